"""The OpenAPI document: it is one, its examples are what they show, and every answer is described alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from orchestrator.core.policy_file import parse_policy
from orchestrator.server.app import make_app
from orchestrator.server.chat.errors import speaks
from orchestrator.server.openapi import TAGS
from orchestrator.server.problems import MEDIA_TYPE, Problem, ProblemBody
from tests.unit.serving import small

DOCUMENT: dict[str, Any] = make_app(None).openapi()  # type: ignore[arg-type]  # it is not started
SCHEMAS: dict[str, dict[str, Any]] = DOCUMENT["components"]["schemas"]
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{method} {path}": (path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}


def fits(schema: dict[str, Any], value: object) -> bool:
    validator: Any = Draft202012Validator(schema)
    return bool(validator.is_valid(value))


def test_it_is_a_document():
    validate(DOCUMENT)
    assert DOCUMENT["info"]["description"].count("**") == 10  # authentication, money, errors, lists, idempotency


def test_it_is_rendered_once_and_not_sent_to_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody needs a key for it: whoever asks again and again keeps no one else waiting."""
    with small(tmp_path) as service:
        client = service.client
        plain = client.get("/openapi.json", headers={"Accept-Encoding": "gzip;q=0, identity"})
        packed = client.get("/openapi.json", headers={"Accept-Encoding": "deflate, gzip"})
        assert plain.json() == packed.json() == DOCUMENT

        def never(*_: Any, **__: Any) -> str:
            raise AssertionError("it was rendered again")

        with monkeypatch.context() as patch:
            patch.setattr(json, "dumps", never)
            again = client.get("/openapi.json", headers={"Accept-Encoding": "identity"})
        assert again.content == plain.content
        assert (packed.headers["Content-Encoding"], packed.headers["Vary"]) == ("gzip", "Accept-Encoding")
        assert int(packed.headers["Content-Length"]) * 5 < int(plain.headers["Content-Length"])
        for answer, accepted in ((plain, "identity"), (packed, "gzip")):
            headers = {"Accept-Encoding": accepted, "If-None-Match": f'"other", W/{answer.headers["ETag"]}'}
            known = client.get("/openapi.json", headers=headers)
            assert (known.status_code, known.content) == (304, b"")
            assert known.headers["Cache-Control"] == "no-cache"
        assert plain.headers["ETag"] != packed.headers["ETag"]
        assert client.head("/openapi.json").status_code == 200


def test_operations_make_methods():
    ids: list[str] = [operation["operationId"] for _path, operation in ROUTES.values()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)+", name) for name in ids), ids
    assert {"ask_query", "list_queries", "get_query", "put_context", "list_contexts", "list_keys"} <= set(ids)
    parameters = set(re.findall(r"\{(\w+)", " ".join(DOCUMENT["paths"])))
    assert parameters == {"query", "context", "upload", "tenant", "key", "seq", "old", "model"}


@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_is_described_alike(route: str):
    path, operation = ROUTES[route]
    assert operation["summary"][0].isupper()
    assert " " in operation["summary"]
    assert set(operation["tags"]) <= {tag["name"] for tag in TAGS}
    answers = operation["responses"]
    assert {"400", "421", "431", "500"} <= answers.keys()
    assert "requestBody" not in operation or {"408", "413", "415"} <= answers.keys()
    for status, told in answers.items():
        answer = told
        if "$ref" in told:
            answer = DOCUMENT["components"]["responses"][told["$ref"].rpartition("/")[2]]
        assert "X-Request-Id" in answer["headers"]
        assert ("Retry-After" in answer["headers"]) == (status in ("429", "503"))
        assert ("WWW-Authenticate" in answer["headers"]) == (status == "401")
        if path.startswith("/v1/") and status != "401" and "$ref" not in told:
            assert {"RateLimit", "RateLimit-Policy"} <= answer["headers"].keys()
        if int(status) >= 400:
            assert answer["content"].keys() == {"application/json" if speaks(path) else MEDIA_TYPE}


def test_examples_are_of_their_schemas():
    seen = 0
    for name, schema in SCHEMAS.items():
        whole = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
        for example in schema.get("examples", ()):
            assert fits(whole, example), (name, example)
            seen += 1
    assert seen >= 15


def exemplified(schema: dict[str, Any], above: tuple[str, ...] = ()) -> bool:
    """As a whole, or all of what it is made of."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return name in above or exemplified(SCHEMAS[name], (*above, name))
    if schema.keys() & {"example", "examples", "const", "enum", "default"} or schema.get("type") in ("boolean", "null"):
        return True
    if "properties" in schema:
        return all(exemplified(each, above) for each in schema["properties"].values())
    inner = schema.get("items") or schema.get("additionalProperties") or {}
    either = schema.get("anyOf") or schema.get("oneOf") or ([inner] if isinstance(inner, dict) and inner else [])
    return any(exemplified(each, above) for each in either if each.get("type") != "null")


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_sent_and_what_comes_back_has_an_example(route: str):
    _path, operation = ROUTES[route]
    answers = [answer for status, answer in operation["responses"].items() if status[0] == "2" and "$ref" not in answer]
    for told in [operation.get("requestBody", {}), *answers]:
        for kind, content in told.get("content", {}).items():
            if content.get("schema", {}).get("format") != "binary":
                assert "example" in content or exemplified(content["schema"]), kind
    for parameter in operation.get("parameters", ()):
        assert parameter.keys() & {"example", "examples"} or exemplified(parameter["schema"]), parameter["name"]


def test_the_example_of_a_policy_is_one():
    seen = 0
    for path in ("/v1/admin/policies/validate", "/v1/admin/tenants/{tenant}/policy"):
        for operation in DOCUMENT["paths"][path].values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                example = content.get("example") or content["schema"]["examples"][0]["yaml"]
                assert parse_policy(example, "example")
                seen += 1
    assert seen == 4  # as YAML and within JSON


def test_moments_are_dates():
    for name, schema in SCHEMAS.items():
        for field, said in schema.get("properties", {}).items():
            if field.endswith("_at"):
                assert "date-time" in str(said), (name, field)


def test_a_problem_is_as_it_is_described():
    faults = [{"at": "body.question", "is": "too long"}]
    schema = ProblemBody.model_json_schema()
    plain = Problem(422, "bad-request", "x").body()
    for more in dict[str, Any](), {"rule": "money.query"}, {"errors": faults}:
        assert fits(schema, plain | more)
    for more in {"rule": None}, {"errors": [{"at": 1}]}, {"status": "422"}:
        assert not fits(schema, plain | more)
