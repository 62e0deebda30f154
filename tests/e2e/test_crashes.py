"""kill -9 at any moment of a query, and again while it is resumed: nothing is lost, and nothing is paid for twice.

The command is the real one, in a process that kills itself at one of its steps (tests/doom.py) or after a time; the
provider is a real server that remembers what it was asked. AIRLOCK_CRASHES says how many moments there are.
"""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from orchestrator.core.units import nano
from orchestrator.lm.base import Usage
from orchestrator.proxy.prices import Prices
from tests.command import Airlock, Done
from tests.fakes.provider import Provider, Say, Seen

CRASHES = int(os.environ.get("AIRLOCK_CRASHES", "40"))  # in the midst of a query; 200 take two to four minutes
BY_TIME = 5  # of so many moments one is a time, the others are steps
GOLDEN = 0.6180339887  # multiples of it spread evenly between whole numbers, however many there are
TWICE = 4  # of so many crashes one is followed by another while the query is resumed
PRICES = Prices({"m": (Decimal(1), Decimal(2))})
USED = (10, 5)
TURNS = {
    "root?": [
        """
        parts = llm_query_batched([f"part {n} of {context}" for n in range(5)])
        print(parts)
        """,
        """
        import sys
        try:
            llm_query("never mind", model="nobody")
        except NotPermitted as error:
            print("refused:", error, file=sys.stderr)
        print(budget()["usd_limit"], len(parts))
        below = rlm_query("deep?", ["one", "two"])
        print(below)
        """,
        """
        last = llm_query("the last of " + below)
        answer["content"] = "; ".join([*parts, below, last])
        answer["ready"] = True
        """,
    ],
    "deep?": [
        """
        inner = llm_query_batched([f"inner {item}" for item in context])
        print(inner)
        """,
        "FINAL_VAR(inner)",
    ],
}


def question(messages: list[dict[str, Any]]) -> str:
    return str(messages[1]["content"]).split("Question: ", 1)[1].split("\n", 1)[0]


def key(seen: Seen) -> str:
    """Which of the query's calls it is."""
    if seen.role == "sub":
        return seen.text
    messages = seen.body["messages"]
    return f"{question(messages)} turn {sum(message['role'] == 'assistant' for message in messages)}"


def say(seen: Seen) -> Say:
    if seen.role == "sub":
        return Say(f"<{seen.text}>", usage=USED)
    asked, _, turn = key(seen).partition(" turn ")
    code = textwrap.dedent(TURNS[asked][int(turn)])
    return Say(code if code.startswith("FINAL") else f"```repl{code}```", usage=USED)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        running.answer = say
        yield running


class Crashes:
    def __init__(self, airlock: Airlock, provider: Provider) -> None:
        self.airlock, self.provider = airlock, provider
        self.server = ("--base-url", provider.url, "--price", "m=1,2")

    def begin(self, doom: dict[str, Any] | None = None) -> Done:
        given = ("--context", "context.txt", "--model", "m", "--policy", "development", "--depth", 2)
        return self.airlock("run", "root?", *given, *self.server, "--json", doom=doom)

    def resume(self, query: str, doom: dict[str, Any] | None = None) -> Done:
        return self.airlock("run", "--resume", query, *self.server, "--json", doom=doom)

    def newest(self) -> str:
        found = self.airlock.rows("SELECT id FROM queries ORDER BY opened_at DESC, rowid DESC LIMIT 1")
        return str(found[0][0])

    def answered(self, query: str) -> Counter[str]:
        """The calls whose results are in the journal."""
        asked: dict[str, str] = {}  # node -> question, call -> prompt
        found = Counter[str]()
        for record in self.airlock.history(query):
            body = record.body
            if record.type in ("query.opened", "node.opened"):
                asked[record.node] = record.payloads["question"]
            elif record.type == "call.intent" and body["role"] == "sub":
                asked[body["call"]] = json.loads(record.payloads["prompt"])[-1]["content"]
            elif record.type == "call.result" and body["outcome"] == "answered":
                turns = f"{asked[record.node]} turn "
                turn = sum(found[name] for name in found if name.startswith(turns))
                found[asked.get(body["call"]) or f"{turns}{turn}"] += 1
        return found

    def check(self, query: str, done: Done, answer: str, seen: int, used: int) -> None:
        """After the end. seen, used: how much the provider had seen and counted when the query began."""
        assert (done.code, done.json["answer"]) == (0, answer)
        assert done.json["iterations"] == 3
        records = self.airlock.records(query)
        assert all(record["body"]["same"] for record in records if record["type"] == "cell.replayed")
        opened = [record["node"] for record in records if record["type"] == "node.opened"]
        assert opened == [record["node"] for record in records if record["type"] == "node.closed"] == ["root.1"]
        calls = [record["body"]["call"] for record in records if record["type"] == "call.intent"]
        assert len(calls) == len(set(calls))
        # Whatever the provider counted was paid, and whatever was not answered for sure was paid in full.
        ((spent, held),) = self.airlock.rows("SELECT spent, held FROM scopes WHERE id=?", f"query:{query}")
        charged = [record["body"]["cost_usd"] for record in records if record["type"] == "call.result"]
        assert (held, spent) == (0, sum(nano(Decimal(cost)) for cost in charged))
        assert spent >= PRICES.cost("m", Usage(*USED)) * (len(self.provider.used) - used)
        assert len(self.provider.requests) - seen <= len(calls)
        assert self.airlock.rows("SELECT id FROM reservations WHERE state='open'") == []


@pytest.mark.timeout(900)
def test_kill_minus_nine_at_any_moment(airlock: Airlock, provider: Provider) -> None:
    crashes = Crashes(airlock, provider)
    began = time.monotonic()
    whole = crashes.begin({"count": str(airlock.folder / "steps")})
    took_s = time.monotonic() - began
    steps = int((airlock.folder / "steps").read_text())
    assert steps > 100
    answer = whole.json["answer"]
    crashes.check(crashes.newest(), whole, answer, 0, 0)
    how = Counter[str]()
    for moment in range(2 * CRASHES):
        if how["killed"] >= CRASHES:
            break
        part = moment * GOLDEN % 1
        doom = {"after_s": took_s * part} if moment % BY_TIME == 0 else {"at": 1 + int(steps * part)}
        before, seen, used = crashes.newest(), len(provider.requests), len(provider.used)
        done = crashes.begin(doom)
        query = crashes.newest()
        again = {"at": 1 + moment * 37 % steps} if moment % TWICE == 0 else None
        while done.code == -signal.SIGKILL and query != before:
            known, asked = crashes.answered(query), len(provider.requests)
            how["closed already" if closed(airlock, query) else "killed"] += 1
            if closed(airlock, query):
                break
            done = crashes.resume(query, again)
            again = None
            twice = known & Counter(key(request) for request in provider.requests[asked:])
            assert not twice, (doom, twice)
        if done.code == -signal.SIGKILL:  # before it began, or after its end was on record
            assert closed(airlock, crashes.newest())
            continue
        how["resumed" if "query.resumed" in types(airlock, query) else "not killed"] += 1
        crashes.check(query, done, answer, seen, used)
    assert crashes.begin().code == 0  # which clears what the last ones left behind
    verdicts = airlock("audit", "verify", code=0).out
    assert verdicts.count(" holds ") == 5, verdicts
    assert how["killed"] >= CRASHES > how["not killed"] + how["closed already"], how
    assert how["killed"] > how["resumed"] > 0  # some of them twice


def closed(airlock: Airlock, query: str) -> bool:
    return airlock.rows("SELECT status FROM queries WHERE id=?", query) == [("answered",)]


def types(airlock: Airlock, query: str) -> list[str]:
    return [record["type"] for record in airlock.records(query)]
