"""Ctrl-C, SIGTERM and kill -9 in the middle of things: the guest is gone, the money settled, the journal closed."""

from __future__ import annotations

import signal
import textwrap
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sandbox.slots import UID_BASE
from tests.command import Airlock, until
from tests.fakes.provider import Hang, Provider, Say

PRICED = ("--price", "mine=1,2")
LOOP = "import os\nos.write(1, b'begun')\nprint(flush=True)\nwhile True: pass"
SUB_CALL = "print(llm_query('What?'))"


def options(provider: Provider) -> list[str]:
    return ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]


def fenced(code: str) -> Say:
    return Say(f"```repl\n{code}\n```")


def charged(airlock: Airlock) -> tuple[Decimal, Decimal]:
    """What the newest query cost, and the sum of what it should have: bounds of unknown outcomes, costs of the rest."""
    records = airlock.records()
    bounds = {r["body"]["call"]: r["body"]["bound_usd"] for r in records if r["type"] == "call.intent"}
    results = [r["body"] for r in records if r["type"] == "call.result"]
    assert {result["call"] for result in results} == set(bounds)
    due = (bounds[r["call"]] if r["outcome"] == "unknown" else r["cost_usd"] for r in results)
    return Decimal(airlock.closing()["cost_usd"]), sum(map(Decimal, due), Decimal(0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "sigterm", "sighup"])
@pytest.mark.parametrize("moment", ["turn", "sub-call", "cell"])
def test_a_query_is_interrupted(airlock: Airlock, number: int, moment: str) -> None:
    turn = {"turn": Hang(), "sub-call": fenced(SUB_CALL), "cell": fenced(LOOP)}[moment]
    with Provider(root=[turn], sub=[Hang()]) as provider:
        with airlock.started("run", "What?", *options(provider), "--json") as query:
            if moment == "cell":
                until(lambda: "cell.started" in types(airlock))
            else:
                provider.wait("root" if moment == "turn" else "sub")
            done = query.interrupt(number)
        provider_saw = len(provider.requests)
    assert done.code == 130, done
    assert done.json["status"] == "cancelled"
    assert done.json["answer"] is None
    assert "Traceback" not in done.err
    assert done.said == "cancelled"
    assert airlock.closing()["status"] == "cancelled"
    cost, due = charged(airlock)
    assert cost == due > 0
    assert provider_saw == len([r for r in airlock.records() if r["type"] == "call.intent"])


def test_nohup_is_respected(airlock: Airlock) -> None:
    airlock.prefix = ["nohup"]
    hung_up = threading.Event()
    answer = Say(lambda _seen: "FINAL(42)" if hung_up.wait(20) else "nobody hung up")
    with Provider(root=[answer]) as provider, airlock.started("run", "What?", *options(provider)) as query:
        provider.wait("root")
        query.process.send_signal(signal.SIGHUP)
        hung_up.set()
        done = query.end()
    assert (done.code, done.out) == (0, "42\n")


def test_a_large_context_is_interrupted_while_it_is_read(airlock: Airlock) -> None:
    airlock.file("large.jsonl", b'{"line": "of many"}\n' * 10_000_000)
    file = airlock.file("cell.py", "pass")
    with airlock.started("exec", file, "--context", "large.jsonl") as query:
        until(lambda: list(airlock.home.glob("contexts/drafts/*")))
        before = set(airlock.home.glob("contexts/data/*"))
        done = query.interrupt()
    assert (done.code, done.out) == (130, "")
    assert set(airlock.home.glob("contexts/data/*")) == before  # it was not read to its end


def types(airlock: Airlock) -> list[str]:
    found = airlock.rows("SELECT id FROM queries")
    return [record["type"] for record in airlock.records(found[-1][0])] if found else []


@pytest.mark.parametrize("moment", ["sub-call", "cell"])
def test_a_cell_of_exec_is_interrupted(airlock: Airlock, moment: str) -> None:
    file = airlock.file("cell.py", SUB_CALL if moment == "sub-call" else LOOP)
    with Provider(sub=[Hang()]) as provider, airlock.started("exec", file, *options(provider)) as query:
        if moment == "sub-call":
            provider.wait("sub")
        else:
            assert query.line() == "begun\n"
        done = query.interrupt()
    assert done.code == 130, done
    assert "Traceback" not in done.err
    assert airlock.closing()["status"] == "cancelled"


def test_a_person_who_presses_ctrl_c_again_and_again(airlock: Airlock) -> None:
    with Provider(root=[Hang()]) as provider, airlock.started("run", "What?", *options(provider)) as query:
        provider.wait("root")

        def ended() -> bool:
            query.process.send_signal(signal.SIGINT)
            return query.process.poll() is not None

        until(ended)
        done = query.end()
    assert done.code == 130, done
    assert "Traceback" not in done.err
    assert airlock.closing()["status"] == "cancelled"


def test_it_is_interrupted_while_it_waits_for_its_context(airlock: Airlock) -> None:
    script = airlock.file("script.yaml", "root: ['FINAL(42)']")
    with airlock.started("run", "What?", "--context", "-", "--model", f"scripted:{script}") as query:
        assert query.process.stdin is not None
        query.process.stdin.write(b"some text and then nothing for a long time")
        query.process.stdin.flush()
        until(lambda: list(airlock.home.glob("contexts/drafts/*")))
        query.process.send_signal(signal.SIGINT)
        assert query.process.wait(timeout=20) == 130
        done = query.end()
    assert "Traceback" not in done.err
    assert done.said == "interrupted before the query began"
    airlock("exec", airlock.file("cell.py", "pass"), "--context", "context.txt", code=0)  # clears the draft


@pytest.mark.alone
@pytest.mark.parametrize("moment", ["turn", "sub-call", "cell"])
def test_the_orchestrator_is_killed(airlock: Airlock, moment: str) -> None:
    turn = {"turn": Hang(), "sub-call": fenced(SUB_CALL), "cell": fenced(LOOP)}[moment]
    with Provider(root=[turn], sub=[Hang()]) as provider:
        with airlock.started("run", "What?", *options(provider)) as query:
            if moment == "cell":
                until(lambda: "cell.started" in types(airlock))
            else:
                provider.wait("root" if moment == "turn" else "sub")
            (slot,) = airlock.home.glob("slots/slot-*")
            slot_number = int(slot.name.removeprefix("slot-"))
            uid = UID_BASE + slot_number
            assert processes(uid)
            query.process.kill()
            query.process.wait()
        # The guest dies with it, whether or not anybody ever starts Airlock again.
        until(lambda: not processes(uid), 5.0)
    assert airlock.rows("SELECT count(*) FROM reservations WHERE state='open'") == [(2 if moment != "cell" else 1,)]
    # The next start, here of another query, settles what was held; the query can be resumed.
    script = airlock.file("script.yaml", "root: ['FINAL(42)']")
    airlock("run", "What?", "--context", "context.txt", "--model", f"scripted:{script}", code=0)
    killed = airlock.rows("SELECT id, status FROM queries ORDER BY opened_at LIMIT 1")
    assert killed[0][1] == "interrupted"
    records = airlock.records(killed[0][0])
    assert records[-1]["body"]["why"].startswith("orchestrator-died: ")
    bounds = [Decimal(r["body"]["bound_usd"]) for r in records if r["type"] == "call.intent"]
    costs = [Decimal(r["body"]["cost_usd"]) for r in records if r["type"] == "call.result"]
    assert len(bounds) == len(costs)
    if moment != "cell":
        assert costs[-1] == bounds[-1] > 0  # unknown, so charged in full
    shown = airlock("audit", "show", killed[0][0], code=0)
    assert "orchestrator-died" in shown.out
    assert shown.out.rstrip().endswith("the chain is whole")


@pytest.mark.alone
def test_the_orchestrator_is_killed_while_a_child_query_runs(airlock: Airlock) -> None:
    """Nothing that any node of the tree held stays held, its last word's money included."""
    with Provider(root=[fenced("rlm_query('deeper?', 'a text of its own')"), Hang()]) as provider:
        deep = ("--policy", "development", "--depth", 2)
        with airlock.started("run", "What?", *options(provider), *deep) as query:
            provider.wait("root", 2)
            users = [UID_BASE + int(slot.name.removeprefix("slot-")) for slot in airlock.home.glob("slots/slot-*")]
            assert len(users) == 2
            query.process.kill()
            query.process.wait()
        until(lambda: not any(map(processes, users)), 5.0)
    # The last words of both, and the call that hangs.
    assert airlock.rows("SELECT count(*) FROM reservations WHERE state='open'") == [(3,)]
    script = airlock.file("script.yaml", "root: ['FINAL(42)']")
    airlock("run", "What?", "--context", "context.txt", "--model", f"scripted:{script}", code=0)
    assert airlock.rows("SELECT count(*) FROM reservations WHERE state='open'") == [(0,)]
    assert airlock.rows("SELECT count(*) FROM scopes WHERE held != 0 OR tokens_held != 0 OR in_flight != 0") == [(0,)]
    records = airlock.records(first(airlock))
    assert [record["node"] for record in records if record["type"] == "node.opened"] == ["root.1"]
    lost = records[-2]
    assert (lost["type"], lost["node"], lost["body"]["outcome"]) == ("call.result", "root.1", "unknown")
    costs = [Decimal(record["body"]["cost_usd"]) for record in records if record["type"] == "call.result"]
    assert sum(costs) > costs[-1] > 0
    assert airlock("audit", "show", first(airlock), code=0).out.rstrip().endswith("the chain is whole")


def processes(uid: int) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"\nUid:\t{uid}\t" in text and "\nState:\tZ" not in text:
            found.append(text.split("\n", 1)[0])
    return found


def test_a_command_that_reads_settles_nothing_and_needs_nothing(airlock: Airlock) -> None:
    """`audit show` of a killed query, before anything else is started: it says that the query is not closed."""
    with Provider(root=[Hang()]) as provider, airlock.started("run", "What?", *options(provider)) as query:
        provider.wait("root")
        query.process.kill()
        query.process.wait()
    shown = airlock("audit", "show", code=0)
    assert "What?" in shown.out
    assert "closed:" not in shown.out
    airlock("exec", airlock.file("cell.py", "pass"), "--context", "context.txt", code=0)
    assert "interrupted: orchestrator-died" in airlock("audit", "show", first(airlock), code=0).out


def first(airlock: Airlock) -> str:
    return str(airlock.rows("SELECT id FROM queries ORDER BY opened_at LIMIT 1")[0][0])


def test_two_runs_at_once_on_one_data_folder(airlock: Airlock) -> None:
    code = """
        import time
        print(llm_query("meet"), context[:3])
        FINAL_VAR("context")
    """

    def meet(_seen: Any) -> str:
        provider.wait("sub", 3)  # nobody is answered before all three are under way
        return "met"

    with Provider(sub=[Say(meet)]) as provider:
        file = airlock.file("cell.py", textwrap.dedent(code))
        started = [airlock.started("exec", file, *options(provider)) for _ in range(3)]
        with started[0] as one, started[1] as two, started[2] as three:
            ends = [query.end() for query in (one, two, three)]
    assert [(end.code, end.out.splitlines()[0]) for end in ends] == [(0, "met one")] * 3, ends
    assert airlock.rows("SELECT count(*), count(DISTINCT owner) FROM queries WHERE status='answered'") == [(3, 3)]


def test_two_first_runs_at_once_make_the_data_folder(airlock: Airlock) -> None:
    airlock.home = airlock.folder / "fresh"
    file = airlock.file("cell.py", "print(len(context))")
    started = [airlock.started("exec", file, "--context", "context.txt") for _ in range(3)]
    with started[0] as one, started[1] as two, started[2] as three:
        ends = [query.end() for query in (one, two, three)]
    assert [(end.code, end.out) for end in ends] == [(0, "33\n")] * 3, ends


def test_a_tenant_has_so_many_queries_at_once_and_no_more(airlock: Airlock) -> None:
    policy = airlock.policy(tenant_queries_at_once="1")
    with Provider(root=[Hang()]) as provider:
        more = [*options(provider), "--policy", policy]
        with airlock.started("run", "What?", *more) as query:
            provider.wait("root")
            refused = airlock("run", "What?", *more, code=3)
            assert query.interrupt().code == 130
    assert "1 queries of this tenant are running already" in refused.said
    # Nor does one that was killed count for ever.
    with Provider(root=[Hang(), Say("FINAL(42)")]) as provider:
        with airlock.started("run", "What?", *options(provider), "--policy", policy) as query:
            provider.wait("root")
            query.process.kill()
            query.process.wait()
        assert airlock("run", "What?", *options(provider), "--policy", policy, code=0).out == "42\n"


def test_the_reader_of_the_answer_has_gone(airlock: Airlock) -> None:
    file = airlock.file("cell.py", "while True: print('x' * 1000)")
    with airlock.started("exec", file, "--context", "context.txt") as query:
        query.line()
        assert query.process.stdout is not None
        query.process.stdout.close()
        code = query.process.wait(timeout=30)
    assert code in (1, 130)
