"""`airlock run --resume` and `airlock audit replay`, as a person uses them, on real sandboxes and a real server."""

from __future__ import annotations

import signal
import textwrap
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import anyio
import pytest

from orchestrator.auditing import past_of
from orchestrator.choices import Choices
from orchestrator.core.context import Context
from orchestrator.core.errors import RequestError
from orchestrator.store.db import Database
from orchestrator.store.schema import scopes
from orchestrator.wiring import Platform, open_platform
from tests.command import Airlock, Done, until
from tests.fakes.provider import Behaviour, Fail, Hang, Provider, Say

USED = (100, 50)
AS_IT_HAD = ", with --base-url and --api-key-env as it had them"
DEEP = ("--policy", "development", "--depth", 2)


def cell(code: str) -> Say:
    return Say(f"```repl\n{textwrap.dedent(code)}\n```", usage=USED)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


class Query:
    """One that is killed as soon as the provider has as many requests as it says."""

    def __init__(self, airlock: Airlock, provider: Provider) -> None:
        self.airlock, self.provider = airlock, provider
        self.id = ""

    def options(self) -> tuple[object, ...]:
        return "--base-url", self.provider.url, "--price", "m=1,2"

    def run(self, *more: object, root: list[Behaviour], sub: list[Behaviour] | None = None, code: int = 0) -> Done:
        self.provider.behaviours = {"root": root, "sub": sub or []}
        given = ("--context", "context.txt", "--model", "m", *self.options(), *more)
        done = self.airlock("run", "What?", *given, code=code)
        self.find()
        return done

    def killed(
        self, *more: object, root: list[Behaviour], sub: list[Behaviour] | None = None, turns: int = 0, calls: int = 0
    ) -> None:
        """After so many root turns, or sub-calls, were asked."""
        self.provider.requests.clear()
        self.provider.behaviours = {"root": root, "sub": sub or []}
        given = ("--context", "context.txt", "--model", "m", *self.options(), *more)
        with self.airlock.started("run", "What?", *given) as running:
            self.provider.wait("sub" if calls else "root", calls or turns)
            running.process.kill()
            running.process.wait()
        self.find()
        self.provider.requests.clear()

    def find(self) -> None:
        newest = "SELECT id FROM queries ORDER BY opened_at DESC, rowid DESC LIMIT 1"
        self.id = str(self.airlock.rows(newest)[0][0])

    def resume(self, *more: object, root: list[Behaviour], sub: list[Behaviour] | None = None, code: int = 0) -> Done:
        self.provider.behaviours = {"root": root, "sub": sub or []}
        return self.airlock("run", "--resume", self.id, *self.options(), *more, code=code)

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record["body"] for record in self.airlock.records(self.id) if record["type"] == kind]


@pytest.fixture
def query(airlock: Airlock, provider: Provider) -> Query:
    return Query(airlock, provider)


# Replay


def test_a_replay_of_what_does_not_change(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [
        cell("""
            answers = llm_query_batched(["a", "b", "a"])
            print(answers, budget()["usd_limit"], len(context))
            try:
                llm_query("x", model="unknown")
            except NotPermitted as error:
                print(type(error).__name__, error, error.limit)
            below = rlm_query("deep?", ["one", "two"])
        """),
        cell("print(context)"),  # the child's first
        Say("FINAL_VAR(context)", usage=USED),
        cell("print(below); raise ValueError(len(answers))"),
        Say("FINAL(42)", usage=USED),
    ]
    assert query.run(*DEEP, root=root, sub=[Say("first"), Say("second"), Say("third")]).out == "42\n"
    before = airlock.rows("SELECT count(*) FROM records"), airlock.rows("SELECT * FROM scopes")
    asked = len(query.provider.requests)
    done = airlock("audit", "replay", code=0)
    assert done.out.splitlines() == [
        "root cell 1: same",
        "root cell 2: same",
        "root.1 cell 1: same",
        "root.1 cell 2: same",
        f"query {query.id}, 4 cells again in bubblewrap (namespace): 4 the same, 0 different",
    ]
    assert done.err == ""
    assert before == (airlock.rows("SELECT count(*) FROM records"), airlock.rows("SELECT * FROM scopes"))
    assert len(query.provider.requests) == asked
    report = airlock("audit", "replay", query.id, "--json", "--backend", "bubblewrap", code=0).json
    assert (report["same"], report["notes"], len(report["cells"])) == (True, [], 4)
    assert report["cells"][0] == {"node": "root", "cell": 1, "verdict": "same", "why": "", "diff": []}


def test_a_replay_shows_what_changes(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [cell("import time\nprint('same')\nprint(time.time_ns())\n"), Say("FINAL(42)", usage=USED)]
    query.run(root=root)
    lines = airlock("audit", "replay", code=1).out.splitlines()
    assert lines[0] == "root cell 1: different: another stdout"
    assert lines[1:5] == ["    --- recorded stdout", "    +++ replayed stdout", "    @@ -1,2 +1,2 @@", "     same"]
    assert lines[5].startswith("    -")
    assert lines[6].startswith("    +")
    assert lines[7].endswith("0 the same, 1 different")


def test_a_replay_in_which_a_cell_asks_for_something_else(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [
        cell("import time\nprint(llm_query(str(time.time_ns())))"),
        cell("print('never run')"),
        Say("FINAL(42)", usage=USED),
    ]
    query.run(root=root, sub=[Say("an answer")])
    lines = airlock("audit", "replay", code=1).out.splitlines()
    assert lines[0].startswith("root cell 1: different: the REPL cannot be rebuilt: cell 1 of root asks for what the")
    assert "llm_query('" in lines[0]
    assert lines[1] == "root cell 2: not compared: the cells before it could not be run as they were"


def test_a_cell_that_was_ended_is_run_and_not_compared(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(time_cell="1 s")
    root: list[Behaviour] = [
        cell("x = 1\nprint('begun', flush=True)\nwhile True: pass"),
        cell("print(x)"),
        Say("FINAL(42)", usage=USED),
    ]
    query.run("--policy", policy, root=root)
    lines = airlock("audit", "replay", code=0).out.splitlines()
    assert lines[0] == "root cell 1: not compared: it ended with timeout (interrupted by its time limit)"
    assert lines[1:] == [
        "root cell 2: same",
        f"query {query.id}, 2 cells again in bubblewrap (namespace): 1 the same, 0 different, 1 not compared",
    ]


def test_a_batch_that_was_ended_while_calls_waited_for_their_turn(airlock: Airlock, query: Query) -> None:
    """These have left no word of themselves on record."""
    policy = airlock.policy(time_cell="2 s", counts_in_flight="2")
    root: list[Behaviour] = [cell("llm_query_batched([f'p{n}' for n in range(10)])"), cell("x = 'on'"), Hang()]
    query.killed("--policy", policy, root=root, sub=[Say("1"), Say("2"), Hang()], turns=3)
    assert len([body for body in query.records("call.intent") if body["role"] == "sub"]) < 10
    assert query.records("cell.ended")[0]["status"] == "timeout"
    done = airlock("audit", "replay", query.id, code=0)
    assert done.out.splitlines()[0].startswith("root cell 1: not compared: it ended with timeout")
    assert query.resume(root=[Say("FINAL_VAR(x)", usage=USED)]).out == "on\n"
    assert [body["status"] for body in query.records("cell.replayed")] == ["timeout", "ok"]


def test_a_replay_that_cannot_be_made(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [cell("print(1)"), Say("FINAL(42)", usage=USED)]
    query.run("--policy", airlock.policy(audit_payloads="hash"), root=root)
    said = airlock("audit", "replay", code=4).said
    assert said == f"the policy of query {query.id} keeps no payloads (audit.payloads: hash)"
    query.provider.requests.clear()
    query.run(root=root)
    for data in airlock.home.glob("contexts/data/*"):
        data.write_bytes(b"another one")
    said = airlock("audit", "replay", code=4).said
    assert said == "the context of root is not what it was: its hash is another one"
    for manifest in airlock.home.glob("contexts/manifests/*"):
        manifest.unlink()
    assert airlock("audit", "replay", code=4).said.startswith("the context of root is gone: no context ")
    seq = [record["type"] for record in airlock.records(query.id)].index("cell.started")
    airlock("audit", "erase", query.id, "--record", seq, "--payload", "code", code=0)
    said = airlock("audit", "replay", code=4).said
    assert said == f"query {query.id} takes a payload that is not kept any more: record {seq}, code"
    assert airlock("audit", "replay", "nothing", code=2).said == "there is no query 'nothing' in the journal"


def test_hostile_output_reaches_nothing_but_a_file_unescaped(airlock: Airlock, query: Query) -> None:
    """A line of a diff is one line, and says whose it is."""
    code = "import time\nprint(f'{time.time_ns()}\\rroot cell 1: same\\x0broot cell 1: same')"
    query.run(root=[cell(code), Say("FINAL(42)", usage=USED)])
    lines = airlock("audit", "replay", code=1).out.splitlines()
    assert [line for line in lines if line.startswith("root")] == ["root cell 1: different: another stdout"]


def test_what_had_secrets_in_it_is_named_by_a_replay_and_not_resumed_from(airlock: Airlock, query: Query) -> None:
    token = "ghp_" + "aB3dE5gH1jK7mN9pQ2sT4vW6xY8zA0cF1eG2"
    root: list[Behaviour] = [cell(f"print('{token}')"), Say("FINAL(42)", usage=USED)]
    query.run(root=root)
    lines = airlock("audit", "replay", code=0).out.splitlines()
    noted = [line for line in lines if line.endswith(": secrets were taken out, so what follows from it may differ")]
    kinds = [line.split(", ")[1].partition(":")[0] for line in noted]
    assert kinds == ["completion", "code", "stdout"]
    query.killed(root=[cell(f"print('{token}')"), Hang()], turns=2)
    said = query.resume(root=[], code=4).said
    assert said.startswith(f"query {query.id} takes a payload that had secrets taken out: record ")
    query.run(root=[Say("FINAL(42)", usage=USED)])  # which clears up after the one that was killed


# Resume


def test_a_query_goes_on_where_its_process_died(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [
        cell("import sys\nprint('to err', file=sys.stderr, flush=True)\nx = llm_query('one')\nprint(x)"),
        cell("y = llm_query('two')\nprint(x + y)"),
        Hang(),
    ]
    query.killed(root=root, sub=[Say("first"), Say("second")], turns=3)
    assert query.records("query.opened")[0]["payloads"] == "keep"
    done = query.resume(root=[Say("FINAL_VAR(y)", usage=USED)])
    assert done.out == "second\n"
    assert "resumed in bubblewrap (namespace): 2 cells and 4 answers are on record" in done.err
    assert "cell 2 was run again: ok, as before" in done.err
    assert len(query.provider.requests) == 1
    # The one that hung is charged in full; the conversation is what it was.
    told = [message["content"] for message in query.provider.requests[0].body["messages"]]
    assert told[-1] == "Output of cell 2:\nfirstsecond\n[new variables: y]"
    assert told[3].startswith("Output of cell 1:\nto err\nfirst")
    results = query.records("call.result")
    assert [result["outcome"] for result in results] == ["answered"] * 4 + ["unknown", "answered"]
    closing = airlock.closing()
    assert (closing["turns"], closing["sub_calls"]) == (3, 2)
    assert Decimal(closing["cost_usd"]) == sum(Decimal(result["cost_usd"]) for result in results)
    assert query.records("cell.replayed") == [
        {"cell": number, "status": "ok", "same": True, "differs": []} for number in (1, 2)
    ]
    report = airlock("audit", "replay", code=0)
    assert report.out.endswith("3 the same, 0 different\n")


def test_a_cell_that_was_under_way_asks_for_the_rest_only(airlock: Airlock, query: Query) -> None:
    asks = """
        out = []
        for name in ("one", "two", "three"):
            out.append(llm_query(name))
        print(out)
        FINAL("-".join(out))
    """
    query.killed(root=[cell(asks)], sub=[Say("1"), Say("2"), Hang()], calls=3)
    done = query.resume(root=[], sub=[Say("3")])
    assert done.out == "1-2-3\n"
    assert [seen.text for seen in query.provider.requests] == ["three"]
    started = [body["cell"] for body in query.records("cell.started")]
    assert (started, query.records("cell.replayed")) == ([1], [])
    assert [body["sub_call"] for body in query.records("call.intent") if body["role"] == "sub"] == [1, 2, 3, 4]


def test_a_child_query_goes_on_and_one_that_ended_is_not_run(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [
        cell(
            "first = rlm_query('first?', 'its text')\nsecond = rlm_query('second?', ['a', 'b'])\nFINAL(first + second)"
        ),
        Say("FINAL(one)", usage=USED),
        cell("item = llm_query(context[1])"),
        Hang(),
    ]
    query.killed(*DEEP, root=root, sub=[Say("two")], turns=4)
    done = query.resume(root=[Say("FINAL_VAR(item)", usage=USED)])
    assert done.out == "onetwo\n"
    assert len(query.provider.requests) == 1
    records = airlock.records(query.id)
    at = [record["type"] for record in records].index("query.resumed")
    assert [record["node"] for record in records if record["type"] == "node.opened"] == ["root.1", "root.2"]
    assert [record["node"] for record in records[at:] if record["type"] == "sandbox.started"] == ["root", "root.2"]
    assert [record["node"] for record in records[at:] if record["type"] == "cell.replayed"] == ["root.2"]
    assert len(airlock.rows("SELECT id FROM scopes WHERE id LIKE 'node:%'")) == 2


def test_a_child_query_that_is_not_asked_for_again_is_closed(airlock: Airlock, query: Query) -> None:
    """The cell was under way, so it may take another course."""
    code = """
        import time
        try:
            FINAL(rlm_query(f"deep at {time.time_ns()}?"))
        except SubCallError as error:
            FINAL(error.kind)
    """
    query.killed(*DEEP, root=[cell(code), Hang()], turns=2)
    assert query.resume(root=[Say("FINAL(again)", usage=USED)]).out == "again\n"
    nodes = [(r["node"], r["body"]["status"]) for r in airlock.records(query.id) if r["type"] == "node.closed"]
    assert nodes == [("root.2", "answered"), ("root.1", "cancelled")]


def test_what_comes_out_otherwise_is_recorded_and_what_ends_otherwise_ends_it(airlock: Airlock, query: Query) -> None:
    query.killed(root=[cell("import time\nx = time.time_ns()\nprint(x)"), Hang()], turns=2)
    done = query.resume(root=[Say("FINAL(42)", usage=USED)])
    assert done.out == "42\n"
    assert query.records("cell.replayed") == [{"cell": 1, "status": "ok", "same": False, "differs": ["stdout"]}]

    then = time.time() + 4
    query.killed(root=[cell(f"import time\nassert time.time() < {then}"), Hang()], turns=2)
    until(lambda: time.time() > then)
    done = query.resume(root=[Say("FINAL(42)", usage=USED)], code=4)
    assert done.said.startswith("failed: not-rebuilt: the REPL cannot be rebuilt: cell 1 of root was ok, and is error")
    assert query.provider.requests == []
    assert airlock.closing()["status"] == "failed"

    query.killed(root=[cell("import time\nprint(llm_query(str(time.time_ns())))"), Hang()], sub=[Say("x")], turns=2)
    done = query.resume(root=[Say("FINAL(42)", usage=USED)], code=4)
    assert "cell 1 of root asks for what the journal has not: llm_query('1" in done.said


def test_limits_hold_across_an_interruption(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(counts_sub_calls="3", counts_iterations="3", time_query="30 s")
    root: list[Behaviour] = [cell("print(llm_query('one'))"), cell("print(llm_query('two'))"), Hang()]
    query.killed("--policy", policy, root=root, sub=[Say("1"), Say("2")], turns=3)
    asks = """
        print(llm_query('three'))
        try:
            llm_query('four')
        except CountExceeded as error:
            print(error)
    """
    done = query.resume(root=[cell(asks), Say("FINAL(last)", usage=USED)], sub=[Say("3")], code=3)
    assert done.out == "last\n"
    assert done.said == "limit: count-exceeded: all 3 turns are used"
    assert [seen.text for seen in query.provider.of("sub")] == ["three"]
    assert query.records("call.refused")[0]["detail"] == "the query's 3 sub-calls are used up"
    asides = airlock.rows("SELECT id, state FROM reservations WHERE id LIKE '%last-word%' ORDER BY id")
    assert asides == [(f"{query.id}:root:last-word", "void"), (f"{query.id}:root:last-word:1", "void")]


def test_without_money_or_room_it_waits(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(tenant_queries_at_once="1")
    query.killed("--policy", policy, root=[cell("print(1)"), Hang()], turns=2)

    def spend(nano_usd: int) -> None:  # by others
        db = Database(airlock.home)
        day = scopes.update().where(scopes.c.id.startswith("tenant-day:")).values(spent=scopes.c.spent + nano_usd)
        db.write_sync(lambda tx: tx.execute(day))
        db.close()

    all_of_it = 20 * 10**9
    spend(all_of_it)
    said = query.resume(root=[], code=3).said
    assert said == "0.00 USD are left, which do not pay for the last words: resume it later"
    spend(-all_of_it)
    other = query.id
    query.provider.behaviours = {"root": [Hang()], "sub": []}
    given = ("--context", "context.txt", "--model", "m", *query.options(), "--policy", policy)
    with airlock.started("run", "What?", *given) as running:
        query.provider.wait("root")
        assert query.resume(root=[], code=3).said.startswith("1 queries of this tenant are running already")
        assert running.interrupt().code == 130
    assert airlock.rows("SELECT status FROM queries WHERE id=?", other) == [("interrupted",)]
    assert query.resume(root=[Say("FINAL(42)", usage=USED)]).out == "42\n"


def test_without_money_for_every_last_word_it_waits(airlock: Airlock, query: Query) -> None:
    """That of a child query under way is not set aside any more either, and others may have spent the rest."""
    root = [cell("FINAL(rlm_query('deep?', 'its text'))"), Hang()]
    query.killed(*DEEP, root=root, turns=2)
    airlock("exec", airlock.file("nothing.py", "1"), code=0)  # which interrupts it
    (word, _) = [int(Decimal(body["usd"]) * 10**9) for body in query.records("budget.held")]
    day, spent = airlock.rows("SELECT id, spent FROM scopes WHERE id LIKE 'tenant-day:%'")[0]
    most = int(past_of(airlock.home, query.id).rules.money.tenant_day)

    def set_spent(nano_usd: int) -> None:  # by others
        db = Database(airlock.home)
        db.write_sync(lambda tx: tx.execute(scopes.update().where(scopes.c.id == day).values(spent=nano_usd)))
        db.close()

    set_spent(most - word * 3 // 2)
    said = query.resume(root=[], code=3).said
    assert said.endswith(" USD are left, which do not pay for the last words: resume it later")
    assert query.records("query.resumed") == []
    set_spent(spent)
    assert query.resume(root=[Say("FINAL(42)", usage=USED)]).out == "42\n"


def test_a_past_that_is_out_of_date_is_not_gone_on_with(
    airlock: Airlock, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by one; then another went on with it and died; it is interrupted as before, and has more records."""
    query.killed(root=[cell("print(1)"), Hang()], turns=2)
    choices = Choices(base_url=query.provider.url, prices={"m": (Decimal(1), Decimal(2))}, pool=0)

    def meanwhile(platform: Platform) -> None:
        verify = platform.contexts.verify

        def after_another(context: Context) -> bool:
            query.provider.behaviours = {"root": [cell("x = llm_query('dear')"), Hang()], "sub": [Say("1")]}
            with airlock.started("run", "--resume", query.id, *query.options()) as running:
                query.provider.wait("root", 2)
                running.process.kill()
                running.process.wait()
            airlock("exec", airlock.file("nothing.py", "1"), code=0)  # which interrupts it
            query.provider.requests.clear()
            return verify(context)

        monkeypatch.setattr(platform.contexts, "verify", after_another)

    async def resume() -> None:
        async with open_platform(choices, airlock.home) as platform:
            meanwhile(platform)
            with pytest.raises(RequestError, match="is not interrupted any more"):
                await platform.resume(query.id)

    anyio.run(resume)
    assert query.provider.requests == []
    assert len(query.records("query.resumed")) == 1
    assert query.resume(root=[Say("FINAL_VAR(x)", usage=USED)]).out == "1\n"


def test_a_child_query_does_not_go_on_with_another_context(airlock: Airlock, query: Query) -> None:
    query.killed(*DEEP, root=[cell("FINAL(rlm_query('deep?', 'its text'))"), Hang()], turns=2)
    (data,) = (path for path in airlock.home.glob("contexts/data/*") if path.read_bytes() == b"its text")
    data.write_bytes(b"not this")
    said = query.resume(root=[Say("FINAL_VAR(context)", usage=USED)], code=4).said
    assert "the context of root.1 is not what it was: its hash is another one" in said
    assert query.provider.requests == []


def test_an_answer_of_a_fallback_is_not_asked_for_again(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(models_dedupe="true", models_fallbacks="[f]", counts_retries="0")
    same = cell("x = llm_query('same')")
    query.killed("--policy", policy, "--price", "f=1,2", root=[same, Hang()], sub=[Fail(503), Say("dear")], turns=2)
    done = query.resume("--price", "f=1,2", root=[cell("x = llm_query('same')"), Say("FINAL_VAR(x)", usage=USED)])
    assert done.out == "dear\n"
    assert query.provider.of("sub") == []


def test_a_query_does_not_go_on_at_another_server(airlock: Airlock, query: Query) -> None:
    """What it was told would be sent to whoever is there: without the option, to OpenAI, if there is a key for that."""
    query.provider.requests.clear()
    query.provider.behaviours = {"root": [cell("x = 1"), Hang()], "sub": []}
    url = query.provider.url.replace("://", "://me:hunter2-secret@")
    given = ("--context", "context.txt", "--model", "gpt-4o-mini", "--base-url", url)
    with airlock.started("run", "What?", *given) as running:
        query.provider.wait("root", 2)
        running.process.kill()
        running.process.wait()
    query.find()
    query.provider.requests.clear()
    airlock.env["OPENAI_API_KEY"] = "sk-test-0123456789"
    airlock.env["HTTPS_PROXY"] = "http://127.0.0.1:9"  # nothing leaves this machine
    says = f"query {query.id} ran with another --base-url for gpt-4o-mini: give it again"
    assert airlock("run", "--resume", query.id, code=2).said == says
    assert airlock("run", "--resume", query.id, "--base-url", url.replace("/v1", "/v2"), code=2).said == says
    assert query.records("query.resumed") == query.provider.requests == []
    query.provider.behaviours = {"root": [Say("FINAL(42)", usage=USED)], "sub": []}
    other = url.replace("hunter2-secret", "another-password")  # whoever asks, it is the same server
    assert airlock("run", "--resume", query.id, "--base-url", f"{other}/", code=0).out == "42\n"


def test_a_cell_of_which_too_little_is_on_record_is_not_run_again(airlock: Airlock, query: Query) -> None:
    """And the query stays as it is. A cell under way asks for the rest."""
    budgets = "n = sum('usd_left' in budget() for _ in range(101))"
    query.killed(root=[cell(budgets), Hang()], turns=2)
    said = query.resume(root=[], code=4).said
    assert said.startswith("cell 1 of root cannot be run again as it was: 100 refusals and 100 budgets told are all")
    assert airlock.rows("SELECT status FROM queries")[0] == ("open",)  # and nobody's: not even looked at
    query.killed(root=[cell(f"{budgets}\nx = llm_query('p')"), Hang()], sub=[Hang()], calls=1)
    assert query.resume(root=[Say("FINAL_VAR(n)", usage=USED)], sub=[Say("1")]).out == "101\n"


def test_a_limit_that_was_hit_is_not_hit_twice(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(counts_iterations="1")
    query.killed("--policy", policy, root=[cell("print(1)"), Hang()], turns=2)
    assert query.resume(root=[Say("FINAL(last)", usage=USED)], code=3).out == "last\n"
    assert len(query.records("limit.hit")) == 1
    assert [body["last"] for body in query.records("call.intent")] == [False, True, True]


def test_the_time_that_it_ran_counts(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(time_query="6 s")
    root: list[Behaviour] = [cell("import time\ntime.sleep(3.5)"), Hang()]  # twice it is more than there is
    query.killed("--policy", policy, root=root, turns=2)
    done = query.resume(root=[Say("FINAL(too late)", usage=USED)], code=3)
    assert done.said.startswith("limit: time-exceeded: the query's ")
    assert query.provider.requests == []


def test_a_schema_holds_as_well(airlock: Airlock, query: Query) -> None:
    schema = airlock.file("schema.json", '{"type": "integer"}')
    query.killed("--answer-schema", schema, root=[cell("print(1)"), Hang()], turns=2)
    schema.unlink()
    done = query.resume(root=[Say("FINAL(none)", usage=USED), Say("FINAL(7)", usage=USED)])
    assert done.out == "7\n"
    assert "it has to be JSON alone" in query.provider.requests[1].text


def test_a_cell_alone_goes_on(airlock: Airlock, query: Query, provider: Provider) -> None:
    provider.behaviours = {"root": [], "sub": [Say("1"), Hang()]}
    file = airlock.file("cell.py", "print(llm_query('a'))\nprint(llm_query('b'))\nFINAL('done')")
    given = ("--context", "context.txt", "--model", "m", *query.options())
    with airlock.started("exec", file, *given) as running:
        provider.wait("sub", 2)
        running.process.kill()
        running.process.wait()
    query.find()
    file.unlink()
    provider.requests.clear()
    assert query.resume(root=[], sub=[Say("2")]).out == "1\n2\ndone\n"
    assert [seen.text for seen in provider.requests] == ["b"]


def test_who_is_told_of_a_query_that_was_interrupted(airlock: Airlock, query: Query) -> None:
    query.killed(root=[Hang()], turns=1)
    interrupted = query.id
    done = query.run(root=[Say("FINAL(42)", usage=USED)])
    assert done.lines[0] == (
        f"query {interrupted} was interrupted when its process died: airlock run --resume {interrupted}{AS_IT_HAD}"
    )
    assert "interrupted" not in query.run(root=[Say("FINAL(42)", usage=USED)]).err
    query.id = interrupted
    assert query.resume(root=[Say("FINAL(43)", usage=USED)]).out == "43\n"


def test_what_cannot_be_resumed(airlock: Airlock, query: Query) -> None:
    query.run(root=[Say("FINAL(42)", usage=USED)])
    said = query.resume(root=[], code=2).said
    assert said == f"query {query.id} is closed (answered): there is nothing to resume"
    query.id = "nothing"
    assert query.resume(root=[], code=2).said == "there is no query 'nothing' in the journal"
    query.provider.behaviours = {"root": [Hang()], "sub": []}
    query.provider.requests.clear()
    given = ("--context", "context.txt", "--model", "m", *query.options())
    with airlock.started("run", "What?", *given) as running:
        query.provider.wait("root")
        query.find()
        assert query.resume(root=[], code=2).said == f"query {query.id} is running: the process that runs it lives"
        assert running.interrupt().code == 130
    query.provider.requests.clear()
    query.killed("--policy", airlock.policy(audit_payloads="hash"), root=[Hang()], turns=1)
    assert query.resume(root=[], code=4).said.endswith("keeps no payloads (audit.payloads: hash)")
    query.run(root=[Say("FINAL(42)", usage=USED)])
    assert airlock.rows("SELECT status FROM queries ORDER BY rowid")[-2:] == [("failed",), ("answered",)]


def test_a_query_of_another_tenant_is_not_there(airlock: Airlock, query: Query) -> None:
    query.killed(root=[Hang()], turns=1)
    query.run(root=[Say("FINAL(42)", usage=USED)])  # which clears up after the one that was killed
    for tenant in ("other", "default"):
        db = Database(airlock.home)
        db.write_sync(lambda tx, tenant=tenant: tx.exec_driver_sql(f"UPDATE queries SET tenant='{tenant}'"))  # noqa: S608
        db.close()
        if tenant == "other":
            assert query.resume(root=[], code=2).said == f"there is no query '{query.id}' in the journal"


def test_two_that_resume_at_once(airlock: Airlock, query: Query) -> None:
    query.killed(root=[cell("print(1)"), Hang()], turns=2)
    query.provider.behaviours = {"root": [Say("FINAL(42)", usage=USED)], "sub": []}
    given = ("run", "--resume", query.id, *query.options())
    with airlock.started(*given) as one, airlock.started(*given) as two:
        ends = sorted((running.end() for running in (one, two)), key=lambda done: done.code)
    assert [done.code for done in ends] == [0, 2], ends
    assert ends[0].out == "42\n"
    assert ends[1].said in (
        f"query {query.id} is not interrupted any more: another process goes on with it",
        f"query {query.id} is running: the process that runs it lives",
        f"query {query.id} is closed (answered): there is nothing to resume",
    )
    assert len(query.records("query.resumed")) == 1


def test_options_that_do_not_go_with_resume(airlock: Airlock, query: Query) -> None:
    query.killed(root=[Hang()], turns=1)
    said = " does not go with --resume: the journal has what the query was asked. See `airlock run --help`."
    for option in (
        ("--context", "context.txt"),
        ("--model", "m"),
        ("--sub-model", "m"),
        ("--policy", "default"),
        ("--budget", "1"),
        ("--timeout", "5"),
        ("--depth", "1"),
        ("--encoding", "utf-8"),
        ("--answer-schema", "schema.json"),
    ):
        assert airlock("run", "--resume", query.id, *option, code=2).said == option[0] + said
    assert airlock("run", "What?", "--resume", query.id, code=2).said == "a question" + said
    assert airlock("run", code=2).said == "Missing argument 'QUESTION'. See `airlock run --help`."
    assert airlock("run", "What?", code=2).said == "Missing option '--context'. See `airlock run --help`."
    assert query.resume(root=[Say("FINAL(42)", usage=USED)]).out == "42\n"  # nothing was changed by all that


def test_a_resumption_that_is_interrupted_in_good_order_is_closed(airlock: Airlock, query: Query) -> None:
    """As soon as it has brought something new."""
    query.killed(root=[cell("print(1)"), Hang()], turns=2)
    query.provider.behaviours = {"root": [cell("print(2)"), Hang()], "sub": []}
    with airlock.started("run", "--resume", query.id, *query.options()) as running:
        query.provider.wait("root", 2)
        assert running.interrupt(signal.SIGTERM).code == 130
    assert airlock.closing()["status"] == "cancelled"
    assert airlock.closing()["turns"] == 3


def goes_on(airlock: Airlock, query: Query, done: Done, code: int, why: str) -> None:
    """It was interrupted again, and comes to its answer without asking for what it had.

    why: as it is told to who runs it; the record, which others read, does not say where the provider is.
    """
    assert (done.code, done.out) == (code, "")
    assert done.said == f"interrupted: {why}; airlock run --resume {query.id}{AS_IT_HAD}"
    assert query.records("query.interrupted")[-1]["why"] == why.replace(query.provider.url, "the provider")
    assert airlock.rows("SELECT status, owner FROM queries WHERE id=?", query.id) == [("interrupted", "")]
    query.provider.requests.clear()
    assert query.resume(root=[Say("FINAL_VAR(x)", usage=USED)]).out == "dear\n"
    assert [seen.role for seen in query.provider.requests] == ["root"]
    closing = airlock.closing()
    assert Decimal(closing["cost_usd"]) == sum(Decimal(body["cost_usd"]) for body in query.records("call.result"))


def dear(query: Query) -> None:
    query.killed(root=[cell("x = llm_query('dear')"), Hang()], sub=[Say("dear")], turns=2)


def test_a_wrong_key_does_not_end_a_query_that_is_resumed(airlock: Airlock, query: Query) -> None:
    dear(query)
    done = query.resume(root=[Fail(401)], code=5)
    why = "refused the API key (401): check the key and what it may use"
    goes_on(airlock, query, done, 5, f"provider-refused: {query.provider.url} {why}")
    assert airlock("audit", "verify", code=0).out


def test_a_provider_that_fails_at_the_last_word_neither(airlock: Airlock, query: Query) -> None:
    policy = airlock.policy(counts_iterations="1", counts_retries="0")
    query.killed("--policy", policy, root=[cell("x = llm_query('dear')"), Hang()], sub=[Say("dear")], turns=2)
    done = query.resume(root=[Fail(500)], code=5)
    assert done.said.startswith("interrupted: provider-busy: ")
    assert query.resume(root=[Say("FINAL_VAR(x)", usage=USED)], code=3).out == "dear\n"


def test_a_backend_that_is_not_to_be_had_neither(airlock: Airlock, query: Query) -> None:
    dear(query)
    airlock.env["DOCKER_HOST"] = "unix:///nowhere/docker.sock"
    done = query.resume("--backend", "docker", root=[], code=4)
    assert done.said.startswith("interrupted: sandbox-unusable: ")
    assert query.resume(root=[Say("FINAL_VAR(x)", usage=USED)]).out == "dear\n"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_whoever_stops_it_while_it_is_rebuilt_can_resume_it(airlock: Airlock, query: Query, sign: int) -> None:
    code = "import time\ntime.sleep(1)\nx = llm_query('dear')"
    query.killed(root=[cell(code), Hang()], sub=[Say("dear")], turns=2)
    with airlock.started("run", "--resume", query.id, *query.options()) as running:
        until(lambda: len(query.records("sandbox.started")) == 2)
        done = running.interrupt(sign)
    assert query.records("cell.replayed") == []
    goes_on(airlock, query, done, 130, "cancelled")


@pytest.mark.parametrize("how", ["refused", "stopped"])
def test_a_child_query_under_way_is_interrupted_with_it(airlock: Airlock, query: Query, how: str) -> None:
    root = [cell("x = rlm_query('deep?', 'its text')\nFINAL(x)"), cell("y = llm_query('dear')"), Hang()]
    query.killed(*DEEP, root=root, sub=[Say("dear")], turns=3)
    if how == "refused":
        done = query.resume(root=[Fail(401)], code=5)
    else:
        query.provider.behaviours = {"root": [Hang()], "sub": []}
        with airlock.started("run", "--resume", query.id, *query.options()) as running:
            query.provider.wait("root")
            done = running.interrupt()
    assert done.said.startswith("interrupted: ")
    assert query.records("node.closed") == []
    query.provider.requests.clear()
    assert query.resume(root=[Say("FINAL_VAR(y)", usage=USED)]).out == "dear\n"
    assert [seen.role for seen in query.provider.requests] == ["root"]
    assert [record["body"]["status"] for record in airlock.records(query.id) if record["type"] == "node.closed"] == [
        "answered"
    ]


def test_a_child_query_that_had_only_begun_is_interrupted_with_it(airlock: Airlock, query: Query) -> None:
    root: list[Behaviour] = [cell("import time\nFINAL(rlm_query(f'deep at {time.time_ns()}?'))"), Hang()]
    query.killed(*DEEP, root=root, turns=2)
    assert query.resume(root=[Fail(401)], code=5).said.startswith("interrupted: provider-refused: ")
    assert query.records("call.refused") == query.records("node.closed") == []
    assert query.resume(root=[Say("FINAL(again)", usage=USED)]).out == "again\n"
    nodes = [(r["node"], r["body"]["status"]) for r in airlock.records(query.id) if r["type"] == "node.closed"]
    assert nodes == [("root.3", "answered"), ("root.1", "cancelled"), ("root.2", "cancelled")]


def test_a_child_query_that_its_cell_gave_up_is_closed_all_the_same(airlock: Airlock, query: Query) -> None:
    """The cell ends at its limit, while the child waits: nothing new had come before."""
    root = [cell("rlm_query('deep?', 'its text')"), Hang()]
    query.killed("--policy", airlock.policy("development", time_cell="2 s"), "--depth", 2, root=root, turns=2)
    done = query.resume(root=[Hang(), Say("FINAL(42)", usage=USED)])
    assert done.out == "42\n"
    records = [(record["node"], record["type"]) for record in airlock.records(query.id)]
    assert records.index(("root.1", "node.closed")) < records.index(("root", "cell.ended"))


def test_a_cell_alone_is_interrupted_again_as_well(airlock: Airlock, query: Query, provider: Provider) -> None:
    provider.behaviours = {"root": [], "sub": [Say("1"), Hang()]}
    file = airlock.file("cell.py", "print(llm_query('a'))\nprint(llm_query('b'))\nFINAL('done')")
    with airlock.started("exec", file, "--model", "m", *query.options()) as running:
        provider.wait("sub", 2)
        running.process.kill()
        running.process.wait()
    query.find()
    provider.requests.clear()
    provider.behaviours = {"root": [], "sub": [Hang()]}
    with airlock.started("run", "--resume", query.id, *query.options()) as running:
        provider.wait("sub")
        done = running.interrupt()
    assert (done.code, done.said) == (130, f"interrupted: cancelled; airlock run --resume {query.id}{AS_IT_HAD}")
    assert query.resume(root=[], sub=[Say("2")]).out == "1\n2\ndone\n"
