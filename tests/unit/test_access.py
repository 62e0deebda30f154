"""Who is let in over HTTP, what each may do, and what a page of somebody else cannot make a browser do."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends
from httpx2 import Response
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from orchestrator.server import lasting, tokens
from orchestrator.server.access import LOGINS, allowed, the_gate
from orchestrator.server.lasting import while_let_in
from orchestrator.server.problems import Problem
from orchestrator.server.service import Principal
from orchestrator.server.streaming import EventStream
from tests.unit.serving import Small, small
from tests.unit.test_tokens import issuer, signed

router = APIRouter()
Reads = Annotated[Principal, Depends(allowed("read"))]


@router.get("/v1/read")
async def read(who: Reads) -> dict[str, Any]:
    return {"tenant": who.tenant, "asker": who.asker, "via": who.via, "scopes": sorted(who.scopes)}


@router.post("/v1/write")
async def write(who: Annotated[Principal, Depends(allowed("query"))]) -> str:
    return who.tenant


@router.get("/v1/admin")
async def administer(who: Annotated[Principal, Depends(allowed("admin"))]) -> str:
    return who.tenant


@router.get("/v1/plain")
async def plain(who: Reads) -> PlainTextResponse:
    return PlainTextResponse(who.tenant)


@router.get("/v1/wrong")
async def wrong(_who: Reads) -> str:
    raise Problem(418, "teapot", "no")


@router.get("/open")
async def for_all() -> str:
    return "all"


class Meanwhile:
    """What happens while a client is answered. looks: at its credential, from then on."""

    def __init__(self) -> None:
        self.work: Callable[[], object] = lambda: None
        self.wanted = 2**31
        self.done = False

    async def happen(self, request: Request) -> None:
        """It ends by itself only after the looks that are wanted."""
        await anyio.to_thread.run_sync(self.work)
        gate, enough = the_gate(request), anyio.Event()
        looked, looks = gate.principal, 0

        async def counted(connection: HTTPConnection) -> Principal:
            nonlocal looks
            found = await looked(connection)
            looks += 1
            if looks >= self.wanted:
                enough.set()
            return found

        gate.principal = counted  # type: ignore[method-assign]
        try:
            await enough.wait()
            self.done = True
        finally:
            gate.principal = looked  # type: ignore[method-assign]


@router.get("/v1/stream")
async def stream(request: Request, _who: Reads) -> EventStream:
    async def pieces() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"
        await request.app.state.meanwhile.happen(request)
        yield b"data: 2\n\n"

    return EventStream(pieces())


@router.get("/v1/wait")
async def wait(request: Request, _who: Reads) -> str:
    async with while_let_in(request):
        await request.app.state.meanwhile.happen(request)
    return "waited"


@pytest.fixture
def meanwhile(there: Small, monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    monkeypatch.setattr(lasting, "LOOK_AGAIN_S", 0.02)
    there.app.state.meanwhile = made = Meanwhile()
    return made


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Small]:
    with small(tmp_path, router, requests_minute=50) as made:
        yield made


def problem(answer: Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == f"urn:airlock:{kind}"
    return answer.json()


def log_in(there: Small, *scopes: str, tenant: str = "acme") -> tuple[dict[str, str], str]:
    """(headers with a session's cookie, its token)"""
    row = there.registry.check_key(there.key(tenant, *scopes))
    assert row
    gate = the_gate(HTTPConnection({"type": "http", "app": there.app}))
    value = gate.sessions.issue(row.id, time.time())
    session = gate.sessions.open(value, 0)
    assert session
    return {"Cookie": f"__Host-airlock={value}"}, session.csrf


# Keys and tokens


def test_a_key_is_let_in(there: Small):
    key = there.key("acme", "read")
    for scheme in ("Bearer", "bearer", "BEARER"):
        said = there.client.get("/v1/read", headers={"Authorization": f"{scheme} {key}"}).json()
        assert said == {"tenant": "acme", "asker": key.split("_")[1], "via": "key", "scopes": ["read"]}


def test_a_token_is_let_in(there: Small):
    there.registry.add_tenant("acme", by="a test")
    there.registry.set_issuer("acme", issuer(), by="a test")
    said = there.client.get("/v1/read", headers={"Authorization": f"Bearer {signed()}"}).json()
    assert said == {"tenant": "acme", "asker": "ann", "via": "token", "scopes": ["query", "read"]}


def test_whatever_is_wrong_the_answer_is_the_same(there: Small):
    good = there.bearer("read")
    key = there.key("acme", "read")
    revoked = there.key("acme", "read")
    there.registry.revoke_key("acme", revoked.split("_")[1], by="a test")
    there.registry.set_issuer("acme", issuer(), by="a test")
    assert there.client.get("/v1/read", headers=good).status_code == 200
    answers = [
        there.client.get("/v1/read", headers=headers)
        for headers in (
            [],
            *([("Authorization", text)] for text in ("", "Bearer", "Bearer ", f"Basic {key}", key, f"Token {key}")),
            *(
                [("Authorization", f"Bearer {text}")]
                for text in (revoked, key[:-1], key + "x", f" {key}", "al_", "x" * 9000)
            ),
            *([("Authorization", f"Bearer {text}".encode())] for text in ("\u00ff", "eyJ\u00ff.a.b", "eyJ\0")),
            [("Authorization", f"Bearer {signed(number=1)}")],
            [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")],
            [("Cookie", "__Host-airlock=x.y.z.w")],
            [("Cookie", f"__Host-airlock={key}")],
            [("X-Api-Key", key)],
        )
    ]
    bodies = {answer.text for answer in answers}
    assert len(bodies) == 1, bodies
    for answer in answers:
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "ratelimit" not in answer.headers


def test_a_scope_that_lacks(there: Small):
    answer = there.client.get("/v1/admin", headers=there.bearer("query", "read", "audit", "metrics"))
    assert "'admin'" in problem(answer, 403, "insufficient-scope")["detail"]
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="admin"'
    assert there.client.get("/v1/admin", headers=there.bearer("admin")).json() == "acme"
    problem(there.client.get("/v1/read", headers=there.bearer("admin")), 403, "insufficient-scope")


def test_a_suspended_tenant(there: Small):
    headers, other = there.bearer("read"), there.bearer("read", tenant="other")
    session, _ = log_in(there, "read")
    there.registry.set_issuer("acme", issuer(), by="a test")
    there.registry.suspend("acme", by="a test")
    for credential in (headers, session, {"Authorization": f"Bearer {signed()}"}):
        problem(there.client.get("/v1/read", headers=credential), 403, "suspended")
    assert there.client.get("/v1/read", headers=other).status_code == 200
    there.registry.restore("acme", by="a test")
    assert there.client.get("/v1/read", headers=headers).status_code == 200


def test_a_use_is_noted(there: Small):
    headers = there.bearer("read")
    there.client.get("/v1/read", headers=headers)
    there.service.platform.db.read(lambda _tx: None)
    assert there.registry.keys("acme")[0].used_at


# Who is answered for long


def test_who_is_let_in_is_answered_to_the_end(there: Small, meanwhile: Meanwhile):
    there.registry.add_tenant("acme", by="a test")
    there.registry.set_issuer("acme", issuer(), by="a test")
    meanwhile.wanted = 3
    for headers in (there.bearer("read"), log_in(there, "read")[0], {"Authorization": f"Bearer {signed()}"}):
        assert there.client.get("/v1/stream", headers=headers).text == "data: 1\n\ndata: 2\n\n"
        assert there.client.get("/v1/wait", headers=headers).json() == "waited"


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/wait"])
@pytest.mark.parametrize("what", ["revoked", "suspended", "session", "logged out", "issuer", "narrower", "token"])
def test_who_is_let_in_no_more_is_answered_no_more(
    there: Small, meanwhile: Meanwhile, path: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    registry, headers, shut_out = there.registry, there.bearer("read"), (401, "unauthorized")
    key = registry.keys("acme")[0].id
    meanwhile.work = lambda: registry.revoke_key("acme", key, by="a test")
    match what:
        case "suspended":
            meanwhile.work, shut_out = lambda: registry.suspend("acme", by="a test"), (403, "suspended")
        case "session":
            headers = log_in(there, "read")[0]
            mine = registry.keys("acme")[-1].id
            meanwhile.work = lambda: registry.revoke_key("acme", mine, by="a test")
        case "logged out":
            headers, _ = log_in(there, "read")
            gate = the_gate(HTTPConnection({"type": "http", "app": there.app}))
            session = gate.sessions.open(headers["Cookie"].partition("=")[2], 0)
            assert session
            meanwhile.work = lambda: gate.sessions.end(session, 0)
        case "issuer" | "narrower" | "token":
            registry.set_issuer("acme", issuer(), by="a test")
            headers = {"Authorization": f"Bearer {signed()}"}
            less = issuer(scopes=["query"]) if what == "narrower" else None
            meanwhile.work = lambda: registry.set_issuer("acme", less, by="a test")
            if what == "token":
                meanwhile.work = lambda: monkeypatch.setattr(tokens, "LEEWAY_S", -(10**6))  # so it has expired
        case _:
            pass
    answer = there.client.get(path, headers=headers)
    if path == "/v1/wait":
        problem(answer, *shut_out)
    else:
        assert (answer.status_code, answer.text) == (200, "data: 1\n\n")
    assert not meanwhile.done


# The rate


def test_every_answer_says_what_is_left(there: Small):
    headers = there.bearer("read")
    left: list[int] = []
    for path, status in (
        ("/v1/read", 200),
        ("/v1/plain", 200),
        ("/v1/wrong", 418),
        ("/v1/admin", 403),
        ("/v1/read", 200),
    ):
        answer = there.client.get(path, headers=headers)
        assert answer.status_code == status
        assert answer.headers["ratelimit-policy"] == '"minute";q=50;w=60'
        match = re.fullmatch(r'"minute";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
        assert match
        assert 1 <= int(match[2]) <= 60
        left.append(int(match[1]))
    assert left == [49, 48, 47, 46, 45]
    assert "ratelimit" not in there.client.get("/open").headers


def test_a_tenant_that_asks_too_often(there: Small):
    keys = [there.bearer("read"), there.bearer("read"), log_in(there, "read")[0]]
    for number in range(50):
        assert there.client.get("/v1/read", headers=keys[number % 3]).status_code == 200
    for headers in keys:  # all of its keys together
        answer = there.client.get("/v1/read", headers=headers)
        problem(answer, 429, "rate-limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["ratelimit"].startswith('"minute";r=0;t=')
    assert there.client.get("/v1/read", headers=there.bearer("read", tenant="other")).status_code == 200


# Logins


def test_logins_that_fail_are_bounded(there: Small):
    key, wrong = there.key("acme", "read"), {"key": "al_aaaaaaaaaaaa_" + "A" * 49}
    other = TestClient(there.app, base_url="https://airlock.example", client=("2001:db8::1", 1))
    same = TestClient(there.app, base_url="https://airlock.example", client=("2001:db8::ffff:1", 1))
    next_to_it = TestClient(there.app, base_url="https://airlock.example", client=("2001:db8:0:1::1", 1))
    for client in (there.client, other):
        for _ in range(LOGINS):
            assert client.post("/login", json={"key": key}).status_code == 204, "what succeeds does not count"
            problem(client.post("/login", json=wrong), 401, "unauthorized")
    for client in (there.client, other, same):
        answer = client.post("/login", json=wrong)
        problem(answer, 429, "too-many-logins")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        form = client.post("/login", data=wrong, follow_redirects=False)
        assert (form.status_code, form.headers["location"]) == (303, "/login?later")
        assert client.post("/login", json={"key": key}).status_code == 204, "who fails locks nobody else out"
    problem(next_to_it.post("/login", json=wrong), 401, "unauthorized")


# Sessions


def test_logging_out_ends_the_session_for_who_has_a_copy(there: Small):
    cookie, csrf = log_in(there, "read")
    other, _ = log_in(there, "read")
    problem(there.client.post("/logout", headers=cookie), 403, "csrf")
    assert there.client.get("/v1/read", headers=cookie).status_code == 200
    assert there.client.post("/logout", headers={**cookie, "X-CSRF-Token": csrf}).status_code == 204
    problem(there.client.get("/v1/read", headers=cookie), 401, "unauthorized")
    assert there.client.get("/v1/read", headers=other).status_code == 200


def test_a_session_reads_as_its_key_does(there: Small):
    cookie, _ = log_in(there, "read")
    said = there.client.get("/v1/read", headers=cookie).json()
    assert (said["tenant"], said["via"], said["scopes"]) == ("acme", "session", ["read"])
    problem(there.client.get("/v1/admin", headers=cookie), 403, "insufficient-scope")


def test_a_session_ends_with_its_key(there: Small):
    cookie, _ = log_in(there, "read")
    there.registry.revoke_key("acme", there.registry.keys("acme")[0].id, by="a test")
    problem(there.client.get("/v1/read", headers=cookie), 401, "unauthorized")


def test_a_bad_header_is_not_made_good_by_a_cookie(there: Small):
    cookie, _ = log_in(there, "read")
    problem(there.client.get("/v1/read", headers={**cookie, "Authorization": "Bearer x"}), 401, "unauthorized")


def test_a_session_changes_things_from_its_own_page_alone(there: Small):
    cookie, csrf = log_in(there, "query")
    own = {**cookie, "X-CSRF-Token": csrf}
    for more in (
        {},
        {"Origin": "https://airlock.example"},
        {"Origin": "https://AIRLOCK.example", "Sec-Fetch-Site": "same-origin"},
    ):
        assert there.client.post("/v1/write", headers={**own, **more}).json() == "acme"
    for more in (
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": csrf[:-1]},
        {"X-CSRF-Token": log_in(there, "query")[1]},
        {"Origin": "https://evil.example"},
        {"Origin": "https://airlock.example.evil"},
        {"Origin": "https://airlock.example:444"},
        {"Origin": "https://x@airlock.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ):
        problem(there.client.post("/v1/write", headers={**own, **more}), 403, "csrf")
    problem(there.client.post("/v1/write", headers=cookie), 403, "csrf")
    problem(there.client.post("/v1/write", headers=[*own.items(), ("X-CSRF-Token", "x")][::-1]), 403, "csrf")


def test_a_key_needs_no_token_of_a_page(there: Small):
    """No browser sends it by itself."""
    headers = {**there.bearer("query"), "Origin": "https://elsewhere.example"}
    assert there.client.post("/v1/write", headers=headers).json() == "acme"


def test_without_tls_the_cookie_is_another(tmp_path: Path):
    with small(tmp_path, router, secure=False) as there:
        cookie, _ = log_in(there, "read")
        problem(there.client.get("/v1/read", headers=cookie), 401, "unauthorized")
        plain = {"Cookie": cookie["Cookie"].replace("__Host-", "")}
        assert there.client.get("/v1/read", headers=plain).status_code == 200


def test_the_document_says_how_to_be_let_in(there: Small):
    document = there.app.openapi()
    schemes = document["components"]["securitySchemes"]
    assert (schemes["bearer"]["scheme"], schemes["session"]["in"]) == ("bearer", "cookie")
    assert document["paths"]["/v1/read"]["get"]["security"] == [{"bearer": []}, {"session": []}]
    assert "security" not in document["paths"]["/open"]["get"]


def test_another_method_is_told_those_of_all_routes(there: Small):
    answer = there.client.delete("/v1/queries", headers=there.bearer("query"))
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, POST"
    assert answer.json()["detail"] == "this takes GET, POST"


def test_a_body_that_is_not_called_json_is_told_so(there: Small):
    headers = there.bearer("query") | {"Content-Type": "application/x-www-form-urlencoded"}
    answer = there.client.post("/v1/queries", content=b'{"question": "q"}', headers=headers)
    problem(answer, 422, "bad-request")
    assert "Content-Type: application/json" in answer.json()["detail"]


def test_the_document_says_where_a_query_is_found(there: Small):
    answers = there.app.openapi()["paths"]["/v1/queries"]["post"]["responses"]
    for status in ("200", "202"):
        assert {"Location", "Idempotency-Replayed", "Preference-Applied"} <= answers[status]["headers"].keys()
        assert answers[status]["content"]["application/json"]["schema"]
