"""The tree of a query: each record in its place, and each request as the LM was sent it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from orchestrator.core.events import Recorded
from orchestrator.exports.tree import MOST_ASKED, Call, Node, grow, prompts
from orchestrator.loop.engine import MAX_CONTINUATIONS
from tests.unit.exported import Ran, histories
from tests.unit.helpers import quick


@pytest.fixture
def voyage(exported: dict[str, Ran]) -> Ran:
    return exported["voyage"]


def root(history: list[Recorded]) -> Node:
    query = grow(history)
    assert query
    assert query.root
    return query.root


def test_turns_and_cells(voyage: Ran):
    node = root(voyage.history)
    assert [(len(turn.calls), len(turn.cells)) for turn in node.turns] == [(2, 1), (1, 2), (1, 0), (1, 1), (1, 1)]
    assert [turn.number for turn in node.turns] == [1, 2, 3, 4, 5]
    assert (node.status, node.model) == ("answered", "top")
    first = node.turns[0]
    assert first.reply == "I look.\n```repl\nprint(len(context), llm_query('one'))\n```"
    assert first.cells[0].code == "print(len(context), llm_query('one'))"
    statuses = [cell.ending["status"] for turn in node.turns for cell in turn.cells]
    assert statuses == ["ok", "ok", "error", "ok", "ok"]


def test_what_a_cell_asked_for_is_in_it(voyage: Ran):
    node = root(voyage.history)
    batch, failed = node.turns[1].cells
    assert failed.asked == []
    calls = [item for item in batch.asked if isinstance(item, Call)]
    assert sorted(len(call.attempts) for call in calls) == [1, 1, 2]
    (flaky,) = (call for call in calls if len(call.attempts) == 2)
    assert [attempt.ending["outcome"] for attempt in flaky.attempts] == ["void", "answered"]
    refused, child, repeated = node.turns[3].cells[0].asked
    assert isinstance(refused, Recorded)
    assert (refused.type, refused.body["kind"]) == ("call.refused", "not-permitted")
    assert isinstance(repeated, Recorded)
    assert repeated.type == "call.repeated"
    assert isinstance(child, Node)
    assert (child.name, child.status, child.question) == ("root.1", "answered", "Child, what is it?")
    assert child.within is node.turns[3].cells[0]
    (cell,) = child.turns[0].cells
    (inner,) = cell.asked
    assert isinstance(inner, Call)
    assert inner.last.answer


def test_each_request_is_put_together_as_it_was_sent(exported: dict[str, Ran]):
    for ran in (exported["voyage"], exported["endless"]):
        query = grow(ran.history)
        assert query
        rebuilt = [conversation for node in query.nodes.values() for _, conversation in prompts(node)]
        sent = [seen.body["messages"] for seen in ran.seen if seen.role == "root"]
        assert sorted(map(str, rebuilt)) == sorted(map(str, sent))
        assert len(sent) > 2


def test_an_erased_prompt_is_missing_wherever_it_was_part_of_one(voyage: Ran):
    intents = [record for record in voyage.of("call.intent", "root") if record.body["role"] == "root"]
    lost = intents[2]
    found = list(prompts(root(voyage.erased("prompt", seqs=[lost.seq]))))
    whole = [None not in conversation for _, conversation in found]
    assert whole == [True, True, False, False, False, False]
    # What it had in common with the one before it is still known.
    assert found[2][1][: lost.body["shared"]] == found[0][1]


def test_the_last_word_is_a_turn_of_its_own(exported: dict[str, Ran]):
    node = root(exported["endless"].history)
    assert [turn.reply for turn in node.turns][-1] == "FINAL(perhaps)"
    assert [len(turn.calls) for turn in node.turns] == [1, 1, 1]
    assert "limit.hit" in {record.type for record in node.notes}
    assert node.status == "limit"


def test_a_last_word_goes_on_from_no_reply_that_was_cut(exported: dict[str, Ran]):
    cut = [
        replace(record, body={**record.body, "finish": "length"}) if record.type == "call.result" else record
        for record in exported["endless"].history
        if not record.type.startswith("cell.")
    ]
    assert [len(turn.calls) for turn in root(cut).turns] == [2, 1]


def test_a_cell_that_no_lm_wrote(exported: dict[str, Ran]):
    node = root(exported["alone"].history)
    (turn,) = node.turns
    assert (turn.calls, turn.reply, len(turn.cells)) == ([], None, 1)
    assert turn.cells[0].code == "print(len(context))\nFINAL(context[:3])\n"


def test_a_reply_is_continued_as_often_as_the_loop_does():
    assert MOST_ASKED == 1 + MAX_CONTINUATIONS


@pytest.mark.parametrize("finish", ["finish", "detail"])
def test_where_a_reply_was_cut_a_turn_goes_on(voyage: Ran, finish: str):
    """Newer records have a field of its own for it."""

    def told(record: Recorded) -> Recorded:
        if record.type != "call.result":
            return record
        body = {**record.body, "detail": "", finish: record.body["detail"]}
        return replace(record, body=body)

    assert [len(turn.calls) for turn in root([told(record) for record in voyage.history]).turns] == [2, 1, 1, 1, 1]


def test_a_query_that_was_cut_off_anywhere_has_a_tree(voyage: Ran):
    for length in range(len(voyage.history)):
        query = grow(voyage.history[:length])
        assert (query is None) == (length == 0)
        if query and query.root:
            assert query.root.status == "open"


@quick
@given(histories())
def test_any_well_formed_records_have_a_tree(history: list[Recorded]):
    query = grow(history)
    for node in query.nodes.values() if query else ():
        assert len(list(prompts(node))) == len(node.intents)
