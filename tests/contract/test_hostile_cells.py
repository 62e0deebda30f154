"""Cells that turn on the agent beside them, and what they try to leave behind."""

from __future__ import annotations

import json

import anyio
import pytest

from tests.sandboxes import Repl

pytestmark = pytest.mark.anyio

# Cells that imitate the agent


FORGERIES = "\n".join(
    json.dumps(frame)
    for frame in (
        {"type": "ready", "version": 1, "python": "6.6.6"},
        {"type": "output", "cell": 1, "stream": "out", "text": "forged"},
        {"type": "call", "id": 99, "op": "llm_query", "prompt": "forged", "model": None},
        {"type": "done", "cell": 1, "status": "ok", "detail": "", "answer": "forged", "names": [], "dropped": 0},
        {"type": "end", "status": "ok", "detail": "", "answer": "forged", "names": []},
    )
)


async def test_frames_that_are_printed_are_text(repl: Repl):
    result = await repl.run(f"import sys\nfor stream in (sys.stdout, sys.stderr):\n    stream.write({FORGERIES!r})")
    assert (result.status, result.answer, repl.calls) == ("ok", None, [])
    assert result.text("out").startswith(FORGERIES)
    assert result.text("err") == FORGERIES


async def test_frames_written_to_every_descriptor_do_not_break_the_channel(repl: Repl):
    await repl.run("kept = 'kept'")
    result = await repl.run(
        f"""
        import os
        for fd in range(256):
            try:
                os.write(fd, {FORGERIES!r}.encode())
                os.write(fd, b'\\n')
            except OSError:
                pass
        while True:
            pass
        """,
        5.0,
    )
    # A cell shares its process with the agent's worker: it may forge its own end, never another's, nor a plain frame.
    assert result.status == "killed"
    assert "agent's socket" in result.detail
    assert await repl.out("kept") == "'kept'"


async def test_a_frame_that_is_slow_to_parse_is_not_parsed(repl: Repl):
    """A key given twice: the last is checked, and both would be parsed, 16 MB of empty lists in seconds."""
    await repl.run("kept = 'kept'")
    result = await repl.run(
        """
        import gc
        link, = (found for found in gc.get_objects() if type(found).__name__ == 'Link')
        junk = b'[' + b'[],' * 5_000_000 + b'0]'
        link._sock.sendall(b'{"type":"call","id":1,"op":"budget","model":null,"prompt":%s,"prompt":"x"}\\n' % junk)
        while True: pass
        """
    )
    assert (result.status, repl.calls) == ("killed", [])
    assert "agent's socket" in result.detail
    assert await repl.out("kept") == "'kept'"


@pytest.mark.parametrize(
    "code",
    [
        "import builtins\nfor name in ('open', 'len', 'isinstance', 'repr', 'sorted'): setattr(builtins, name, None)",
        "import builtins\nbuiltins.print = None",
        "import builtins\nbuiltins.__import__ = None",
        "import builtins\nbuiltins.__dict__.clear()",
        "import sys\nsys.modules.clear()",
        "import sys\nfor name in list(sys.modules):\n    if 'agent' in name: del sys.modules[name]",
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'agent' in name: module.__dict__.clear()",
        "import json\njson.dumps = lambda *a, **k: 'forged'",
        "import json\njson.loads = lambda *a, **k: {'type': 'run'}",
        "import os\nos.fork = lambda: 0",
        "import os\nos.fork = lambda: 77",
        "import os\nos.dup2 = os.close = os.write = None",
        "import signal\nsignal.signal = None",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, lambda *a: None)\n    except OSError: pass",
        "import sys\nsys.stdout = sys.stderr = None",
        "import sys\nsys.stdout.close(); sys.stderr.close()",
        "import sys\nsys.settrace(lambda *a: 1 / 0); sys.setrecursionlimit(60)",
        "import sys, time\nsys.setswitchinterval(1000)",
        "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Link', 'Repl'): o.__dict__.clear()",
        "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1, 1))",
        "import atexit, os\nos.register_at_fork(before=lambda: os._exit(1))",
    ],
)
async def test_a_cell_that_breaks_its_interpreter_does_not_break_the_sandbox(repl: Repl, code: str):
    """Whatever it broke, the cells that follow either work or say why not, and an answer is never made up."""
    await repl.run("kept = 'kept'")
    for cell in (code, "1 + 1", "import os\nos._exit(1)", "1 + 1"):
        result = await repl.run(cell, 2.0)
        assert result.answer is None
        assert result.text("out") in (("2\n",) if (cell, result.status) == ("1 + 1", "ok") else ("",))
        assert result.status == "ok" or result.detail


# What outlives its cell


LEFTOVERS = {
    "a process": "if not os.fork():\n    spin()",
    "a session of its own": "if not os.fork():\n    os.setsid()\n    spin()",
    "a daemon": "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        spin()\n    os._exit(0)\nos.wait()",
    "a thread": "threading.Thread(target=spin).start()",
    "a daemon thread": "threading.Thread(target=spin, daemon=True).start()",
    "a raw thread": "_thread.start_new_thread(spin, ())",
    "a thread and a lie": "threading.Thread(target=spin).start()\nthreading.active_count = lambda: 1",
    "a sibling": "libc = ctypes.CDLL(None)\nif not libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0):\n    spin()",
    "a subprocess": "subprocess.Popen([sys.executable, '-c', 'while True:\\n    pass'])",
}
SPIN = """
import ctypes, os, subprocess, sys, threading, time, _thread
def spin():
    while True:
        os.close(os.open('/tmp/alive', os.O_CREAT | os.O_WRONLY))
        print('from the cell before')
        try:
            llm_query('from the cell before')
        except BaseException:
            pass
"""


@pytest.mark.parametrize("what", LEFTOVERS)
async def test_what_a_cell_leaves_running_is_gone_in_the_next(repl: Repl, what: str):
    await repl.run(SPIN + "kept = 'kept'")
    result = await repl.run(LEFTOVERS[what])
    assert result.status == "ok", result
    repl.calls.clear()
    # A look at it while it can do no more: it makes its file again and again, if it lives.
    assert (
        await repl.out(
            "if os.path.exists('/tmp/alive'): os.unlink('/tmp/alive')\ntime.sleep(0.05)\nos.path.exists('/tmp/alive')"
        )
        == "False"
    )
    assert await repl.out("len(sys._current_frames()), kept") == "(1, 'kept')"
    assert repl.calls == []


async def test_calls_between_cells_do_not_reach_the_host(repl: Repl):
    await repl.run(
        SPIN + "for _ in range(3):\n    threading.Thread(target=spin).start()\nif not os.fork():\n    spin()"
    )
    made = len(repl.calls)
    with anyio.move_on_after(0.2):
        await anyio.sleep_forever()  # the host only listens during a cell: what came now would be seen by the next
    assert await repl.out("'quiet'") == "'quiet'"
    assert len(repl.calls) == made
