"""What every request is held to before a route sees it, and what every answer carries.

The name that the service is called by, the size of headers and body, and how slowly a body may come. A body is judged
by what it says of its length, and counted while it comes. Who is refused with a body on its way is answered at once
and cut off a moment later: one that is cut off at once mostly loses the answer with the connection.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.server.chat.errors import error_response, speaks
from orchestrator.server.problems import Problem, come_again
from orchestrator.settings import ServerSettings

JSON_S = 60.0  # that a body has which is read before anything is done
PIECE_S = 20.0  # that the next piece has; also what a rate is measured over
LEAST_RATE = 1024  # bytes a second
LINGER_S, LINGER_BYTES = 2.0, 8 << 20  # that who is refused has to read why, and may send meanwhile
HEADER_BYTES = 32 << 10
HEADERS = 100
SMALL = 1 << 20
BODIES = 16  # of the largest, that one tenant may have in memory at once
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9._-]{0,253}[A-Za-z0-9])?)(:[0-9]{1,5})?")
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Bodies:
    """ASGI middleware, outside of the application.

    hosts: names that the service is called by, without ports; empty for any. secure: it is reached over TLS alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        hosts: Collection[str] = (),
        secure: bool = False,
    ) -> None:
        self._app, self._settings = app, settings
        self._hosts = {host.lower() for host in hosts}
        self._room = _Room(BODIES * (settings.inline_bytes + SMALL))
        self._always = _ALWAYS | ({"Strict-Transport-Security": "max-age=31536000"} if secure else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Never the client's: what is found by it in the log is ours.
        request_id = scope.setdefault("state", {}).setdefault("request_id", secrets.token_hex(8))
        always = self._always | ({"Cache-Control": "no-store"} if scope["path"].startswith("/v1/") else {})

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in always.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = request_id
            await send(message)

        body = _Body(self._allowance(scope["method"], scope["path"]), receive, told, self._room, scope["state"])
        try:
            self._require_sane(scope)
            body.require_fits(scope)
        except Problem as problem:
            body.fault = problem
        else:
            try:
                await self._app(scope, body.receive, body.send)
            except Problem as problem:
                if problem is not body.fault:
                    raise
            finally:
                body.let_go()
        if body.fault is not None and not body.answered:
            told_so = error_response(body.fault) if speaks(scope["path"]) else body.fault.response()
            await _refuse(told_so, scope, receive, told)

    def _allowance(self, method: str, path: str) -> Allowance:
        if (method, path) == ("PUT", "/v1/contexts") or (method == "PATCH" and path.startswith("/v1/contexts/")):
            return Allowance(self._settings.upload_bytes, None)
        if method == "POST" and path in ("/v1/queries", "/v1/chat/completions"):
            return Allowance(self._settings.inline_bytes + SMALL, JSON_S)
        return Allowance(SMALL, JSON_S)

    def _require_sane(self, scope: Scope) -> None:
        """Raises Problem."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        named = [value for name, value in headers if name == b"host"]
        match = _HOST.fullmatch(named[0].decode("latin-1")) if len(named) == 1 else None
        if match is None:
            raise Problem(400, "bad-host", "the header Host has to name one host")
        if self._hosts and match[1].lower() not in self._hosts:
            raise Problem(421, "other-host", "the service is not called by this name")
        if any(value.lower() != b"identity" for name, value in headers if name == b"content-encoding"):
            raise Problem(415, "unsupported-encoding", "send the body without a Content-Encoding")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _value in headers}:
            # A proxy before us may have taken the other one for the body's end (RFC 9112, 6.1).
            raise Problem(
                400, "bad-request", "a body's end is said by Content-Length or Transfer-Encoding, not by both"
            )
        if len(headers) > HEADERS or sum(len(name) + len(value) + 4 for name, value in headers) > HEADER_BYTES:
            raise Problem(431, "headers-too-large", f"at most {HEADERS} headers of {HEADER_BYTES:,} bytes are taken")


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a body may be. most: bytes. within_s: all of it; None where that depends on its size."""

    most: int
    within_s: float | None


class _Room:
    """For bodies in memory. most: bytes of all that one tenant has under way."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = Counter[str]()

    def take(self, tenant: str, size: int) -> None:
        """Raises Problem where it is more than the tenant may have; to be given back all the same."""
        self._taken[tenant] += size
        if self._taken[tenant] > self._most:
            text = f"the tenant's requests that are under way may have bodies of {self._most:,} bytes together"
            raise come_again(429, "bodies-at-once", text)

    def give_back(self, tenant: str, size: int) -> None:
        self._taken[tenant] -= size
        if not self._taken[tenant]:
            del self._taken[tenant]


class _Body:
    """One request's body while it comes. fault: why it was cut off. answered: the answer has begun.

    state: of the request; where it has a principal, that is there before anything is read.
    """

    def __init__(
        self, allowance: Allowance, receive: Receive, send: Send, room: _Room, state: Mapping[str, Any]
    ) -> None:
        self._allowance, self._receive, self._send = allowance, receive, send
        self._room, self._state = room, state
        self._taken: list[tuple[str, int]] = []  # of the room
        self.fault: Problem | None = None
        self.answered = False
        self._size = 0
        self._waited = 0.0  # for this client; what we take is not the client's fault
        self._ended = False
        self._since = (0.0, 0)  # of the rate: what was waited, and what had come by then

    def require_fits(self, scope: Scope) -> None:
        """By what it says of its length. Raises Problem."""
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        for length in lengths:
            if not re.fullmatch(rb"[0-9]{1,18}", length) or int(length) > self._allowance.most:
                raise self._too_large()

    async def receive(self) -> Message:
        """Raises Problem: 408, 413."""
        if self._ended:
            return await self._receive()
        if self.fault is not None:
            raise self.fault
        try:
            message = await self._next()
        except Problem as problem:
            self.fault = problem
            raise
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        begun, all_s = anyio.current_time(), self._allowance.within_s
        left = PIECE_S if all_s is None else min(PIECE_S, all_s - self._waited)
        message: Message | None = None
        with anyio.move_on_after(left):
            message = await self._receive()
        if message is None:
            raise self._too_slow()
        self._waited += anyio.current_time() - begun
        self._size += len(message.get("body", b""))
        if self._size > self._allowance.most:
            raise self._too_large()
        self._take_room(len(message.get("body", b"")))
        since, size = self._since
        if self._waited - since >= PIECE_S:
            if message.get("more_body") and self._size - size < LEAST_RATE * (self._waited - since):
                raise self._too_slow()
            self._since = (self._waited, self._size)
        return message

    def _take_room(self, size: int) -> None:
        """Raises Problem: 429."""
        principal = self._state.get("principal")  # whoever has none sends something small
        if size and principal is not None and self._allowance.within_s is not None:  # else it is not kept in memory
            self._taken.append((principal.tenant, size))
            self._room.take(principal.tenant, size)

    def let_go(self) -> None:
        """The request has ended, and with it what there was of its body in memory."""
        while self._taken:
            self._room.give_back(*self._taken.pop())

    async def send(self, message: Message) -> None:
        """What the application says of a body that was cut off is not told: it may have taken the cut for an end."""
        if self.fault is None or self.answered:
            self.answered = True
            await self._send(message)

    def _too_large(self) -> Problem:
        return Problem(413, "too-large", f"the body may have {self._allowance.most:,} bytes at most")

    def _too_slow(self) -> Problem:
        return Problem(408, "too-slow", "the body came too slowly: send it again over a better connection")


async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and take no notice of what is still sent until the client has gone, for a moment at most."""
    response.headers["Connection"] = "close"

    async def lingering(message: Message) -> None:
        if message["type"] != "http.response.body" or message.get("more_body"):
            await send(message)
            return
        await send({**message, "more_body": True})
        with anyio.move_on_after(LINGER_S):
            left = LINGER_BYTES
            while left > 0 and (come := await receive())["type"] != "http.disconnect" and come.get("more_body"):
                left -= len(come.get("body", b""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await response(scope, receive, lingering)
