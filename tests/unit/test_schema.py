"""Answers are held to a size and, when asked for, to a JSON Schema."""

from __future__ import annotations

import pytest

from orchestrator.loop.engine import schema_check

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_without_a_schema_only_the_size_counts():
    accept = schema_check(None, 3)
    assert accept("abc") is None
    assert accept("€€€") is None
    assert accept("abcd") == "it has 4 characters, and 3 are permitted"


def test_json_that_fits_is_accepted():
    assert schema_check(SCHEMA, 100)(' {"n": 1} ') is None


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("the answer is 1", "it has to be JSON alone"),
        ('```json\n{"n": 1}\n```', "it has to be JSON alone"),
        ("", "it has to be JSON alone"),
        ('{"n": "1"}', "it does not fit the schema: '1' is not of type 'integer' at $.n"),
        ("{}", "it does not fit the schema: 'n' is a required property at $"),
        ('{"n": 1}' + " " * 100_000, "it has 100,008 characters"),
    ],
)
def test_a_fault_says_what_is_wrong_and_where(answer: str, fault: str):
    assert str(schema_check(SCHEMA, 100_000)(answer)).startswith(fault)


def test_a_schema_with_a_reference_to_the_network_is_not_followed():
    accept = schema_check({"$ref": "http://127.0.0.1:9/schema.json"}, 100)
    assert accept("{}") is not None


def test_an_answer_that_is_nested_too_deeply_is_a_fault():
    assert schema_check(SCHEMA, 1_000_000)("[" * 100_000) is not None
