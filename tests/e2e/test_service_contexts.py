"""Contexts over HTTP: sent whole and in pieces, kept apart by tenant, bounded, and gone when they are given up."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.command import Airlock, copy_home, until
from tests.service import SLOW, Served, ask, served
from tests.warm import Warm

CONFIG = """
[server]
upload_bytes = 2_000_000
stored_bytes = 5_000_000
uploads = 4
inline_bytes = 100_000
requests_minute = 1_000_000
"""
TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}


@pytest.fixture(scope="module")
def shared(seed: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests that leave it as it was, each with tenants of its own."""
    folder = tmp_path_factory.mktemp("contexts")
    command = Airlock(copy_home(seed, folder / "home"), folder, warm)
    with served(command, config=CONFIG) as running:
        yield running
    command.nothing_left()


@pytest.fixture
def server(shared: Served) -> Served:
    for name in left(shared):  # uploads that a test before has left under way
        (shared.airlock.home / "uploads" / name).unlink()
    return shared


def fresh(server: Served) -> httpx2.Client:
    """Of a new tenant."""
    return server.client(f"tenant{len(server.keys)}")


def put(client: httpx2.Client, content: Any = b"hello world", **query: Any) -> httpx2.Response:
    return client.put("/v1/contexts", content=content, params=query)


def begin(client: httpx2.Client, length: int, **metadata: str) -> str:
    told = ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items())
    answer = client.post("/v1/contexts", headers={**TUS, "Upload-Length": str(length), "Upload-Metadata": told})
    assert answer.status_code == 201, answer.text
    assert answer.headers["upload-expires"].endswith("GMT")
    return answer.headers["location"]


def send(client: httpx2.Client, where: str, offset: int, content: Any) -> httpx2.Response:
    return client.patch(where, content=content, headers={**PIECE, "Upload-Offset": str(offset)})


def kind(answer: httpx2.Response, status: int) -> str:
    """Of a problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    return body["type"].removeprefix("urn:airlock:")


def left(server: Served) -> list[str]:
    """Files of uploads, and of contexts that are under way."""
    folders = [server.airlock.home / "uploads", server.airlock.home / "contexts" / "drafts"]
    return [path.name for folder in folders if folder.exists() for path in folder.iterdir()]


def stored(server: Served) -> list[str]:
    return [path.name for path in (server.airlock.home / "contexts" / "data").iterdir()]


def test_a_context_is_sent_whole_asked_of_and_given_up(server: Served):
    text = "Grüße\n".encode() * 1000
    with fresh(server) as client:
        answer = put(client, iter([text[:100], text[100:]]), name="grüße ☺")
        made = answer.json()
        assert answer.status_code == 201
        assert answer.headers["location"] == f"/v1/contexts/{made['id']}"
        assert (made["kind"], made["bytes"], made["characters"]) == ("text", 8000, 6000)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", made["created_at"])
        again = put(client, text)
        assert (again.status_code, again.json()) == (200, made)
        assert client.get(answer.headers["location"]).json() == made
        assert client.get("/v1/contexts").json() == {"contexts": [{**made, "characters": None}], "next": None}
        done = ask(client, context={"id": made["id"]})
        assert (done["status"], done["context"]["id"]) == ("answered", made["id"])
        assert hashlib.sha256(text).hexdigest() in stored(server)
        assert client.delete(answer.headers["location"]).status_code == 204
        assert kind(client.delete(answer.headers["location"]), 404) == "not-found"
        until(lambda: hashlib.sha256(text).hexdigest() not in stored(server))
        answer = client.post("/v1/queries", json={"question": "q", "context": {"id": made["id"]}})
        assert kind(answer, 404) == "not-found"
    until(lambda: not left(server))


@pytest.mark.parametrize(
    ("content", "query", "facts"),
    [
        (b'{"a": 1}', {"kind": "json"}, ("json", 8, 8)),
        (b'{"path": "a", "text": "b"}\n\n[1]', {"kind": "jsonl"}, ("jsonl", 31, 31)),
        (b"\xe9", {"encoding": "latin-1"}, ("text", 2, 1)),
        (b"\xff", {"encoding": "replace"}, ("text", 3, 1)),
    ],
)
def test_what_is_sent_is_what_was_named(server: Served, content: bytes, query: dict[str, str], facts: Any):
    with fresh(server) as client:
        made = put(client, content, **query).json()
        assert (made["kind"], made["bytes"], made["characters"]) == facts


@pytest.mark.parametrize(
    ("content", "query", "says"),
    [
        (b"", {}, "is empty"),
        (b"{", {"kind": "json"}, "not valid JSON at byte 1"),
        (b"{}\n{", {"kind": "jsonl"}, "line 2 is not valid JSON"),
        (b"a\xff", {}, "not UTF-8 at byte 1 (invalid start byte); use encoding=latin-1 or encoding=replace"),
        (b"a\0b", {}, "looks binary"),
    ],
)
def test_what_is_not_what_was_named_is_refused(server: Served, content: bytes, query: dict[str, str], says: str):
    with fresh(server) as client:
        answer = put(client, content, **query)
        assert kind(answer, 422) == "bad-context"
        assert says in answer.json()["detail"]
        assert client.get("/v1/contexts").json()["contexts"] == []
    until(lambda: not left(server))


@pytest.mark.parametrize(
    "query",
    [
        {"kind": "documents"},
        {"encoding": "utf-16"},
        {"name": "a" * 256},
        {"name": "a\0b"},
        {"name": "a\nb"},
        {"name": "\u202egpj.exe"},
        {"knd": "json"},
    ],
)
def test_what_is_named_wrongly_is_refused(server: Served, query: dict[str, str]):
    with fresh(server) as client:
        assert kind(put(client, **query), 422) == "bad-request"


def test_a_name_is_no_path(server: Served):
    names = ["../../etc/passwd", "/etc/passwd", "C:\\x", "%2e%2e%2f", "a/b", "."]
    with fresh(server) as client:
        for name in names:
            assert put(client, f"about {name}".encode(), name=name).json()["name"] == name
        assert {made["name"] for made in client.get("/v1/contexts").json()["contexts"]} == set(names)
    files = {path.parent.name: path.name for path in (server.airlock.home / "contexts").rglob("*") if path.is_file()}
    assert files.keys() == {"data", "manifests"}
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in files.values())
    assert not any("passwd" in path.name for path in server.airlock.folder.rglob("*"))


def test_a_compressed_body_is_refused(server: Served):
    with fresh(server) as client:
        answer = client.put("/v1/contexts", content=b"x", headers={"Content-Encoding": "gzip"})
        assert kind(answer, 415) == "unsupported-encoding"


# In pieces


def test_a_context_is_sent_in_pieces(server: Served):
    text = b"0123456789" * 1000
    with fresh(server) as client:
        where = begin(client, len(text), filename="digits.txt", filetype="text/plain")
        for offset in range(0, len(text), 4000):
            state = client.head(where, headers=TUS)
            assert (state.status_code, state.headers["upload-offset"], state.headers["upload-length"]) == (
                200,
                str(offset),
                str(len(text)),
            )
            assert state.headers["cache-control"] == "no-store"
            assert client.get(where).json()["context"] is None
            answer = send(client, where, offset, text[offset : offset + 4000])
            assert (answer.status_code, answer.headers["tus-resumable"]) == (204, "1.0.0")
            assert answer.headers["upload-offset"] == str(min(len(text), offset + 4000))
        found = client.get(where).json()
        assert (found["offset"], found["length"]) == (len(text), len(text))
        assert found["context"]["name"] == "digits.txt"
        assert client.get(f"/v1/contexts/{found['context']['id']}").json() == found["context"]
        assert hashlib.sha256(text).hexdigest() in stored(server)
        assert client.head(where, headers=TUS).headers["upload-offset"] == str(len(text))
        assert kind(send(client, where, len(text), b""), 409) == "other-offset"
        assert client.delete(where, headers=TUS).status_code == 204
        assert client.head(where, headers=TUS).status_code == 404
        assert client.get(f"/v1/contexts/{found['context']['id']}").status_code == 200
    until(lambda: not left(server))


def test_an_upload_goes_on_after_the_connection_was_lost(server: Served):
    with fresh(server) as client:
        where = begin(client, 2_000_000)
        headers = {**PIECE, "Upload-Offset": "0"}
        with half_sent(server, client, 2_000_000, 1_900_000, "PATCH", where, **headers):
            until(lambda: offset_of(client, where) >= 1 << 20)
        until(lambda: send(client, where, 0, b"").status_code == 409)  # nobody has it any more
        offset = offset_of(client, where)
        assert 1 << 20 <= offset <= 1_900_000
        assert send(client, where, offset, b"x" * (2_000_000 - offset)).status_code == 204
        made = client.get(where).json()["context"]
    assert made["bytes"] == 2_000_000
    assert hashlib.sha256(b"x" * 2_000_000).hexdigest() in stored(server)


def offset_of(client: httpx2.Client, where: str) -> int:
    return int(client.head(where, headers=TUS).headers["upload-offset"])


@contextlib.contextmanager
def half_sent(
    server: Served,
    client: httpx2.Client,
    length: int,
    sent: int,
    method: str = "PUT",
    path: str = "/v1/contexts",
    **headers: str,
) -> Iterator[socket.socket]:
    """A request of which so many bytes of the body are sent; the client is gone with the block."""
    address = urlsplit(server.url)
    assert address.port
    told = {"Host": address.netloc, "Content-Length": str(length), **headers}
    told["Authorization"] = client.headers["authorization"]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items()), "", ""])
    with socket.create_connection(("127.0.0.1", address.port), timeout=40) as connection:
        connection.sendall(head.encode() + b"x" * sent)
        yield connection


def test_an_upload_goes_on_after_the_service_died(airlock: Airlock):
    with served(airlock, config=CONFIG) as first, first.client() as client:
        where, key = begin(client, 30_000, kind="text"), first.key()
        assert send(client, where, 0, b"x" * 20_000).status_code == 204
        first.stop(signal.SIGKILL)
    with served(airlock, config=CONFIG) as second, second.client() as client:
        client.headers["Authorization"] = f"Bearer {key}"
        assert client.head(where, headers=TUS).headers["upload-offset"] == "20000"
        assert send(client, where, 20_000, b"x" * 10_000).status_code == 204
        assert client.get(where).json()["context"]["bytes"] == 30_000


def test_a_killed_service_leaves_no_half_of_a_whole_one(airlock: Airlock):
    with served(airlock, config=CONFIG) as first, first.client() as client:
        key = first.key()
        with half_sent(first, client, 1_900_000, 1_000_000):
            until(lambda: left(first))
            first.stop(signal.SIGKILL)
        assert len(left(first)) == 1
    with served(airlock, config=CONFIG) as second, second.client() as client:
        client.headers["Authorization"] = f"Bearer {key}"
        until(lambda: not left(second))
        for number in range(2):  # all room is there again
            assert put(client, bytes([65 + number]) * 2_000_000).status_code == 201


def test_the_protocol_is_told_and_asked_for(server: Served):
    with fresh(server) as client:
        for where in ("/v1/contexts", f"/v1/contexts/uploads/{'0' * 32}"):
            told = client.options(where)
            assert (told.status_code, told.headers["tus-version"]) == (204, "1.0.0")
            assert told.headers["tus-extension"] == "creation,termination,expiration"
        assert client.options("/v1/contexts").headers["tus-max-size"] == "2000000"
        answer = client.post("/v1/contexts", headers={"Tus-Resumable": "0.2.2", "Upload-Length": "1"})
        assert kind(answer, 412) == "tus-version"
        assert answer.headers["tus-version"] == "1.0.0"
        assert kind(client.post("/v1/contexts", headers={"Upload-Length": "1"}), 422) == "bad-request"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 422),
        ({"Upload-Length": "0"}, 422),
        ({"Upload-Length": "-1"}, 422),
        ({"Upload-Length": "1e3"}, 422),
        ({"Upload-Length": "9" * 5000}, 422),
        ({"Upload-Length": "2000001"}, 413),
        ({"Upload-Length": str(10 << 30)}, 413),
        ({"Upload-Length": "1", "Upload-Metadata": "name"}, 201),
        ({"Upload-Length": "1", "Upload-Metadata": "name !!!"}, 400),
        ({"Upload-Length": "1", "Upload-Metadata": "name /w=="}, 400),
        ({"Upload-Length": "1", "Upload-Metadata": "name AA=="}, 422),
        ({"Upload-Length": "1", "Upload-Metadata": "kind ZG9jdW1lbnRz"}, 422),
        ({"Upload-Length": "1", "Upload-Metadata": "other ZG9jdW1lbnRz,"}, 201),
    ],
)
def test_what_begins_wrongly_is_refused(server: Served, headers: dict[str, str], status: int):
    with fresh(server) as client:
        answer = client.post("/v1/contexts", headers={**TUS, **headers})
        assert answer.status_code == status, answer.text
        assert len(left(server)) == (status == 201)


def test_a_piece_at_the_wrong_place_changes_nothing(server: Served):
    with fresh(server) as client:
        where = begin(client, 10)
        assert send(client, where, 0, b"01234").status_code == 204
        for offset in (0, 4, 6, 10):
            answer = send(client, where, offset, b"xxxxx")
            assert kind(answer, 409) == "other-offset"
            assert answer.headers["upload-offset"] == "5"
        assert kind(client.patch(where, content=b"x", headers={**TUS, "Upload-Offset": "5"}), 415)
        assert kind(send(client, where, 5, b"567890"), 413) == "count-exceeded"
        assert client.head(where, headers=TUS).headers["upload-offset"] == "5"
        assert send(client, where, 5, b"56789").status_code == 204


def test_there_is_one_piece_at_a_time(server: Served):
    with fresh(server) as client:
        where = begin(client, 2_000_000)
        headers = {**PIECE, "Upload-Offset": "0"}
        with half_sent(server, client, 1_900_000, 1_800_000, "PATCH", where, **headers) as connection:
            until(lambda: offset_of(client, where) >= 1 << 20)
            assert kind(send(client, where, 0, b"y"), 423) == "upload-busy"
            assert kind(client.delete(where, headers=TUS), 423) == "upload-busy"
            connection.sendall(b"x" * 100_000)
            assert b" 204 " in connection.recv(1000)
        assert offset_of(client, where) == 1_900_000


def test_what_can_never_become_a_context_is_given_up(server: Served):
    with fresh(server) as client:
        where = begin(client, 1, kind="json")
        assert kind(send(client, where, 0, b"{"), 422) == "bad-context"
        assert client.head(where, headers=TUS).status_code == 404
    until(lambda: not left(server))


# Limits


@pytest.mark.parametrize("says", [True, False])
def test_what_is_too_large_is_refused_and_leaves_nothing(server: Served, says: bool):
    """Ten gigabytes: at once where that is told, and where it is not, when there is too much of it."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10 << 30:
            yield b"x" * 65536
            sent += 65536

    with fresh(server) as client:
        headers = {"Content-Length": str(10 << 30)} if says else {}
        answer = client.put("/v1/contexts", content=endless(), headers=headers)
        assert kind(answer, 413) == "too-large"
        assert sent < 20 << 20
        until(lambda: not left(server))
        assert client.get("/v1/contexts").json()["contexts"] == []


def test_a_crowd_does_not_store_more_than_it_may(server: Served):
    together = Barrier(4, timeout=60)

    def one(number: int) -> int:
        def pieces() -> Iterator[bytes]:
            together.wait()
            for _piece in range(20):
                yield bytes([65 + number]) * 90_000

        with server.client("crowd") as client:
            return put(client, pieces()).status_code

    before = size(server)
    server.key("crowd")
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(one, range(4)))
    assert set(codes) <= {201, 413}
    kept = codes.count(201)
    assert kept <= 2  # of 5 MB, each takes 1.8 MB; those that come at once may all find too little
    until(lambda: not left(server))
    assert size(server) == before + kept * 1_800_000
    with server.client("crowd") as client:  # what was refused holds no room
        assert put(client, b"Z" * 1_800_000).status_code == (201 if kept < 2 else 413)


def size(server: Served) -> int:
    return sum(path.stat().st_size for path in (server.airlock.home / "contexts" / "data").iterdir())


def test_all_that_a_tenant_has_counts(server: Served):
    with fresh(server) as client:
        for number in range(2):
            assert put(client, bytes([65 + number]) * 2_000_000).status_code == 201
        where = begin(client, 600_000)
        assert kind(put(client, b"z" * 500_000), 413) == "count-exceeded"
        inline = {"question": "q", "context": {"text": "z" * 90_000}}
        assert client.delete(where, headers=TUS).status_code == 204
        assert put(client, b"z" * 950_000).status_code == 201
        assert kind(client.post("/v1/queries", json=inline), 413) == "count-exceeded"
        newest = client.get("/v1/contexts").json()["contexts"][0]["id"]
        assert client.delete(f"/v1/contexts/{newest}").status_code == 204
        assert client.post("/v1/queries", json=inline).status_code == 202
        with fresh(server) as other:
            assert put(other, b"z" * 2_000_000).status_code == 201


def test_so_many_uploads_are_under_way(server: Served):
    with fresh(server) as client:
        begun = [begin(client, 1) for _number in range(4)]
        answer = client.post("/v1/contexts", headers={**TUS, "Upload-Length": "1"})
        assert kind(answer, 429) == "rate-limited"
        assert int(answer.headers["retry-after"]) >= 1
        assert kind(put(client), 429) == "rate-limited"
        assert client.delete(begun[0], headers=TUS).status_code == 204
        assert put(client).status_code == 201


def test_who_is_gone_in_the_middle_leaves_nothing(server: Served):
    with fresh(server) as client:
        for _time in range(3):
            with half_sent(server, client, 1_900_000, 1_500_000):
                until(lambda: left(server))
            until(lambda: not left(server))
        assert client.get("/v1/contexts").json()["contexts"] == []
        assert put(client, b"y" * 2_000_000).status_code == 201  # nothing of the room is taken


# Tenants


def test_nothing_of_another_tenant_can_be_told(server: Served):
    """What is another's and what is not there at all are answered in the same words."""
    with fresh(server) as acme, fresh(server) as other:
        made = put(acme, b"acme's own", name="mine").json()["id"]
        upload = begin(acme, 10)
        for theirs, nobodys in (
            (f"/v1/contexts/{made}", f"/v1/contexts/{'0' * 64}"),
            (upload, f"/v1/contexts/uploads/{'0' * 32}"),
        ):
            for method in ("GET", "HEAD", "PATCH", "DELETE"):
                answers = [
                    other.request(method, where, headers={**PIECE, "Upload-Offset": "0"}) for where in (theirs, nobodys)
                ]
                assert answers[0].status_code == answers[1].status_code in (404, 405)
                assert answers[0].content == answers[1].content
                names = [set(answer.headers) for answer in answers]
                assert names[0] == names[1]
        assert other.get("/v1/contexts").json() == {"contexts": [], "next": None}
        assert put(other, b"acme's own").status_code == 201  # as new as anything else
        assert other.get(f"/v1/contexts/{made}").json()["name"] == ""
        assert other.delete(f"/v1/contexts/{made}").status_code == 204
        assert acme.get(f"/v1/contexts/{made}").json()["name"] == "mine"
        assert ask(acme, context={"id": made})["status"] == "answered"


@pytest.mark.parametrize(
    "name",
    [
        "0",
        "0" * 63,
        "A" * 64,
        "%00",
        "..%2f..%2fairlock.db",
        "%ff%fe",
        "uploads",
        "a" * 2000,
        "%ED%A0%80",
        "uploads/%00",
    ],
)
def test_an_id_that_is_none_is_not_there(server: Served, name: str):
    with fresh(server) as client:
        for method in ("GET", "DELETE", "HEAD", "PATCH"):
            answer = client.request(method, f"/v1/contexts/{name}", headers={**PIECE, "Upload-Offset": "0"})
            assert answer.status_code in (404, 405), answer.text


def test_a_key_does_what_it_is_for(server: Served):
    with server.client("acme", "read") as reader, server.client("acme", "query") as giver:
        assert kind(put(reader), 403) == "insufficient-scope"
        assert kind(giver.get("/v1/contexts"), 403) == "insufficient-scope"
        made = put(giver).json()["id"]
        assert reader.get(f"/v1/contexts/{made}").status_code == 200
        assert kind(reader.delete(f"/v1/contexts/{made}"), 403) == "insufficient-scope"
        where = begin(giver, 1)
        assert kind(reader.get(where), 403) == "insufficient-scope"
        assert giver.get(where).status_code == 200
    with httpx2.Client(base_url=server.url, trust_env=False) as nobody:
        assert kind(put(nobody), 401) == "unauthorized"


def test_a_list_has_pages(server: Served):
    with fresh(server) as client:
        made = [put(client, f"number {number}".encode()).json()["id"] for number in range(7)]
        found: list[str] = []
        query: dict[str, Any] = {"limit": 3}
        while True:
            page = client.get("/v1/contexts", params=query).json()
            found += [context["id"] for context in page["contexts"]]
            if page["next"] is None:
                break
            query["cursor"] = page["next"]
        assert found == made[::-1] or sorted(found) == sorted(made)  # in one millisecond there may be several
        for cursor in ("", "x", "\0", "2026", f"2026-01-01T00:00:00.000Z_{made[0]}"):
            assert kind(client.get("/v1/contexts", params={"cursor": cursor}), 422) == "bad-request"
        for limit in (0, 201, "x"):
            assert client.get("/v1/contexts", params={"limit": limit}).status_code == 422


def test_a_query_keeps_what_it_began_with(airlock: Airlock):
    """The context is given up while the query runs, and it is there when its process died and the query goes on."""
    slow = SLOW.replace("delay_s: 30", "delay_s: 1")
    with served(airlock, script=slow, config=CONFIG) as first, first.client() as client:
        key, made = first.key(), put(client).json()["id"]
        query = ask(client, wait=0, context={"id": made})["id"]
        assert client.delete(f"/v1/contexts/{made}").status_code == 204
        first.stop(signal.SIGKILL)
    with served(airlock, script=slow, config=CONFIG) as second, second.client() as client:
        client.headers["Authorization"] = f"Bearer {key}"
        found = until(lambda: (now := client.get(f"/v1/queries/{query}").json())["ended_at"] and now, 60)
        assert found["status"] == "answered"
        assert client.get(f"/v1/contexts/{made}").status_code == 404


def test_a_body_that_stops_is_cut_off_and_leaves_nothing(server: Served):
    with fresh(server) as client, half_sent(server, client, 1000, 10) as connection:
        begun = time.monotonic()
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        assert 15 < time.monotonic() - begun < 35
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "urn:airlock:too-slow"
        until(lambda: not left(server))
