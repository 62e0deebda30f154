"""Connections: how many a client and all may have, and how long headers may take. The rest is uvicorn's."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import sys
from collections import Counter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from orchestrator.server.bodies import LINGER_S
from orchestrator.server.problems import MEDIA_TYPE, Problem

HEADERS_S = 10.0
PER_ADDRESS = 256


class Protocol(H11Protocol):
    """h11's, for it bounds the size of headers: give `h11_max_incomplete_event_size`.

    headers_s: from the connection's beginning, or the first byte after an answer, to the end of the headers; what is
    left of a body that nobody read has to come in this time, too. per_address: connections at once of one client; of
    IPv6, a /64 is one. in_all: of all clients. See `limited`.
    """

    headers_s: ClassVar[float] = HEADERS_S
    per_address: ClassVar[int] = PER_ADDRESS
    in_all: ClassVar[float] = math.inf
    _connected: ClassVar[WeakKeyDictionary[ServerState, Counter[str]]] = WeakKeyDictionary()
    _timer: asyncio.TimerHandle | None = None
    _counted: str | None = None
    _deaf = False

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
