"""Use up what the machine has, or stay when it is over. What counts is what the host sees used of it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import anyio
import pytest

from orchestrator.core.errors import SandboxDied
from orchestrator.guest.processes import OURS
from orchestrator.sandbox import sandbox
from orchestrator.sandbox.bubblewrap import MEMORY_OF_AIRLOCK, PIDS_OF_AIRLOCK, BubblewrapGuest
from orchestrator.sandbox.docker import DockerGuest
from orchestrator.sandbox.runtimes import PIDS_OF_SENTRY
from tests.sandboxes import MIB, status_of
from tests.security import host_view
from tests.security.frame import Attack, Attempt, Stage, attacked, breaches, survives
from tests.security.weak import Weak, host_config

PIDS, FILES, MEMORY, TMP, OUTPUT, CPUS = 20, 100, 64 * MIB, 8 * MIB, MIB, 0.2

FORK = """
import signal
count = 0
try:
    while count < MOST:
        if not os.fork():
            signal.pause()
        count += 1
except OSError:
    pass
if count > LIMIT:
    breach('tasks')
llm_query('look')
"""
THREADS = """
import _thread, time
count = 0
try:
    while count < MOST:
        _thread.start_new_thread(time.sleep, (100,))
        count += 1
except RuntimeError:
    pass
if count > LIMIT:
    breach('tasks')
llm_query('look')
"""
ZOMBIES = """
count = 0
try:
    while count < MOST:
        if not os.fork():
            os._exit(0)
        count += 1
except OSError:
    pass
if count > LIMIT:
    breach('tasks')
llm_query('look')
"""
ANONYMOUS = """
got = []
for _ in range(150):
    got.append(bytearray(b'x' * (1 << 20)))
"""
SHARED = """
import mmap
for _ in range(10):
    area = mmap.mmap(-1, 15 << 20)  # shared by default, and no part of any rlimit
    for at in range(0, len(area), 4096):
        area[at] = 1
    got = [area, *globals().get('got', [])]
"""
IN_TMP = """
for number in range(150):
    with open(f'/tmp/{number}', 'wb') as file:
        file.write(b'x' * (1 << 20))
"""
OF_THE_DYING = 16 * MIB  # version 1 lets what it is killing for its memory have a little more, to end sooner
INODES = """
os.chdir('/tmp')
for number in range(25_000):
    os.symlink('x' * 4000, str(number))
"""
DISK = """
count = 0
try:
    for number in range(40):
        with open(f'/tmp/{number}', 'wb') as file:
            for _ in range(16):
                count += file.write(b'x' * (1 << 16))
except OSError:
    pass
if count > LIMIT:
    breach('space')
"""
DESCRIPTORS = """
count = 0
try:
    while count < 800:
        os.open('/dev/null', os.O_RDONLY)
        count += 1
except OSError:
    pass
if count > LIMIT:
    breach('descriptors')
os.closerange(64, 1024)
"""
SPIN = """
import time
os.fork()
end = time.monotonic() + 0.6
while time.monotonic() < end:
    pass
"""
ENDLESS = """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
FLOOD = """
for _ in range(1000):
    os.write(1, b'flood\\n' * 10_000)
    os.write(2, b'flood\\n' * 1_000)
"""
LINE = """
piece = b'x' * (1 << 20)
for _ in range(256):
    left = memoryview(piece)
    while left:
        left = left[os.write(1, left):]
"""
RECURSION = """
import sys
sys.setrecursionlimit(10**9)
def deeper():
    return [*map(lambda _: deeper(), [0])]  # by way of C: it is the stack of the process that is used up
deeper()
"""
CRASH = "ctypes.string_at(0)"
END_ITSELF = "os.kill(os.getpid(), 9)"
STAY = """
if not os.fork():
    os.setsid()
    if not os.fork():
        while True:
            os.close(os.open('/tmp/alive', os.O_CREAT | os.O_WRONLY))
    os._exit(0)
os.wait()
"""
STAYED = """
import time
if os.path.exists('/tmp/alive'):
    os.unlink('/tmp/alive')
time.sleep(0.1)
if os.path.exists('/tmp/alive'):
    breach('alive')
"""
# An agent that goes on when its channel is closed, and so does what it starts.
DEAF = """
def main():
    import json, signal
    os.read(0, 1 << 16)
    for number in range(1, 65):
        if number not in (9, 19, 32, 33):
            signal.signal(number, lambda *_: None)
    if os.fork():
        os.write(1, json.dumps({"type": "ready", "version": wire.VERSION, "python": "3"}).encode() + b"\\n")
    else:
        os.setsid()
    while True:
        signal.pause()
"""


def tasks(code: str) -> Attempt:
    """More processes and threads than there may be, as the cell counts them, or the host."""

    async def attempt(stage: Stage) -> list[str]:
        margin = PIDS_OF_SENTRY if stage.backend == "gvisor" else PIDS_OF_AIRLOCK
        counts: list[int] = []
        async with stage.open(pids=PIDS, memory_bytes=512 * MIB) as repl:

            async def on_call(_call: object) -> str:
                counts.append(host_view.tasks(repl))
                return ""

            result = await attacked(repl, code, {"MOST": 3 * PIDS, "LIMIT": PIDS + OURS}, on_call=on_call)
        assert counts
        return [*breaches(result), *("tasks" for count in counts if count > PIDS + margin)]

    return attempt


def memory(code: str, **changes: Any) -> Attempt:
    """More memory, as the control group counts it, than the sandbox may use."""

    async def attempt(stage: Stage) -> list[str]:
        peaks: list[int] = []
        async with stage.open(memory_bytes=MEMORY, **changes) as repl, anyio.create_task_group() as group:

            async def watch() -> None:
                while True:  # gVisor's group goes with its sandbox, before anybody could ask what it has used
                    peaks.append((await repl.sandbox.usage()).peak_memory_bytes or 0)
                    await anyio.sleep(0.01)

            group.start_soon(watch)
            with contextlib.suppress(SandboxDied):
                await attacked(repl, code)
            peaks.append((await repl.sandbox.usage()).peak_memory_bytes or 0)
            group.cancel_scope.cancel()
        assert max(peaks), "the tests of isolation need a control group"
        return ["memory"] if max(peaks) > MEMORY + MEMORY_OF_AIRLOCK + OF_THE_DYING else []

    return attempt


def counted(code: str, field: str, limit: int) -> Attempt:
    async def attempt(stage: Stage) -> list[str]:
        async with stage.open(**{field: limit}) as repl:
            return breaches(await attacked(repl, code, {"LIMIT": limit}))

    return attempt


async def cpu(stage: Stage) -> list[str]:
    async with stage.open(cpus=CPUS) as repl:
        started, before = time.monotonic(), (await repl.sandbox.usage()).cpu_s
        await attacked(repl, SPIN)
        after, spent = (await repl.sandbox.usage()).cpu_s, time.monotonic() - started
    assert before is not None
    assert after is not None
    return ["share"] if (after - before) / spent > 2 * CPUS else []


async def endless(stage: Stage) -> list[str]:
    """The agent ends such a cell, and the sandbox goes on; if it did not, the host would end the sandbox."""
    async with stage.open(agent="GRACE_S = 0.2") as repl:
        try:
            result = await repl.run(ENDLESS, 0.3)
        except SandboxDied:
            return ["the sandbox had to be ended"]
    assert result.status == "timeout"
    return []


def output(code: str) -> Attempt:
    async def attempt(stage: Stage) -> list[str]:
        async with stage.open(output_bytes=OUTPUT) as repl:
            result = await attacked(repl, code)
            assert result.status == "ok"
        return ["output"] if sum(len(text) for _, text in result.output) > OUTPUT else []

    return attempt


def fatal(code: str) -> Attempt:
    """A cell that ends its process must not take with it what the cells before it made."""

    async def attempt(stage: Stage) -> list[str]:
        async with stage.open() as repl:
            return await survives(repl, code)

    return attempt


async def outlives_its_cell(stage: Stage) -> list[str]:
    async with stage.open() as repl:
        await attacked(repl, STAY)
        return breaches(await attacked(repl, STAYED))


async def outlives_its_sandbox(stage: Stage) -> list[str]:
    async with stage.open(agent=DEAF) as repl:
        there = {pid: status_of(pid)["NSpid"] for pid in host_view.processes(repl)}
        assert len(there) >= 2
    left = [pid for pid, ids in there.items() if (now := status_of(pid)).get("NSpid") == ids and lives(now)]
    guest: Any = repl.sandbox._guest  # pyright: ignore[reportPrivateUsage]
    await KILLS[type(guest)](guest)
    return ["processes"] if left else []


def lives(status: dict[str, str]) -> bool:
    """The dead stay on the list until their parent collects them, which the engine does in its own time."""
    return status["State"][0] not in "ZX"


KILLS: dict[type, Any] = {kind: kind.kill for kind in (BubblewrapGuest, DockerGuest)}


def no_kill(patch: pytest.MonkeyPatch) -> None:
    async def kill(_guest: object) -> None:
        return

    for kind in KILLS:
        patch.setattr(kind, "kill", kill)


def soon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sandbox, "OVERTIME_S", 1.0)


MORE_TASKS = Weak(changes={"pids": 60}, body=(host_config(PidsLimit=0),))
MORE_MEMORY = Weak(changes={"memory_bytes": 256 * MIB})
MORE_INODES = MORE_MEMORY | Weak(
    body=(lambda body, _scene: body["HostConfig"]["Tmpfs"].update({"/tmp": "rw,mode=1777,size=512m"}),),
)
NO_SNAPSHOT = Weak(agent="Workers._make_snapshot = lambda self: None")
NO_SWEEP = Weak(agent="Workers._sweep = lambda self: False\nWorkers._stop = lambda self: None")
NO_END = NO_SWEEP | Weak(agent="_new_word = lambda: b'always'")
NO_WATCH = Weak(agent="Supervisor._watch_time = lambda self: None", host=soon)
LARGE = 512 * MIB
ATTACKS = [
    Attack("resources", "processes", tasks(FORK), MORE_TASKS),
    Attack("resources", "threads", tasks(THREADS), MORE_TASKS),
    Attack("resources", "zombies", tasks(ZOMBIES), MORE_TASKS),
    Attack("resources", "anonymous memory", memory(ANONYMOUS), MORE_MEMORY),
    Attack("resources", "shared memory", memory(SHARED), MORE_MEMORY),
    Attack("resources", "memory in /tmp", memory(IN_TMP, tmp_bytes=LARGE), MORE_MEMORY),
    Attack("resources", "inodes in /tmp", memory(INODES, tmp_bytes=LARGE), MORE_INODES),
    Attack("resources", "space in /tmp", counted(DISK, "tmp_bytes", TMP), Weak(changes={"tmp_bytes": 64 * MIB})),
    Attack("resources", "descriptors", counted(DESCRIPTORS, "files", FILES), Weak(changes={"files": 1000})),
    Attack("resources", "CPU", cpu, Weak(changes={"cpus": 2.0})),
    Attack("resources", "a cell without an end", endless, NO_WATCH),
    Attack("resources", "floods of output", output(FLOOD), Weak(changes={"output_bytes": 8 * MIB})),
    Attack("resources", "one line of 256 MB", output(LINE), Weak(changes={"output_bytes": 8 * MIB})),
    Attack("resources", "recursion", fatal(RECURSION), NO_SNAPSHOT),
    Attack("resources", "a native crash", fatal(CRASH), NO_SNAPSHOT),
    Attack("resources", "a cell that kills its process", fatal(END_ITSELF), NO_SNAPSHOT),
    Attack("resources", "a process that outlives its cell", outlives_its_cell, NO_SWEEP),
    Attack("resources", "a process that outlives its sandbox", outlives_its_sandbox, Weak(host=no_kill)),
]
