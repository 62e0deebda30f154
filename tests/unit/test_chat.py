"""What a chat shows of a query while it thinks, and how what goes wrong is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from orchestrator.core.events import Recorded
from orchestrator.server.chat import errors, retries
from orchestrator.server.chat.reasoning import MOST_CALLS, MOST_OUTPUT, MOST_WORDS, Reasoning, fenced, words
from orchestrator.server.problems import Problem


def record(kind: str, node: str = "root", payloads: dict[str, str] | None = None, **body: Any) -> Recorded:
    kept = payloads or {}
    sizes = {name: {"bytes": len(text)} for name, text in {"prompt": "p" * 12, "completion": "c" * 7, **kept}.items()}
    return Recorded("20261126-010203-0123456789", 1, "", kind, node, body, kept, sizes)


def shown(*records: Recorded) -> str:
    reasoning = Reasoning()
    return "".join(map(reasoning.told, records))


def test_a_turn_is_words_code_output_and_sub_calls():
    ended = {"cell": 1, "status": "ok", "detail": ""}
    told = shown(
        record("call.intent", role="root", call="root.c1", model="big"),
        record(
            "call.result",
            payloads={"completion": "I look.\n```repl\nprint(1)\n```\n"},
            call="root.c1",
            outcome="answered",
        ),
        record("cell.started", payloads={"code": "print(1)"}, cell=1),
        record("call.intent", role="sub", call="root.c2", model="small"),
        record("call.result", call="root.c2", outcome="answered"),
        record("call.refused", detail="too\nmany"),
        record("cell.ended", payloads={"stdout": "1\n"}, **ended),
    )
    assert told == (
        "I look.\n\n```python\nprint(1)\n```\n- small was asked 12 bytes and answered 7\n"
        "- a sub-call was refused: too many\n```text\n1\n```\n\n"
    )


def test_nothing_kept_shows_nothing_and_breaks_nothing():
    told = shown(
        record("call.result", call="root.c1", outcome="answered"),
        record("cell.started", cell=1),
        record("cell.ended", cell=1, status="error", detail="NameError"),
        record("context.verified", unchanged=True),
        record("something.new"),
    )
    assert told == "- error: NameError\n\n"


def test_a_crowd_of_sub_calls_is_counted():
    calls = [record("call.refused", detail="no")] * (MOST_CALLS + 5)
    end = record("cell.ended", cell=1, status="ok", detail="")
    told = shown(record("cell.started", cell=1), *calls, end)
    assert told.count("refused") == MOST_CALLS
    assert told.endswith("- and 5 more sub-calls\n\n")
    again = shown(record("cell.started", cell=1), *calls, end, record("cell.started", cell=2), calls[0])
    assert again.count("refused") == MOST_CALLS + 1


def test_children_are_a_line_where_they_begin_and_where_they_end():
    told = shown(
        record("node.opened", "root.1", model="m"),
        record("call.refused", "root.1", detail="no"),
        record("cell.started", "root.1", {"code": "x"}, cell=1),
        record("node.closed", "root.1", status="answered", turns=1),
    )
    assert told == "- child query root.1 to m\n- child query root.1 answered: 1 turn\n"


@pytest.mark.parametrize("text", ["```", "a\n```\n![x](http://evil/?q)", "`````", "~~~\n```` x", "``\n```text\n"])
def test_nothing_in_a_fence_ends_it(text: str):
    first, *inside, last = fenced(text, "text").rstrip("\n").split("\n")
    fence = first.removesuffix("text")
    assert last == fence
    assert not any(re.match(rf" *{fence}", line) for line in inside)


def test_words_are_what_is_neither_code_nor_answer():
    assert words("one\n\n```repl\ncode\n```\n\n\n\ntwo\n~~~python\nx\n~~~") == "one\n\ntwo"
    assert words("done\nFINAL(the\nanswer)") == "done"
    assert words("FINAL_VAR(x)") == ""
    assert words("```repl\nnever closed") == ""
    assert len(words("word " * 5000)) < MOST_WORDS + 100
    assert len(fenced("x" * 10**6, "text")) > MOST_OUTPUT


@pytest.mark.parametrize(
    ("status", "reason", "code", "kind"),
    [
        ("limit", "budget-exhausted: the money is spent", 402, "budget-exhausted"),
        ("limit", "budget-in-flight: held", 402, "budget-in-flight"),
        ("limit", "time-exceeded: 3 s are over", 422, "time-exceeded"),
        ("limit", "count-exceeded: all 2 turns are used", 422, "count-exceeded"),
        ("limit", "something else", 422, "limit"),
        ("refused", "not-permitted: no", 403, "not-permitted"),
        ("refused", "rate-limited: later", 429, "rate-limited"),
        ("refused", "count-exceeded: 4 queries run already", 413, "count-exceeded"),
        ("failed", "provider-busy: http://10.0.0.1:8000/v1 answers 503", 502, "provider-busy"),
        ("failed", "sandbox-died: killed", 500, "sandbox-died"),
        ("failed", "store-unavailable: the disk is full", 503, "store-unavailable"),
        ("failed", "not-rebuilt: the REPL cannot be rebuilt: why", 500, "machine"),
        ("failed", "internal: KeyError", 500, "error"),
        ("cancelled", "cancelled", 422, "cancelled"),
    ],
)
def test_why_a_query_has_no_answer(status: str, reason: str, code: int, kind: str):
    problem = errors.no_answer({"id": "20261126-010203-0123456789", "status": status, "reason": reason})
    assert (problem.status, problem.kind) == (code, kind)
    assert "10.0.0.1" not in str(problem)
    assert "20261126-010203-0123456789" in str(problem)
    # Whatever has run may have cost as much as another one would.
    assert (problem.headers.get("x-should-retry") == "false") is (status != "refused")
    if code in (429, 503):
        assert int(problem.headers["Retry-After"]) > 0


def test_paths_that_speak_to_openai():
    speaking = ("/v1/chat/completions", "/v1/chat", "/v1/models", "/v1/models/rlm/a\nb", "/v1/chat/other")
    speaking += ("/chat/completions", "/models", "/v1/completions", "/v1/responses", "/embeddings", "/v1/files/x")
    assert all(map(errors.speaks, speaking))
    assert not any(map(errors.speaks, ("/v1/queries", "/v1/modelsx", "/v1/chatter", "/", "/x/v1/models")))


def test_a_retry_of_what_was_given_up_is_refused(monkeypatch: pytest.MonkeyPatch):
    again = {"x-stainless-retry-count": "1"}
    retries.require_wanted(again, "acme", b"one")  # as of a request that never came here
    retries.given_up("acme", b"one")
    for tenant, body, headers in (
        ("acme", b"one", {}),
        ("acme", b"one", {"x-stainless-retry-count": "0"}),
        ("acme", b"two", again),
        ("other", b"one", again),
    ):
        retries.require_wanted(headers, tenant, body)
    with pytest.raises(Problem, match="Idempotency-Key") as refused:
        retries.require_wanted(again, "acme", b"one")
    assert (refused.value.status, refused.value.headers) == (422, {"x-should-retry": "false"})
    monkeypatch.setattr(retries, "MOST", 3)
    for number in range(3):
        retries.given_up("acme", b"%d" % number)
    assert len(retries._given_up) == 3
    retries.require_wanted(again, "acme", b"one")
    monkeypatch.setattr(retries, "KEPT_S", 0.0)
    retries.require_wanted(again, "acme", b"2")


def test_where_a_fault_is():
    at = [{"at": "body.messages.0.content.as parts.1.as file.file.file_id", "is": "wrong"}]
    told = errors.body(Problem(422, "bad-request", "all of it", errors=at))["error"]
    assert (told["param"], told["message"]) == (
        "messages[0].content[1].file.file_id",
        "messages[0].content[1].file.file_id: wrong",
    )
    whole = errors.body(Problem(422, "bad-request", "x", errors=[{"at": "body", "is": "wrong"}]))["error"]
    assert (whole["param"], whole["message"]) == (None, "the body: wrong")
