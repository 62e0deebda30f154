"""Promises on lifetimes: a sandbox ends for certain, with all that it started, and the next one knows nothing of it."""

from __future__ import annotations

import contextlib
import os

import anyio

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.conformance.promise import Bench, Broken, expect, over_sandboxes, processes_of, status_of
from orchestrator.sandbox.sandbox import Call


def _guests_of(uid: int | None) -> set[int]:
    """Of a slot's user id; else, of our own, those that we have started."""
    return {pid for pid in processes_of(uid) if uid is not None or _is_ours(pid)}


def _is_ours(pid: int) -> bool:
    while pid not in (0, 1, os.getpid()):
        pid = int(status_of(pid).get("PPid", "0"))
    return pid == os.getpid()


@over_sandboxes("A sandbox is killed for certain, in the middle of a cell, with all that it started.", invariant=6)
async def killed_for_certain(bench: Bench) -> None:
    code = """
        import os
        for _ in range(3):
            if not os.fork():
                os.setsid()
                while True:
                    pass
        llm_query('x')
        while True:
            pass
        """
    uid, mine = None, set[int]()
    async with bench.open() as repl:
        uid = repl.slot.uid

        async def on_call(_call: Call) -> str:
            mine.update(_guests_of(uid))
            async with anyio.create_task_group() as tasks:
                for _ in range(3):  # idempotent, and whoever asks waits for the end
                    tasks.start_soon(repl.sandbox.close)
            return "too late"

        try:
            await repl.run(code, on_call=on_call)
        except SandboxDied:
            pass
        else:
            raise Broken("the cell ended in order although its sandbox was killed")
        with contextlib.suppress(SandboxDied):
            await repl.run("1")
            raise Broken("a dead sandbox ran a cell")
        expect(not mine & processes_of(uid), f"processes {sorted(mine & processes_of(uid))} are still there")
    expect(not repl.slot.folder.exists(), f"{repl.slot.folder} is still there")


@over_sandboxes("A sandbox that is ended while it is waited for leaves nothing behind.", invariant=6)
async def cancelled_in_the_middle(bench: Bench) -> None:
    uid, mine = None, set[int]()
    with anyio.CancelScope() as scope:
        async with bench.open() as repl:
            uid = repl.slot.uid

            async def on_call(_call: Call) -> str:
                mine.update(_guests_of(uid))
                scope.cancel()
                await anyio.sleep_forever()
                return ""

            await repl.run("import os\nos.fork()\nllm_query('x')\nwhile True: pass", on_call=on_call)
    expect(scope.cancelled_caught, "the cell ended by itself")
    expect(not mine & processes_of(uid), f"processes {sorted(mine & processes_of(uid))} are still there")


@over_sandboxes("Sandboxes do not see each other, and nothing of one is in the next on its slot.", invariant=7)
async def one_sandbox_one_node(bench: Bench) -> None:
    look = "import os\n(context, sorted(os.listdir('/context')), os.listdir('/tmp'), 'secret' in globals())"
    leave = "secret = open('/tmp/secret', 'w').write('x')\nimport os\nif not os.fork():\n    while True: pass"
    async with bench.open() as one, bench.open() as other:
        one.attach("of the first")
        await one.run(leave)
        await other.prints(look, "(None, [], [], False)")
        await other.run("os.kill(-1, 9)")
        await one.prints("context", "'of the first'")
        slots = (one.slot, other.slot)
        expect(slots[0].number != slots[1].number and (slots[0].uid is None or slots[0].uid != slots[1].uid), slots)
    async with bench.open() as later:
        await later.prints(look, "(None, [], [], False)")
