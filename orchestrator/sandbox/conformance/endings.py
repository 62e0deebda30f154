"""Promises on cells that end badly: whatever one does to its processes, what was there before it is there after it."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.base import EXHAUSTION, UNBOUNDED, UNTOLD
from orchestrator.sandbox.conformance.promise import MIB, Bench, Broken, Repl, expect, in_a_sandbox, over_sandboxes
from orchestrator.sandbox.sandbox import Call

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
_LOOP = "while True:\n    pass"
_WENT_ON = "was interrupted by its time limit and went on and was killed"


async def _is_as_before(repl: Repl) -> None:
    # Sub-calls, too: the next worker starts over with its ids.
    await repl.prints("before, llm_query('still')", "(['kept'], 'reply to still')")


async def _survives(repl: Repl, ends: dict[str, tuple[str, str]], timeout_s: float) -> None:
    """ends: code -> how it has to end."""
    await repl.run("before = ['kept']")
    for code, (status, detail) in ends.items():
        await repl.ends(code, status, detail, timeout_s)
        await _is_as_before(repl)


@in_a_sandbox("A cell that is interrupted at its time limit loses nothing but the rest of itself.", invariant=6)
async def time_limit(repl: Repl) -> None:
    await repl.run("before = ['kept']")
    result = await repl.ends(f"begun = 1\n{_LOOP}", "timeout", "interrupted by its time limit", 0.3)
    expect(0.3 <= result.duration_s < 8, f"after {result.duration_s:.1f} s")
    await repl.prints("begun", "1")
    await _is_as_before(repl)


@in_a_sandbox("A cell that goes on after its time limit is killed.", invariant=6)
async def killed_after_the_time_limit(repl: Repl) -> None:
    swallowed = f"while True:\n    try:\n        {_LOOP.replace(chr(10), chr(10) + '        ')}\n"
    swallowed += "    except KeyboardInterrupt:\n        pass"
    await _survives(repl, dict.fromkeys(("sum(iter(int, 1))", swallowed), ("timeout", _WENT_ON)), 0.3)


@in_a_sandbox("The host can interrupt a cell before its time.")
async def interrupt(repl: Repl) -> None:
    async def on_call(_call: Call) -> str:
        await repl.sandbox.interrupt()
        return "late"

    result = await repl.run(f"begun = 2\nllm_query('go')\n{_LOOP}", on_call=on_call)
    expect((result.status, result.detail) == ("timeout", "interrupted by the host's word"), result)
    await repl.prints("begun", "2")


@in_a_sandbox("A cell that crashes, exits or kills itself leaves the state from before it.")
async def crashes(repl: Repl) -> None:
    ends = {
        "import ctypes; ctypes.string_at(0)": ("killed", "crashed with SIGSEGV"),
        "import os; os._exit(3)": ("killed", "exit code 3"),
        "import os; os.abort()": ("killed", "SIGABRT"),
        "import os; os.kill(os.getpid(), 9)": ("killed", "was killed"),
    }
    await _survives(repl, ends, 20.0)


@in_a_sandbox("A cell that closes its descriptors does not close the channel.")
async def closed_descriptors(repl: Repl) -> None:
    ends = {
        f"import os\nos.closerange(0, 4096)\n{_LOOP}": ("killed", "closed"),
        "import os\nos.close(1); os.close(2)": ("ok", ""),
        "import sys\nsys.stdout.close(); sys.stderr.close()": ("ok", ""),
    }
    await _survives(repl, ends, 20.0)


_FORGED: tuple[dict[str, Any], ...] = (
    {"type": "ready", "version": 1, "python": "6.6.6"},
    {"type": "output", "cell": 1, "stream": "out", "text": "forged"},
    {"type": "call", "id": 99, "op": "llm_query", "prompt": "forged", "model": None, "context": None},
    {"type": "done", "cell": 1, "status": "ok", "detail": "", "answer": "forged", "names": [], "dropped": 0},
    {"type": "end", "status": "ok", "detail": "", "answer": "forged", "names": []},
)
FORGERIES = "\n".join(map(json.dumps, _FORGED))


@in_a_sandbox(
    "Frames of the channel's own form are text when they are printed, and no frames wherever else.", invariant=2
)
async def frames_that_a_cell_writes(repl: Repl) -> None:
    await repl.run("before = ['kept']")
    repl.calls.clear()
    result = await repl.run(f"import sys\nfor stream in (sys.stdout, sys.stderr):\n    stream.write({FORGERIES!r})")
    expect((result.status, result.answer, repl.calls) == ("ok", None, []), result)
    expect(result.text("out").startswith(FORGERIES) and result.text("err") == FORGERIES, result)
    everywhere = f"""
        import os
        for fd in range(256):
            try:
                os.write(fd, {FORGERIES!r}.encode() + b'\\n')
            except OSError:
                pass
        while True:
            pass
        """
    # A cell shares its process with the agent's worker: it may forge its own end, never another's, nor a plain frame.
    await repl.ends(everywhere, "killed", "agent's socket", 5.0)
    expect(not repl.calls, repl.calls)
    await _is_as_before(repl)


LEFTOVERS = {
    "a process": "if not os.fork():\n    spin()",
    "a session of its own": "if not os.fork():\n    os.setsid()\n    spin()",
    "a daemon": "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        spin()\n    os._exit(0)\nos.wait()",
    "a daemon that prints without end": "if not os.fork():\n    os.setsid()\n    flood()",
    "a thread": "threading.Thread(target=spin).start()",
    "a daemon thread": "threading.Thread(target=spin, daemon=True).start()",
    "a thread that prints without end": "threading.Thread(target=flood).start()",
    "a raw thread": "_thread.start_new_thread(spin, ())",
    "a thread and a lie": "threading.Thread(target=spin).start()\nthreading.active_count = lambda: 1",
    "a sibling": "libc = ctypes.CDLL(None)\nif not libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0):\n    spin()",
    "a subprocess": "subprocess.Popen([sys.executable, '-c', 'while True:\\n    pass'])",
}
_SPIN = """
import ctypes, os, subprocess, sys, threading, time, _thread
def spin():
    while True:
        os.close(os.open('/tmp/alive', os.O_CREAT | os.O_WRONLY))
        print('from the cell before')
        try:
            llm_query('from the cell before')
        except BaseException:
            pass
def flood():
    while True:
        print('x' * 5000)
"""
# A look at it while it can do no more: it makes its file again and again, if it lives.
_LOOK = "if os.path.exists('/tmp/alive'): os.unlink('/tmp/alive')\ntime.sleep(0.05)\nos.path.exists('/tmp/alive')"


@in_a_sandbox("What a cell leaves running ends with it: processes, sessions, daemons, threads.", invariant=6)
async def leftovers(repl: Repl) -> None:
    await repl.run(_SPIN + "before = ['kept']")
    for what, code in LEFTOVERS.items():
        result = await repl.run(code)
        expect(result.status == "ok", (what, result))
        repl.calls.clear()
        expect((seen := await repl.out(_LOOK)) == "False", f"{what}: {seen}")
        expect((seen := await repl.out("len(sys._current_frames()), before")) == "(1, ['kept'])", f"{what}: {seen}")
        expect(not repl.calls, f"{what} called")


@over_sandboxes("A cell that ends every process it can loses its variables, and is told so.")
async def losing_everything_is_said(bench: Bench) -> None:
    async with bench.open() as repl:
        await repl.run("before = ['kept']")
        repl.attach("context")
        await repl.ends(KILL_ALL, "killed", "all variables are gone")
        await repl.prints("'before' in globals(), context", "(False, 'context')")


@in_a_sandbox("One object that does not fit into memory is a MemoryError.")
async def memory_error(repl: Repl) -> None:
    await _survives(repl, {"large = bytearray(1 << 40)": ("error", "MemoryError")}, 20.0)


@over_sandboxes(
    "A cell that uses up its memory ends, and leaves the state from before it.", unless={EXHAUSTION: SandboxDied}
)
async def memory_to_the_brim(bench: Bench) -> None:
    async with bench.open(memory_bytes=64 * MIB) as repl:
        await _survives(repl, {"small = []\nwhile True:\n    small.append(object())": ("error", "MemoryError")}, 20.0)


@over_sandboxes(
    "Processes that use up the memory together are killed, which is told, and leave the state from before.",
    unless={EXHAUSTION: SandboxDied, UNBOUNDED: Broken, UNTOLD: Broken},
)
async def memory_of_many_processes(bench: Bench) -> None:
    # Each for itself stays below the limit of one process.
    code = """
        import os
        for _ in range(8):
            if not os.fork():
                break
        data = bytearray(b'x' * (24 << 20))
        while True:
            pass
        """
    async with bench.open(memory_bytes=64 * MIB) as repl:
        await repl.run("before = ['kept']")
        result = await repl.run(code, 1.0)
        expect(result.status in ("killed", "error", "timeout"), result)
        await _is_as_before(repl)
        expect((await repl.sandbox.usage()).oom, "the host was not told")


# On a busy machine the dead of a bomb take a moment to be gone.
_AFTER_A_BOMB = """
import subprocess, sys, time
for _ in range(50):
    try:
        ended = subprocess.run([sys.executable, "-c", ""]).returncode
        break
    except BlockingIOError:
        time.sleep(0.1)
ended
"""


@over_sandboxes("A fork bomb is bounded, and leaves the state from before it.", unless={EXHAUSTION: SandboxDied})
async def fork_bomb(bench: Bench) -> None:
    async with bench.open() as repl:
        await repl.run("before = ['kept']")
        code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
        result = await repl.run(code, 1.0)
        expect(result.status in ("timeout", "killed"), result)
        await _is_as_before(repl)
        await repl.prints(_AFTER_A_BOMB, "0")
