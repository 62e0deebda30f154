"""Events for security tools: each one is valid by the schema's own definition, extra fields and all."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from jsonschema import Draft202012Validator
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from orchestrator.core.events import EventType, Recorded
from orchestrator.exports.ocsf import OCSF_VERSION, lines
from tests.unit.exported import Ran, histories
from tests.unit.helpers import quick

CALL = {"call.intent", "call.result", "call.refused", "call.repeated"}


@pytest.fixture
def voyage(exported: dict[str, Ran]) -> Ran:
    return exported["voyage"]


@functools.cache
def schema() -> OcsfJsonSchemaEmbedded:
    return OcsfJsonSchemaEmbedded(get_ocsf_schema(version=OCSF_VERSION))


@functools.cache
def validator(uid: int, profiles: tuple[str, ...]) -> Draft202012Validator:
    name = schema().lookup_class_name_from_uid(uid)
    return Draft202012Validator(schema().get_class_schema(name, list(profiles)))


def events(history: list[Recorded], *, content: bool = False) -> list[dict[str, Any]]:
    """Those that there are, each of them found valid."""
    found = [json.loads(line) for line in lines(history, content=content) if line]
    for event in found:
        profiles = tuple(event["metadata"].get("profiles", ()))
        validator(event["class_uid"], profiles).validate(event)
        assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
        assert event["category_uid"] == event["class_uid"] // 1000
    return found


def test_the_validator_is_one():
    """What it is to find is found: a field too many, one too few, a profile that is not said to be there."""
    fields = dict.fromkeys(("time", "severity_id", "type_uid", "category_uid", "class_uid", "activity_id"), 1)
    good = fields | {"metadata": {"version": "1", "product": {"name": "x"}}, "app": {"name": "x"}}
    good |= {"class_uid": 6002, "category_uid": 6, "type_uid": 600203, "activity_id": 3}
    check = validator(6002, ())
    assert check.is_valid(good)
    for bad in ({**good, "more": 1}, {**good, "activity_id": 77}, {**good, "container": {"uid": "x"}}):
        assert not check.is_valid(bad)
    del good["app"]
    assert not check.is_valid(good)


def test_each_record_is_a_valid_event(exported: dict[str, Ran]):
    for ran in exported.values():
        found = events(ran.history)
        assert [event["metadata"]["sequence"] for event in found] == [record.seq for record in ran.history]
        assert [event["metadata"]["event_code"] for event in found] == [record.type for record in ran.history]
        for event, record in zip(found, ran.history, strict=True):
            assert event["metadata"]["uid"] == f"{ran.id}:{record.seq}"
            assert event["metadata"]["tenant_uid"] == "default"
            assert event["unmapped"]["record"] == record.body
            assert isinstance(event["time"], int)


def test_time_is_in_milliseconds(voyage: Ran):
    record = replace(voyage.history[0], at="2026-11-25T10:00:00.123Z")
    (event,) = events([record])
    assert event["time"] == 1795600800123
    assert event["metadata"]["original_time"] == record.at


def test_cells_sandboxes_and_the_rest_have_classes_of_their_own(voyage: Ran):
    classes = {event["metadata"]["event_code"]: event["type_uid"] for event in events(voyage.history)}
    assert classes == {
        "query.opened": 600301,
        "node.opened": 600301,
        "call.intent": 600301,
        "call.result": 600303,
        "call.refused": 600301,
        "call.repeated": 600302,
        "context.verified": 600302,
        "node.closed": 600303,
        "query.closed": 600303,
        "budget.held": 600301,
        "cell.started": 100901,
        "cell.ended": 100999,
        "sandbox.started": 600203,
        "sandbox.ended": 600204,
    }


def test_calls_name_model_and_tokens(voyage: Ran):
    found = events(voyage.history)
    for event in found:
        called = event["metadata"]["event_code"] in CALL
        assert ("ai_operation" in event["metadata"].get("profiles", [])) == called
    results = [event for event in found if event["metadata"]["event_code"] == "call.result"]
    assert {event["ai_model"]["name"] for event in results} == {"top", "mid"}
    used = [event["message_context"].get("prompt_tokens", 0) for event in results]
    assert sum(used) == 100 + 110 + 200 + 250 + 300 + 400 + 50 + 7 + 4 * 11


def test_a_refusal_and_a_limit_are_denials(exported: dict[str, Ran]):
    for ran, kind, why in (("voyage", "call.refused", "not-permitted"), ("endless", "limit.hit", "count-exceeded")):
        (event,) = [e for e in events(exported[ran].history) if e["metadata"]["event_code"] == kind]
        assert "security_control" in event["metadata"]["profiles"]
        assert (event["action_id"], event["disposition_id"], event["status_id"]) == (2, 2, 2)
        assert event["policy"] == {"name": why, "uid": exported[ran].history[0].policy}
        assert event["severity_id"] == 2
        assert event["status_detail"]


def test_who_asks_is_the_guest_or_the_host(voyage: Ran):
    calls = [event for event in events(voyage.history) if event["metadata"]["event_code"] in CALL]
    roles = {call.body["call"]: call.body["role"] for call in voyage.of("call.intent")}
    for event in calls:
        role = roles.get(event["unmapped"]["record"].get("call"), "sub")
        assert event["src_endpoint"]["zone"] == {"root": "host", "sub": "guest"}[role]
    assert {event["src_endpoint"]["zone"] for event in calls} == {"host", "guest"}


def test_what_went_wrong_is_a_failure(voyage: Ran):
    failed = [event["metadata"]["event_code"] for event in events(voyage.history) if event["status_id"] == 2]
    assert sorted(failed) == ["call.refused", "call.result", "cell.ended"]
    (context,) = voyage.of("context.verified", "root")
    (event,) = events([replace(context, body={**context.body, "unchanged": False})])
    assert (event["severity_id"], event["status_id"]) == (4, 2)


def test_the_image_of_a_container(voyage: Ran):
    (started, *_) = voyage.of("sandbox.started")
    (event,) = events([replace(started, body={**started.body, "image": "sha256:1", "backend": "docker"})])
    assert event["device"]["container"] == {
        "uid": f"{voyage.id}:root",
        "runtime": "docker",
        "image": {"uid": "sha256:1"},
    }
    assert event["metadata"]["profiles"] == ["host", "container"]


def test_code_is_there_only_where_it_is_asked_for(voyage: Ran):
    bare, full = (events(voyage.history, content=content) for content in (False, True))
    scripts = [[event["script"]["script_content"] for event in found if "script" in event] for found in (bare, full)]
    assert {script["value"] for script in scripts[0]} == {""}
    assert scripts[0][0]["is_truncated"]
    assert scripts[0][0]["untruncated_size"] == len("print(len(context), llm_query('one'))")
    assert scripts[1][0] == {"value": "print(len(context), llm_query('one'))"}
    for found in (bare, full):
        text = json.dumps(found)
        for words in ("plain two", "Nothing to run", "Which ship", "Santa Rosa!"):
            assert words not in text


@pytest.mark.parametrize("kind", [*get_args(EventType), "query.interrupted", "query.resumed", "query.scored"])
def test_every_type_of_record_has_a_class(kind: str):
    record = Recorded("q", 0, "2026-01-01T00:00:00.000Z", kind, "root", {}, {}, {}, "", "")
    assert len(events([record])) == 1


def test_a_type_that_is_not_known_is_none():
    record = Recorded("q", 0, "2026-01-01T00:00:00.000Z", "quite.new", "root", {}, {}, {})
    assert list(lines([record])) == [None]


@quick
@given(histories())
def test_any_well_formed_records_are_valid_events(history: list[Recorded]):
    found = list(lines(history, content=True))
    assert len(found) == len(history)
    assert all(line is None or line.splitlines() == [line[:-1]] for line in found)
    events(history, content=True)
