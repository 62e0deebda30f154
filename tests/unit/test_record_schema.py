"""The schema of records: one exact form for each type of event, all of it bounded, none larger than a record may be."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, get_args

import jsonschema
import pytest

from orchestrator.core import errors, events
from orchestrator.core.errors import AirlockError, LimitError
from orchestrator.core.events import Event, canonical, seal
from orchestrator.core.policy import PAYLOADS
from orchestrator.store.journal import SAID
from tests.records import check_record, schema

SCHEMA = schema()
EVENTS: dict[str, Any] = SCHEMA["$defs"]["events"]
HASH, ROOT, QUERY, TIME = "0f" * 32, "A" * 43 + "=", "20261125-100000-0123456789", "2026-11-25T10:00:00.000Z"
CONTEXT = {"id": HASH, "sha256": HASH, "kind": "text", "bytes": 10, "chars": 9}
BODIES: dict[str, dict[str, Any]] = {
    "query.opened": {
        "model": "a/model",
        "sub_models": ["other"],
        "may_ask": ["other", "a/model"],
        "servers": {"other": HASH, "local:model": None},
        "backend": "bubblewrap",
        "isolation": "namespace",
        "context": CONTEXT,
        "limit_usd": "1.00",
        "payloads": ["question", "answer"],
    },
    "query.narrowed": {"limit_usd": "0.50", "payloads": ["question", "answer"]},
    "query.interrupted": {"why": "orchestrator-died: it ended", "until": TIME, "records": 9},
    "query.resumed": {"backend": "gvisor", "isolation": "gvisor", "cells": 3, "calls": 12},
    "query.closed": {
        "status": "answered",
        "reason": "",
        "sub_calls": 0,
        "refused": 0,
        "children": 0,
        "turns": 2,
        "duration_ms": 12,
        "cost_usd": "0.000000001",
        "records": 9,
    },
    "node.opened": {"parent": "root", "depth": 1, "model": "other", "limit_usd": "0.50", "context": CONTEXT},
    "node.closed": {
        "status": "limit",
        "reason": "count-exceeded: all 3 turns are used",
        "turns": 3,
        "calls": 4,
        "duration_ms": 12,
        "cost_usd": "0.00",
    },
    "sandbox.started": {
        "backend": "docker",
        "isolation": "container",
        "python": "3.11.2",
        "image": "sha256:" + HASH,
        "start": "cold",
        "because": "none was ready",
    },
    "sandbox.ended": {"cpu_ms": 12, "peak_memory_bytes": None, "oom": False},
    "cell.started": {"cell": 1},
    "cell.ended": {
        "cell": 1,
        "status": "error",
        "detail": "ValueError: no",
        "names": ["found", "größe"],
        "dropped_bytes": 0,
        "duration_ms": 12,
        "answered": False,
    },
    "cell.replayed": {"cell": 1, "status": "ok", "same": False, "differs": ["stdout"]},
    "call.intent": {
        "call": "root.1.c2",
        "attempt": 1,
        "role": "root",
        "model": "other",
        "bound_usd": "0.0123",
        "output_tokens": 4096,
        "messages": 3,
        "shared": 2,
        "last": False,
        "sub_call": 7,
        "asked": "other",
    },
    "call.result": {
        "call": "root.c1",
        "outcome": "answered",
        "detail": "stop",
        "cost_usd": "0.0001",
        "usage": {"input_tokens": 10, "output_tokens": 2},
        "finish": "stop",
        "reported_usd": "0.0002",
    },
    "call.refused": {
        "role": "sub",
        "model": "anything",
        "kind": "rate-limited",
        "detail": "too many",
        "limit": "60",
        "asked": "1",
        "left": "0",
        "rule": "tenant.in_flight",
        "retry_after_ms": 20,
        "sub_call": 3,
    },
    "call.repeated": {"of": "root.c1", "model": "other", "sub_call": 3, "asked": "other"},
    "budget.told": {
        "usd_left": "0.50",
        "usd_limit": "1.00",
        "usd_spent": "0.50",
        "sub_calls_left": 9,
        "children_left": 0,
        "depth_left": 1,
        "seconds_left": "899",
    },
    "budget.held": {"for": "last word", "usd": "0.02"},
    "limit.hit": {"kind": "budget-exhausted", "detail": "too dear", "limit": "1.00 USD", "rule": "money.query"},
    "context.verified": {"sha256": HASH, "unchanged": True},
    "key.created": {"key": "tenants/default", "public": "airlock+0123+AAAA"},
    "tenant.head": {"tenant": "default", "size": 9, "root": ROOT},
    "payload.erased": {"query": QUERY, "seq": 3, "name": "prompt", "payloads": 1, "why": "asked for"},
    "query.scored": {"query": QUERY, "score": "0.75", "by": "a person"},
    "log.anchored": {"log": "platform", "size": 9, "root": ROOT, "where": "file:/anchors", "receipt_sha256": HASH},
    "admin.action": {
        "action": "tenant.added",
        "subject": "default",
        "detail": "with the default policy",
        "by": "the command line",
    },
}
PAYLOAD = {"commitment": HASH, "bytes": 12, "kept": True, "redacted": 1}


def record(kind: str) -> dict[str, Any]:
    return {
        "v": 1,
        "query": QUERY,
        "tenant": "default",
        "policy": HASH,
        "node": "root.1",
        "seq": 0,
        "at": TIME,
        "type": kind,
        "body": copy.deepcopy(BODIES[kind]),
        "payloads": {name: dict(PAYLOAD) for name in EVENTS[kind]["properties"]["payloads"]["properties"]},
        "prev": "0" * 64,
    }


def refused(fields: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_record(fields)


# The schema


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for part in schema.values():
            yield from parts(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from parts(part)


def test_everything_in_it_is_exact_and_bounded() -> None:
    for part in parts({**SCHEMA, "properties": {**SCHEMA["properties"], "body": {}, "payloads": {}}}):
        match part.get("type"):
            case "object":
                assert part["additionalProperties"] is False or (part["maxProperties"] and part["propertyNames"]), part
            case "string":
                assert part.get("maxLength", 0) or part["pattern"].endswith("$"), part
            case "array":
                assert part["maxItems"], part
            case "integer":
                assert 0 <= part["minimum"] <= part["maximum"] < 2**53, part
            case kind:  # of floats there is none; `type` is also the name of a field
                assert kind in (None, "boolean", "null") or isinstance(kind, dict), part


def test_it_has_every_type_of_event_that_there_is() -> None:
    known = {*get_args(events.EventType), *get_args(events.LogEventType)}
    assert known <= set(EVENTS) == set(SCHEMA["properties"]["type"]["enum"]) == set(BODIES)
    assert [rule["then"]["$ref"].rpartition("/")[2] for rule in SCHEMA["allOf"]] == list(EVENTS)
    assert [rule["if"]["properties"]["type"]["const"] for rule in SCHEMA["allOf"]] == list(EVENTS)


def test_what_others_may_have_said_is_cut_where_it_says() -> None:
    said: dict[str, dict[str, int]] = {}
    for event, schema_of in EVENTS.items():
        for name, field in schema_of["properties"]["body"]["properties"].items():
            if name in ("detail", "reason") or (event, name) == ("query.interrupted", "why"):
                said.setdefault(event, {})[name] = field["maxLength"]
    assert said == SAID


def test_it_has_every_kind_of_error_that_there_is() -> None:
    found = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, AirlockError)]
    assert {error.kind for error in found} <= set(kinds("call.refused"))
    assert {error.kind for error in found if issubclass(error, LimitError)} <= set(kinds("limit.hit"))


def kinds(event: str) -> list[str]:
    return EVENTS[event]["properties"]["body"]["properties"]["kind"]["enum"]


def test_it_has_the_payloads_that_a_policy_can_name() -> None:
    kept = SCHEMA["$defs"]["kept"]["anyOf"][1]["items"]["enum"]
    assert tuple(kept) == PAYLOADS


# Records


@pytest.mark.parametrize("kind", BODIES)
def test_a_record_of_each_type(kind: str) -> None:
    check_record(record(kind))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a record, with the way to it."""
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(kind: str, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    fields: Any = record(kind)
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return fields


@pytest.mark.parametrize("kind", BODIES)
def test_what_a_record_may_not_hold(kind: str) -> None:
    """In every place of it: a float, a key too many or too few, text without end, a value of another type."""
    for path, value in places(record(kind)):
        if path:
            refused(changed(kind, path, 0.5))
            refused(changed(kind, path, {"strange": "value"}))
        if isinstance(value, dict) and path:
            refused(changed(kind, (*path, "unknown"), "x"))
        if isinstance(value, dict) and not path:
            refused(record(kind) | {"unknown": "x"})
        if type(value) is int:
            for wrong in (float(value), str(value), -1, 2**53, True):
                refused(changed(kind, path, wrong))
        if isinstance(value, str):
            refused(changed(kind, path, "x" * 17_000))
        if isinstance(value, list):
            refused(changed(kind, path, (value or ["x"]) * 1100))
    for name in record(kind):
        fields = record(kind)
        del fields[name]
        refused(fields)


@pytest.mark.parametrize(
    ("kind", "field", "wrong"),
    [
        ("call.result", "cost_usd", "0.1"),
        ("call.result", "cost_usd", "1e-5"),
        ("call.result", "cost_usd", "-0.10"),
        ("call.result", "outcome", "maybe"),
        ("context.verified", "sha256", HASH.upper()),
        ("context.verified", "sha256", HASH[1:]),
        ("call.intent", "call", "root"),
        ("call.intent", "model", "a\nb"),
        ("query.scored", "score", "1.5"),
        ("query.interrupted", "until", "yesterday"),
        ("tenant.head", "root", HASH),
    ],
)
def test_values_have_their_forms(kind: str, field: str, wrong: str) -> None:
    refused(changed(kind, ("body", field), wrong))


def test_what_is_sealed_is_what_the_schema_says() -> None:
    where = {"query": QUERY, "tenant": "default", "policy": HASH, "seq": 0, "at": TIME, "prev": "0" * 64}
    for kind in get_args(events.EventType):
        sealed = seal(Event(kind, "root", BODIES[kind]), payloads={}, **where)
        fields = json.loads(sealed.record)
        if not EVENTS[kind]["properties"]["payloads"].get("required"):
            check_record(fields)


# Size

WORST = {
    "hash": HASH,
    "root": ROOT,
    "count": 2**53 - 1,
    "usd": "9" * 16 + "." + "9" * 9,
    "time": TIME,
    "query": QUERY,
    "log": "tenants/" + "\U0001d54f" * 128,
    "chain": "tenants/" + "\U0001d54f" * 128,
    "node": "root" + ".9999999999999999" * 8,
    "call": "root" + ".9999999999999999" * 8 + ".c9999999999999999",
    "model": "\U0001d54f" * 767,
    "models": ["\U0001d54f" * 767],
    "servers": {"\U0001d54f" * 767: HASH, **{f"{number:02d}": HASH for number in range(31)}},
    "rule": "x" * 64 + "." + "x" * 64,
}
SPECIAL = {
    "^[0-9]{1,16}$": "9" * 16,
    "^(0(\\.[0-9]{1,20})?|1(\\.0{1,20})?)$": "0." + "9" * 20,
}


def largest(part: dict[str, Any]) -> Any:
    """Of all values that fit, one that takes the most bytes: of a control character JSON makes six."""
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return WORST.get(name) or largest(SCHEMA["$defs"][name])
    if "anyOf" in part:
        return max(map(largest, part["anyOf"]), key=lambda value: len(json.dumps(value)))
    if "enum" in part:
        return max(part["enum"], key=len)
    match part.get("type"):
        case "object":
            return {name: largest(inner) for name, inner in part["properties"].items()}
        case "array":
            return [largest(part["items"])] * (1 if part.get("uniqueItems") else part["maxItems"])
        case "string":
            return SPECIAL[part["pattern"]] if "pattern" in part else "\x01" * part["maxLength"]
        case "integer":
            return part["maximum"]
        case _:
            return part.get("const", False)


@pytest.mark.parametrize("kind", EVENTS)
def test_no_record_that_fits_the_schema_is_too_large(kind: str) -> None:
    worst = {
        **record(kind),
        **{name: largest(SCHEMA["properties"][name]) for name in ("query", "node", "seq", "policy", "tenant")},
        "body": largest(EVENTS[kind]["properties"]["body"]),
        "payloads": largest(EVENTS[kind]["properties"]["payloads"]),
    }
    if kind == "cell.ended":
        name = "\x01" * 256
        assert worst["body"]["names"] == [name] * 64  # which alone are six times as large as a record
        worst["body"]["names"] = [name] * (4096 // len(json.dumps(name)))
    if kind == "query.opened":
        worst["body"]["model"] = "m"  # all names together are as long as that of one may be
    check_record(worst)
    assert len(canonical(worst)) > len(canonical(record(kind))) or kind == "query.opened"
