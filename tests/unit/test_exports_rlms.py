"""The trace of the reference library: what its visualizer reads, field by field, is there and of the type it expects.

Read from `visualizer/src/lib` (`types.ts`, `parse-logs.ts`), its components, and `rlm/core/types.py` of rlms 0.1.3.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given

from orchestrator.core.events import Recorded
from orchestrator.exports.rlms import lines
from tests.unit.exported import ANSWER, SMILE, Ran, histories
from tests.unit.helpers import quick


@pytest.fixture
def voyage(exported: dict[str, Ran]) -> Ran:
    return exported["voyage"]


def trace(history: list[Recorded]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Its two kinds of lines, as the visualizer takes them: each has to be fit for what is done with it."""
    setup, *iterations = [json.loads(line) for line in lines(history)]
    assert setup["type"] == "metadata"
    for name in ("root_model", "backend", "environment_type"):
        assert isinstance(setup[name], str)
    for name in ("max_depth", "max_iterations"):
        assert isinstance(setup[name], int)
    fit(iterations)
    return setup, iterations


def fit(iterations: list[dict[str, Any]]) -> None:
    for number, iteration in enumerate(iterations, 1):
        assert iteration["type"] == "iteration"
        assert iteration["iteration"] == number
        datetime.fromisoformat(iteration["timestamp"])
        assert isinstance(iteration["response"], str)
        assert isinstance(iteration["iteration_time"], float)
        assert isinstance(iteration["final_answer"], str | None)
        for message in iteration["prompt"]:
            assert isinstance(message["role"], str)
            assert isinstance(message["content"], str)
        for block in iteration["code_blocks"]:
            result = block["result"]
            assert all(isinstance(text, str) for text in (block["code"], result["stdout"], result["stderr"]))
            assert isinstance(result["locals"], dict)
            assert isinstance(result["execution_time"], float)
            assert isinstance(result["final_answer"], str | None)
            for call in result["rlm_calls"]:
                assert all(isinstance(call[name], str) for name in ("root_model", "prompt", "response"))
                assert all(isinstance(call[name], int) for name in ("prompt_tokens", "completion_tokens"))
                assert isinstance(call["execution_time"], float)
                assert set(call["usage_summary"]) in (
                    {"model_usage_summaries", "total_cost"},
                    {"model_usage_summaries"},
                )
                assert isinstance(call["usage_summary"].get("total_cost", 0.0), float)
                if "metadata" in call:
                    assert set(call["metadata"]) == {"run_metadata", "iterations"}
                    fit(call["metadata"]["iterations"])


def test_the_setup(voyage: Ran):
    setup, _ = trace(voyage.history)
    del setup["timestamp"]
    assert setup == {
        "type": "metadata",
        "root_model": "top",
        "max_depth": 3,
        "max_iterations": 100,
        "backend": "openai",
        "backend_kwargs": {"model_name": "top"},
        "environment_type": "bubblewrap",
        "environment_kwargs": {"isolation": "namespace"},
        "other_backends": ["openai"],
    }


def test_an_iteration_is_a_turn(voyage: Ran):
    _, iterations = trace(voyage.history)
    sent = [seen.body["messages"] for seen in voyage.seen if seen.role == "root" and seen.body["model"] == "top"]
    del sent[1]  # it asked for the rest of a reply that was cut
    assert [iteration["prompt"] for iteration in iterations] == sent
    assert [len(iteration["code_blocks"]) for iteration in iterations] == [1, 2, 0, 1, 1]
    assert iterations[2]["response"] == f"Nothing to run here {SMILE}"
    assert [iteration["final_answer"] for iteration in iterations] == [None] * 4 + [ANSWER]
    (last,) = iterations[4]["code_blocks"]
    assert last["result"]["final_answer"] == ANSWER


def test_cells_and_what_they_printed(voyage: Ran):
    _, iterations = trace(voyage.history)
    first = iterations[0]["code_blocks"][0]
    assert first["code"] == "print(len(context), llm_query('one'))"
    assert first["result"]["stdout"] == "38 plain one\n"
    assert first["result"]["stderr"] == ""
    failed = iterations[1]["code_blocks"][1]
    assert failed["result"]["stderr"].startswith("Traceback ")
    assert "\n[error] ZeroDivisionError" in failed["result"]["stderr"]
    assert "ship" in iterations[3]["code_blocks"][0]["result"]["locals"]


def test_calls_of_every_kind(voyage: Ran):
    _, iterations = trace(voyage.history)
    batch = iterations[1]["code_blocks"][0]["result"]["rlm_calls"]
    assert sorted((call["prompt"], call["response"], call["prompt_tokens"]) for call in batch) == [
        ("flaky", "at last", 7),
        ("three", "plain three", 11),
        ("two", "plain two", 11),
    ]
    assert all("error" not in call for call in batch)
    refused, child, repeated = iterations[3]["code_blocks"][0]["result"]["rlm_calls"]
    assert refused["response"].startswith("Error: sub-calls can ask ")
    assert refused["error"]
    same = f"(the same as of {voyage.of('call.repeated')[0].body['of']})"
    assert (repeated["prompt"], repeated["response"]) == (same, same)
    assert (child["prompt"], child["response"]) == ("Child, what is it?", "plain four!")
    assert (child["prompt_tokens"], child["completion_tokens"]) == (50 + 11, 5 + 2)
    (inner,) = child["metadata"]["iterations"]
    assert inner["code_blocks"][0]["result"]["rlm_calls"][0]["response"] == "plain four"
    assert inner["final_answer"] == "plain four!"
    assert child["metadata"]["run_metadata"]["root_model"] == "mid"


def test_a_limit_ends_with_the_best_answer(exported: dict[str, Ran]):
    _, iterations = trace(exported["endless"].history)
    assert [iteration["final_answer"] for iteration in iterations] == [None, None, "perhaps"]
    assert iterations[-1]["code_blocks"] == []


def test_a_cell_that_no_lm_wrote(exported: dict[str, Ran]):
    setup, (iteration,) = trace(exported["alone"].history)
    assert (setup["root_model"], iteration["prompt"], iteration["response"]) == ("", [], "")
    assert iteration["code_blocks"][0]["result"]["stdout"] == "38\n"
    assert iteration["final_answer"] == "the"


def test_what_is_not_kept_is_said_to_be_so(voyage: Ran):
    _, iterations = trace(voyage.erased())
    first = iterations[0]
    assert first["prompt"] == [{"role": "user", "content": "(not kept)"}]
    assert first["response"] == "(not kept: 20 bytes)(not kept: 37 bytes)"
    assert first["code_blocks"][0]["code"] == "(not kept: 37 bytes)"
    assert iterations[-1]["final_answer"] == f"(not kept: {len(ANSWER)} bytes)"


def test_a_query_that_was_cut_off_is_read(voyage: Ran):
    for length in range(1, len(voyage.history)):
        trace(voyage.history[:length])


@quick
@given(histories())
def test_any_well_formed_records_make_a_trace(history: list[Recorded]):
    found = list(lines(history))
    assert all(line.splitlines() == [line[:-1]] for line in found)
    if found:
        trace(history)
