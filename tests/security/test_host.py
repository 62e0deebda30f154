"""What is left of a guest of bubblewrap after its orchestrator's own death: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.sandbox.base import Slot
from orchestrator.sandbox.cgroup import Cgroup, own_hierarchy
from orchestrator.sandbox.slots import Slots
from tests.sandboxes import processes_of, status_of, until

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

AS_ROOT = os.geteuid() == 0


# Both take a slot that no other user of this machine is likely to come to meanwhile.
ORCHESTRATOR = """
import contextlib, sys
from pathlib import Path
import anyio
from orchestrator.sandbox.slots import Slots
from orchestrator.sandbox.bubblewrap import Bubblewrap
from tests.sandboxes import SECCOMP, open_repl

async def main():
    home = Path(sys.argv[1])
    others = contextlib.ExitStack()
    for _ in range(8):
        others.enter_context(Slots(home).take())
    async with open_repl(Bubblewrap(home / "cache", SECCOMP), home) as repl:
        async def on_call(call):
            print(repl.slot.number, flush=True)
            await anyio.sleep_forever()
        cell = "import os\\nif not os.fork():\\n    os.setsid()\\n    while True: pass\\nllm_query('x')"
        await repl.run(cell, 60.0, on_call=on_call)

anyio.run(main)
"""
LEAVES_A_STRANGER = """
import contextlib, subprocess, sys
from pathlib import Path
from orchestrator.sandbox.slots import Slots

with contextlib.ExitStack() as stack:
    for _ in range(9):
        slot = stack.enter_context(Slots(Path(sys.argv[1])).take())
    # As a bwrap is whose parent was killed in the middle of its start: waiting for ever, tied to nothing.
    subprocess.Popen(["sleep", "1000"], user=slot.uid, start_new_session=True)
    print(slot.number, flush=True)
    sys.stdin.read()
"""


@contextmanager
def orchestrator(code: str, home: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process of its own that runs `code`, and the slot that it says it took."""
    process = subprocess.Popen([sys.executable, "-c", code, home], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    try:
        assert process.stdout
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@contextmanager
def taken(home: Path, number: int) -> Iterator[Slot]:
    """That slot, by taking all free ones before it."""
    slots = Slots(home)
    with contextlib.ExitStack() as stack:
        while (slot := stack.enter_context(slots.take())).number < number:
            pass
        assert slot.number == number
        yield slot


async def test_a_guest_dies_with_its_orchestrator(home: Path):
    with orchestrator(ORCHESTRATOR, home) as (process, number):
        uid = 2_000_000_000 + number if AS_ROOT else None
        mine = {pid for pid in processes_of(uid) if _is_below(pid, process.pid)}
        assert len(mine) >= 4, "bwrap, supervisor, runner, and its child"
        process.send_signal(signal.SIGKILL)
        process.wait()
        await until(lambda: not mine & processes_of(uid), 5.0)
        with taken(home, number) as slot:
            assert list(slot.folder.iterdir()) == []
            # The control group is empty by now; the slot's next sandbox begins with removing it.
            hierarchy = own_hierarchy()
            assert hierarchy
            group = Cgroup(hierarchy, f"airlock-{number}")
            group.remove()
            assert not [folder for folder in group.folders.values() if folder.exists()]


async def test_what_a_dead_orchestrator_left_under_a_slots_user_is_ended(home: Path):
    assert AS_ROOT, "without root no process can have another user id"
    with orchestrator(LEAVES_A_STRANGER, home) as (process, number):
        left = processes_of(2_000_000_000 + number)
        assert left
        process.kill()
        process.wait()
        assert processes_of(2_000_000_000 + number) >= left
        with taken(home, number) as slot:
            assert slot.uid
            assert not processes_of(slot.uid) & left


def _is_below(pid: int, ancestor: int) -> bool:
    while pid not in (0, 1, ancestor):
        pid = int(status_of(pid).get("PPid", "0"))
    return pid == ancestor
