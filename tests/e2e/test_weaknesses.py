"""What the reference library lets happen (field notes, weaknesses 2 to 6), tried against Airlock.

Weakness 4's part on child queries is in tests/integration/test_children.py.
"""

from __future__ import annotations

import os
import time
from decimal import Decimal
from pathlib import Path

from tests.command import Airlock, children
from tests.e2e.test_budget import PRICED, counted, execute
from tests.fakes.provider import Hang, Provider, Say


def listening(process: int) -> list[str]:
    """Addresses on which a process, or one that it started, accepts connections over a network."""
    tree = [process, *children(process)]
    inodes = {str(fd.readlink()) for pid in tree for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    rows = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{kind}").read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def test_2_there_is_no_port_for_a_neighbour_to_spend_the_key_through(airlock: Airlock) -> None:
    with Provider(sub=[Hang()]) as provider:
        file = airlock.file("cell.py", "llm_query('wait')")
        asked = ("exec", file, "--model", "mine", "--base-url", provider.url, *PRICED)
        with airlock.started(*asked) as running:
            provider.wait("sub")
            assert listening(os.getpid()), "the provider of this test is not seen, so nothing would be"
            assert listening(running.process.pid) == []
            running.interrupt()


def test_3_a_cell_that_never_ends_is_ended_at_its_limit(airlock: Airlock) -> None:
    policy = airlock.policy(time_cell="1 s")
    for code in (
        "while True: pass",
        "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass",
    ):
        began = time.monotonic()
        done = airlock("exec", airlock.file("cell.py", code), "--policy", policy)
        assert done.code == 3, done
        assert time.monotonic() - began < 10


SPEND = """
answered = 0
for _ in range(500):
    try:
        llm_query("x" * 100)
        answered += 1
    except BudgetExhausted:
        break
print(answered)
"""


def test_4_five_hundred_calls_in_one_cell_stay_within_the_budget(airlock: Airlock) -> None:
    """Also when the provider tells of no usage, which there means that nothing is ever counted."""
    policy = airlock.policy(models_output_tokens="4000", models_output_floor="4000")
    for usage in ("most", None):
        with Provider(sub=[Say("x", usage=usage)]) as provider:
            done = execute(airlock, provider.url, SPEND, "--budget", "0.05", "--policy", policy)
        assert done.code == 0, done
        assert 0 < int(done.out) < 10
        assert Decimal(airlock.closing()["cost_usd"]) <= Decimal("0.05")
        assert counted(provider) <= Decimal("0.05")


def test_5_a_cell_cannot_name_a_model_of_its_own_choice(airlock: Airlock) -> None:
    code = """
        for ask in (llm_query, rlm_query):
            for model in ("gpt-5", "local:/etc/passwd", "scripted:/etc/passwd", "Mine", "mine "):
                try:
                    print(ask("p", model=model))
                except NotPermitted as error:
                    print(type(error).__name__)
    """
    with Provider(sub=[Say("x")]) as provider:
        done = execute(airlock, provider.url, code)
    assert done.out.split() == ["NotPermitted"] * 10
    assert provider.requests == []


def test_6_every_call_that_is_answered_is_on_record(airlock: Airlock) -> None:
    """A process that a cell leaves behind cannot go on asking; what was asked before is in the journal."""
    code = """
        import os, threading, time
        def ask():
            while True:
                try:
                    llm_query("from behind")
                except Exception:
                    pass
        threading.Thread(target=ask, daemon=True).start()
        if os.fork() == 0:
            os.setsid()
            ask()
        llm_query("in front")
        time.sleep(0.2)
    """
    with Provider(sub=[Say("x")]) as provider:
        assert execute(airlock, provider.url, code).code == 0
        records = airlock.records()
        intents = [record for record in records if record["type"] == "call.intent"]
        answered = [r for r in records if r["type"] == "call.result" and r["body"]["outcome"] == "answered"]
        # One that was under way when the cell ended may have been cancelled before it came there.
        assert 2 <= len(answered) <= len(provider.requests) <= len(intents) <= len(answered) + 2
