"""Sessions of browsers over HTTP: how they begin and end, and what they take."""

from __future__ import annotations

import httpx2

from tests.command import Airlock
from tests.service import Served, make_key, served

GARBAGE = "al_aaaaaaaaaaaa_" + "A" * 49
KEY_LIKE = ("", "x", GARBAGE, "\0", "al_\ud800", "é" * 100, "eyJ.eyJ.x")


def browser(server: Served, **options: object) -> httpx2.Client:
    """Nobody's, until it logs in."""
    return httpx2.Client(base_url=server.url, timeout=30, trust_env=False, **options)  # type: ignore[arg-type]


def log_in(page: httpx2.Client, **given: object) -> httpx2.Response:
    """As a browser does, for which this machine is as good as TLS: the cookie is for secure connections."""
    page.headers.pop("Cookie", None)
    answer = page.post("/login", **given)  # type: ignore[arg-type]
    page.headers["Cookie"] = answer.headers["Set-Cookie"].partition(";")[0]
    page.cookies.clear()
    return answer


def test_a_session_begins_and_ends(airlock: Airlock):
    with served(airlock) as server, browser(server) as page:
        key = server.key("acme")
        _begin_by_form(page, key)
        told = page.get("/v1/session")
        assert told.headers["Cache-Control"] == "no-store"
        session = told.json()
        assert (session["tenant"], session["scopes"]) == ("acme", ["audit", "query", "read"])
        assert page.get("/v1/queries").status_code == 200
        _changes_nothing_without_its_token(page, session["csrf"])
        ended = page.post("/logout", headers={"X-CSRF-Token": session["csrf"]})
        assert ended.status_code == 204
        assert ended.headers["Set-Cookie"].startswith('__Host-airlock=""; HttpOnly; Max-Age=0')
        assert log_in(page, json={"key": key}).status_code == 204
        assert page.get("/v1/session").json()["csrf"] != session["csrf"]
        with server.client() as client:  # a key has no session
            assert client.get("/v1/session").json() == {**session, "csrf": None}


def _begin_by_form(page: httpx2.Client, key: str) -> None:
    begun = log_in(page, data={"key": key})
    assert (begun.status_code, begun.headers["Location"]) == (303, "/")
    cookie = begun.headers["Set-Cookie"]
    assert cookie.startswith("__Host-airlock=")
    assert {part.strip() for part in cookie.lower().split(";")} >= {"secure", "httponly", "samesite=strict", "path=/"}
    assert key.rpartition("_")[2] not in cookie


def _changes_nothing_without_its_token(page: httpx2.Client, csrf: str) -> None:
    body = {"question": "q", "context": {"text": "a"}}
    for headers in (
        {},
        {"X-CSRF-Token": "x"},
        {"X-CSRF-Token": csrf, "Origin": "https://elsewhere.invalid"},
        {"X-CSRF-Token": csrf, "Origin": "null"},
        {"X-CSRF-Token": csrf, "Sec-Fetch-Site": "same-site"},
    ):
        for address in ("/v1/queries", "/logout"):
            refused = page.post(address, json=body, headers=headers)
            assert (refused.status_code, refused.json()["type"]) == (403, "urn:airlock:csrf")
    assert page.get("/v1/queries").json()["queries"] == []
    assert page.post("/v1/queries", json=body, headers={"X-CSRF-Token": csrf}).status_code == 202


def test_nobody_else_logs_in(airlock: Airlock):
    with served(airlock) as server, browser(server) as page:
        key = server.key("acme")
        for wrong in KEY_LIKE:
            body = b'{"key": "' + wrong.encode("unicode_escape").replace(b"\\x", b"\\u00") + b'"}'
            refused = page.post("/login", content=body, headers={"Content-Type": "application/json"})
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer"), wrong
            assert "Set-Cookie" not in refused.headers
        assert page.post("/login", data={"key": GARBAGE}).headers["Location"] == "/login?refused"
        for headers in ({"Origin": "https://elsewhere.invalid"}, {"Sec-Fetch-Site": "cross-site"}):
            assert page.post("/login", json={"key": key}, headers=headers).status_code == 403
        for content, status in (
            (b"{", 422),
            (b"[" * 5000, 422),
            (b'{"key": 1}', 422),
            (b"[]", 422),
            (b"x" * 9000, 413),
        ):
            refused = page.post("/login", content=content, headers={"Content-Type": "application/json"})
            assert (refused.status_code, refused.headers["Content-Type"]) == (status, "application/problem+json")
        for content in (b"", b"key", b"other=1", b"\xff=1", b"a=1&" * 100):
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            assert page.post("/login", content=content, headers=form).status_code == 422
        for cookie in ("x", "a.b.c.d", "." * 50, f"{key.split('_')[1]}.99999999999.x.{'0' * 64}"):
            forged = page.get("/v1/session", headers={"Cookie": f"__Host-airlock={cookie}"})
            assert forged.status_code == 401
        _suspended(airlock, page)


def _suspended(airlock: Airlock, page: httpx2.Client) -> None:
    """A session of before is no better than a key."""
    key = make_key(airlock, "stopped")
    log_in(page, json={"key": key})
    airlock("tenants", "suspend", "stopped", code=0)
    assert page.get("/v1/session").json()["type"] == "urn:airlock:suspended"
    del page.headers["Cookie"]
    assert page.post("/login", json={"key": key}).json()["type"] == "urn:airlock:suspended"
