"""The service as those see it who run it: probes, metrics, logs and traces."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from orchestrator.exports.spans import spans
from tests.collector import attributes, collecting
from tests.command import Airlock, until
from tests.e2e.test_machine import fill, small_disk
from tests.service import SCRIPT, SLOW, Served, ask, events, served

TEXT = "Ada Lovelace has the flu"  # nothing of a query may be in the log


def samples(server: Served) -> dict[str, float]:
    """What Prometheus gets: name and labels as they are written -> value."""
    with server.client("ops", "metrics") as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def public(server: Served, path: str) -> httpx2.Response:
    return httpx2.get(f"{server.url}{path}", trust_env=False, timeout=30)


def test_probes_need_no_key_and_tell_little(airlock: Airlock):
    with served(airlock) as server:
        assert public(server, "/healthz").json() == {"status": "alive"}
        assert public(server, "/readyz").json() == {"status": "ready"}


def test_a_backend_that_starts_nothing_is_away(airlock: Airlock):
    with served(airlock) as server:
        slots = airlock.home / "slots"
        slots.rename(airlock.home / "gone")
        slots.write_text("no folder")
        answer = public(server, "/readyz")
        assert (answer.status_code, answer.json()["away"]) == (503, ["backend"])
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) > 0
        assert str(airlock.home) not in answer.text
        assert public(server, "/healthz").status_code == 200
        slots.unlink()
        (airlock.home / "gone").rename(slots)
        until(lambda: public(server, "/readyz").status_code == 200)
        told = [line for line in server.lines() if line["message"].startswith("not ready: backend: ")]
        assert len(told) == 1


def test_a_database_that_takes_nothing_is_away(airlock: Airlock):
    with served(airlock) as server:
        assert public(server, "/readyz").status_code == 200
        with closing(sqlite3.connect(airlock.home / "airlock.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # another process that writes, and does not end
            away = until(lambda: (got := public(server, "/readyz")).status_code == 503 and got.json()["away"], 30)
            assert "database" in away
            other.execute("ROLLBACK")
        until(lambda: public(server, "/readyz").status_code == 200, 30)


def test_connections_of_anybody_leave_descriptors_for_the_services_own_work(airlock: Airlock):
    small = replace(airlock, prefix=["prlimit", "--nofile=128:256"])  # so many are had, and so many may be
    with served(small) as server, server.client() as client, ExitStack() as held:
        assert client.get("/healthz").status_code == 200  # so it has a connection
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for _number in range(400):
            held.enter_context(socket.create_connection(address, timeout=20))
        assert ask(client)["status"] == "answered"
        assert len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) > 128
        held.close()
        until(lambda: is_public(server, "/readyz"))
    assert [line for line in server.lines() if line["level"] in ("warning", "error")] == []


def is_public(server: Served, path: str) -> bool:
    try:
        return public(server, path).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_full_disk_is_away(airlock: Airlock):
    with small_disk(airlock.folder / "disk", "16m") as disk, served(replace(airlock, home=disk / "home")) as server:
        assert public(server, "/readyz").status_code == 200
        filler = fill(disk)
        away = until(lambda: (got := public(server, "/readyz")).status_code == 503 and got.json()["away"])
        assert "data folder" in away
        assert public(server, "/healthz").status_code == 200
        filler.unlink()
        until(lambda: public(server, "/readyz").status_code == 200)


def test_a_service_that_stops_is_not_ready_any_more(airlock: Airlock):
    with served(airlock, script=SLOW, config="[server]\ndrain_s = 600\n") as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        assert public(server, "/readyz").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        away = until(lambda: (got := public(server, "/readyz")).status_code == 503 and got.json()["away"])
        assert away == ["service"]
        assert public(server, "/healthz").status_code == 200
        client.post(f"/v1/queries/{query}/cancel")  # what it waited for
        assert server.process.wait(60) == 0


def test_metrics_are_for_those_who_may_see_them(airlock: Airlock):
    with served(airlock) as server:
        assert public(server, "/metrics").status_code == 401
        with server.client() as client:
            assert client.get("/metrics").status_code == 403


def test_metrics_are_what_happened(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        before = samples(server)
        assert before['airlock_queries_total{status="answered"}'] == 0
        done = ask(client)
        list(events(client, done["id"]))
        assert client.get("/nowhere").status_code == 404
        after = samples(server)
    assert after['airlock_queries_total{status="answered"}'] == 1
    assert after['airlock_sub_calls_total{outcome="answered"}'] == 1
    assert after['airlock_lm_request_seconds_count{role="root"}'] == 2
    assert after['airlock_lm_request_seconds_count{role="sub"}'] == 1
    assert after['airlock_sandboxes_started_total{start="cold"}'] == 1
    assert after["airlock_query_seconds_count"] == 1
    assert after["airlock_queries_running"] == after["airlock_queue_waiting"] == after["airlock_event_streams"] == 0
    assert after['airlock_http_requests_total{method="POST",route="/v1/queries",status="200"}'] == 1
    assert after['airlock_http_requests_total{method="GET",route="none",status="404"}'] == 1
    assert after['airlock_refused_total{kind="not-found",what="request"}'] == 1
    assert after["process_resident_memory_bytes"] > 0
    for name in after:
        for word in ("acme", "ops", done["id"], "script"):
            assert word not in name


def test_what_runs_is_seen(airlock: Airlock):
    with served(airlock, script=SLOW) as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        with client.stream("GET", f"/v1/queries/{query}/events") as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            next(lines)
            until(lambda: samples(server)["airlock_queries_running"] == 1)
            assert samples(server)["airlock_event_streams"] == 1
        until(lambda: samples(server)["airlock_event_streams"] == 0)
        client.post(f"/v1/queries/{query}/cancel")
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "cancelled")
        assert samples(server)['airlock_queries_total{status="cancelled"}'] == 1


def hostile(server: Served, client: httpx2.Client) -> Iterator[httpx2.Response]:
    """Requests that try to get something of theirs into the log."""
    yield client.get(f"/v1/queries/{TEXT}%0a%7b%22forged%22:1%7d", params={"key": TEXT})
    yield client.post("/v1/queries", json={"question": TEXT, TEXT: TEXT})
    yield client.post("/v1/queries", content=f'{{"question": "{TEXT}'.encode())
    yield client.get("/v1/queries", headers={"User-Agent": TEXT, "X-Request-Id": TEXT, "traceparent": TEXT})
    yield client.request("FLU", f"/{TEXT}")
    yield httpx2.get(f"{server.url}/v1/queries", headers={"Authorization": f"Bearer {TEXT}"}, trust_env=False)


def test_the_log_has_every_request_and_nothing_that_was_said(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        done = ask(client, TEXT, context={"text": f"{TEXT} " * 20})
        answers = list(hostile(server, client))
        assert all(400 <= answer.status_code < 500 for answer in (*answers[:3], *answers[4:]))
        key, last = server.key(), client.get("/healthz").headers["x-request-id"]
        until(lambda: any(line.get("route") == "/healthz" for line in server.lines()))
    text = server.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]  # all of it is JSON, to the last line
    asked, *rest = [line for line in lines if line["logger"] == "airlock.access"]
    assert len(rest) == len(answers) + 1
    assert asked["route"] == "/v1/queries"
    assert (asked["method"], asked["status"], asked["tenant"], asked["query"]) == ("POST", 200, "acme", done["id"])
    assert asked["asker"] == key.split("_")[1]
    assert asked["duration_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", asked["time"])
    assert rest[-1]["request_id"] == last
    for word in ("Ada", "Lovelace", "forged", key, key.split("_")[2], "it is short", "FLU"):
        assert word not in text, word


def test_traces_go_to_the_collector(airlock: Airlock):
    with collecting() as collector:
        airlock.env["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        with served(airlock) as server, server.client() as client:
            done = ask(client, TEXT)
            until(lambda: samples(server).get('airlock_traces_total{outcome="sent"}') == 1)
        found = collector.spans()  # requests' are sent when the service ends, at the latest
    trace = [span for span in found if span.name == "invoke_workflow airlock"]
    assert [attributes(span)["airlock.query"] for span in trace] == [done["id"]]
    own = [span for span in found if span.trace_id == trace[0].trace_id]
    assert len(own) == len(spans(airlock.history(done["id"])))
    (asked,) = [span for span in found if span.name == "POST /v1/queries"]
    assert attributes(asked)["airlock.query"] == done["id"]
    for body in collector.bodies:
        assert b"Ada" not in body
        assert b"it is short" not in body


def test_a_collector_that_is_away_is_in_nobodys_way(airlock: Airlock):
    airlock.env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with served(airlock) as server, server.client() as client:
        assert ask(client)["status"] == "answered"
        until(lambda: samples(server).get('airlock_traces_total{outcome="failed"}') == 1)
        assert ask(client)["status"] == "answered"
    assert [line["level"] for line in server.lines() if line["message"].startswith("traces are lost")] == ["warning"]


def test_plain_lines_for_a_terminal(airlock: Airlock):
    with served(airlock, "--log", "plain") as server:
        public(server, "/healthz")
        until(lambda: "info request " in server.log.read_text())
    line = next(line for line in server.log.read_text().splitlines() if " info request " in line)
    assert "method=GET route=/healthz status=200" in line


def test_the_log_tells_how_queries_begin_and_end(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        query = ask(client, "What of the zebra?")["id"]

        def told() -> list[dict[str, Any]]:
            found = [line for line in server.lines() if line.get("query") == query]
            return found if len(found) > 2 else []

        said = until(told)
    own = [(line["message"], line.get("outcome")) for line in said if line["logger"] == "airlock.queries"]
    assert own == [("a query began", None), ("a query ended", "answered")]
    assert "zebra" not in server.log.read_text()
    (serving,) = [line for line in server.lines() if line["message"] == "serving"]
    assert (serving["backend"], serving["isolation"]) == ("bubblewrap", "namespace")


def test_queries_go_on_when_a_full_disk_has_room_again(airlock: Airlock):
    """The one that ran is interrupted and resumed; those that waited wait on, and begin."""
    slow, config = SCRIPT + "delay_s: 0.2\n", "[server]\nqueries = 1\n"
    with small_disk(airlock.folder / "disk", "16m") as disk:
        there = replace(airlock, home=disk / "home")
        with served(there, script=slow, config=config) as server, server.client() as client:
            asked = [ask(client, f"What of {number}?", wait=0)["id"] for number in range(2)]
            until(lambda: client.get(f"/v1/queries/{asked[0]}").json()["status"] == "running")
            filler = fill(disk)

            def failed(query: str) -> bool:
                return any(line.get("query") == query and line["level"] == "error" for line in server.lines())

            until(lambda: failed(asked[0]) and failed(asked[1]))
            filler.unlink()
            for query in asked:
                ended = until(lambda q=query: (got := client.get(f"/v1/queries/{q}").json())["ended_at"] and got)
                assert (ended["status"], ended["answer"]) == ("answered", "it is short"), ended
        assert "query.resumed" in [row["type"] for row in there.records(asked[0])]
