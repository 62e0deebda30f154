"""What every backend promises of its sandboxes: a REPL that keeps its state, whatever a cell does to it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from orchestrator.core.errors import SandboxDied
from orchestrator.guest import wire
from orchestrator.sandbox.base import EXHAUSTION, Backend
from orchestrator.sandbox.sandbox import Call
from tests.sandboxes import KILL_ALL, MIB, Repl, open_repl, until

pytestmark = pytest.mark.anyio

# Running cells


async def test_state_is_kept_and_the_last_expression_printed(repl: Repl):
    first = await repl.run("import math\nx = 20\nx + 1")
    assert (first.status, first.text("out"), first.names) == ("ok", "21\n", ("math", "x"))
    assert await repl.out("def f():\n    return x * 2\nNone") == ""
    assert await repl.out("print('a'); f()") == "a\n40"
    assert await repl.out("x = 'new'\n'déjà vu €😀'") == "'déjà vu €😀'"


async def test_a_traceback_names_the_right_line_and_nothing_of_the_agent(repl: Repl):
    await repl.run("def divide(a):\n    b = 0\n    return a / b")
    result = await repl.run("x = 1\n\ndivide(x)")
    assert (result.status, result.detail) == ("error", "ZeroDivisionError: division by zero")
    trace = result.text("err")
    assert 'File "<cell 2>", line 3, in <module>\n    divide(x)' in trace
    assert 'File "<cell 1>", line 3, in divide\n    return a / b' in trace
    assert "agent" not in trace
    assert await repl.out("x") == "1"


async def test_a_syntax_error_is_a_result(repl: Repl):
    result = await repl.run("x = 1\nx = = 2")
    assert result.status == "error"
    assert result.detail.startswith("SyntaxError")
    assert "line 2" in result.text("err")


async def test_only_new_variables_of_the_users_own_are_named(repl: Repl):
    assert (await repl.run("a = 1\n_b = 2\nanswer = {}\ncontext = 3\nFINAL = 4")).names == ("a",)
    assert (await repl.run("a = 2\nc = 3")).names == ("c",)
    many = await repl.run("for i in range(200): globals()[f'v{i:03}'] = i")
    assert many.names[:2] == ("i", "v000")
    assert len(many.names) == wire.MAX_NAMES


async def test_output_is_streamed_while_the_cell_runs(repl: Repl):
    came = anyio.Event()

    async def answer_once_output_came(_call: Call) -> str:
        with anyio.fail_after(10):
            await came.wait()
        return "seen"

    code = "print('first')\nprint(llm_query('?'))"
    result = await repl.sandbox.run(code, 20.0, answer_once_output_came, lambda _stream, _text: came.set())
    assert result.text("out") == "first\nseen\n"


async def test_output_comes_in_the_order_it_was_written(repl: Repl):
    seen: list[tuple[str, str]] = []

    async def arrived(call: Call) -> str:  # the streams are two pipes: which was first is known if there is a pause
        await until(lambda: len(seen) == int(call.prompt))
        return ""

    code = """
        import sys
        for i in range(3):
            print("out", i, flush=True)
            llm_query(2 * i + 1)
            print("err", i, file=sys.stderr, flush=True)
            llm_query(2 * i + 2)
        """
    result = await repl.run(code, on_call=arrived, on_output=lambda *part: seen.append(part))
    assert result.output == seen == [(s, f"{s} {i}\n") for i in range(3) for s in ("out", "err")]


async def test_output_arrives_while_the_cell_runs(repl: Repl):
    seen: list[tuple[str, str]] = []

    async def on_call(call: Call) -> str:
        await until(lambda: seen)
        return "seen"

    assert await repl.out(
        "print('early', flush=True); llm_query('?')", on_call=on_call, on_output=lambda *part: seen.append(part)
    )
    assert seen[0] == ("out", "early\n")


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ("for _ in range(300_000): print('y' * 99)", 30_000_000),
        ("print('z' * (64 << 20), end='')", 64 * MIB),
        ("import os\nfor _ in range(64): os.write(2, b'e' * 65536)", 64 * 65536),
    ],
    ids=["flood", "one line of 64 MB", "stderr"],
)
async def test_output_is_capped_and_what_was_dropped_counted(repl: Repl, code: str, written: int):
    result = await repl.run(code)
    assert result.status == "ok"
    assert sum(len(text) for _, text in result.output) == MIB
    assert result.dropped == written - MIB


async def test_binary_garbage_is_text_by_the_time_it_is_output(repl: Repl):
    result = await repl.run("import os\nos.write(1, bytes(range(256)) * 4 + b'\\xe2\\x82')")
    assert result.status == "ok"
    assert result.text("out").count("\ufffd") >= 4
    assert "\0" in result.text("out")
    split = await repl.run("import os, time\nos.write(1, b'\\xe2\\x82'); time.sleep(0.05); os.write(1, b'\\xac')")
    assert split.text("out") == "€1\n"


# Cells that end badly: what was there before them is there after them


BAD_ENDS = {
    "segfault": ("import ctypes; ctypes.string_at(0)", "killed", "crashed with SIGSEGV"),
    "os._exit": ("import os; os._exit(3)", "killed", "exit code 3"),
    "abort": ("import os; os.abort()", "killed", "SIGABRT"),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", "killed", "was killed"),
    "MemoryError": ("kept = bytearray(1 << 40)", "error", "MemoryError"),
    "MemoryError to the brim": ("small = []\nwhile True:\n    small.append(object())", "error", "MemoryError"),
    "RecursionError": ("def f(): f()\nf()", "error", "RecursionError"),
    "SystemExit": ("import sys; sys.exit(3)", "error", "SystemExit: 3"),
    "SystemExit without a text": (
        "class E:\n    def __str__(self): 1 / 0\nraise SystemExit(E())",
        "error",
        "SystemExit: E",
    ),
    "an exception without a text": (
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
        "error",
        "E",
    ),
    "closes all descriptors": ("import os\nos.closerange(0, 4096)\nwhile True:\n    pass", "killed", "closed"),
    "closes its output": ("import os\nos.close(1); os.close(2)", "ok", ""),
    "stops itself": ("import os\nos.kill(os.getpid(), 19)", "timeout", "time limit"),
    "loops": ("while True:\n    pass", "timeout", "interrupted by its time limit"),
    "loops in C": ("sum(iter(int, 1))", "timeout", "was interrupted by its time limit and went on and was killed"),
    "swallows the interrupt": (
        "while True:\n    try:\n        while True:\n            pass\n    except KeyboardInterrupt:\n        pass",
        "timeout",
        "was interrupted by its time limit and went on and was killed",
    ),
    "ignores the interrupt": (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass",
        "timeout",
        "was interrupted by its time limit and went on and was killed",
    ),
}


async def ends_the_sandbox(repl: Repl, code: str) -> None:
    """What `EXHAUSTION` stands for: it is contained all the same."""
    with pytest.raises(SandboxDied):
        await repl.run(code, 20.0)


@pytest.mark.parametrize("end", BAD_ENDS)
async def test_state_survives(backend: Backend, repl: Repl, end: str):
    code, status, detail = BAD_ENDS[end]
    await repl.run("import os\nkept = ['kept']")
    if end == "MemoryError to the brim" and EXHAUSTION in backend.deviations:
        await ends_the_sandbox(repl, code)
        return
    timeout_s = 0.5 if status == "timeout" else 20.0
    result = await repl.run(code, timeout_s)
    assert (result.status, detail in result.detail) == (status, True), result
    if status == "timeout":
        assert 0.5 <= result.duration_s < 8  # the interrupt, then two seconds of grace
    assert await repl.out("kept") == "['kept']"
    # Sub-calls work as before: the next worker starts over with its ids.
    assert await repl.out("llm_query('still')") == "'reply to still'"


async def test_losing_everything_is_said(repl: Repl):
    await repl.run("kept = 1")
    result = await repl.run(KILL_ALL)
    assert result.status == "killed"
    assert "all variables are gone" in result.detail
    assert await repl.out("'kept' in globals()") == "False"


async def test_state_survives_many_processes_that_run_out_of_memory_together(backend: Backend, home: Path):
    async with open_repl(backend, home, memory_bytes=64 * MIB) as repl:
        await repl.run("kept = 'kept'")
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
        if EXHAUSTION in backend.deviations:
            await ends_the_sandbox(repl, code)
            return
        result = await repl.run(code, 1.0)
        assert result.status in ("killed", "error", "timeout")
        assert await repl.out("kept") == "'kept'"
        assert (await repl.sandbox.usage()).oom


async def test_state_survives_a_fork_bomb(backend: Backend, repl: Repl):
    await repl.run("kept = 'kept'")
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    if EXHAUSTION in backend.deviations:
        await ends_the_sandbox(repl, code)
        return
    result = await repl.run(code, 1.0)
    assert result.status in ("timeout", "killed")
    assert await repl.out("kept") == "'kept'"
    assert await repl.out("import subprocess, sys\nsubprocess.run([sys.executable, '-c', '']).returncode") == "0"


async def test_a_cell_can_be_interrupted_by_the_host(repl: Repl):
    async def on_call(_call: Call) -> str:
        await repl.sandbox.interrupt()
        return "late"

    result = await repl.run("x = 1\nllm_query('go')\nwhile True:\n    pass", on_call=on_call)
    assert (result.status, result.detail) == ("timeout", "interrupted by the host's word")
    assert await repl.out("x") == "1"
