"""The client of the native routes, against the real service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Client, RequestError, ServiceError, client
from orchestrator.core.errors import ContextError
from tests.command import Airlock
from tests.fakes.relay import Relay
from tests.service import Served, served

SCRIPT = """
root:
  - "```repl\\nwhole = repr(context if isinstance(context, (str, dict)) else list(context))\\n```"
  - FINAL_VAR(whole)
"""


@contextmanager
def connected(server: Served, url: str = "", *scopes: str) -> Iterator[Client]:
    with Client(url or server.url, server.key("acme", *scopes)) as made:
        yield made


@pytest.mark.parametrize(
    ("context", "seen"),
    [
        pytest.param("a text", "'a text'", id="text"),
        pytest.param([1, {"a": "b"}], "[1, {'a': 'b'}]", id="list"),
        pytest.param({"a": [1]}, "{'a': [1]}", id="object"),
        pytest.param(Path("context.txt"), repr("one\ntwo\nthe magic number is 4711\n"), id="file"),
    ],
)
def test_a_query_of_every_kind_of_context(airlock: Airlock, context: Any, seen: str):
    with served(airlock, script=SCRIPT) as server, connected(server) as service:
        given = airlock.folder / context if isinstance(context, Path) else context
        asked = service.ask("what is it?", given)
        assert asked.status in ("queued", "running")
        ended = service.wait(asked.id)
        assert (ended.status, ended.answer, ended.has_ended) == ("answered", seen, True)
        assert ended.question == "what is it?"


def test_what_there_is_to_be_known_of_queries(airlock: Airlock):
    with served(airlock, script=SCRIPT) as server, connected(server) as service:
        ids = [
            service.ask(f"q{number}", "a", budget_usd="0.25", idempotency_key=f"k{number}").id for number in range(3)
        ]
        assert service.ask("q2", "a", budget_usd="0.25", idempotency_key="k2").id == ids[2]
        for query in ids:
            service.wait(query)
        assert [query.id for query in service.queries()] == ids[::-1]
        assert list(service.queries("failed")) == []
        records = list(service.events(ids[0]))
        assert [record.seq for record in records] == list(range(len(records)))
        assert list(service.events(ids[0], after=records[-3].seq)) == records[-2:]
        assert list(service.events(ids[0], after=records[-1].seq)) == []
        assert service.spend(ids[0]).limit_usd == "0.25"
        assert sum(model.calls for model in service.spend(ids[0]).models.values()) == 2
        assert service.budgets().queries["running"] == 0
        assert service.budgets().day.spent_usd == "0.00"
        assert service.cancel(ids[0]).status == "answered"


def test_an_export_is_one_that_can_be_verified(airlock: Airlock):
    with served(airlock, script=SCRIPT) as server, connected(server, "", "query", "read", "audit") as service:
        query = service.wait(service.ask("q", "a").id).id
        out = airlock.folder / "export.tar"
        service.export(query, out)
        assert "integrity" in airlock("audit", "verify", out).out
        head = service.checkpoint()
        assert head.startswith("airlock-")
        assert service.consistency(1).startswith("old 1\n")
        assert service.consistency(1).endswith(f"\n\n{head}")
        with pytest.raises(RequestError, match="cannot write"):
            service.export(query, airlock.folder / "nowhere" / "export.tar")


def test_a_large_file_goes_in_pieces_and_goes_on_where_it_was_cut(airlock: Airlock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "WHOLE", 100_000)
    monkeypatch.setattr(client, "PIECE", 150_000)
    source = airlock.file("large.txt", "0123456789" * 100_000)
    with served(airlock, script=SCRIPT) as server, Relay(server.url) as relay, connected(server, relay.url) as service:
        seen: list[int] = []

        def progress(done: int, of: int) -> None:
            assert of == 1_000_000
            seen.append(done)
            if len(seen) in (1, 3):
                relay.cut()

        stored = service.upload(source, name="a name, with ünicode", progress=progress)
        assert relay.cuts >= 2
        assert (stored.bytes, stored.characters, stored.name) == (1_000_000, 1_000_000, "a name, with ünicode")
        assert seen[-1] == 1_000_000
        assert seen == sorted(seen)
        assert service.upload(source).id == stored.id


def test_a_folder_is_a_list_of_documents(airlock: Airlock):
    airlock.file("folder/a.txt", "one\n\u2028")
    airlock.file("folder/b/c.txt", "two")
    airlock.file("folder/.hidden", "no")
    with served(airlock, script=SCRIPT) as server, connected(server) as service:
        stored = service.upload(airlock.folder / "folder")
        assert (stored.kind, stored.name) == ("jsonl", "folder")
        answer = service.wait(service.ask("q", stored).id).answer
        documents = [{"path": "a.txt", "text": "one\n\u2028"}, {"path": "b/c.txt", "text": "two"}]
        assert answer == repr(documents)
        with pytest.raises(ContextError, match="no readable text"):
            service.upload(airlock.file("empty/.hidden", "").parent)


def test_what_goes_wrong_says_what_and_what_to_do(airlock: Airlock):
    with served(airlock, script=SCRIPT) as server, connected(server) as service:
        cases: list[tuple[Any, int, str, int]] = [
            (lambda: service.query("20260101-000000-0123456789"), 404, "not-found", 2),
            (lambda: service.ask("", "a"), 422, "bad-request", 2),
            (lambda: service.ask("q", "a", model="gone"), 422, "bad-model", 2),
            (lambda: service.upload(airlock.file("bad.json", "{")), 422, "bad-context", 2),
            (lambda: service.ask("q", "x" * (9 << 20)), 413, "count-exceeded", 3),
        ]
        for call, status, kind, code in cases:
            with pytest.raises(ServiceError) as caught:
                call()
            assert (caught.value.status, caught.value.exit_code) == (status, code)
            assert caught.value.kind == kind or status == 413
            assert caught.value.detail == str(caught.value) != ""
        with pytest.raises(RequestError):
            service.query("../admin/tenants")
    with Client(server.url, "al_x") as gone, pytest.raises(ServiceError, match="cannot be reached") as caught:
        gone.budgets()
    assert (caught.value.status, caught.value.kind, caught.value.exit_code) == (0, "unreachable", 4)


def test_what_answers_and_is_no_service(airlock: Airlock, monkeypatch: pytest.MonkeyPatch):
    """A proxy, a redirect, a service of another version."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Other(BaseHTTPRequestHandler):
        seen: list[str] = []  # noqa: RUF012  of one test

        def do_GET(self) -> None:
            self.seen.append(self.path)
            hostile = json.dumps({"type": "urn:airlock:x", "detail": "a\x1b[2J\nb\u202e"}).encode()
            known = {"/a": (302, b""), "/b": (502, b"<html>"), "/c": (200, b"<html>"), "/e": (404, hostile)}
            status, body = known.get(self.path[:2], (200, b"{}"))
            self.send_response(status)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/b")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  as it is called
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        try:
            for path, status, said in (
                ("a", 302, "sends elsewhere"),
                ("b", 502, "answers 502 Bad Gateway"),
                ("c", 0, "not JSON"),
                ("d", 0, "another version"),
                ("e", 404, r"^a\\x1b\[2J b\\u202e$"),
            ):
                with Client(f"http://127.0.0.1:{other.server_address[1]}/{path}/", "al_x") as service:
                    with pytest.raises(ServiceError, match=said) as caught:
                        service.budgets()
                    assert caught.value.status == status
        finally:
            other.shutdown()
            thread.join()
    assert Other.seen == [f"/{path}/v1/budgets" for path in "abcde"]
