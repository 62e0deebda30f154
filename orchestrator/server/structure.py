"""JSON bodies: what of one lies outside of its strings is small, whatever it is sent to.

8 MiB of `[],` become hundreds of megabytes when they are parsed, and whatever walks through them takes seconds. The
parser lets nobody else run, in whichever thread it is. So a body is judged before it is parsed, in a few passes in C,
as frames are (`guest/wire`): what is left costs little more than its strings, which cost what copying them does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from orchestrator.core.turns import Turns
from orchestrator.server.inline import in_turn
from orchestrator.server.problems import Problem

MOST = 256 << 10  # bytes outside of strings, quotes included; the README and the routes' descriptions say it
LARGE = 64 << 10  # bytes of a body that others would wait for
_large = Turns(2)  # of all tenants, checked or parsed at once: threads, which take the processor from the event loop
T = TypeVar("T")


class JsonRoute(APIRoute):
    """A route whose body, where it takes one, is JSON with little structure. Every router of the service has it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def judged(request: Request) -> Response:
            request = _Json(request.scope, request.receive)
            try:
                body = await request.body()
            except ClientDisconnect:
                raise Problem(400, "cut-short", "the body ended early") from None
            await _worked(request, body, require_little_structure)
            return await handle(request)

        return judged


class _Json(Request):
    """A request whose body is parsed where it keeps nobody waiting."""

    async def json(self) -> Any:
        return await _worked(self, await self.body(), json.loads)


async def _worked(request: Request, body: bytes, work: Callable[[bytes], T]) -> T:
    """What `work` makes of a body. A large one takes its turn, in a thread: few at once, and one of a tenant."""
    if len(body) <= LARGE:
        return work(body)
    principal = request.scope.get("state", {}).get("principal")
    return await in_turn(_large, principal.tenant if principal else "", partial(work, body))


def require_little_structure(body: bytes | bytearray) -> None:
    """Raises Problem: 413; 400 for another encoding than UTF-8, in which quotes are not where they seem to be."""
    if b"\0" in body:  # in UTF-16 and UTF-32 every character that JSON itself is made of has one; in UTF-8 none
        raise Problem(400, "bad-json", "the body is not JSON in UTF-8")
    if not _has_little(body):
        text = f"at most {MOST:,} bytes of a body may lie outside of its strings: where the context has more"
        raise Problem(413, "too-much-structure", f"{text}, give it as one of kind json or jsonl: PUT /v1/contexts")


def _has_little(body: bytes | bytearray) -> bool:
    """Backslashes are taken away two by two, then the quotes that one escapes: what is left delimits strings. Outside
    of strings a backslash is no JSON, and the parser gets no further.
    """
    if len(body) <= MOST:
        return True
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = body.count(b'"')
    return quotes <= MOST and quotes + sum(map(len, body.split(b'"')[::2])) <= MOST
