"""Lines to train on: what an LM was sent and what it said to that, and no line that is not whole."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given

from orchestrator.core.events import Recorded
from orchestrator.exports.chat import Wanted, lines
from orchestrator.exports.tree import grow
from tests.unit.exported import SMILE, Ran, histories
from tests.unit.helpers import quick


@pytest.fixture
def voyage(exported: dict[str, Ran]) -> Ran:
    return exported["voyage"]


def samples(history: list[Recorded], scores: dict[str, Decimal] | None = None, **wanted: Any) -> list[Any]:
    return [line and json.loads(line) for line in lines(history, scores or {}, Wanted(**wanted))]


def test_each_turn_of_each_node_is_a_line(voyage: Ran):
    found = samples(voyage.history)
    assert [(sample["node"], sample["turn"]) for sample in found] == [
        *(("root", number) for number in range(1, 6)),
        ("root.1", 1),
    ]
    assert {sample["query"] for sample in found} == {voyage.id}
    assert [sample["model"] for sample in found] == ["top"] * 5 + ["mid"]
    assert {(sample["status"], sample["score"]) for sample in found} == {("answered", None)}


def test_a_line_is_what_was_sent_and_the_reply_to_it(voyage: Ran):
    sent = [seen.body["messages"] for seen in voyage.seen if seen.role == "root"]
    del sent[1]  # it asked for the rest of a reply that was cut
    for sample in samples(voyage.history):
        *prompt, reply = sample["messages"]
        earlier = [message for message in prompt if message["role"] == "assistant"]
        assert all(message.pop("weight") == 0 for message in earlier)
        assert prompt in sent
        assert [prompt[0]["role"], prompt[1]["role"], reply["role"]] == ["system", "user", "assistant"]
        assert set(reply) == {"role", "content"}
    replies = [sample["messages"][-1]["content"] for sample in samples(voyage.history)]
    assert replies[0] == "I look.\n```repl\nprint(len(context), llm_query('one'))\n```"
    assert replies[2] == f"Nothing to run here {SMILE}"
    assert replies[4] == "FINAL_VAR(ship)"


def test_roles_take_turns(voyage: Ran):
    for sample in samples(voyage.history):
        roles = [message["role"] for message in sample["messages"]]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]


def test_only_nodes_that_ended_like_this(exported: dict[str, Ran]):
    endless = exported["endless"].history
    assert len(samples(endless, status="limit")) == 3
    assert samples(endless, status="answered") == []
    assert len(samples(exported["voyage"].history, status="answered")) == 6


@pytest.mark.parametrize(("score", "least", "count"), [("0.85", "0.85", 6), ("0.84", "0.85", 0), (None, "0", 0)])
def test_only_queries_of_this_score(voyage: Ran, score: str | None, least: str, count: int):
    scores = {voyage.id: Decimal(score)} if score else {}
    found = samples(voyage.history, scores, least=Decimal(least))
    assert len(found) == count
    assert {sample["score"] for sample in found} == ({score} if count else set())


def test_a_line_whose_prompt_is_lost_is_left_out_and_those_that_go_on_from_it(voyage: Ran):
    lost = [record for record in voyage.of("call.intent", "root") if record.body["role"] == "root"][2]
    found = samples(voyage.erased("prompt", seqs=[lost.seq]))
    assert [sample is not None for sample in found] == [True, False, False, False, False, True]
    assert found[0] == samples(voyage.history)[0]


def test_a_line_whose_reply_is_lost_is_left_out(voyage: Ran):
    (first, *_) = [record for record in voyage.of("call.result", "root") if record.body["outcome"] == "answered"]
    found = samples(voyage.erased("completion", seqs=[first.seq]))
    assert [sample is not None for sample in found] == [False, True, True, True, True, True]


def test_nothing_is_kept_so_nothing_is_written(voyage: Ran):
    assert samples(voyage.erased()) == [None] * 6


def test_a_turn_without_a_reply_is_no_line(voyage: Ran):
    result = next(record for record in voyage.history if record.type == "call.result" and record.node == "root")
    assert samples(voyage.history[: result.seq]) == []


def test_a_cell_that_no_lm_wrote_is_no_line(exported: dict[str, Ran]):
    assert samples(exported["alone"].history) == []


@quick
@given(histories())
def test_any_well_formed_records_make_whole_lines(history: list[Recorded]):
    query = grow(history)
    turns = sum(len(node.turns) for node in query.nodes.values()) if query else 0
    found = list(lines(history, {}))
    assert len(found) <= turns
    for line in filter(None, found):
        assert line.splitlines() == [line[:-1]]
        last = json.loads(line)["messages"][-1]
        assert last["role"] == "assistant"
        assert "\ud800" not in last["content"]
