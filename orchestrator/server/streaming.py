"""Server-sent events (WHATWG HTML, 9.2) and files, to clients that may be half gone or hostile.

How slow they may be is the connection's to say (`protocol`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, BinaryIO

import anyio
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.core.errors import AirlockError
from orchestrator.server.lasting import while_let_in
from orchestrator.server.problems import Problem

HEARTBEAT_S = 15.0
_PIECE = 256 << 10  # bytes of a file that are sent at once

_log = logging.getLogger("airlock.streaming")


def event(kind: str | None, data: Any, number: int | None = None) -> bytes:
    """One event. data: JSON, in ASCII and on one line, so that nothing in it can end the event."""
    lines = [f"id: {number}"] if number is not None else []
    lines += [f"event: {kind}"] if kind else []
    text = json.dumps(data, separators=(",", ":"))
    return ("\n".join([*lines, f"data: {text}"]) + "\n\n").encode()


class EventStream(Response):
    """pieces: the events, as `event` makes them.

    It ends with them, or when the client has gone, or does not read, or is let in no more.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._pieces = pieces

    def farewell(self, problem: Problem) -> bytes:
        """The last event for who is let in no more; who comes again is told by the status."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready, taken = anyio.create_memory_object_stream[bytes](1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_gone, receive, tasks.cancel_scope)
            tasks.start_soon(self._pump, HTTPConnection(scope), ready)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with taken:
                await _give(taken, send)
            tasks.cancel_scope.cancel()

    async def _pump(self, connection: HTTPConnection, ready: MemoryObjectSendStream[bytes]) -> None:
        async with ready, aclosing(self._pieces):
            try:
                async with while_let_in(connection):
                    async for piece in self._pieces:
                        await ready.send(piece)
            except Problem as problem:
                _log.info("a stream was ended", extra={"problem": problem.kind})
                await ready.send(self.farewell(problem))
            except AirlockError as error:  # the client comes again, and is told then
                _log.warning("a stream ended early", extra={"error": error.kind})


@asynccontextmanager
async def while_there(receive: Receive, over: anyio.Event | None = None) -> AsyncGenerator[None]:
    """Its body is cancelled once the client has gone, or `over` is set."""
    raised: list[Exception] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_when_gone, receive, tasks.cancel_scope)
        if over is not None:
            tasks.start_soon(_cancel_when, over, tasks.cancel_scope)
        try:
            yield
        except Exception as error:  # raised below: the task group would wrap it
            raised.append(error)
        tasks.cancel_scope.cancel()
    if raised:
        raise raised[0]


async def _cancel_when(over: anyio.Event, scope: anyio.CancelScope) -> None:
    await over.wait()
    scope.cancel()


async def cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Beside work that is of use only as long as its client waits for it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


class FileStream(Response):
    """A file that is nobody else's, from its beginning on; closed when it was sent, or the client does not take it.

    over: called then.
    """

    media_type = "application/octet-stream"

    def __init__(
        self, file: BinaryIO, bytes_: int, media_type: str, headers: Mapping[str, str], over: Callable[[], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", **headers}, media_type=media_type)
        self.headers["content-length"] = str(bytes_)
        self._file, self._over = file, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._file:
                async with while_there(receive):
                    await self._send(send)
        finally:
            self._over()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        more = True
        while more:
            piece = await anyio.to_thread.run_sync(self._file.read, _PIECE)
            more = bool(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


async def _give(taken: MemoryObjectReceiveStream[bytes], send: Send) -> None:
    more = True
    while more:
        piece = b": keep-alive\n\n"
        with anyio.move_on_after(HEARTBEAT_S):
            try:
                piece = await taken.receive()
            except anyio.EndOfStream:
                piece, more = b"", False
        await send({"type": "http.response.body", "body": piece, "more_body": more})
