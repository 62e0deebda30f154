"""What the tests of sandboxes share: short ways to open one, to run a cell in it, and to look at it from the host."""

from __future__ import annotations

import os
import textwrap
from collections.abc import AsyncGenerator, Iterator
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
async def open_repl(backend: Backend, home: Path, **changes: Any) -> AsyncGenerator[Repl]:
    taken: list[Slot] = []

    def spec(slot: Slot) -> SandboxSpec:
        taken.append(slot)
        return spec_for(slot, **changes)

    async with open_sandbox(backend, Slots(home), spec) as sandbox:
        yield Repl(sandbox, taken[0])


def _statuses() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                yield int(folder.name), (folder / "status").read_text()
            except OSError:  # it ended while we looked
                continue


def processes_of(uid: int | None) -> set[int]:
    """Process ids, on the host, of a user id (ours when None: then only those whose pid namespace is not ours)."""
    own = os.geteuid() if uid is None else uid
    found: set[int] = set()
    for pid, status in _statuses():
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        if int(fields["Uid"].split()[0]) == own and (uid is not None or len(fields["NSpid"].split()) > 1):
            found.add(pid)
    return found


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that another process brings about."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.01)
