"""What nobody should send to the service: each is told what is wrong in a line, and changes nothing."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import Any

import pytest

from tests.command import Airlock, until
from tests.service import SLOW, Served, ask, served

GOOD: dict[str, Any] = {"question": "q", "context": {"text": "a"}}
WRONG: dict[str, tuple[dict[str, Any], int]] = {
    "no question": ({"context": {"text": "a"}}, 422),
    "empty question": ({**GOOD, "question": ""}, 422),
    "blank question": ({**GOOD, "question": " \n"}, 422),
    "question too long": ({**GOOD, "question": "q" * 40_000}, 413),
    "no context": ({"question": "q"}, 422),
    "two contexts": ({**GOOD, "context": {"text": "a", "json": 1}}, 422),
    "empty context": ({**GOOD, "context": {"text": ""}}, 422),
    "a context that is a text": ({**GOOD, "context": "a"}, 422),
    "half a character": ({**GOOD, "context": {"text": "\ud800"}}, 422),
    "half a character in the question": ({**GOOD, "question": "\ud800"}, 422),
    "NUL": ({**GOOD, "model": "a\0b"}, 422),
    "unknown field": ({**GOOD, "tenant": "other"}, 422),
    "unknown model": ({**GOOD, "model": "scripted:/etc/passwd"}, 422),
    "a number for a model": ({**GOOD, "model": 1}, 422),
    "budget that is no number": ({**GOOD, "budget_usd": "NaN"}, 422),
    "negative budget": ({**GOOD, "budget_usd": "-1"}, 422),
    "budget as a number": ({**GOOD, "budget_usd": 0.5}, 422),
    "endless timeout": ({**GOOD, "timeout_s": 1e300}, 422),
    "deeper than the policy": ({**GOOD, "depth": 8}, 422),
    "path that leaves": ({**GOOD, "context": {"documents": [{"path": "../../etc/passwd", "text": "a"}]}}, 422),
    "absolute path": ({**GOOD, "context": {"documents": [{"path": "/etc/passwd", "text": "a"}]}}, 422),
    "path with a line break": ({**GOOD, "context": {"documents": [{"path": "a\nb", "text": "a"}]}}, 422),
    "no schema": ({**GOOD, "answer_schema": {"type": "nonsense"}}, 422),
    "large schema": ({**GOOD, "answer_schema": {"const": "x" * 65_536}}, 413),
    "more structure than a body has": ({**GOOD, "context": {"json": [[]] * 87_381}}, 413),
    "more fields than a body has": ({**GOOD, **{f"field{number}": 0 for number in range(50_000)}}, 413),
    "context of nobody": ({**GOOD, "context": {"id": "0" * 64}}, 404),
    "context id with a path": ({**GOOD, "context": {"id": "../../../etc/passwd"}}, 422),
}


def test_bodies_that_are_not_as_they_have_to_be(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        for name, (body, status) in WRONG.items():
            answer = client.post("/v1/queries", content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == status, (name, answer.text)
            problem = answer.json()
            assert answer.headers["Content-Type"] == "application/problem+json", name
            assert problem["status"] == status, name
            assert "\n" not in problem["detail"], name
        for body in ("{", '{"question": }', "[" * 100_000, "\xff", "nul", ""):
            answer = client.post("/v1/queries", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 422), (body[:20], answer.text)
        assert client.get("/v1/queries").json()["queries"] == []


def test_a_model_has_to_be_named_where_none_is_asked_by_default(airlock: Airlock):
    with served(airlock, by_default=False) as server, server.client() as client:
        refused = client.post("/v1/queries", json=GOOD)
        assert refused.status_code == 422, refused.text
        assert refused.json()["detail"] == (
            "name a model, for there is none that is asked by default: see GET /v1/models"
        )
        (model,) = client.get("/v1/models").json()["data"]
        assert ask(client, model=model["id"].removeprefix("rlm/"))["status"] == "answered"


@pytest.mark.parametrize("path", ["x", "20261126-010203-0123456789", "%00", "..%2f..", "a" * 3000])
def test_ids_that_are_none(airlock: Airlock, path: str):
    with served(airlock) as server, server.client() as client:
        unknown = client.get("/v1/queries/20260101-000000-0123456789")
        assert (unknown.status_code, unknown.json()["detail"]) == (404, "there is no such query")
        audits = ("records", "verify", "proof/0", "export")
        for route in ("", "/events", "/spend", *(f"/{name}" for name in audits)):
            where = "audit/queries" if route[1:] in audits else "queries"
            answer = client.get(f"/v1/{where}/{path}{route}")
            assert answer.status_code == 404, (route, answer.text)
            if "%2f" not in path:  # which is another path
                assert answer.json() == unknown.json(), route
        for route in ("queries/{}/cancel", "audit/queries/{}/replay"):
            assert client.post(f"/v1/{route.format(path)}").status_code == 404
        if path != "%00":
            assert client.get("/v1/queries", params={"cursor": path}).status_code == 422


def test_nobody_is_let_in_without_a_key(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        whole = server.key()
        for given in ("", "Bearer", "Bearer x", f"Bearer {whole}x", f"Bearer {whole[:-1]}", f"Basic {whole}"):
            answer = client.get("/v1/queries", headers={"Authorization": given})
            assert answer.status_code == 401, given
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert whole not in answer.text


def _stream(server: Served, query: str) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)))
    lines = (
        f"GET /v1/queries/{query}/events HTTP/1.1",
        f"Host: {host}:{port}",
        f"Authorization: Bearer {server.key()}",
    )
    made.sendall("\r\n".join([*lines, "", ""]).encode())
    assert made.recv(12) == b"HTTP/1.1 200"
    return made


def test_streams_of_clients_that_went_away_by_halves_are_given_up(airlock: Airlock):
    config = "[server]\nstreams = 60\n"
    with served(airlock, script=SLOW, config=config) as server, server.client() as client, ExitStack() as open_ones:
        query = ask(client, wait=0)["id"]
        for _round in range(3):
            streams = [open_ones.enter_context(_stream(server, query)) for _ in range(60)]
            assert client.get(f"/v1/queries/{query}/events").status_code == 429
            for stream in streams:
                stream.shutdown(socket.SHUT_WR)

            def room() -> bool:
                with client.stream("GET", f"/v1/queries/{query}/events") as answer:
                    return answer.status_code == 200

            until(room)
        client.post(f"/v1/queries/{query}/cancel")


def test_nothing_of_a_body_is_read_before_it_is_known_whose_it_is(airlock: Airlock):
    with served(airlock) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for path in ("queries", "contexts", "chat/completions", "admin/tenants", "nothing"):
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            with socket.create_connection((host, int(port)), timeout=20) as client:
                client.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())  # of which nothing comes
                assert client.recv(12) == b"HTTP/1.1 401", path
