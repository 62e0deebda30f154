"""What the journal has of a query, read back: replies, cells, and what came of all that cells asked for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.asked import fingerprint
from orchestrator.core.errors import (
    BudgetExhausted,
    ChildStopped,
    CountExceeded,
    LimitError,
    NotKept,
    NotPermitted,
    ProviderRefused,
    RateLimited,
)
from orchestrator.core.events import GENESIS, Event, Recorded, seal
from orchestrator.core.policy import Policy
from orchestrator.core.redact import Redactor, excerpt
from orchestrator.loop.cells import bounded, ended, order_of
from orchestrator.loop.handed import Given, asked_by
from orchestrator.loop.past import Past, PastCell, PastNode
from orchestrator.loop.reader import read_past
from orchestrator.proxy.account import ModelUsage
from orchestrator.proxy.proxy import refusal_of
from orchestrator.sandbox.sandbox import Call, CellResult
from orchestrator.store.vault import Keeper
from tests.unit.helpers import DEFAULT, policy, quick

CONTEXT = {"id": "c" * 64}
OPENED = {
    "backend": "bubblewrap",
    "model": "m",
    "sub_models": ["s"],
    "may_ask": ["s", "m"],
    "payloads": "keep",
    "context": CONTEXT,
    "limit_usd": "1.00",
}
ASKED = {"question": "Who?", "policy": json.dumps(DEFAULT.model_dump(mode="json"))}
LACKING = object()  # a payload that was not kept


class Story:
    """A query's records, one after the other; each takes a second."""

    def __init__(self, **opened: Any) -> None:
        self.records: list[Recorded] = []
        self.clock = itertools.count()
        self.add("query.opened", {**OPENED, **opened}, **ASKED)

    def add(self, kind: str, body: Mapping[str, Any], node: str = "root", /, **texts: Any) -> None:
        committed: dict[str, dict[str, Any]] = {name: {"commitment": "c", "bytes": 1} for name in texts}
        kept = {name: text for name, text in texts.items() if text is not LACKING}
        at = f"2026-11-25T10:00:{next(self.clock):02d}.000Z"
        self.records.append(Recorded("q", len(self.records), at, kind, node, body, kept, committed))

    def intent(self, call: str, prompt: str = "", node: str = "root", /, **body: Any) -> None:
        role = "sub" if "sub_call" in body else "root"
        fields = {"call": call, "role": role, "model": "m", "last": False, "asked": None, **body}
        self.add("call.intent", fields, node, prompt=json.dumps([{"role": "user", "content": prompt}]))

    def result(self, call: str, text: str | None, node: str = "root", /, **body: Any) -> None:
        usage = {"input_tokens": 3, "output_tokens": 2} if text is not None else None
        outcome = "void" if text is None else "answered"
        fields = {"call": call, "outcome": outcome, "cost_usd": "0.01", "usage": usage, "finish": "stop", **body}
        self.add("call.result", fields, node, **({} if text is None else {"completion": text}))

    def asks(self, number: int, prompt: str, text: str | None, call: str = "", model: str | None = None) -> None:
        call = call or f"root.c{number}"
        self.intent(call, prompt, sub_call=number, asked=model)
        if text is not None:
            self.result(call, text)

    def cell(self, number: int = 1, node: str = "root") -> None:
        self.add("cell.started", {"cell": number}, node, code=f"code {number}")

    def ends(self, result: CellResult | None = None, number: int = 1, node: str = "root") -> None:
        body, texts = ended(number, result or CellResult("ok", ""))
        self.add("cell.ended", body, node, **texts)

    def child(self, name: str, call: Call, given: Given | None = None) -> None:
        body = {"parent": name.rpartition(".")[0], "context": CONTEXT, "limit_usd": "0.50"}
        body |= {"model": "s", "depth": name.count(".")}
        self.add("node.opened", body, name, question=call.prompt, asked=asked_by(call, given or Given(None)))

    def closes(self, name: str, status: str, reason: str = "", **answer: str) -> None:
        self.add("node.closed", {"status": status, "reason": reason}, name, **answer)

    def refused(self, error: LimitError | Any, call: Call, number: int | None = None) -> None:
        body = {**refusal_of(error, "sub", "m"), "sub_call": number}
        self.add("call.refused", body, asked=asked_by(call, Given(None)))

    def past(self) -> Past:
        return read_past(self.records)


def llm(prompt: str, model: str | None = None) -> Call:
    return Call("llm_query", prompt, model)


def rlm(question: str, context: int | None = None) -> Call:
    return Call("rlm_query", question, None, context)


def came_of(cell: PastCell, call: Call, given: Given | None = None) -> Any:
    asked = cell.recall(call, given or Given(None))
    assert asked is not None, "the journal has no more of it"
    return asked.outcome


def test_what_was_asked_of_a_query():
    past = Story().past()
    assert (past.query, past.model, past.sub_models, past.may_ask) == ("q", "m", ["s"], ["s", "m"])
    assert (past.root.question, past.root.most, past.schema, past.code) == ("Who?", 10**9, None, None)
    assert past.policy == DEFAULT
    assert past.rules.sha256() == DEFAULT.sha256()
    story = Story(model=None)
    story.records[0] = Recorded(
        **{name: getattr(story.records[0], name) for name in ("query", "seq", "at", "type", "node")},
        body=story.records[0].body,
        payloads={**ASKED, "schema": '{"type": "object"}', "code": "print(1)"},
        committed={name: {} for name in (*ASKED, "schema", "code")},
    )
    past = story.past()
    assert (past.model, past.schema, past.code) == (None, {"type": "object"}, "print(1)")


def test_replies_come_in_their_order_and_the_last_word_apart():
    story = Story()
    for number, (text, finish, last) in enumerate(
        [("one", "length", False), ("two", "stop", False), ("end", "stop", True)]
    ):
        story.intent(f"root.c{number}", last=last)
        story.result(f"root.c{number}", text, finish=finish)
    story.intent("root.c7")
    story.result("root.c7", None)
    root = story.past().root
    assert [(reply.text, reply.finish_reason) for reply in root.replies] == [("one", "length"), ("two", "stop")]
    assert root.reply(last=True).text == "end"
    assert root.reply(last=True) is None
    assert root.calls == 7


def test_equal_calls_are_answered_in_the_order_in_which_they_were_asked():
    story = Story()
    story.cell()
    story.asks(1, "same", None)
    story.asks(2, "same", None)
    story.asks(3, "same", "other model", model="big")
    story.result("root.c2", "second")
    story.result("root.c1", "first")
    story.ends()
    (cell,) = story.past().root.cells
    assert [came_of(cell, llm("same")) for _ in range(2)] == ["first", "second"]
    assert came_of(cell, llm("same", "big")) == "other model"
    assert cell.recall(llm("same"), Given(None)) is None
    assert cell.recall(llm("never"), Given(None)) is None


def test_a_call_that_had_to_wait_is_on_record_after_those_that_overtook_it():
    """The order in which they were asked is that of their numbers."""
    story = Story()
    story.cell()
    story.asks(2, "same", "second")
    story.add("call.repeated", {"of": "root.c2", "model": "m", "sub_call": 5, "asked": None})
    story.refused(RateLimited("later", retry_after=1.5), llm("same"), 4)
    story.asks(3, "same", None)
    story.asks(1, "same", "first")
    story.result("root.c3", "third")
    story.ends()
    (cell,) = story.past().root.cells
    came = [came_of(cell, llm("same")) for _ in range(5)]
    assert [came[0], came[1], came[2], came[4]] == ["first", "second", "third", "second"]
    assert isinstance(came[3], RateLimited)


def test_attempts_and_fallbacks_are_one_call():
    story = Story()
    story.cell()
    story.intent("root.c1", "p", sub_call=1, asked=None)
    story.result("root.c1", None)
    story.intent("root.c1", "p", sub_call=1, asked=None)
    story.result("root.c1", None)
    story.intent("root.c2", "p", sub_call=1, asked=None, model="fallback")
    story.result("root.c2", "answer")
    past = story.past()
    (cell,) = past.root.cells
    assert came_of(cell, llm("p")) == "answer"
    assert cell.recall(llm("p"), Given(None)) is None
    assert past.sub_calls == 1
    assert past.usage == {
        "m": ModelUsage(calls=2, cost=2 * 10**7),
        "fallback": ModelUsage(calls=1, input_tokens=3, output_tokens=2, cost=10**7),
    }


def test_a_call_that_was_answered_as_another_one():
    story = Story()
    story.cell()
    story.asks(1, "p", "answer")
    story.add("call.repeated", {"of": "root.c1", "model": "m", "sub_call": 2, "asked": "m"})
    past = story.past()
    (cell,) = past.root.cells
    assert came_of(cell, llm("p", "m")) == came_of(cell, llm("p")) == "answer"
    assert past.sub_calls == 2
    assert past.answers == [("s", "p", "root.c1", "answer")]


def test_answers_are_found_by_the_model_that_was_asked_for():
    """Whichever was asked in its place: a fallback, from the first, where the circuit was open."""
    story = Story(sub_models=["s", "t"])
    story.cell()
    story.intent("root.c1", "p", sub_call=1, asked="big", model="big")
    story.result("root.c1", None)
    story.intent("root.c2", "p", sub_call=1, asked="big", model="fallback")
    story.result("root.c2", "one")
    story.intent("root.c3", "p", sub_call=2, asked=None, model="fallback")
    story.result("root.c3", "two")
    story.child("root.1", rlm("deep?"))
    story.cell(1, "root.1")
    story.intent("root.1.c1", "p", "root.1", sub_call=3, asked=None, model="fallback")
    story.result("root.1.c1", "three", "root.1")
    story.child("root.1.1", rlm("deeper?"))
    story.cell(1, "root.1.1")
    story.intent("root.1.1.c1", "q", "root.1.1", sub_call=4, asked=None, model="fallback")
    story.result("root.1.1.c1", "four", "root.1.1")
    assert story.past().answers == [
        ("big", "p", "root.c2", "one"),
        ("s", "p", "root.c3", "two"),
        ("t", "p", "root.1.c1", "three"),
        ("s", "q", "root.1.1.c1", "four"),  # the last of all is asked at all further depths: its own here
    ]


@pytest.mark.parametrize("which", ["prompt", "completion"])
@pytest.mark.parametrize("how", ["erased", "redacted"])
def test_what_is_not_kept_as_it_was_is_no_answer_to_others(which: str, how: str):
    story = Story()
    story.cell()
    story.child("root.1", rlm("deep?"))
    story.cell(1, "root.1")
    story.intent("root.1.c1", "p", "root.1", sub_call=1)
    story.result("root.1.c1", "below", "root.1")
    record = next(record for record in reversed(story.records) if which in record.committed)
    if how == "erased":
        del record.payloads[which]  # pyright: ignore[reportIndexIssue]
    else:
        record.committed[which]["redacted"] = 1  # pyright: ignore[reportIndexIssue]
    story.ends(node="root.1")
    story.closes("root.1", "answered", answer="a")
    past = story.past()
    past.require_to_resume()
    assert past.answers == []
    story.add("call.repeated", {"of": "root.1.c1", "model": "m", "sub_call": 2, "asked": None})
    with pytest.raises(NotKept, match=f"record {record.seq}, {which}"):  # the root takes it now
        story.past().require_to_resume()


def test_refusals_are_the_errors_that_they_were():
    story = Story()
    story.cell()
    story.refused(NotPermitted("not this", limit="a, b", asked="c"), llm("p", "c"))
    story.refused(RateLimited("later", retry_after=1.5, limit="2"), llm("q"), 1)
    story.asks(2, "r", None)
    story.refused(ProviderRefused("401"), llm("r"), 2)
    story.add("limit.hit", {"kind": "budget-exhausted", "detail": "no money", "limit": "1 USD"})
    past = story.past()
    (cell,) = past.root.cells
    error = came_of(cell, llm("p", "c"))
    assert (type(error), str(error), error.limit, error.asked) == (NotPermitted, "not this", "a, b", "c")
    error = came_of(cell, llm("q"))
    assert (type(error), error.retry_after, error.limit) == (RateLimited, 1.5, "2")
    assert isinstance(came_of(cell, llm("r")), ProviderRefused)
    assert (past.refused, past.sub_calls) == (3, 2)
    limit = past.root.limit
    assert (type(limit), str(limit), limit and limit.limit) == (BudgetExhausted, "no money", "1 USD")


def test_child_queries_by_question_and_context():
    story = Story()
    story.cell()
    mine = Given("jsonl", ['"a"\n', '"b"\n'])
    story.child("root.1", rlm("same"))
    story.child("root.2", rlm("same", 1), mine)
    story.closes("root.2", "limit", "time-exceeded", answer="half")
    story.closes("root.1", "answered", answer="whole")
    story.child("root.3", rlm("gone"))
    story.closes("root.3", "cancelled")
    story.ends()
    past = story.past()
    (cell,) = past.root.cells
    stopped = came_of(cell, rlm("same", 7), Given("jsonl", ['"a"\n"b"\n']))
    assert (type(stopped), stopped.partial) == (ChildStopped, "half")
    assert str(stopped) == "child query root.2 ended without an answer: time-exceeded"
    assert came_of(cell, rlm("same")) == "whole"
    assert came_of(cell, rlm("gone")) is None
    assert cell.recall(rlm("same", 1), Given("text", ['"a"\n"b"\n'])) is None
    assert (past.children, past.root.children) == (3, 3)


def test_a_child_query_that_had_not_ended_is_its_own_past():
    story = Story()
    story.cell()
    story.child("root.1", rlm("deep?"))
    story.cell(1, "root.1")
    story.intent("root.1.c4", "p", "root.1", sub_call=1)
    story.result("root.1.c4", "below", "root.1")
    story.add("query.interrupted", {"why": "w", "until": story.records[-1].at})
    past = story.past()
    child = came_of(past.root.cells[0], rlm("deep?"))
    assert isinstance(child, PastNode)
    assert child is past.nodes["root.1"]
    assert came_of(child.cells[0], llm("p")) == "below"
    assert (child.question, child.most, child.calls, child.spent, child.closed) == ("deep?", 5 * 10**8, 4, 10**7, False)
    assert past.root.spent == 10**7


def test_children_that_were_not_asked_for_again_are_told_the_deepest_first():
    story = Story()
    story.cell()
    story.child("root.1", rlm("deep?"))
    story.cell(1, "root.1")
    story.child("root.1.1", rlm("deeper?"))
    (cell,) = story.past().root.cells
    assert [child.name for child in cell.children_left] == ["root.1.1", "root.1"]


def test_a_child_query_on_the_last_level_was_a_plain_call():
    story = Story()
    story.cell()
    given = Given("text", ["mat", "erial"])
    story.asks(1, given.as_prompt("why?"), "because")
    (cell,) = story.past().root.cells
    assert came_of(cell, rlm("why?", 1), given) == "because"


def test_what_was_in_flight_is_forgotten_where_the_process_died_and_else_waited_for():
    story = Story()
    story.cell()
    story.asks(1, "never", None)
    story.ends()
    story.cell(2)
    story.asks(2, "again", None)
    story.add("query.interrupted", {"why": "w", "until": story.records[-1].at})
    story.asks(3, "again", "answer")
    ended_, open_ = story.past().root.cells
    assert came_of(ended_, llm("never")) is None
    assert came_of(open_, llm("again")) == "answer"
    assert (ended_.result is None, open_.result) == (False, None)


def test_budgets_are_told_in_their_order():
    story = Story()
    story.cell()
    for left in ("0.50", "0.40"):
        story.add("budget.told", {"usd_left": left})
    past = story.past()
    found = [came_of(past.root.cells[0], Call("budget", "", None)) for _ in range(2)]
    assert found == [{"usd_left": "0.50"}, {"usd_left": "0.40"}]
    assert past.told == 2


def test_the_time_that_it_ran_counts_and_the_time_that_it_waited_or_lay_does_not():
    story = Story()  # second 0
    story.add("budget.held", {"for": "last word", "usd": "0"})  # second 1: its turn has come
    story.cell()
    story.add("call.result", {"call": "x", "outcome": "unknown", "cost_usd": "0.01", "usage": None})
    story.records.pop()  # by the one that found it dead, much later
    story.add("query.interrupted", {"why": "w", "until": story.records[-1].at})  # ran to 2
    story.add("query.resumed", {"cells": 0, "calls": 0})  # second 5
    story.cell(2)
    story.ends(number=2)
    story.add("query.interrupted", {"why": "w", "until": story.records[-1].at})  # and to 7
    assert story.past().ran_s == 1 + 2


def test_a_query_that_never_had_its_turn_has_not_run():
    story = Story()
    story.add("query.interrupted", {"why": "w", "until": story.records[-1].at})
    assert story.past().ran_s == 0


texts = st.lists(st.tuples(st.sampled_from(["out", "err"]), st.text(min_size=1)), max_size=8)


@quick
@given(texts)
def test_output_of_two_streams_comes_back_as_it_was_mixed(output: list[tuple[str, str]]):
    story = Story()
    story.cell()
    story.ends(CellResult("error", "why", output, None, ("a", "b"), 3, 0.25))
    result = story.past().root.cells[0].result
    assert result is not None
    assert "".join(text for _, text in result.output) == "".join(text for _, text in output)
    assert result.text("err") == "".join(text for stream, text in output if stream == "err")
    assert (result.status, result.detail, result.answer) == ("error", "why", None)
    assert (result.names, result.dropped, result.duration_s) == (("a", "b"), 3, 0.25)


def test_how_streams_were_mixed_is_told_only_where_it_has_to_be():
    assert order_of([("out", "a"), ("out", "b"), ("err", "c")]) == ""
    assert order_of([("err", "ab"), ("out", "c")]) == '[["err", 2], ["out", 1]]'


def test_an_answer_of_a_cell_is_a_payload_even_when_it_is_empty():
    story = Story()
    story.cell()
    story.ends(CellResult("ok", "", answer=""))
    assert story.past().root.cells[0].result == CellResult("ok", "", answer="")


@pytest.mark.parametrize("character", ["x", "\x01", "\u20ac", "\U0001f600"])
def test_the_record_of_a_cells_end_is_bounded_whatever_a_guest_says(character: str):
    result = bounded(CellResult("error", character * 2000, names=tuple(character * 256 for _ in range(64))))
    body, _ = ended(1, result)
    link = seal(
        Event("cell.ended", "root", body), query="q", tenant="t", policy="p", seq=0, at="a", prev=GENESIS, payloads={}
    )
    assert len(link.record) < 16 * 1024
    assert result.names  # and something is left


def test_secrets_go_before_a_cells_end_is_cut_and_the_loop_is_told_what_is_recorded():
    keeper = Keeper(bytes(32), "q", (), Redactor().redact)
    token = "sk-proj-" + "a1B2c3D4" * 8
    for room in (1, 20, len(token)):
        result = bounded(CellResult("error", "x" * (999 - room) + " " + token), keeper)
        assert "sk-" not in result.detail
        assert len(result.detail) <= 1000
        body, _ = ended(1, result)
        assert excerpt(body["detail"], 1000, keeper.redact) == result.detail  # as it is recorded


def test_what_is_missing_is_said_once_it_is_needed():
    story = Story()
    story.cell()
    story.child("root.1", rlm("deep?"))
    story.add("cell.started", {"cell": 1}, "root.1", code=LACKING)
    story.ends(node="root.1")
    past = story.past()
    for check in (past.require, past.require_to_resume):
        with pytest.raises(NotKept, match=r"a payload that is not kept any more: record 3, code$"):
            check()
    story.closes("root.1", "answered", answer="a")
    past = story.past()
    past.require_to_resume()  # it is not run again
    with pytest.raises(NotKept, match="record 3, code"):
        past.require()


def test_what_was_taken_out_is_told_by_a_replay_and_stops_a_resumption():
    story = Story()
    story.cell()
    story.asks(1, "p", "answer")
    story.records[-1].committed["completion"]["redacted"] = 2  # pyright: ignore[reportIndexIssue]
    past = story.past()
    past.require()
    assert past.redacted == [("root", "record 3, completion")]
    with pytest.raises(NotKept, match="had secrets taken out: record 3, completion"):
        past.require_to_resume()


def test_a_query_without_payloads_and_one_of_another_version():
    with pytest.raises(NotKept, match="keeps no payloads"):
        Story(payloads="hash").past().require()
    story = Story()
    story.records[0].payloads["policy"] = '{"models": {}}'  # pyright: ignore[reportIndexIssue]
    with pytest.raises(NotKept, match="policy of query q is none that this version"):
        story.past().require_to_resume()
    story = Story()
    story.add("call.result", {"call": "unknown"})
    with pytest.raises(NotKept, match="not as this version of Airlock writes them"):
        story.past()
    story = Story()
    del story.records[0].body["may_ask"]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(NotKept, match="not as this version"):
        story.past()


@quick
@given(st.text(), st.text(), st.lists(st.text()))
def test_a_context_in_other_pieces_is_the_same_and_another_one_is_not(op: str, prompt: str, pieces: list[str]):
    whole = fingerprint(op, prompt, None, pieces)
    assert whole == fingerprint(op, prompt, None, ["".join(pieces)])
    assert whole != fingerprint(op, prompt + "x", None, pieces)
    assert whole != fingerprint(op, prompt, "model", pieces)
    assert fingerprint("a", "bc", None) != fingerprint("ab", "c", None)


def test_a_policy_comes_back_exactly():
    """Narrowed, it has several lists of patterns; its hash is what all records carry."""
    narrowed = DEFAULT.narrowed(policy(models={"root": (("m*",),)}))
    again = Policy.model_validate_json(json.dumps(narrowed.model_dump(mode="json")))
    assert (again, again.sha256()) == (narrowed, narrowed.sha256())


def test_a_limit_keeps_its_kind():
    story = Story()
    story.add("limit.hit", {"kind": "count-exceeded", "detail": "all 3 turns are used", "limit": "3"})
    assert isinstance(story.past().root.limit, CountExceeded)
