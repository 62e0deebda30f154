"""Work that has to come to an end of its own, however its caller is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

from orchestrator.core.errors import RequestError

T = TypeVar("T")


class Shelter:
    """Runs work in tasks that nobody else knows of.

    asyncio's own `cancel` (of `wait_for`, `timeout`, or by hand) breaks through every shield in the task that it hits.
    It cannot hit these: whatever cancels the caller becomes the cancellation of a scope, which shields do hold off.
    """

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], anyio.CancelScope] = {}

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """`work`'s result or exception; the caller's cancellation only once `work` has ended.

        Raises RequestError when `aclose` ended it.
        """
        scope, results = anyio.CancelScope(), list[T]()

        async def sheltered() -> None:
            with scope:
                results.append(await work())

        task = asyncio.create_task(sheltered())
        self._running[task] = scope
        task.add_done_callback(self._running.pop)
        cancelled: BaseException | None = None
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            scope.cancel()
            await _end_of(task)
        task.result()
        if cancelled is not None:
            raise cancelled
        if not results:
            raise RequestError("the query was cancelled: its platform was closed while it ran")
        return results[0]

    async def aclose(self) -> None:
        """Cancel what is running, and wait for its end."""
        for task, scope in list(self._running.items()):
            scope.cancel()
            await _end_of(task)


async def _end_of(task: asyncio.Task[Any]) -> None:
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):
            await asyncio.wait([task])
