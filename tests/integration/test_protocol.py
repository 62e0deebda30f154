"""Connections on a real uvicorn: slow and large headers, and too many connections of one client."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest

from orchestrator.server.protocol import Protocol, _block, limited  # pyright: ignore[reportPrivateUsage]
from orchestrator.server.streaming import FileStream
from tests.command import until
from tests.uvicorns import Address, rest, run

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


LARGE = 16 << 20  # more than the kernel takes
begun: list[str] = []  # paths


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, without a look at the body; `/large` at length."""
    begun.append(scope["path"])
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
        await send({"type": "http.response.body", "body": b"x" * LARGE})
        begun.append("/large taken")
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Quick(Protocol):
    headers_s = 0.5


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with run(app, Quick) as made:
        yield made


def read_answer(connection: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"ok"):
        got += connection.recv(1000)
    return got


def test_a_connection_that_says_nothing_is_closed(address: Address):
    begun = time.monotonic()
    with address.connected() as connection:
        assert rest(connection) == b""
    assert 0.4 < time.monotonic() - begun < 10


def test_headers_that_come_byte_by_byte_are_not_waited_for(address: Address):
    begun = time.monotonic()
    with address.connected() as connection:
        connection.settimeout(0.05)
        got = None
        for number in range(1000):
            try:
                connection.sendall(GET[:16] if number == 0 else b"X")
                got = connection.recv(100)
                break
            except TimeoutError:
                continue
            except OSError:
                got = b""
                break
    assert got == b""
    assert 0.4 < time.monotonic() - begun < 10


def test_who_asks_again_on_the_same_connection_has_the_time_anew(address: Address):
    with address.connected() as connection:
        for _request in range(3):
            connection.sendall(GET)
            assert b"200 OK" in read_answer(connection)
        connection.sendall(GET[:-4])
        begun = time.monotonic()
        assert rest(connection) == b""
        assert 0.4 < time.monotonic() - begun < 10


def test_two_requests_at_once_are_answered_one_after_the_other(address: Address):
    with address.connected() as connection:
        connection.sendall(GET + GET + GET[:10])
        assert rest(connection).count(b"200 OK") == 2


def test_a_body_that_nobody_reads_is_not_waited_for(address: Address):
    with address.connected() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n123")
        assert b"200 OK" in read_answer(connection)
        begun = time.monotonic()
        assert rest(connection) == b""
        assert 0.4 < time.monotonic() - begun < 10


def test_a_body_that_nobody_reads_and_that_comes_is_no_reason_to_close(address: Address):
    with address.connected() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n123")
        assert b"200 OK" in read_answer(connection)
        connection.sendall(b"x" * 997)
        connection.settimeout(1)
        with pytest.raises(TimeoutError):  # twice the time that headers have
            connection.recv(1)
        connection.settimeout(20)
        connection.sendall(GET)
        assert b"200 OK" in read_answer(connection)


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 400_000, 431, "headers-too-large"),
        (b"GET /" + b"a" * 400_000, 431, "headers-too-large"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad-request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad-request"),
        (b"nonsense\r\n\r\n", 400, "bad-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, "bad-request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "bad-request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "bad-request"),
    ],
)
def test_what_is_no_request_is_told_so(address: Address, request_: bytes, status: int, kind: str):
    with address.connected() as connection:
        with contextlib.suppress(ConnectionError):  # it may be answered before all of it was sent
            connection.sendall(request_)
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"application/problem+json" in head
    assert json.loads(body)["type"] == f"urn:airlock:{kind}"


def test_a_body_that_breaks_the_rules_ends_the_connection(address: Address):
    answer = address.answer_to(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("most", [limited(per_address=3), limited(in_all=3)])
def test_a_client_has_so_many_connections_and_so_have_all_of_them(most: type[Protocol]):
    with run(app, most) as address:
        held = [socket.create_connection(("127.0.0.1", address.port), timeout=20) for _number in range(3)]
        for connection in held:
            connection.sendall(GET)
            assert b"200 OK" in read_answer(connection)
        with address.connected() as one_more:
            assert rest(one_more) == b""
        held[0].close()
        assert until(lambda: is_served(address))
        for connection in held[1:]:
            connection.sendall(GET)
            assert b"200 OK" in read_answer(connection)
            connection.close()


def is_served(address: Address) -> bool:
    try:
        return b"200 OK" in address.answer_to(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    except ConnectionError:
        return False


class Impatient(Protocol):
    slowest_s = 0.5
    untaken = LARGE


GET_LARGE = GET.replace(b"/", b"/large", 1)


def test_an_answer_that_nobody_takes_is_not_kept():
    with run(app, Impatient) as address, address.connected() as connection:
        begun.clear()
        connection.sendall(GET_LARGE + GET)
        connection.recv(1000)
        assert until(lambda: "/large taken" in begun)
        assert len(rest(connection)) < LARGE  # it was cut off, and nothing but what the kernels had comes
        assert "/" not in begun  # what was asked after it would have been kept as well


def test_an_answer_that_is_taken_slowly_is_whole():
    with run(app, Impatient) as address, address.connected() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        connection.sendall(GET_LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        got, began = 0, time.monotonic()
        while piece := connection.recv(64 << 10):
            got += len(piece)
            # A steady client that is slow: its pace, and no wait for anything.
            while got < LARGE and got / LARGE > (time.monotonic() - began) / (4 * Impatient.slowest_s):
                time.sleep(0.01)
    assert got > LARGE
    assert time.monotonic() - began > 3 * Impatient.slowest_s


def test_what_lies_here_of_one_client_is_bounded_and_the_oldest_goes():
    class Patient(Impatient):
        slowest_s = 60

    with run(app, Patient) as address, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(address.connected()) for _number in range(5)]
        for connection in connections:
            connection.sendall(GET_LARGE)
            connection.recv(1000)
        for connection in connections[:-1]:
            assert len(rest(connection)) < LARGE
        got = 0
        while got < LARGE - 1000:
            got += len(connections[-1].recv(1 << 20))


def test_a_file_that_nobody_takes_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture):
    ended: list[bool] = []

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        file = BytesIO(b"x" * LARGE)
        await FileStream(file, LARGE, "text/plain", {}, lambda: ended.append(file.closed))(scope, receive, send)

    with run(sends, Impatient) as address, address.connected() as connection:
        connection.sendall(GET)
        connection.recv(1000)
        assert until(lambda: ended) == [True]  # nothing is read until then
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_nobody_takes_does_not_keep_a_service_from_its_end(caplog: pytest.LogCaptureFixture):
    with contextlib.ExitStack() as stack, run(app, grace_s=1) as address:
        for _number in range(3):
            connection = stack.enter_context(address.connected())
            connection.sendall(GET_LARGE)
            connection.recv(1000)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_one_client_is():
    assert _block("192.0.2.1") == _block("::ffff:192.0.2.1")
    assert _block("2001:db8::1") == _block("2001:db8::ffff:2") != _block("2001:db8:0:1::1")
    assert _block("fe80::1%eth0") == _block("fe80::2")
