"""Requests on a real uvicorn: what a body may be and how it may come, by which names the service is called, and what
every answer carries.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.server import bodies
from orchestrator.server.bodies import Bodies
from orchestrator.settings import ServerSettings
from tests.command import until
from tests.uvicorns import Address, rest, run

SETTINGS = ServerSettings(inline_bytes=1024, upload_bytes=3 << 20)
SMALL = 1 << 20
seen: list[int] = []  # of each request that was read to its end, the bytes


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and answers with how long it was; takes a fault of it for one of its own, as frameworks do."""
    size, more = 0, True
    status = 200
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        seen.append(size)
    except Exception:
        if scope["path"] == "/raises":
            raise
        status = 400
    text = json.dumps({"size": size, "id": scope["state"]["request_id"]}).encode()
    headers = [(b"content-length", str(len(text)).encode()), (b"x-request-id", b"an application's own")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PIECE_S", 1.0), ("JSON_S", 3.0), ("LINGER_S", 0.2)):
            patch.setattr(bodies, name, value)
        with run(Bodies(app, SETTINGS, hosts=["Airlock.example", "[::1]"], secure=True)) as made:
            yield made


def kind(body: dict[str, Any]) -> str:
    """Of a problem, in either form."""
    return body["error"]["code"].replace("_", "-") if "error" in body else body["type"].removeprefix("urn:airlock:")


def request(method: str, path: str, *headers: str, host: str = "airlock.example") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


def read(answer: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body) if body else None


def asked(address: Address, head: bytes, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
    return read(address.answer_to(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body))


def test_an_answer_carries_what_every_answer_does(address: Address):
    status, headers, body = asked(address, request("GET", "/v1/queries", "X-Request-Id: mine"))
    assert status == 200
    assert re.fullmatch("[0-9a-f]{16}", headers["x-request-id"])
    assert headers["x-request-id"] == body["id"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["strict-transport-security"].startswith("max-age=")
    other = asked(address, request("GET", "/static/page.css"))[1]
    assert "cache-control" not in other
    assert other["x-request-id"] != headers["x-request-id"]
    refused = asked(address, request("GET", "/v1/queries", host="other"))[1]
    assert refused.keys() >= headers.keys() - {"content-length"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("airlock.example", 200),
        ("AIRLOCK.example:8443", 200),
        ("[::1]", 200),
        ("[::1]:80", 200),
        ("other.example", 421),
        ("airlock.example.other.example", 421),
        ("[::2]", 421),
        ("127.0.0.1", 421),
        ("", 400),
        ("airlock.example:80:80", 400),
        ("airlock.example:port", 400),
        ("user@airlock.example", 400),
        ("airlock.example/path", 400),
        ("airlock.example, other.example", 400),
        ("airlock.example other.example", 400),
        ("airlock.example\u00e9", 400),
        ("[::1", 400),
    ],
)
def test_the_service_is_called_by_its_name(address: Address, host: str, status: int):
    assert asked(address, request("GET", "/", host=host))[0] == status


def test_a_request_without_a_host_is_refused(address: Address):
    assert read(address.answer_to(b"GET / HTTP/1.0\r\n\r\n"))[0] == 400


def test_any_name_will_do_where_none_is_said():
    with run(Bodies(app, SETTINGS)) as address:
        status, headers, _body = asked(address, request("GET", "/", host="whatever.example"))
        assert (status, "strict-transport-security" in headers) == (200, False)
        assert asked(address, request("GET", "/", host="what ever"))[0] == 400


@pytest.mark.parametrize("headers", [[f"X-{n}: y" for n in range(100)], ["X: " + "y" * 32000, "Z: " + "y" * 2000]])
def test_headers_that_came_all_at_once_are_bounded_too(address: Address, headers: list[str]):
    status, _headers, body = asked(address, request("GET", "/", *headers))
    assert (status, body["type"]) == (431, "urn:airlock:headers-too-large")


LIMITS = [
    ("POST", "/v1/queries", 1024 + SMALL),
    ("POST", "/v1/chat/completions", 1024 + SMALL),
    ("PUT", "/v1/contexts", 3 << 20),
    ("PATCH", "/v1/contexts/uploads/1", 3 << 20),
    ("POST", "/v1/contexts", SMALL),
    ("PUT", "/v1/contexts/", SMALL),
    ("GET", "/v1/queries", SMALL),
    ("POST", "/raises", SMALL),
]


@pytest.mark.parametrize(("method", "path", "most"), LIMITS)
def test_a_body_has_its_limit(address: Address, method: str, path: str, most: int):
    status, _headers, body = asked(address, request(method, path, f"Content-Length: {most}"), b"x" * most)
    assert (status, body["size"]) == (200, most)
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (most, b"x" * most)
    assert asked(address, request(method, path, "Transfer-Encoding: chunked"), chunks)[2]["size"] == most


@pytest.mark.parametrize(("method", "path", "most"), LIMITS)
@pytest.mark.parametrize("size", [1, 10 << 30, 10**19])
def test_what_says_that_it_is_too_large_is_refused_at_once(
    address: Address, method: str, path: str, most: int, size: int
):
    """Nothing of it has been sent, and nothing of it is read."""
    read_before = len(seen)
    status, headers, body = read(address.answer_to(request(method, path, f"Content-Length: {most + size}")))
    assert (status, kind(body), headers["connection"]) == (413, "too-large", "close")
    assert len(seen) == read_before


@pytest.mark.parametrize(("method", "path", "most"), LIMITS)
def test_what_does_not_say_so_is_cut_off(address: Address, method: str, path: str, most: int):
    """Endless, and the answer is read all the same."""
    with address.connected() as connection:
        connection.sendall(request(method, path, "Transfer-Encoding: chunked"))
        sent = send_until_cut(connection)
        status, headers, body = read(rest(connection))
    assert (status, kind(body), headers["connection"]) == (413, "too-large", "close")
    assert most < sent < most + (8 << 20)


def send_until_cut(connection: socket.socket) -> int:
    """As a client that looks whether there is an answer; the bytes that it has sent."""
    piece, sent = b"10000\r\n" + b"x" * 65536 + b"\r\n", 0
    while not is_answered(connection):
        connection.sendall(piece)
        sent += 65536
    return sent


def is_answered(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def test_a_client_that_does_not_look_reads_why_all_the_same(address: Address):
    """It sends more than the connection holds before it reads."""
    body = b"x" * (6 << 20)
    with address.connected() as connection:
        connection.sendall(request("PUT", "/v1/contexts", f"Content-Length: {len(body)}") + body)
        assert read(rest(connection))[0] == 413


def test_who_asks_first_is_not_told_to_go_on(address: Address):
    head = request("PUT", "/v1/contexts", f"Content-Length: {10 << 30}", "Expect: 100-continue")
    assert b"100 Continue" not in (answer := address.answer_to(head))
    assert read(answer)[0] == 413


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/queries"), ("PUT", "/v1/contexts"), ("POST", "/raises")])
def test_a_body_that_stops_is_not_waited_for(address: Address, method: str, path: str):
    begun = time.monotonic()
    status, headers, body = read(address.answer_to(request(method, path, "Content-Length: 100") + b"half"))
    assert (status, body["type"], headers["connection"]) == (408, "urn:airlock:too-slow", "close")
    assert 1 <= time.monotonic() - begun < 10


@pytest.mark.parametrize(("rate", "status"), [(200, 408), (5000, 200)])
def test_a_body_that_drips_is_not_waited_for(address: Address, rate: int, status: int):
    """Each piece is in time, and all of them together are too few."""
    size = 3 * rate
    with address.connected() as connection:
        connection.sendall(request("PUT", "/v1/contexts", f"Content-Length: {size}", "Connection: close"))
        drip(connection, rate, size)
        assert read(rest(connection))[0] == status


def drip(connection: socket.socket, rate: int, size: int) -> None:
    """So many bytes a second, ten times a second, while nothing is answered."""
    begun, sent = time.monotonic(), 0
    while sent < size and not is_answered(connection):
        due = min(size, int((time.monotonic() - begun) * rate))
        if due - sent < rate / 10 and due < size:
            time.sleep(0.02)  # what is tried is slowness itself
            continue
        connection.sendall(b"x" * (due - sent))
        sent = due


def test_a_body_that_is_read_before_all_else_has_to_be_there_in_time(address: Address):
    with address.connected() as connection:
        connection.sendall(request("POST", "/v1/queries", "Content-Length: 100000", "Connection: close"))
        begun = time.monotonic()
        drip(connection, 5000, 100000)
        assert read(rest(connection))[0] == 408
        assert 2.9 < time.monotonic() - begun < 15


def test_a_body_whose_end_is_said_twice_is_refused_and_nothing_after_it_is_a_request(address: Address):
    head = request("POST", "/v1/other", "Content-Length: 4", "Transfer-Encoding: chunked")
    answer = address.answer_to(head + b"1\r\nx\r\n0\r\n\r\n" + request("GET", "/v1/queries"))
    status, headers, body = read(answer)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert (status, headers["connection"], kind(body)) == (400, "close", "bad-request")


def test_what_one_tenant_may_have_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "BODIES", 2)

    async def of_tenants(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["principal"] = SimpleNamespace(tenant=dict(scope["headers"])[b"tenant"].decode())
        await app(scope, receive, send)

    guarded, large = Bodies(of_tenants, SETTINGS), SMALL + 1024

    def sent(address: Address, tenant: str, size: int, method: str = "POST", path: str = "/v1/queries") -> int:
        head = request(method, path, f"Tenant: {tenant}", f"Content-Length: {size}")
        status, headers, body = asked(address, head, bytes(size))
        assert (status == 429) == ("retry-after" in headers)
        assert status != 429 or kind(body) == "bodies-at-once"
        return status

    with run(guarded) as address, address.connected() as one, address.connected() as two:
        for connection in (one, two):
            head = request("POST", "/v1/queries", "Tenant: a", f"Content-Length: {large}", "Connection: close")
            connection.sendall(head + bytes(large - 10))
        until(lambda: guarded._room._taken["a"] == 2 * large - 20)
        assert sent(address, "a", 21) == 429
        assert sent(address, "a", 21, "PATCH", "/v1/queries") == 429
        assert sent(address, "a", large, "PUT", "/v1/contexts") == 200, "that is not kept in memory"
        assert sent(address, "a", 0) == sent(address, "a", 20) == 200
        assert sent(address, "b", large) == 200
        for connection in (one, two):
            connection.sendall(bytes(10))
            assert read(rest(connection))[0] == 200
        assert sent(address, "a", large) == 200
        assert guarded._room._taken == {}


def test_who_goes_leaves_the_service_as_it_was(address: Address):
    for _time in range(20):
        with address.connected() as connection:
            connection.sendall(request("PUT", "/v1/contexts", "Content-Length: 1000") + b"half")
    assert asked(address, request("GET", "/"))[0] == 200


def test_a_fault_of_the_application_is_its_own():
    async def faulty(_scope: Any, _receive: Any, _send: Any) -> None:
        raise bodies.Problem(500, "mine", "this is none of the middleware's")

    with run(Bodies(faulty, SETTINGS)) as address:
        assert b" 500 " in address.answer_to(request("GET", "/")).split(b"\r\n")[0]


@pytest.mark.parametrize("path", ["/v1/queries", "/v1/chat/completions"])
def test_a_body_that_is_packed_is_not_taken_for_what_is_in_it(address: Address, path: str):
    status, _headers, body = asked(address, request("POST", path, "Content-Encoding: gzip", "Content-Length: 2"), b"{}")
    assert (status, kind(body)) == (415, "unsupported-encoding")
    as_it_is = request("POST", path, "Content-Encoding: identity", "Content-Length: 2")
    assert asked(address, as_it_is, b"{}")[0] == 200


def test_who_speaks_to_another_api_is_told_in_its_words(address: Address):
    status, _headers, body = asked(address, request("POST", "/v1/chat/completions", f"Content-Length: {1 << 30}"))
    assert (status, body["error"]["code"]) == (413, "too_large")
