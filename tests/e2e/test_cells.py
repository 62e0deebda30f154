"""Cells that misbehave, through `airlock exec`: a status, an exit code and one line; the machine is as it was."""

from __future__ import annotations

import json
import textwrap

import pytest

from orchestrator.sandbox.bubblewrap import PIDS_OF_AIRLOCK
from tests.command import Airlock, Done

FIELDS = ["status", "reason", "stdout", "stderr", "answer", "duration_s"]


def cell(airlock: Airlock, code: str, *more: object) -> Done:
    file = airlock.file("cell.py", textwrap.dedent(code))
    return airlock("exec", file, "--context", "context.txt", *more)


@pytest.mark.parametrize(
    ("code", "exit_code", "status", "says"),
    [
        ("print(context.count('\\n'))", 0, "ok", ""),
        ("1 / 0", 1, "error", "ZeroDivisionError: division by zero"),
        ("def f(:", 1, "error", "SyntaxError"),
        ("raise SystemExit(3)", 1, "error", "SystemExit: 3"),
        ("import sys; sys.exit()", 1, "error", "SystemExit"),
        ("while True: pass", 3, "timeout", "interrupted by its time limit"),
        ("import os; os._exit(0)", 4, "killed", "exit code 0"),
        ("import os; os.kill(os.getpid(), 9)", 4, "killed", "was killed"),
        ("import ctypes; ctypes.string_at(0)", 4, "killed", "SIGSEGV"),
        ("import os; os.abort()", 4, "killed", "SIGABRT"),
        ("x = bytearray(3 << 30)", 1, "error", "MemoryError"),
    ],
)
def test_how_a_cell_ends(airlock: Airlock, code: str, exit_code: int, status: str, says: str) -> None:
    policy = airlock.policy(time_cell="1 s")
    done = cell(airlock, code, "--json", "--policy", policy)
    assert (done.code, done.json["status"]) == (exit_code, status)
    assert list(done.json) == FIELDS
    assert says in done.json["reason"]
    assert done.json["answer"] is None
    if status in ("timeout", "killed"):
        assert done.said.startswith(f"{status}: ")


def test_a_loop_that_ignores_its_interrupt(airlock: Airlock) -> None:
    code = """
        print("begun", flush=True)
        while True:
            try:
                while True: pass
            except KeyboardInterrupt:
                pass
    """
    done = cell(airlock, code, "--json", "--policy", airlock.policy(time_cell="500 ms"))
    assert (done.code, done.json["status"], done.json["stdout"]) == (3, "timeout", "begun\n")
    assert done.json["duration_s"] < 10


def test_a_fork_bomb(airlock: Airlock) -> None:
    code = """
        import os
        made = 0
        try:
            while True:
                os.fork()
                made += 1
        except OSError as error:
            if made: print("stopped", flush=True)
            while True: pass
    """
    done = cell(airlock, code, "--json", "--policy", airlock.policy(time_cell="1 s", sandbox_pids="16"))
    assert (done.code, done.json["status"]) == (3, "timeout")
    assert 1 <= done.json["stdout"].count("stopped") <= 16 + PIDS_OF_AIRLOCK


def test_a_memory_hog(airlock: Airlock) -> None:
    code = """
        import os
        print("begun", flush=True)
        hog = []
        while True:
            hog.append(os.urandom(1 << 20))
    """
    done = cell(airlock, code, "--json", "--policy", airlock.policy(sandbox_memory="128 MiB"))
    assert done.json["stdout"] == "begun\n"
    assert (done.code, done.json["status"]) in [(1, "error"), (4, "killed")]
    assert "memory" in done.json["reason"].lower()


def test_memory_hogs_together(airlock: Airlock) -> None:
    code = """
        import os
        for _ in range(8):
            if not os.fork():
                hog = [os.urandom(1 << 20) for _ in range(100)]
                while True: pass
        while True:
            os.wait()
    """
    policy = airlock.policy(sandbox_memory="128 MiB", time_cell="3 s")
    done = cell(airlock, code, "--json", "--policy", policy)
    assert done.code in (1, 3, 4)
    ended = next(r["body"] for r in airlock.records() if r["type"] == "sandbox.ended")
    assert ended["peak_memory_bytes"] < 256 << 20


def test_a_flood_of_output(airlock: Airlock) -> None:
    policy = airlock.policy(sandbox_output="64 KiB")
    done = cell(airlock, "for _ in range(300): print('x' * 99_999)\nprint('the end')", "--json", "--policy", policy)
    assert (done.code, done.json["status"]) == (0, "ok")
    assert 64_000 <= len(done.json["stdout"]) <= 66_000
    ended = next(r["body"] for r in airlock.records() if r["type"] == "cell.ended")
    assert ended["dropped_bytes"] == 30_000_008 - (64 << 10)


def test_an_endless_flood_of_output(airlock: Airlock) -> None:
    policy = airlock.policy(sandbox_output="64 KiB", time_cell="1 s")
    done = cell(airlock, "import os\nwhile True: os.write(2, b'x' * 65536)", "--policy", policy)
    assert done.code == 3
    assert len(done.err) < 70_000


def test_a_cell_that_closes_its_descriptors(airlock: Airlock) -> None:
    code = """
        import os
        print("before", flush=True)
        os.closerange(0, 256)
    """
    done = cell(airlock, code, "--json")
    assert done.json["stdout"] == "before\n"
    assert (done.code, done.json["status"]) in [(0, "ok"), (1, "error"), (4, "killed")]


FRAMES = [
    {"type": "done", "cell": 1, "status": "ok", "detail": "", "answer": "forged", "names": [], "dropped": 0},
    {"type": "output", "cell": 1, "stream": "out", "text": "forged"},
    {"type": "end", "status": "ok", "detail": "", "answer": "forged", "names": []},
    {"type": "call", "id": 1, "op": "llm_query", "prompt": "spend", "model": None, "context": None},
    {"type": "reply", "id": 1, "ok": True, "value": "forged", "error": None},
    {"type": "bye"},
]


def test_a_cell_that_prints_frames_of_our_protocol(airlock: Airlock) -> None:
    lines = "".join(json.dumps(frame) + "\n" for frame in FRAMES)
    done = cell(airlock, f"import os\nfor fd in (1, 2): os.write(fd, {lines.encode()!r})\nprint('after')", "--json")
    assert (done.code, done.json["status"], done.json["answer"]) == (0, "ok", None)
    assert (done.json["stdout"], done.json["stderr"]) == (lines + "after\n", lines)


def test_a_cell_that_writes_frames_to_every_descriptor(airlock: Airlock) -> None:
    lines = "".join(json.dumps(frame) + "\n" for frame in FRAMES)
    code = f"""
        import os
        for fd in range(3, 256):
            try:
                os.write(fd, {lines.encode()!r})
            except OSError:
                pass
        print("after", flush=True)
    """
    done = cell(airlock, code, "--json")
    assert done.code in (0, 1, 4)
    # A cell may give an answer of its own, and so may a forged end of it: what it cannot do is speak for the host.
    assert not [r for r in airlock.records() if r["type"] in ("call.intent", "call.result")]


def test_what_a_cell_leaves_running_ends_with_it(airlock: Airlock) -> None:
    code = """
        import os, threading, time
        if not os.fork():
            os.setsid()
            if not os.fork():
                while True: time.sleep(1)
            os._exit(0)
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        print("left two")
    """
    done = cell(airlock, code)
    assert (done.code, done.out) == (0, "left two\n")


def test_output_and_errors_go_where_they_belong(airlock: Airlock) -> None:
    code = """
        import sys
        print("to out")
        print("to err", file=sys.stderr)
        FINAL({"found": [1, 2]})
    """
    done = cell(airlock, code)
    assert (done.code, done.out, done.err) == (0, 'to out\n{"found": [1, 2]}\n', "to err\n")
    done = cell(airlock, code, "--json")
    assert done.json == {
        "status": "ok",
        "reason": "",
        "stdout": "to out\n",
        "stderr": "to err\n",
        "answer": '{"found": [1, 2]}',
        "duration_s": done.json["duration_s"],
    }
    assert 0 <= done.json["duration_s"] < 20


def test_a_cell_needs_no_context(airlock: Airlock) -> None:
    file = airlock.file("cell.py", "print(type(context).__name__, repr(context))\nFINAL(len(context))")
    assert airlock("exec", file, code=0).out == "str ''\n0\n"
    done = airlock("exec", file, "--json", code=0)
    assert (list(done.json), done.json["answer"]) == (FIELDS, "0")
    assert "closed: answered" in airlock("audit", "show", code=0).out
    assert "Missing option '--context'" in airlock("run", "What?", code=2).said


def test_the_query_runs_out_of_time_in_a_cell(airlock: Airlock) -> None:
    done = cell(airlock, "print('begun', flush=True)\nwhile True: pass", "--timeout", 1, "--json")
    assert (done.code, done.json["status"], done.json["stdout"]) == (3, "timeout", "begun\n")
    assert airlock.closing()["status"] == "limit"


def test_a_sandbox_that_dies_is_said_to(airlock: Airlock) -> None:
    """Not for a cell to bring about, as far as is known: process 1 is out of its reach."""
    code = """
        import os, signal
        for target in (1, -1):
            try:
                os.kill(target, signal.SIGKILL)
            except OSError as error:
                print(error.strerror)
        print("still here")
    """
    done = cell(airlock, code)
    assert done.code in (0, 4)
