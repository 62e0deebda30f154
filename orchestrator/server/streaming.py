"""Server-sent events (WHATWG HTML, 9.2) to clients that may be slow, half gone or hostile."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.core.errors import AirlockError

HEARTBEAT_S = 15.0
SLOWEST_S = 30.0  # a client that does not take a piece in this time has gone

_log = logging.getLogger("airlock.streaming")


def event(kind: str | None, data: Any, number: int | None = None) -> bytes:
    """One event. data: JSON, in ASCII and on one line, so that nothing in it can end the event."""
    lines = [f"id: {number}"] if number is not None else []
    lines += [f"event: {kind}"] if kind else []
    text = json.dumps(data, separators=(",", ":"))
    return ("\n".join([*lines, f"data: {text}"]) + "\n\n").encode()


class EventStream(Response):
    """pieces: the events, as `event` makes them. It ends with them, or when the client has gone, or does not read."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready, taken = anyio.create_memory_object_stream[bytes](1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_gone, receive, tasks.cancel_scope)
            tasks.start_soon(_pump, self._pieces, ready)
            with anyio.move_on_after(SLOWEST_S):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with taken:
                await _give(taken, send)
            tasks.cancel_scope.cancel()


async def _gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _pump(pieces: AsyncGenerator[bytes], ready: MemoryObjectSendStream[bytes]) -> None:
    async with ready, aclosing(pieces):
        try:
            async for piece in pieces:
                await ready.send(piece)
        except AirlockError as error:  # the client comes again, and is told then
            _log.warning("a stream ended early", extra={"error": error.kind})


async def _give(taken: MemoryObjectReceiveStream[bytes], send: Send) -> None:
    more = True
    while more:
        piece = b": keep-alive\n\n"
        with anyio.move_on_after(HEARTBEAT_S):
            try:
                piece = await taken.receive()
            except anyio.EndOfStream:
                piece, more = b"", False
        with anyio.move_on_after(SLOWEST_S) as slow:
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        if slow.cancelled_caught:
            return
