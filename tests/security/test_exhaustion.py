"""Attack: use up what the machine has. Each probe prints how much it got, and is run with a small and a large limit:
the small one has to hold, and the large one shows that nothing else was in the way."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.bubblewrap import MEMORY_OF_AIRLOCK
from orchestrator.sandbox.cgroup import own_hierarchy
from tests.sandboxes import MIB, Repl, open_repl

pytestmark = pytest.mark.anyio

PROCESSES = """
import os, time
count = 0
while count < 1000:
    try:
        pid = os.fork()
    except OSError:
        break
    if not pid:
        while True: time.sleep(1)
    count += 1
count
"""
THREADS = """
import _thread, time
count = 0
while count < 1000:
    try:
        _thread.start_new_thread(time.sleep, (100,))
    except RuntimeError:
        break
    count += 1
count
"""
DESCRIPTORS = """
import os
count = 0
try:
    while count < 5000:
        os.open('/dev/null', os.O_RDONLY)
        count += 1
except OSError:
    pass
os.closerange(64, 8192)
count
"""
MEMORY = """
got = []
try:
    while len(got) < 1000:
        got.append(bytearray(b'x' * (1 << 20)))
except MemoryError:
    pass
count = len(got)
got.clear()
count
"""
TMP_BYTES = """
count = 0
try:
    for number in range(1000):
        with open(f'/tmp/{number}', 'wb') as file:
            file.write(b'x' * (1 << 20))
        count += 1
except OSError:
    pass
count
"""
LIMITS = {
    "processes": (PROCESSES, "pids", 20, 200),
    "threads": (THREADS, "pids", 20, 200),
    "descriptors": (DESCRIPTORS, "files", 100, 1000),
    "memory": (MEMORY, "memory_bytes", 64 * MIB, 200 * MIB),
    "space in /tmp": (TMP_BYTES, "tmp_bytes", 8 * MIB, 40 * MIB),
}


@pytest.mark.parametrize("what", LIMITS)
async def test_limit_of(backend: Backend, home: Path, what: str):
    probe, field, small, large = LIMITS[what]
    unit = MIB if field.endswith("_bytes") else 1
    for limit, least in ((small, 0), (large, small)):
        async with open_repl(backend, home, **{field: limit}) as repl:
            assert least < int(await repl.out(probe)) * unit <= limit + 4 * (unit == 1)
            assert await repl.out("'goes on'") == "'goes on'"


SHARED_MEMORY = """
import mmap
areas = [mmap.mmap(-1, 16 << 20) for _ in range(AREAS)]  # shared by default, and no part of any rlimit
for area in areas:
    for at in range(0, len(area), 4096):
        area[at] = 1
'got it'
"""
TINY_FILES = """
import os
os.chdir('/tmp')
try:
    for number in range(FILES):
        os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY))
except OSError:
    pass
'got it'
"""


def peak(usage: object) -> int:
    return getattr(usage, "peak_memory_bytes", None) or 0


async def bounded_by_the_group(backend: Backend, home: Path, small: str, large: str) -> None:
    """The control group holds: the cell dies, or the whole sandbox, and never more than its memory is in use."""
    assert own_hierarchy(), "without a control group nothing bounds this: run the tests where one can be made"
    async with open_repl(backend, home, memory_bytes=64 * MIB) as repl:
        assert await repl.out(small) == "'got it'"
    async with open_repl(backend, home, memory_bytes=64 * MIB) as repl:
        with contextlib.suppress(SandboxDied):
            assert (await repl.run(large)).status == "killed"
        usage = await repl.sandbox.usage()
        assert usage.oom
        assert peak(usage) <= 64 * MIB + MEMORY_OF_AIRLOCK


async def test_shared_memory(backend: Backend, home: Path):
    await bounded_by_the_group(backend, home, f"AREAS = 1\n{SHARED_MEMORY}", f"AREAS = 10\n{SHARED_MEMORY}")


async def test_many_tiny_files(backend: Backend, home: Path):
    await bounded_by_the_group(backend, home, f"FILES = 1000\n{TINY_FILES}", f"FILES = 1_000_000\n{TINY_FILES}")


async def test_cpu(backend: Backend, home: Path):
    spin = "import os, time\nos.fork()\nend = time.monotonic() + 0.5\nwhile time.monotonic() < end: pass"
    hierarchy = own_hierarchy()
    assert hierarchy
    more_than_there_are = 2.0 * (os.cpu_count() or 1)
    for cpus in (0.2, more_than_there_are):
        async with open_repl(backend, home, cpus=cpus) as repl:
            started, before = time.monotonic(), (await repl.sandbox.usage()).cpu_s or 0.0
            await repl.run(spin)
            share = ((await repl.sandbox.usage()).cpu_s or 0.0 - before) / (time.monotonic() - started)
            statistics = (hierarchy.folders["cpu"] / f"airlock-{repl.slot.number}" / "cpu.stat").read_text()
            assert ("nr_throttled 0\n" in statistics) == (cpus == more_than_there_are)
            assert share < cpus + 0.3


async def test_files_larger_than_tmp(repl: Repl):
    assert (
        await repl.run("import os\nfd = os.open('/tmp/x', os.O_CREAT | os.O_RDWR)\nos.ftruncate(fd, 1 << 40)")
    ).detail == ("OSError: [Errno 27] File too large")
