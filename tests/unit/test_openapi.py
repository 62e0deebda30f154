"""The OpenAPI document: it is one, its examples are what they show, and every answer is described alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from orchestrator.server.app import make_app
from orchestrator.server.chat.errors import speaks
from orchestrator.server.openapi import TAGS
from orchestrator.server.problems import MEDIA_TYPE, Problem, ProblemBody

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


def test_operations_make_methods():
    ids: list[str] = [operation["operationId"] for _path, operation in ROUTES.values()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)+", name) for name in ids), ids
    assert {"ask_query", "list_queries", "get_query", "put_context", "list_contexts", "list_keys"} <= set(ids)
    parameters = set(re.findall(r"\{(\w+)", " ".join(DOCUMENT["paths"])))
    assert parameters == {"query", "context", "upload", "tenant", "key", "seq", "model"}


@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_is_described_alike(route: str):
    path, operation = ROUTES[route]
    assert operation["summary"][0].isupper()
    assert " " in operation["summary"]
    assert set(operation["tags"]) <= {tag["name"] for tag in TAGS}
    answers = operation["responses"]
    assert {"400", "421", "431", "500"} <= answers.keys()
    assert "requestBody" not in operation or {"408", "413"} <= answers.keys()
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
