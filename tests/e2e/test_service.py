"""Queries over HTTP: asked, watched, cancelled, and seen to their end whatever becomes of the service."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from orchestrator.auditing import open_books
from orchestrator.core.policy_file import parse_policy
from orchestrator.named_policy import load_policy
from orchestrator.server import queries_view
from orchestrator.server.protocol import PER_ADDRESS
from orchestrator.store.journal import Connection
from tests.command import Airlock, until
from tests.service import SCRIPT, SLOW, ask, events, registry, served


def shown(airlock: Airlock, query: str) -> dict[str, Any]:
    """As the service would show it, while there is none."""
    with open_books(airlock.home) as books:

        def look(tx: Connection) -> dict[str, Any]:
            found = queries_view.find(tx, query)
            assert found
            return queries_view.view(tx, books, found)

        return books.db.read(look)


def test_a_query_is_asked_watched_and_answered(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        done = ask(client)
        assert (done["status"], done["answer"]) == ("answered", "it is short")
        assert done["iterations"] == 2
        assert done["sub_calls"] == 1
        records = list(events(client, done["id"]))
        assert [number for number, _kind, _data in records] == list(range(len(records)))
        assert records[0][1] == "query.opened"
        assert records[0][2]["payloads"]["question"] == "Is it long?"
        assert records[-1][1] == "query.closed"
        assert records[-1][2]["payloads"]["answer"] == "it is short"
        listed = client.get("/v1/queries").json()
        assert [query["id"] for query in listed["queries"]] == [done["id"]]
        spend = client.get(f"/v1/queries/{done['id']}/spend").json()
        assert spend["nodes"]["root"]["spent_usd"] == done["cost_usd"]
        assert sum(model["calls"] for model in spend["models"].values()) == 3


def test_a_stream_goes_on_where_it_was_cut(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        done = ask(client)
        whole = list(events(client, done["id"]))
        assert list(events(client, done["id"], after=3)) == whole[4:]
        over = client.get(f"/v1/queries/{done['id']}/events", headers={"Last-Event-ID": str(whole[-1][0])})
        assert over.status_code == 204


def test_a_stream_has_what_happens_as_it_happens(airlock: Airlock):
    slow = SCRIPT + "delay_s: 0.3\n"
    with served(airlock, script=slow) as server, server.client() as client, server.client() as other:
        query = ask(client, wait=0)["id"]
        seen: list[str] = []
        for _number, kind, _data in events(client, query):
            seen.append(other.get(f"/v1/queries/{query}").json()["status"])
            last = kind
        assert last == "query.closed"
        assert seen[0] in ("queued", "running")
        assert "running" in seen


def test_an_idempotency_key_gives_the_query_of_before(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        body = {"question": "q", "context": {"text": "a"}}
        asked = [
            client.post("/v1/queries", json=body, headers={"Idempotency-Key": "k", **more})
            for more in ({"Prefer": "wait=999999"}, dict[str, str]())
        ]
        assert [answer.status_code for answer in asked] == [200, 200], "it has ended"
        assert asked[0].headers["Preference-Applied"] == "wait=300"
        assert "Preference-Applied" not in asked[1].headers
        assert asked[0].json()["id"] == asked[1].json()["id"]
        assert "Idempotency-Replayed" not in asked[0].headers
        assert asked[1].headers["Idempotency-Replayed"] == "true"
        other = client.post("/v1/queries", json=body | {"question": "r"}, headers={"Idempotency-Key": "k"})
        assert other.status_code == 422
        assert other.json()["type"] == "urn:airlock:idempotency-key-reused"
        with server.client("other") as another:
            apart = another.post("/v1/queries", json=body, headers={"Idempotency-Key": "k"})
            assert apart.json()["id"] != asked[0].json()["id"]


def test_a_query_of_before_is_given_also_when_its_context_is_gone(airlock: Airlock):
    with served(airlock) as server, server.client("acme", "query", "read") as client:
        context = client.put("/v1/contexts", content=b"hello").json()["id"]
        body = {"question": "q", "context": {"id": context}}
        first, again = {"Idempotency-Key": "k", "Prefer": "wait=30"}, {"Idempotency-Key": "k"}
        query = client.post("/v1/queries", json=body, headers=first).json()["id"]
        assert client.delete(f"/v1/contexts/{context}").status_code == 204
        before = client.post("/v1/queries", json=body, headers=again)
        assert (before.status_code, before.json().get("id")) == (200, query)
        other = client.post("/v1/queries", json=body | {"question": "r"}, headers=again)
        assert other.json()["type"] == "urn:airlock:idempotency-key-reused"
        assert client.post("/v1/queries", json=body, headers={"Idempotency-Key": "l"}).status_code == 404


def test_who_waits_for_a_query_and_goes_is_not_waited_for(airlock: Airlock):
    with served(airlock, script=SLOW) as server, server.client() as client:
        body = json.dumps({"question": "q", "context": {"text": "a"}})
        host = server.url.removeprefix("http://")
        head = f"POST /v1/queries HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.key()}\r\n"
        head += f"Content-Type: application/json\r\nPrefer: wait=300\r\nContent-Length: {len(body)}\r\n\r\n"
        name, _, port = host.partition(":")
        with socket.create_connection((name, int(port))) as connection:
            connection.sendall((head + body).encode())
            query = until(lambda: client.get("/v1/queries").json()["queries"])[0]["id"]
        until(
            lambda: [line for line in server.lines() if line.get("route") == "/v1/queries" and line["method"] == "POST"]
        )
        assert client.get(f"/v1/queries/{query}").json()["status"] in ("queued", "running"), "it goes on"
        client.post(f"/v1/queries/{query}/cancel")


def test_a_query_of_before_that_runs_is_no_answer_yet(airlock: Airlock):
    with served(airlock, script=SLOW) as server, server.client() as client:
        body = {"question": "q", "context": {"text": "a"}}
        asked = [client.post("/v1/queries", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert [answer.status_code for answer in asked] == [202, 202]
        assert asked[1].headers["Idempotency-Replayed"] == "true"
        assert asked[1].json()["context"] == {**asked[1].json()["context"], "bytes": 1, "characters": 1}
        client.post(f"/v1/queries/{asked[0].json()['id']}/cancel")


def test_an_idempotency_key_makes_one_query_of_many_requests_at_once(airlock: Airlock):
    with served(airlock) as server, server.client() as client:

        def post(_number: int) -> str:
            body = {"question": "q", "context": {"text": "a"}}
            return client.post("/v1/queries", json=body, headers={"Idempotency-Key": "k"}).json()["id"]

        with ThreadPoolExecutor(8) as threads:
            assert len(set(threads.map(post, range(8)))) == 1


@pytest.mark.parametrize("how", ["queued", "running"])
def test_a_query_is_cancelled(airlock: Airlock, how: str):
    config = "[server]\nqueries = 1\n"
    with served(airlock, script=SLOW, config=config) as server, server.client() as client:
        first = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{first}").json()["status"] == "running")
        second = ask(client, wait=0)["id"]
        assert client.get(f"/v1/queries/{second}").json()["status"] == "queued"
        query = second if how == "queued" else first
        assert client.post(f"/v1/queries/{query}/cancel").status_code == 202
        ended = until(lambda: (found := client.get(f"/v1/queries/{query}").json())["ended_at"] and found)
        assert (ended["status"], ended["reason"]) == ("cancelled", "cancelled")
        for left in {first, second} - {query}:
            client.post(f"/v1/queries/{left}/cancel")
        again = client.post(f"/v1/queries/{query}/cancel")
        assert again.json()["status"] == "cancelled"


def test_the_queue_is_bounded(airlock: Airlock):
    config = "[server]\nqueries = 1\nqueue_tenant = 2\nqueue = 3\n"
    with served(airlock, script=SLOW, config=config) as server, server.client() as client:
        queries = [ask(client, wait=0)["id"]]
        until(lambda: client.get(f"/v1/queries/{queries[0]}").json()["status"] == "running")
        queries += [ask(client, wait=0)["id"] for _ in range(2)]
        body = {"question": "q", "context": {"text": "a"}}
        full = client.post("/v1/queries", json=body)
        assert full.status_code == 429
        assert full.json()["type"] == "urn:airlock:queue-full"
        assert int(full.headers["Retry-After"]) > 0
        with server.client("second") as other:
            queries_of_other = [ask(other, wait=0)["id"]]
            assert other.post("/v1/queries", json=body).status_code == 503
            for query in queries_of_other:
                other.post(f"/v1/queries/{query}/cancel")
        for query in queries:
            client.post(f"/v1/queries/{query}/cancel")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_service_that_is_stopped_lets_queries_end(airlock: Airlock, how: signal.Signals):
    slow = SCRIPT + "delay_s: 0.5\n"
    with served(airlock, script=slow) as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        assert server.stop(how) == 0
    assert airlock.closing()["status"] == "answered"


def test_a_service_under_nohup_goes_on_when_its_terminal_is_closed(airlock: Airlock):
    with served(replace(airlock, prefix=["nohup"])) as server, server.client() as client:
        server.process.send_signal(signal.SIGHUP)
        assert ask(client)["status"] == "answered"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_queries_of_a_service_that_ended_are_gone_on_with_by_the_next_one(airlock: Airlock, how: signal.Signals):
    slow = SCRIPT + "delay_s: 1\n"
    config = "[server]\nqueries = 1\ndrain_s = 0\n"
    with served(airlock, script=slow, config=config) as server, server.client() as client:
        running = ask(client, wait=0)["id"]
        waiting = ask(client, "And this one?", wait=0)["id"]
        until(lambda: "cell.ended" in {row["type"] for row in airlock.records(running)})
        server.stop(how)
    found = shown(airlock, running)
    assert (found["status"], found["ended_at"]) == ("interrupted" if how == signal.SIGTERM else "running", None)
    with served(airlock, script=SCRIPT, config=config) as server, server.client() as client:
        for query in (running, waiting):
            ended = until(lambda q=query: (got := client.get(f"/v1/queries/{q}").json())["ended_at"] and got)
            assert (ended["status"], ended["answer"]) == ("answered", "it is short"), ended
    kinds = [row["type"] for row in airlock.records(running)]
    assert kinds.count("query.opened") == 1
    assert "query.resumed" in kinds


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_queries_of_a_service_that_ended_are_gone_on_with_by_the_one_beside_it(airlock: Airlock, how: signal.Signals):
    """Those that ran, and those that waited: nobody has to be started anew for them."""
    beside = Airlock(airlock.home, airlock.folder / "beside")
    beside.folder.mkdir()
    slow, config = SCRIPT + "delay_s: 1\n", "[server]\nqueries = 1\ndrain_s = 0\n"
    same = ("--model", f"scripted:{airlock.folder}/script.yaml")
    with served(airlock, script=slow, config=config) as server, served(beside, *same, script=slow) as other:
        other.keys = {"acme": server.key()}
        with server.client() as client:
            asked = [ask(client, question, wait=0)["id"] for question in ("Is it long?", "And this one?")]
            until(lambda: client.get(f"/v1/queries/{asked[0]}").json()["status"] == "running")
        server.stop(how)
        with other.client() as client:
            for query in asked:
                ended = until(lambda q=query: (got := client.get(f"/v1/queries/{q}").json())["journal_head"] and got)
                assert ended["answer"] == "it is short"


def test_a_query_that_cannot_be_gone_on_with_ends_alone(airlock: Airlock):
    """Its tenant's policy is one of a newer Airlock: what others ask is answered all the same."""
    with served(airlock, script=SLOW) as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        server.stop(signal.SIGKILL)
    with closing(sqlite3.connect(airlock.home / "airlock.db")) as db, db:
        db.execute("UPDATE tenants SET policy = '{\"newer\": 1}' WHERE name = 'acme'")
    with served(airlock) as server, server.client("other") as client:
        until(lambda: [line for line in server.lines() if line["level"] == "error" and line.get("query") == query])
        assert ask(client)["status"] == "answered"
        assert airlock.rows("SELECT status FROM queries WHERE id = ?", query) == [("interrupted",)]


def test_a_stopped_service_keeps_nobody_waiting(airlock: Airlock):
    """Streams end, and who waits is told how far it is: at once, and in order."""
    config = "[server]\ndrain_s = 0\n"
    with (
        served(airlock, script=SLOW, config=config) as server,
        server.client() as client,
        ThreadPoolExecutor(2) as both,
    ):
        query = ask(client, wait=0)["id"]
        seen: list[str] = []
        stream = both.submit(lambda: [seen.append(kind) for _number, kind, _data in events(client, query)])
        waits = both.submit(lambda: ask(client, "And this?", wait=60))
        until(lambda: "call.intent" in seen and len(airlock.rows("SELECT id FROM queries WHERE status='open'")) == 2)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 5, "it waited for its clients"
        stream.result()
        assert seen[-1] == "query.interrupted"
        assert waits.result()["status"] == "interrupted"


def test_a_second_signal_stops_it_at_once_and_what_ran_is_left(airlock: Airlock):
    with served(airlock, script=SLOW, config="[server]\ndrain_s = 600\n") as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.post("/v1/queries", json={"question": "q", "context": {"text": "a"}}).status_code == 503
        assert server.stop() == 0
    assert airlock.records(query)[-1]["type"] == "query.interrupted"


def test_a_stopped_service_closes_what_it_could_not_leave(airlock: Airlock):
    policy = airlock.policy(audit_payloads="hash")
    config = "[server]\ndrain_s = 0\n"
    with served(airlock, "--policy", policy, script=SLOW, config=config) as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        server.stop()
    assert airlock.closing()["status"] == "cancelled"
    assert airlock.closing()["reason"].startswith("service-stopped")


def test_money_that_is_spent_is_402_and_says_whose(airlock: Airlock):
    policy = airlock.policy(money_tenant_day="0.01 USD")
    options = ("--policy", policy, "--price", f"scripted:{airlock.folder}/script.yaml=1000,1000")
    with served(airlock, *options) as server, server.client() as client:
        refused = client.post("/v1/queries", json={"question": "q", "context": {"text": "a"}})
        assert refused.status_code == 402
        assert refused.json()["rule"] == "money.query"


def test_a_public_address_needs_tls(airlock: Airlock):
    said = airlock("serve", "--host", "0.0.0.0", "--port", 0, code=2).said  # noqa: S104
    assert "--tls-cert" in said


def test_it_does_not_start_without_a_model_that_can_be_asked(airlock: Airlock):
    def refused(*options: object) -> str:
        return airlock("serve", "--port", 0, "--backend", "bubblewrap", *options, code=2).lines[0]

    assert "no model is configured" in refused()
    assert "there is no API key for gpt-5-mini: set OPENAI_API_KEY" in refused("--model", "gpt-5-mini")
    assert "--price mine=" in refused("--model", "mine", "--base-url", "http://127.0.0.1:9")


def test_a_proxy_on_this_machine_may_have_many_connections(airlock: Airlock):
    with served(airlock) as server, ExitStack() as open_ones:
        where = urlsplit(server.url)
        for _number in range(PER_ADDRESS + 20):
            connection = open_ones.enter_context(socket.create_connection((where.hostname, where.port), timeout=20))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_what_a_tenant_has_running_ends_when_it_is_suspended(airlock: Airlock):
    with served(airlock, script=SLOW) as server, server.client() as client, server.client("other") as other:
        mine, theirs = ask(client, wait=0)["id"], ask(other, wait=0)["id"]
        airlock("tenants", "suspend", "acme", code=0)
        until(lambda: airlock.records(mine)[-1]["type"] == "query.closed")
        assert airlock.records(mine)[-1]["body"]["reason"].startswith("suspended")
        refused = client.get(f"/v1/queries/{mine}")
        assert (refused.status_code, refused.json()["type"]) == (403, "urn:airlock:suspended")
        assert other.get(f"/v1/queries/{theirs}").json()["status"] == "running"
        other.post(f"/v1/queries/{theirs}/cancel")


def test_who_asks_much_does_not_make_others_wait_for_all_of_it(airlock: Airlock):
    slow = SCRIPT + "delay_s: 0.05\n"
    config = "[server]\nqueries = 1\n"
    with served(airlock, script=slow, config=config) as server, server.client() as client, server.client("b") as other:
        many = [ask(client, wait=0)["id"] for _ in range(8)]
        one = ask(other)
        assert one["status"] == "answered"
        waiting = [query for query in many if client.get(f"/v1/queries/{query}").json()["status"] == "queued"]
        assert len(waiting) >= 4
        for query in waiting:
            client.post(f"/v1/queries/{query}/cancel")


LINGERS = """
root:
  - |
    ```repl
    import time
    time.sleep(20 if "linger" in context else 0)
    ```
  - FINAL(42)
"""


@pytest.mark.parametrize("restarted", [False, True])
def test_what_waits_is_under_the_policy_of_when_it_begins(airlock: Airlock, restarted: bool):
    config = "[server]\nqueries = 1\ndrain_s = 0\n"
    asked = load_policy("default")
    forbids = parse_policy(airlock.policy(models_root="[other]").read_text(), "other")
    narrows = parse_policy(airlock.policy(money_query="0.10 USD").read_text(), "less")
    with ExitStack() as stack:
        server = stack.enter_context(served(airlock, script=LINGERS, config=config))
        client, other = (stack.enter_context(server.client(tenant)) for tenant in ("acme", "b"))
        first = ask(client, wait=0, context={"text": "linger"})["id"]
        until(lambda: client.get(f"/v1/queries/{first}").json()["status"] == "running")
        refused, narrower = ask(other, wait=0)["id"], ask(client, wait=0)["id"]
        with registry(airlock) as known:
            known.set_policy("b", forbids, by="a test")
            known.set_policy("acme", narrows, by="a test")
        if restarted:
            keys = server.keys
            assert server.stop() == 0
            server = stack.enter_context(served(airlock, script=LINGERS, config=config))
            server.keys = keys
            client, other = (stack.enter_context(server.client(tenant)) for tenant in ("acme", "b"))
        client.post(f"/v1/queries/{first}/cancel")
        ends = [
            until(lambda of=of, query=query: (found := of.get(f"/v1/queries/{query}").json())["ended_at"] and found)
            for of, query in ((other, refused), (client, narrower))
        ]
        assert [(end["status"], end["answer"]) for end in ends] == [("refused", None), ("answered", "42")]
        assert re.fullmatch("not-permitted: the policy does not permit model .* for root calls", ends[0]["reason"])
        assert ends[1]["limit_usd"] == "0.10", "what it may is shown, not what it was asked with"
        (listed,) = (query for query in client.get("/v1/queries").json()["queries"] if query["id"] == narrower)
        assert listed["limit_usd"] == "0.10"
        for query, policy in ((refused, forbids), (narrower, narrows)):
            records = airlock.records(query)
            at = next(record["seq"] for record in records if record["type"] == "query.narrowed")
            before, after = ({record["policy"] for record in part} for part in (records[:at], records[at:]))
            assert (before, after) == ({asked.sha256()}, {asked.narrowed(policy).sha256()})
        replayed = client.post(f"/v1/audit/queries/{narrower}/replay").json()
        assert replayed["cells"][0]["verdict"] == "same", replayed
    airlock("audit", "verify", code=0)


def test_services_beside_each_other_keep_one_limit_and_end_each_others_queries(airlock: Airlock):
    policy = airlock.policy(tenant_queries_at_once="1")
    beside = Airlock(airlock.home, airlock.folder / "beside")
    beside.folder.mkdir()
    same = ("--policy", policy, "--model", f"scripted:{airlock.folder}/script.yaml")
    with served(airlock, "--policy", policy, script=SLOW) as server, served(beside, *same, script=SLOW) as other:
        other.keys = {"acme": server.key()}
        with server.client() as client, other.client() as there:

            def status(query: str) -> str:
                return client.get(f"/v1/queries/{query}").json()["status"]

            running = ask(client, wait=0)["id"]
            until(lambda: status(running) == "running")
            waiting, unwanted = ask(there, wait=0)["id"], ask(there, wait=0)["id"]
            assert client.post(f"/v1/queries/{unwanted}/cancel").status_code == 202
            until(lambda: status(unwanted) == "cancelled")
            assert status(waiting) == "queued"
            there.post(f"/v1/queries/{running}/cancel")
            until(lambda: status(waiting) == "running")
            client.post(f"/v1/queries/{waiting}/cancel")
            until(lambda: status(waiting) == "cancelled")
        assert not [line for line in (*server.lines(), *other.lines()) if line["level"] == "error"]
