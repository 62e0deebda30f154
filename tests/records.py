"""What every record is held to that a test reads: the schema in the package, and its size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from orchestrator.core.events import MOST_BYTES, canonical


def schema() -> dict[str, Any]:
    return json.loads(files("orchestrator.core").joinpath("records.v1.schema.json").read_text())


@cache
def _validator() -> Draft202012Validator:
    # JSON Schema takes 1.0 for an integer. In a record it is a float.
    exact = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _checker, value: type(value) is int)
    return extend(Draft202012Validator, type_checker=exact)(schema())


def check_record(fields: Mapping[str, Any]) -> None:
    """Raises AssertionError that says what is wrong with it."""
    fault = best_match(_validator().iter_errors(fields))
    assert fault is None, f"{fields.get('type')} at {fault.json_path}: {fault.message[:500]}"
    assert len(canonical(fields)) <= MOST_BYTES, f"{fields['type']} is larger than a record may be"


def read(record: bytes) -> dict[str, Any]:
    """A record's fields, after a check."""
    fields = json.loads(record)
    check_record(fields)
    assert canonical(fields) == record
    return fields
