"""What the tests of sandboxes share: short ways to open one, to run a cell in it, and to look at it from the host."""

from __future__ import annotations

import os
import textwrap
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Call, CellResult, Sandbox, open_sandbox
from orchestrator.sandbox.slots import Slots

SECCOMP = Path(__file__).parents[1] / "policies" / "seccomp.json"
MIB = 1 << 20
# A cell that ends every process it can, its own snapshot with them, and then itself.
KILL_ALL = """
import os
os.kill(-1, 9)
try:
    while True:
        os.wait()
except ChildProcessError:
    os.kill(os.getpid(), 9)
"""


def spec_for(slot: Slot, **changes: Any) -> SandboxSpec:
    spec = SandboxSpec(
        slot,
        memory_bytes=256 * MIB,
        cpus=2.0,
        pids=64,
        tmp_bytes=16 * MIB,
        files=256,
        output_bytes=MIB,
        answer_chars=100_000,
        calls_in_flight=8,
    )
    return replace(spec, **changes)


class Repl:
    """A sandbox with a short way to run a cell, and the slot it lives in."""

    def __init__(self, sandbox: Sandbox, slot: Slot) -> None:
        self.sandbox = sandbox
        self.slot = slot
        self.calls: list[Call] = []

    async def on_call(self, call: Call) -> str | dict[str, Any]:
        self.calls.append(call)
        return {"left": "$1"} if call.op == "budget" else f"reply to {call.prompt}"

    async def run(self, code: str, timeout_s: float = 20.0, **options: Any) -> CellResult:
        return await self.sandbox.run(textwrap.dedent(code), timeout_s, options.pop("on_call", self.on_call), **options)

    async def out(self, code: str, **options: Any) -> str:
        """What an ordinary cell prints; it has to end well."""
        result = await self.run(code, **options)
        assert (result.status, result.text("err")) == ("ok", ""), (result, result.text("err"))
        return result.text("out").removesuffix("\n")


@asynccontextmanager
async def open_repl(backend: Backend, home: Path, *, own_uid: bool = True, **changes: Any) -> AsyncGenerator[Repl]:
    """own_uid=False is for the tests that show what a user id of its own defends against."""
    taken: list[Slot] = []

    def spec(slot: Slot) -> SandboxSpec:
        slot = slot if own_uid else replace(slot, uid=None)
        taken.append(slot)
        return spec_for(slot, **changes)

    async with open_sandbox(backend, Slots(home), spec) as sandbox:
        yield Repl(sandbox, taken[0])


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status; empty when there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def processes_of(uid: int | None) -> set[int]:
    """Process ids, on the host, of a user id; when None, of our own, in a process id namespace of their own."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        status = status_of(int(entry.name)) if entry.name.isdecimal() else {}
        if (
            not status
            or status["State"].startswith("Z")
            or int(status["Uid"].split()[0]) != (os.geteuid() if uid is None else uid)
        ):
            continue
        if uid is not None or len(status["NSpid"].split()) > 1:
            found.add(int(entry.name))
    return found


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that another process brings about."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - it happens outside of this process
            await anyio.sleep(0.01)
