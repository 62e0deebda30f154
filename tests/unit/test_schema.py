"""Answers are held to a size and, when asked for, to a JSON Schema, by a process that can be ended."""

from __future__ import annotations

import json

import pytest

from orchestrator.loop import engine
from orchestrator.loop.engine import schema_check
from orchestrator.loop.fits import fault

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
pytestmark = pytest.mark.anyio


async def test_without_a_schema_only_the_size_counts():
    accept = schema_check(None, 3)
    assert await accept("abc") is None
    assert await accept("€€€") is None
    assert await accept("abcd") == "it has 4 characters, and 3 are permitted"


async def test_with_a_schema_size_and_form_count():
    accept = schema_check(SCHEMA, 100_000)
    assert await accept(' {"n": 1} ') is None
    assert await accept('{"n": "1"}') == "it does not fit the schema: '1' is not of type 'integer' at $.n"
    assert await accept('{"n": 1}' + " " * 100_000) == "it has 100,008 characters, and 100,000 are permitted"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("the answer is 1", "it does not fit the schema: it has to be JSON alone"),
        ('```json\n{"n": 1}\n```', "it does not fit the schema: it has to be JSON alone"),
        ("", "it does not fit the schema: it has to be JSON alone"),
        ('{"n": "1"}', "it does not fit the schema: '1' is not of type 'integer' at $.n"),
        ("{}", "it does not fit the schema: 'n' is a required property at $"),
        ("[" * 100_000, "it "),
    ],
)
def test_a_fault_says_what_is_wrong_and_where(answer: str, said: str):
    assert str(fault(SCHEMA, answer)).startswith(said)


def test_a_schema_with_a_reference_to_the_network_is_not_followed():
    assert fault({"$ref": "http://127.0.0.1:9/schema.json"}, "{}") is not None


async def test_an_answer_that_takes_hours_to_check_is_not_accepted(monkeypatch: pytest.MonkeyPatch):
    """Items that cannot be sorted are compared each with each."""
    monkeypatch.setattr(engine, "SCHEMA_S", 1.0)
    items = json.dumps([{"a": number} for number in range(50_000)])
    said = await schema_check({"type": "array", "uniqueItems": True}, 1_000_000)(items)
    assert said == "it could not be checked against the schema within 1 s: make it simpler"


async def test_an_answer_that_takes_all_memory_to_check_is_not_accepted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "SCHEMA_S", 60.0)
    said = await schema_check({"type": "array"}, 2_000_000_000)("[" + '"ab",' * 32_000_000 + "0]")
    assert said == "it could not be checked against the schema: make it simpler"
