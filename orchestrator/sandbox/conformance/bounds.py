"""Promises on bounds: a sandbox gets no more of the machine than it was given."""

from __future__ import annotations

import contextlib
import time

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.base import UNBOUNDED, UNTOLD
from orchestrator.sandbox.conformance.promise import MIB, Bench, Broken, expect, over_sandboxes

_MEMORY_OF_AIRLOCK = 32 * MIB  # on top of what the guest has
_PROCESSES_OF_AIRLOCK = 8

_SHARED_MEMORY = """
import mmap
areas = [mmap.mmap(-1, 16 << 20) for _ in range(AREAS)]  # shared by default, and no part of any rlimit
for area in areas:
    for at in range(0, len(area), 4096):
        area[at] = 1
'got it'
"""


@over_sandboxes(
    "All memory of a sandbox together is bounded, shared memory too.", unless={UNBOUNDED: Broken, UNTOLD: Broken}
)
async def memory_is_bounded(bench: Bench) -> None:
    async with bench.open(memory_bytes=64 * MIB) as repl:
        await repl.prints(f"AREAS = 1\n{_SHARED_MEMORY}", "'got it'")
        with contextlib.suppress(SandboxDied):  # its own affair; the machine's is that the memory is not to be had
            result = await repl.run(f"AREAS = 10\n{_SHARED_MEMORY}")
            expect(result.status == "killed", result)
        usage = await repl.sandbox.usage()
        expect(usage.oom, "the host was not told")
        expect((usage.peak_memory_bytes or 0) <= 64 * MIB + _MEMORY_OF_AIRLOCK, f"{usage.peak_memory_bytes} bytes")


async def _counts(bench: Bench, code: str, most: int, **limits: int) -> None:
    """The cell prints how much it got, which is something, and bounded; the sandbox goes on."""
    async with bench.open(**limits) as repl:
        count = int(await repl.out(f"count = 0\n{code}\ncount"))
        expect(0 < count <= most, f"it got {count}, of at most {most}")
        await repl.prints("'goes on'", "'goes on'")


@over_sandboxes("Processes are bounded.")
async def processes_are_bounded(bench: Bench) -> None:
    code = """
import os, time
while count < 1000:
    try:
        pid = os.fork()
    except OSError:
        break
    if not pid:
        while True: time.sleep(1)
    count += 1
"""
    await _counts(bench, code, 20 + _PROCESSES_OF_AIRLOCK, pids=20)


@over_sandboxes("Open files are bounded.")
async def open_files_are_bounded(bench: Bench) -> None:
    code = """
import os
try:
    while count < 5000:
        os.open('/dev/null', os.O_RDONLY)
        count += 1
except OSError:
    pass
os.closerange(64, 8192)
"""
    await _counts(bench, code, 100, files=100)


@over_sandboxes("What is written to /tmp is bounded, and so is one file there.")
async def tmp_is_bounded(bench: Bench) -> None:
    code = """
import os
with open('/tmp/large', 'wb') as large:
    try:
        os.ftruncate(large.fileno(), 1 << 40)
        count = 1 << 40
    except OSError:
        pass
os.unlink('/tmp/large')
try:
    for number in range(64):
        with open(f'/tmp/{number}', 'wb') as file:
            file.write(b'x' * (1 << 20))
        count += 1
except OSError:
    pass
"""
    await _counts(bench, code, 8, tmp_bytes=8 * MIB)


@over_sandboxes(
    "A sandbox has no more of the processors than it was given.", unless={UNBOUNDED: Broken, UNTOLD: Broken}
)
async def processors_are_bounded(bench: Bench) -> None:
    spin = "import os, time\nos.fork()\nend = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass"
    async with bench.open(cpus=0.2) as repl:
        before, started = (await repl.sandbox.usage()).cpu_s, time.monotonic()
        await repl.run(spin)
        after, took = (await repl.sandbox.usage()).cpu_s, time.monotonic() - started
    if before is None or after is None:
        raise Broken("what it used cannot be measured")
    expect((after - before) / took < 0.2 + 0.3, f"it used {after - before:.2f} s in {took:.2f} s")
