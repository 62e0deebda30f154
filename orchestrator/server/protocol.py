"""Connections: how many a client and all may have, how long headers may take, and how it takes its answers.

An answer that is not taken lies in our memory: it is written in pieces, each once there is room for it, and a client
that takes nothing has gone. The rest is uvicorn's.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import json
import math
import struct
import sys
import termios
from collections import Counter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import anyio
import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from orchestrator.server.bodies import LEAST_RATE, LINGER_S
from orchestrator.server.problems import MEDIA_TYPE, Problem

HEADERS_S = 10.0
PER_ADDRESS = 256
SLOWEST_S = 30.0  # of an answer that is not taken at `LEAST_RATE` or faster; the client has gone then
UNTAKEN = 64 << 20  # bytes of one tenant's answers that may lie here
_OF_STOP = 0.8  # the part of the time to stop that answers under way have
_PIECE = 64 << 10  # bytes that are written at once, and that a transport has room for


class _Lying:
    """Long answers that are being taken, whole for as long as that lasts, by whose they are; the oldest first."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[Protocol, int]] = {}

    def add(self, owner: str, of: Protocol, size: int) -> None:
        """Where it is too much, the connections of older ones are cut off."""
        mine = self._sizes.setdefault(owner, {})
        beyond = sum(mine.values()) + size - of.untaken
        for other, its in list(mine.items()):
            if beyond <= 0:
                break
            beyond -= its
            other.transport.abort()
            del mine[other]
        mine[of] = size

    def drop(self, owner: str, of: Protocol) -> None:
        mine = self._sizes.get(owner, {})
        mine.pop(of, None)
        if not mine:
            self._sizes.pop(owner, None)


class Protocol(H11Protocol):
    """h11's, for it bounds the size of headers: give `h11_max_incomplete_event_size`.

    headers_s: from the connection's beginning, or the first byte after an answer, to the end of the headers; what is
    left of a body that nobody read has to come in this time, too. per_address: connections at once of one client; of
    IPv6, a /64 is one. in_all: of all clients. See `limited`. slowest_s, untaken: as the constants say.
    """

    headers_s: ClassVar[float] = HEADERS_S
    per_address: ClassVar[int] = PER_ADDRESS
    in_all: ClassVar[float] = math.inf
    slowest_s: ClassVar[float] = SLOWEST_S
    untaken: ClassVar[int] = UNTAKEN
    _connected: ClassVar[WeakKeyDictionary[ServerState, Counter[str]]] = WeakKeyDictionary()
    _all_lying: ClassVar[WeakKeyDictionary[ServerState, _Lying]] = WeakKeyDictionary()
    _timer: asyncio.TimerHandle | None = None
    _counted: str | None = None
    _deaf = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._app, self.app = self.app, self._answer
        self._lying = self._all_lying.setdefault(self.server_state, _Lying())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        connected = self._connected.setdefault(self.server_state, Counter())
        client = _block(self.client[0]) if self.client else ""
        # Those that are aborted count in all until they are closed: they have a descriptor for so long.
        if connected[client] >= self.per_address or len(self.connections) > self.in_all:
            transport.abort()
            return
        connected[client] += 1
        self._counted = client
        self._arm(self.headers_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._counted is not None:
            connected = self._connected[self.server_state]
            connected[self._counted] -= 1
            if not connected[self._counted]:
                del connected[self._counted]
            self._counted = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._deaf:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        self._require_end()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._require_end()

    def shutdown(self) -> None:
        """The server stops: who has not taken the answer shortly before its time is over is cut off. The server would
        cancel what answers, and call that a fault of ours.
        """
        super().shutdown()
        if self.config.timeout_graceful_shutdown is not None:
            self.loop.call_later(_OF_STOP * self.config.timeout_graceful_shutdown, self.transport.abort)

    def _watch(self) -> None:
        """The time runs while something of a request has come, and no answer to it is under way."""
        cycle: Any = self.cycle  # None before the first request
        if self._deaf:
            return
        answering = cycle is not None and not cycle.response_complete
        pending = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if answering or not pending:
            self._disarm()
        elif self._timer is None:
            self._arm(self.headers_s)

    # Answers

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_pieces(message: Message) -> None:
            await self._until_taken()
            body = message.get("body", b"")
            if len(body) <= _PIECE:
                await send(message)
                return
            owner = self._owner(scope)
            self._lying.add(owner, self, len(body))
            try:
                for at in range(0, len(body), _PIECE):
                    await send({**message, "body": body[at : at + _PIECE], "more_body": True})
                    await self._until_taken()
            finally:
                self._lying.drop(owner, self)
            await send({**message, "body": b""})

        await self._until_taken()  # the answer before this one: two of them would lie here
        await self._app(scope, receive, in_pieces)  # type: ignore[arg-type]

    async def _until_taken(self) -> None:
        """Until there is room for more. A client that takes too little is cut off."""
        while self.flow.write_paused:
            before = self._untaken()
            with anyio.move_on_after(self.slowest_s) as slow:
                await self.flow.drain()
            if slow.cancelled_caught and before - self._untaken() < LEAST_RATE * self.slowest_s:
                self.transport.abort()
                await self.flow.drain()  # it is over at once, and the application is told

    def _untaken(self) -> int:
        """Bytes that are written and not taken, those in the kernel with them: it says that it has room again only
        once a good part of it is there.
        """
        ours = self.transport.get_write_buffer_size()
        if self.transport.is_closing():
            return ours
        kernel = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
        return ours + struct.unpack("i", kernel)[0]

    def _owner(self, scope: Scope) -> str:
        """Whose an answer is: the tenant's, or that of who has shown no key."""
        principal = scope["state"].get("principal")
        return f"tenant {principal.tenant}" if principal else f"client {_block(self.client[0]) if self.client else ''}"

    def _require_end(self) -> None:
        """Where the connection is closed: what little is left of the answer has to be taken in its time."""
        if self.transport.is_closing():
            self._disarm()
            self._timer = self.loop.call_later(self.slowest_s, self._too_late)

    # Requests that are none

    def send_400_response(self, msg: str) -> None:
        """Called while h11's error is handled, which says whether it is about size."""
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._disarm()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun: there is no other one
            self.transport.close()
            return
        problem = (
            Problem(431, "headers-too-large", "the request's headers are too large")
            if hint == 431
            else Problem(400, "bad-request", "this is no HTTP request")
        )
        body = json.dumps(problem.body()).encode()
        headers = [("content-type", MEDIA_TYPE), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=problem.status, headers=headers, reason=problem.body()["title"].encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._let_read()

    def _let_read(self) -> None:
        """Close, once the client has had time to read why: the answer is lost where something comes after the close."""
        if not self.transport.can_write_eof():  # TLS cannot
            self.transport.close()
            return
        self.transport.write_eof()
        self._deaf = True
        self._arm(LINGER_S)

    def _arm(self, seconds: float) -> None:
        if not self.transport.is_closing():
            self._timer = self.loop.call_later(seconds, self._too_late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        self.transport.abort()


def limited(per_address: int = PER_ADDRESS, in_all: float = math.inf) -> type[Protocol]:
    """With as many connections of one client and of all as that; a proxy before the service is one client."""
    fields: dict[str, Any] = {"per_address": per_address, "in_all": in_all}
    return type("LimitedProtocol", (Protocol,), fields)


def _block(address: str) -> str:
    """What one client has for itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return address
