"""Sandboxes as the host sees them: nothing is left of one that has ended, and none sees another."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from orchestrator.sandbox.base import Backend, Isolation
from orchestrator.sandbox.cgroup import own_hierarchy
from orchestrator.sandbox.registry import make_backend
from orchestrator.sandbox.sandbox import Call
from tests.sandboxes import MIB, Repl, open_repl, processes_of, until

pytestmark = pytest.mark.anyio

# Lifetimes, as the host sees them


def groups_of(repl: Repl) -> list[str]:
    hierarchy = own_hierarchy()
    return (
        [str(f) for root in set(hierarchy.folders.values()) for f in root.glob(f"airlock-{repl.slot.number}")]
        if hierarchy
        else []
    )


def seen_from_outside(backend: Backend) -> bool:
    """Whether the host sees a guest's processes as such: gVisor's run in a kernel of their own."""
    return backend.isolation < Isolation.gvisor


async def test_cancelling_a_cell_leaves_nothing_behind(backend: Backend, home: Path):
    async with open_repl(backend, home) as repl:
        code = """
            import os
            for _ in range(3):
                if not os.fork():
                    while True:
                        pass
            llm_query('x')
            """
        running = anyio.Event()

        async def on_call(_call: Call) -> str:
            running.set()
            await anyio.sleep_forever()
            return ""

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: repl.run(code, on_call=on_call))
            await running.wait()
            if seen_from_outside(backend):
                await until(lambda: len(processes_of(repl.slot.uid)) >= 5)  # supervisor, runner, and its forks
            mine = processes_of(repl.slot.uid)
            assert groups_of(repl) or not own_hierarchy() or backend.name != "bubblewrap"
            tasks.cancel_scope.cancel()
    assert not mine & processes_of(repl.slot.uid)
    assert groups_of(repl) == []
    assert not repl.slot.folder.exists()


async def test_an_error_of_the_caller_ends_the_sandbox_and_is_not_changed(backend: Backend, home: Path):
    mine: set[int] = set()

    async def fail() -> None:
        async with open_repl(backend, home) as repl:
            mine.update(processes_of(repl.slot.uid))
            raise FileNotFoundError("the caller's own")

    with pytest.raises(FileNotFoundError, match="the caller's own"):
        await fail()
    assert mine or not seen_from_outside(backend)


async def test_usage_is_measured(backend: Backend, home: Path):
    async with open_repl(backend, home) as repl:
        await repl.run(
            """
            import time
            data = bytearray(b'x' * (40 << 20))
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
            """
        )
        usage = await repl.sandbox.usage()
    assert usage.cpu_s is None or usage.cpu_s >= 0.2
    assert usage.peak_memory_bytes is None or usage.peak_memory_bytes > 40 * MIB
    assert not usage.oom


async def test_a_slot_is_free_at_once_for_another_backend(backend: Backend, home: Path):
    other = make_backend(backend.name, least="namespace", home=home)
    for _ in range(4):
        for either in (backend, other):
            async with open_repl(either, home) as repl:
                assert await repl.out("1") == "1"
    other.close()
