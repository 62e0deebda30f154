"""JSON bodies: what of one lies outside of its strings is small, whatever it is sent to.

8 MiB of `[],` become hundreds of megabytes when they are parsed, and whatever walks through them takes seconds. The
parser lets nobody else run, in whichever thread it is. So a body is judged before it is parsed, in a few passes in C,
as frames are (`guest/wire`): what is left costs little more than its strings, which cost what copying them does.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from orchestrator.server.problems import Problem

MOST = 256 << 10  # bytes outside of strings, quotes included; the README and the routes' descriptions say it


class JsonRoute(APIRoute):
    """A route whose body, where it takes one, is JSON with little structure. Every router of the service has it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def judged(request: Request) -> Response:
            try:
                body = await request.body()
            except ClientDisconnect:
                raise Problem(400, "cut-short", "the body ended early") from None
            require_little_structure(body)
            return await handle(request)

        return judged


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
