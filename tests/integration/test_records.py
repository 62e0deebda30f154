"""Every record that real queries leave behind fits the schema: of each way in which a query can go and end."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from orchestrator import RLM
from orchestrator.core.errors import AirlockError
from orchestrator.core.events import EventType, LogEventType
from tests.command import Airlock
from tests.fakes.provider import Behaviour, Fail, Hang, HangUp, Provider, Say, Seen
from tests.records import read

NOT_HERE = {"log.anchored", "admin.action", "query.narrowed", "query.resumed", "cell.replayed"}
USED = (100, 50)
ALL = """
    print(budget(), llm_query("same"), llm_query("same"), context[:9])
    print("to the other stream", file=__import__("sys").stderr)
    for hostile in ("anything", "local:/etc/passwd\\n" * 40):
        try:
            llm_query("x", model=hostile)
        except NotPermitted as error:
            print(error)
    names = {f"name_{number}_\\u00fc\\x01" + "x" * 40: number for number in range(70)}
    globals().update(names)
    rlm_query_batched(["child?"] * 2, ["a", [1, "b"]])
"""


def cell(code: str) -> Say:
    return Say(f"```repl\n{textwrap.dedent(code)}\n```", usage=USED)


def by_question(seen: Seen) -> Behaviour:
    """What to do is the question itself."""
    turn = sum(message["role"] == "assistant" for message in seen.body["messages"])
    if seen.role == "sub":
        return Say("sub", usage=None if "same" in seen.text else USED)
    question = str(seen.body["messages"][1]["content"]).split("Question: ", 1)[1].split("\n", 1)[0]
    loops: dict[str, list[Behaviour]] = {
        "all?": [cell(ALL), cell("1 / 0"), cell("import os; os.kill(os.getpid(), 9)"), Say("FINAL_VAR(context)")],
        "child?": [cell("FINAL(len(context))")],
        "endless?": [cell("print(1)")],
        "slow?": [cell("while True: pass")],
        "refused?": [Fail(401, message="no \x01 \u00fc such key " * 200)],
        "busy?": [Fail(503)],
        "lost?": [HangUp()],
        "hang?": [Hang()],
    }
    turns = loops[question]
    return turns[min(turn, len(turns) - 1)]


def how(rlm: RLM, question: str) -> str:
    """Its status, or the kind of its error."""
    try:
        return rlm.completion(question, "some context").status
    except AirlockError as error:
        return error.kind


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        running.answer = by_question
        yield running


def test_every_record_fits_the_schema(provider: Provider, fresh: Airlock) -> None:
    policy = fresh.policy(
        "development", models_dedupe="true", counts_iterations="6", counts_retries="0", time_cell="700 ms"
    )
    options: dict[str, Any] = {
        "model": "top",
        "sub_model": ["mid"],
        "base_url": provider.url,
        "prices": {"top": (1, 2), "mid": (1, 2)},
        "backend": "bubblewrap",
        "policy": policy,
    }
    with RLM(**options, api_key="key", home=fresh.home) as rlm:
        assert how(rlm, "all?") == "answered"
        assert [how(rlm, question) for question in ("endless?", "slow?")] == ["limit"] * 2
        kinds = ["provider-refused", "provider-busy", "outcome-unknown"]
        assert [how(rlm, question) for question in ("refused?", "busy?", "lost?")] == kinds
    with RLM(**options, api_key="key", home=fresh.home, max_budget=0.0000001) as rlm:
        assert how(rlm, "all?") == "budget-exhausted"
    fresh("exec", fresh.file("cell.py", "print(len(context))"), "--context", policy, code=0)
    fresh.env["OPENAI_API_KEY"] = "key"
    command = ("run", "hang?", "--context", policy, "--model", "top", "--base-url", provider.url, "--price", "top=1,2")
    asked = len(provider.of("root"))
    with fresh.started(*command, "--policy", policy) as running:
        provider.wait("root", asked + 1)
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
    fresh("exec", fresh.file("cell.py", "FINAL(1)"), code=0)  # finds the one that died
    query = fresh.records()[0]["query"]
    fresh("audit", "erase", query, "--why", "asked for", code=0)
    fresh("audit", "score", query, "0.75", "--by", "a person", code=0)

    records = [read(row[0]) for row in fresh.rows("SELECT record FROM records")]
    types = {record["type"] for record in records}
    missing = {*get_args(EventType), *get_args(LogEventType)} - types
    assert missing <= NOT_HERE
    outcomes = {record["body"]["outcome"] for record in records if record["type"] == "call.result"}
    assert outcomes == {"answered", "void", "unknown"}
    cells = {record["body"]["status"] for record in records if record["type"] == "cell.ended"}
    assert cells == {"ok", "error", "killed", "timeout"}
    for row in fresh.rows("SELECT id FROM queries"):
        assert fresh.records(row[0])[0]["type"] == "query.opened"
