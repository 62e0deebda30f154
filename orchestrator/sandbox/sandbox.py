"""A sandbox as the loop sees it: attach a context, run cells, close. Written once, over every backend."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio

from orchestrator.core.context import Context
from orchestrator.core.errors import (
    AirlockError,
    ChildStopped,
    LimitError,
    MachineError,
    OutcomeUnknown,
    ProtocolViolation,
    RateLimited,
    SandboxDied,
    SandboxUnusable,
    StoreError,
)
from orchestrator.guest import wire
from orchestrator.sandbox.base import Backend, Guest, SandboxSpec, Slot, Usage
from orchestrator.sandbox.channel import Channel
from orchestrator.sandbox.slots import Slots

START_S = 20.0  # for a guest to say it is ready
OVERTIME_S = 10.0  # for the supervisor to end a cell by itself after its limit; then the host kills the sandbox

CellStatus = Literal["ok", "error", "timeout", "killed"]


@dataclass(frozen=True, slots=True)
class Call:
    """A sub-call that a cell asks for. Hostile text; who asks is known from the sandbox it came from.

    context: the number of one that the cell handed over, for a child query.
    """

    op: str
    prompt: str
    model: str | None
    context: int | None = None


@dataclass(slots=True)
class CellResult:
    """How a cell went. `output` holds (stream, text) in the order written; `dropped` counts bytes beyond the cap."""

    status: CellStatus
    detail: str
    output: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    answer: str | None = None
    names: tuple[str, ...] = ()
    dropped: int = 0
    duration_s: float = 0.0

    def text(self, stream: str) -> str:
        return "".join(text for name, text in self.output if name == stream)


OnCall = Callable[[Call], Awaitable[str | dict[str, Any]]]
OnOutput = Callable[[str, str], None]


class Sandbox:
    """One isolated REPL. Use `open_sandbox`."""

    def __init__(self, guest: Guest, spec: SandboxSpec) -> None:
        self._guest = guest
        self._spec = spec
        self._channel = Channel(guest.stream)
        self._cells = 0
        self._room = 0
        self._newest_call = 0
        self._in_flight: set[int] = set()
        self._attach_pending = False
        self.python = ""
        self.cold_because = "no sandboxes are kept ready"  # empty for one that was started before it was asked for

    @property
    def image(self) -> str | None:
        """The digest of the image that it runs in, if it is in a container."""
        return self._guest.image

    async def start(self) -> None:
        """Raises SandboxUnusable when the agent does not come up."""
        hello = {"type": "hello", "version": wire.VERSION, "limits": self._spec.guest_limits()}
        try:
            with anyio.fail_after(START_S):
                await self._channel.send(hello)
                ready = await self._channel.receive()
        except (SandboxDied, TimeoutError) as error:
            await self._guest.kill()
            words = self._guest.last_words()
            why = f": {words}" if words else f" within {START_S:.0f} s" if isinstance(error, TimeoutError) else ""
            raise SandboxUnusable(f"the guest agent did not start{why}; see `airlock doctor`") from None
        if ready["type"] != "ready" or ready["version"] != wire.VERSION:
            raise ProtocolViolation("the guest speaks another version of the channel")
        self.python = ready["python"][:32]

    async def try_out(self) -> None:
        """Run a cell of our own: what is slow the first time has been done by the time that it is needed.

        Raises SandboxUnusable when it does not go well, SandboxDied.
        """
        self._cells = -1  # it has number 0: the cells of a query count from 1
        result = await self.run("print('well')", START_S, _no_calls)
        if (result.status, result.text("out")) != ("ok", "well\n"):
            raise SandboxUnusable(f"a new sandbox does not run cells: {result.status} {result.detail}")

    async def hear(self) -> None:
        """Wait between cells until the guest says something, which it may not. Raises SandboxDied when it ends."""
        frame = await self._channel.receive()
        raise ProtocolViolation(f"the guest sent a frame of type {frame['type']} between cells")

    def attach(self, context: Context) -> None:
        """Make the context visible at /context, hot: hard links, no copy. The next cell finds it as `context`."""
        for name, path in context.files.items():
            os.link(path, self._spec.slot.folder / name)
        self._attach_pending = True

    async def run(self, code: str, timeout_s: float, on_call: OnCall, on_output: OnOutput | None = None) -> CellResult:
        """Run one cell; `timeout_s` of wall clock, then it is interrupted, then killed.

        A cell that fails is a result. Raises SandboxDied (ProtocolViolation) when the sandbox itself is gone; it is
        dead then. Sub-calls in flight when the cell ends are cancelled.
        """
        self._cells += 1
        self._room = self._spec.output_bytes + 4096  # the agent's own notes come on top of what the cell may write
        self._newest_call = 0  # a snapshot that takes over does not know the ids that the dead cell used
        started = time.monotonic()
        result = CellResult("killed", "")
        frame = {"type": "run", "id": self._cells, "code": code, "timeout_s": timeout_s}
        try:
            with anyio.fail_after(timeout_s + OVERTIME_S):
                await self._channel.send(frame | {"context": self._attach_pending})
                self._attach_pending = False
                self._in_flight = set()
                # Most cells ask nothing, and a task group is a turn of the event loop.
                call = await self._until_call(result, on_output)
                if call is not None:
                    await self._with_calls(call, result, on_call, on_output)
        except TimeoutError:
            await self._guest.kill()
            raise SandboxDied("the sandbox did not end a cell at its time limit and was killed") from None
        except BaseExceptionGroup as group:
            await self._guest.kill()
            raise _first(group) from None  # pyright: ignore[reportUnknownArgumentType]
        except SandboxDied:
            await self._guest.kill()
            raise
        result.duration_s = time.monotonic() - started
        return result

    async def _with_calls(
        self, call: wire.Frame | None, result: CellResult, on_call: OnCall, on_output: OnOutput | None
    ) -> None:
        """Answer this call and those that follow it, to the end of the cell."""
        async with anyio.create_task_group() as calls:
            while call is not None:
                calls.start_soon(self._answer, call, on_call)
                call = await self._until_call(result, on_output)
            if self._in_flight:
                calls.cancel_scope.cancel()

    async def _until_call(self, result: CellResult, on_output: OnOutput | None) -> wire.Frame | None:
        """Fill `result` from what the guest sends, to the cell's next call, or to its end: None."""
        while True:
            frame = await self._channel.receive()
            kind = frame["type"]
            if kind == "output" and frame["cell"] == self._cells and frame["stream"] in ("out", "err"):
                self._room -= len(frame["text"])
                if self._room < 0 or not frame["text"]:  # an empty one would take nothing of the cap, and never end
                    raise ProtocolViolation("the guest sent more output than its cap")
                result.output.append((frame["stream"], frame["text"]))
                if on_output:
                    on_output(frame["stream"], frame["text"])
            elif kind == "call" and frame["op"] in wire.OPS:
                if frame["id"] <= self._newest_call or len(self._in_flight) >= self._spec.calls_in_flight:
                    raise ProtocolViolation("the guest reused a call's id or has too many calls in flight")
                self._newest_call = frame["id"]
                self._in_flight.add(frame["id"])
                return frame
            elif kind == "done" and frame["cell"] == self._cells and frame["status"] in wire.CELL_STATUS:
                if frame["answer"] is not None and len(frame["answer"]) > self._spec.answer_chars:
                    raise ProtocolViolation("the guest sent an answer larger than its cap")
                if len(frame["detail"]) > wire.MAX_DETAIL or len(frame["names"]) > wire.MAX_NAMES:
                    raise ProtocolViolation("the guest said more of a cell's end than it may")
                result.status, result.detail, result.answer = frame["status"], frame["detail"], frame["answer"]
                result.names, result.dropped = tuple(frame["names"]), frame["dropped"]
                return None
            else:
                raise ProtocolViolation(f"the guest sent a frame of type {kind} that does not fit the moment")

    async def _answer(self, frame: wire.Frame, on_call: OnCall) -> None:
        reply: wire.Frame = {"type": "reply", "id": frame["id"], "ok": True, "value": None, "error": None}
        try:
            reply["value"] = await on_call(Call(frame["op"], frame["prompt"], frame["model"], frame["context"]))
            if not wire.fits(reply):
                raise OutcomeUnknown("the answer is larger than the channel to the sandbox carries")
        except MachineError:  # not the cell's affair: nothing may go on without ledger and journal
            raise
        except AirlockError as error:
            reply.update(ok=False, value=None, error=_for_guest(error))
            if not wire.fits(reply):  # a child's partial answer, and there are words around it
                reply["error"]["partial"] = None
        self._in_flight.discard(frame["id"])
        await self._channel.send(reply)

    async def interrupt(self) -> None:
        """Interrupt the running cell, as its time limit would."""
        await self._channel.send({"type": "interrupt"})

    async def usage(self) -> Usage:
        return await self._guest.usage()

    async def close(self) -> None:
        """Kill the guest; returns when nothing of it is left. Idempotent."""
        await self._guest.kill()
        await self._channel.aclose()


async def _no_calls(call: Call) -> str:
    raise ProtocolViolation(f"a sandbox that is tried out asked for {call.op}")


def _for_guest(error: AirlockError) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": error.kind, "message": error.told}
    if isinstance(error, LimitError):
        fields |= {"limit": error.limit, "asked": error.asked, "left": error.left}
    if isinstance(error, RateLimited):
        fields["retry_after"] = error.retry_after
    if isinstance(error, ChildStopped):
        fields["partial"] = error.partial
    return fields


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one to tell of: that ledger or journal are gone goes before whatever else happened at the same time."""
    lost = group.subgroup(StoreError)
    error = (lost or group).exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error  # pyright: ignore[reportUnknownArgumentType]


@asynccontextmanager
async def open_sandbox(backend: Backend, slots: Slots, spec: Callable[[Slot], SandboxSpec]) -> AsyncGenerator[Sandbox]:
    """A started sandbox on a slot of its own; on leaving, guest and slot are gone."""
    with slots.take() as slot:
        try:
            guest = await backend.launch(spec(slot))
        except OSError as error:  # of processes, open files or space: for a child query not its parent's end
            raise SandboxUnusable(f"a sandbox cannot be started now: {error.strerror}; see `airlock doctor`") from error
        sandbox = Sandbox(guest, spec(slot))
        try:
            await sandbox.start()
            yield sandbox
        finally:
            with anyio.CancelScope(shield=True):
                await sandbox.close()
