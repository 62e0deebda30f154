"""Sandboxes started ahead of their query: each tried out, watched while it waits, handed out once, never taken back.

A shelf holds sandboxes of one backend with one set of limits; any context can be attached to any of them, hot. What a
query cannot have from a shelf is started for it, cold, and the sandbox says why. Every start goes through here, so
that a crowd of queries does not start more sandboxes at once than this machine can.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio

from orchestrator.core.errors import AirlockError, SandboxDied
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Sandbox, open_sandbox
from orchestrator.sandbox.slots import Slots

Spec = Callable[[Slot], SandboxSpec]

STARTS_AT_ONCE = 2 * (os.cpu_count() or 1)
LONGEST_BACKOFF_S = 60.0
UNMEASURED_BYTES = 64 << 20  # of an idle sandbox, where there is no control group to ask
_NOWHERE = Slot(-1, Path(), None)


@dataclass(slots=True)
class Figures:
    """Of one shelf. ready: waiting now. warm, cold: handed out. lost: died while they waited. failed: starts that did.

    memory_bytes: what those that wait use. fault: why the last start failed, while none has succeeded since.
    """

    backend: str
    isolation: str
    size: int
    ready: int = 0
    warm: int = 0
    cold: int = 0
    lost: int = 0
    failed: int = 0
    memory_bytes: int = 0
    fault: str = ""


class _Job:
    """A task in the background. Ended by a scope: asyncio's own `cancel` would break through the shields of a start."""

    def __init__(self, jobs: set[_Job], work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._scope = anyio.CancelScope()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(lambda _task: jobs.discard(self))
        jobs.add(self)

    async def _run(self) -> None:
        with self._scope:
            await self._work()

    async def stop(self) -> bool:
        """Returns when it has ended; whether that took a cancellation."""
        self._scope.cancel()
        await asyncio.wait([self._task])
        self._task.result()
        return self._scope.cancelled_caught


@dataclass(slots=True, eq=False)
class _Waiting:
    """A sandbox on a shelf. end: of it and its slot."""

    sandbox: Sandbox
    end: AsyncExitStack
    bytes: int
    watch: _Job


@dataclass(slots=True, eq=False)
class _Shelf:
    """most_bytes: what the largest sandbox of this kind used when it began to wait."""

    backend: Backend
    spec: Spec
    figures: Figures
    ready: deque[_Waiting] = field(default_factory=deque[_Waiting])
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    most_bytes: int = 0


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Pool:
    """most_bytes: of memory for all sandboxes that wait. Without a `keep` every sandbox starts cold."""

    def __init__(self, slots: Slots, most_bytes: int = 0) -> None:
        self._slots = slots
        self._most = most_bytes
        self._shelves: dict[tuple[Backend, SandboxSpec], _Shelf] = {}
        self._starting = anyio.Semaphore(STARTS_AT_ONCE)
        self._jobs: set[_Job] = set()
        self._handed_out = 0

    def keep(self, backend: Backend, spec: Spec, size: int) -> None:
        """Have `size` sandboxes of this kind ready from now on, as far as the memory goes. Needs a running loop."""
        shelf = _Shelf(backend, spec, Figures(backend.name, backend.isolation.name, size))
        self._shelves[backend, spec(_NOWHERE)] = shelf
        _Job(self._jobs, partial(self._fill, shelf))

    @asynccontextmanager
    async def open(self, backend: Backend, spec: Spec) -> AsyncGenerator[Sandbox]:
        """A started sandbox for one node; on leaving, guest and slot are gone. Raises what starting one raises."""
        self._handed_out += 1
        try:
            async with AsyncExitStack() as end:
                yield await self._enter(end, backend, spec)
        finally:
            self._handed_out -= 1
            self._changed()

    async def _enter(self, end: AsyncExitStack, backend: Backend, spec: Spec) -> Sandbox:
        shelf = self._shelves.get((backend, spec(_NOWHERE)))
        waiting = await self._take(shelf) if shelf else None
        if waiting is not None:
            waiting.sandbox.cold_because = ""
            await end.enter_async_context(waiting.end)
            return waiting.sandbox
        sandbox = await self._start(end, backend, spec)
        if shelf:
            sandbox.cold_because = "none was ready"
        return sandbox

    def figures(self) -> list[Figures]:
        """Of every shelf, as they are now."""
        return [shelf.figures for shelf in self._shelves.values()]

    async def aclose(self) -> None:
        """End what waits and what is being started. Idempotent; returns when nothing of it is left."""
        while self._jobs:
            await next(iter(self._jobs)).stop()
        for shelf in self._shelves.values():
            while shelf.ready:
                await _end(self._remove(shelf, shelf.ready[0]))
        self._shelves.clear()

    async def _start(self, end: AsyncExitStack, backend: Backend, spec: Spec) -> Sandbox:
        async with self._starting:
            return await end.enter_async_context(open_sandbox(backend, self._slots, spec))

    async def _take(self, shelf: _Shelf) -> _Waiting | None:
        """The one that has waited longest and is well."""
        while shelf.ready:
            waiting = self._remove(shelf, shelf.ready[0])
            well = False
            with anyio.CancelScope(shield=True):  # it is on no shelf, and not in its query's hands yet
                well = await waiting.watch.stop()
            if well:
                shelf.figures.warm += 1
                return waiting
            await self._lose(shelf, waiting)
        shelf.figures.cold += 1
        return None

    def _remove(self, shelf: _Shelf, waiting: _Waiting) -> _Waiting:
        shelf.ready.remove(waiting)
        shelf.figures.ready -= 1
        shelf.figures.memory_bytes -= waiting.bytes
        self._changed()  # there is memory for any of them now
        return waiting

    def _changed(self) -> None:
        for shelf in self._shelves.values():
            shelf.changed.set()

    # In the background

    async def _fill(self, shelf: _Shelf) -> None:
        """Until cancelled: one after the other, so that queries that run keep most of the machine."""
        failures = 0
        while True:
            shelf.changed.clear()
            if not self._lacks(shelf):
                await shelf.changed.wait()
                continue
            try:
                await self._add(shelf)
                failures, shelf.figures.fault = 0, ""
            except (AirlockError, OSError) as error:
                failures += 1
                shelf.figures.failed += 1
                shelf.figures.fault = str(error)
                await anyio.sleep(min(LONGEST_BACKOFF_S, 2.0**failures))

    def _lacks(self, shelf: _Shelf) -> bool:
        """A shelf that is less than half full is filled at once; the rest waits until no query needs the machine."""
        ready, size = len(shelf.ready), shelf.figures.size
        if ready >= size or self._held() + shelf.most_bytes > self._most:
            return False
        return 2 * ready < size or not self._handed_out

    def _held(self) -> int:
        return sum(shelf.figures.memory_bytes for shelf in self._shelves.values())

    async def _add(self, shelf: _Shelf) -> None:
        """Start one, and put it on its shelf if the memory it turns out to use is to be had."""
        async with AsyncExitStack() as stack:
            sandbox = await self._start(stack, shelf.backend, shelf.spec)
            await sandbox.try_out()
            used = (await sandbox.usage()).peak_memory_bytes or UNMEASURED_BYTES
            shelf.most_bytes = max(shelf.most_bytes, used)
            if self._held() + used > self._most:
                return
            end = stack.pop_all()
        waiting = _Waiting(sandbox, end, used, _Job(self._jobs, lambda: self._watch(shelf, waiting)))
        shelf.ready.append(waiting)
        shelf.figures.ready += 1
        shelf.figures.memory_bytes += used

    async def _watch(self, shelf: _Shelf, waiting: _Waiting) -> None:
        """A sandbox that waits has nothing to say: at a word of it, or its end, it is thrown away."""
        with contextlib.suppress(SandboxDied):
            await waiting.sandbox.hear()
        if waiting in shelf.ready:
            self._remove(shelf, waiting)
            await self._lose(shelf, waiting)

    @staticmethod
    async def _lose(shelf: _Shelf, waiting: _Waiting) -> None:
        shelf.figures.lost += 1
        await _end(waiting)


async def _end(waiting: _Waiting) -> None:
    # One that cannot be ended is nobody's any more: its slot stays taken, and the next start in there clears it.
    with anyio.CancelScope(shield=True), contextlib.suppress(AirlockError):
        await waiting.end.aclose()
