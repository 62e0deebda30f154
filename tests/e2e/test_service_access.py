"""Tenants, keys and sessions of a service that runs: what is changed beside it holds at its next request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.command import Airlock
from tests.service import SLOW, Served, ask, served
from tests.unit.helpers import POLICIES


@pytest.fixture
def service(airlock: Airlock) -> Iterator[Served]:
    with served(airlock) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_what_the_command_line_changes_holds_at_once(airlock: Airlock, service: Served):
    airlock("tenants", "add", "acme", code=0)
    made = airlock("keys", "create", "acme", "--json", code=0).json
    with httpx2.Client(base_url=service.url, trust_env=False, headers=bearer(made["key"])) as client:
        assert client.get("/v1/budgets").status_code == 200
        assert client.get("/v1/admin/tenants").status_code == 403
        airlock("tenants", "suspend", "acme", code=0)
        assert client.get("/v1/budgets").json()["type"] == "urn:airlock:suspended"
        airlock("tenants", "restore", "acme", code=0)
        answer = client.get("/v1/budgets")
        assert answer.status_code == 200
        assert re.fullmatch(r'"minute";r=\d+;t=\d+', answer.headers["ratelimit"])
        airlock("keys", "revoke", "acme", made["id"], code=0)
        answer = client.get("/v1/budgets")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    used = airlock("keys", "list", "acme", "--json", code=0).json["keys"][0]["used_at"]
    assert used
    assert airlock("audit", "verify", code=0).out.count("holds") == 5


def test_who_is_shut_out_is_answered_no_more(airlock: Airlock):
    """Streams and requests that wait end long before their queries do."""
    chat = {"model": f"rlm/scripted:{airlock.folder}/script.yaml", "messages": [{"role": "user", "content": "q?"}]}
    new = {"question": "q?", "context": {"text": "a"}}
    with served(airlock, script=SLOW) as server, server.client() as client, server.client("acme", "read") as other:
        watched = client.post("/v1/queries", json=new).json()["id"]
        begun = [threading.Event() for _ in range(2)]

        def streamed(first: threading.Event, method: str, path: str, **given: Any) -> tuple[int, str]:
            with client.stream(method, path, **given) as answer:
                lines: list[str] = []
                for line in answer.iter_lines():
                    lines.append(line)
                    first.set()
                return answer.status_code, "\n".join(lines)

        with ThreadPoolExecutor(4) as pool:
            events = pool.submit(streamed, begun[0], "GET", f"/v1/queries/{watched}/events")
            chunks = pool.submit(streamed, begun[1], "POST", "/v1/chat/completions", json={**chat, "stream": True})
            whole = pool.submit(client.post, "/v1/chat/completions", json=chat)
            waits = pool.submit(client.post, "/v1/queries", json=new, headers={"Prefer": "wait=60"})
            for event in begun:
                assert event.wait(30)
            while len(found := other.get("/v1/queries").json()["queries"]) < 4:
                pass
            airlock("keys", "revoke", "acme", server.key().split("_")[1], code=0)
            begins = time.monotonic()
            (status, seen), (told, said) = events.result(), chunks.result()
            answers = whole.result(), waits.result()
            assert time.monotonic() - begins < 15
        assert (status, told) == (200, 200)
        assert "query.closed" not in seen
        assert '"code":"invalid_api_key"' in said.strip().rpartition("\n")[2], said
        assert [answer.status_code for answer in answers] == [401, 401]
        assert all(query["status"] in ("queued", "running") for query in found)
        while (states := [row["status"] for row in other.get("/v1/queries").json()["queries"]]).count("cancelled") < 2:
            assert set(states) <= {
                "queued",
                "running",
                "cancelled",
            }  # those of the chats end, as when a client has gone


def test_a_policy_that_was_put_in_force_bounds_the_next_query(service: Served):
    policy = (POLICIES / "default.yaml").read_text().replace("query: 1 USD", "query: 0.25 USD")
    with service.client("ops", "admin") as admin, service.client("acme") as client:
        assert ask(client)["limit_usd"] == "1.00"
        yaml = {"Content-Type": "application/yaml"}
        tried = admin.post("/v1/admin/tenants/acme/policy/dry-run", content=policy, headers=yaml).json()
        assert [(row["key"], row["change"]) for row in tried["changes"]] == [("money.query", "narrower")]
        assert admin.put("/v1/admin/tenants/acme/policy", content=policy, headers=yaml).status_code == 200
        assert ask(client)["limit_usd"] == "0.25"
        assert admin.post("/v1/admin/tenants", json={"name": "more"}).status_code == 201
        key = admin.post("/v1/admin/tenants/more/keys", json={}).json()["key"]
        assert client.get("/v1/budgets", headers=bearer(key)).json()["query"]["limit_usd"] == "1.00"


def test_a_session_lives_as_long_as_its_key(airlock: Airlock, service: Served):
    key = service.key("acme")
    with httpx2.Client(base_url=service.url, trust_env=False) as browser:
        assert browser.get("/v1/session").status_code == 401
        done = browser.post("/login", data={"key": key}, headers={"Sec-Fetch-Site": "same-origin"})
        assert done.status_code == 303
        cookie = done.headers["set-cookie"]
        assert re.fullmatch(
            r"__Host-airlock=[^;]+; HttpOnly; Max-Age=28800; Path=/; SameSite=strict; Secure", cookie
        ), cookie
        session = {"Cookie": cookie.partition(";")[0]}  # this client keeps none of those for http
        said = browser.get("/v1/session", headers=session).json()
        assert said["tenant"] == "acme"
        asked = {"question": "Is it long?", "context": {"text": "hello"}}
        refused = browser.post("/v1/queries", json=asked, headers=session)
        assert refused.json()["type"] == "urn:airlock:csrf"
        evil = {**session, "X-CSRF-Token": said["csrf"], "Origin": "https://evil.example"}
        assert browser.post("/v1/queries", json=asked, headers=evil).json()["type"] == "urn:airlock:csrf"
        own = {**session, "X-CSRF-Token": said["csrf"], "Origin": service.url, "Prefer": "wait=30"}
        assert browser.post("/v1/queries", json=asked, headers=own).status_code == 200
        airlock("keys", "revoke", "acme", key.split("_")[1], code=0)
        assert browser.get("/v1/session", headers=session).status_code == 401


def test_no_key_is_in_the_log_or_on_disk(airlock: Airlock, service: Served):
    key = service.key("acme")
    with service.client("acme") as client:
        ask(client, question=f"Is {key} long?")
        client.get("/v1/queries/none", headers=bearer(key + "x"))
        client.get(f"/v1/{key}")
        client.get("/v1/budgets", params={"key": key})
    service.stop()
    secret = key.split("_")[2].encode()
    held = [path for path in files(airlock.home, service.log) if secret in path.read_bytes()]
    assert held == []


def files(home: Path, log: Path) -> list[Path]:
    return [log, *(path for path in home.rglob("*") if path.is_file())]
