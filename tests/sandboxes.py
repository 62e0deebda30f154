"""What the tests of sandboxes share: short ways to open one, to run a cell in it, and to look at it from the host."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.conformance.endings import KILL_ALL
from orchestrator.sandbox.conformance.promise import MIB, Repl, processes_of, small_spec, status_of
from orchestrator.sandbox.registry import NAMES
from orchestrator.sandbox.sandbox import open_sandbox
from orchestrator.sandbox.slots import Slots

__all__ = [
    "BACKENDS",
    "KILL_ALL",
    "MIB",
    "SECCOMP",
    "Repl",
    "open_repl",
    "processes_of",
    "spec_for",
    "status_of",
    "until",
]

SECCOMP = Path(__file__).parents[1] / "policies" / "seccomp.json"
BACKENDS = tuple(name for name in NAMES if name != "kata")  # kata takes a machine that few have
spec_for = small_spec


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


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that another process brings about."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - it happens outside of this process
            await anyio.sleep(0.01)
