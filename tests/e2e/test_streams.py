"""Readers that go away or fall asleep, and disks that are full: progress is dropped, a lost answer is told."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import Airlock, Done, until
from tests.fakes.provider import Provider, Say

PRICED = ("--price", "mine=1,2")
SCRIPT = r"""
root:
  - "```repl\nprint(len(context))\n```"
  - "FINAL(42)"
"""


def scripted(airlock: Airlock) -> list[object]:
    return ["run", "What?", "--context", "context.txt", "--model", f"scripted:{airlock.file('script.yaml', SCRIPT)}"]


def into(airlock: Airlock, redirection: str) -> Airlock:
    return replace(airlock, prefix=["bash", "-c", f'exec "$0" "$@" {redirection}'])


def test_the_reader_of_the_progress_goes_away(airlock: Airlock) -> None:
    with Provider(root=[Say("```repl\nprint(1)\n```", delay_s=0.3), Say("FINAL(42)")]) as provider:
        arguments = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
        with airlock.started("run", "What?", *arguments) as query:
            assert query.process.stderr is not None
            query.process.stderr.readline()
            query.process.stderr.close()
            assert query.line() == "42\n"
            assert query.process.wait(timeout=20) == 0
    assert airlock.closing()["status"] == "answered"


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_progress_that_cannot_be_written_is_dropped(airlock: Airlock, redirection: str) -> None:
    done = into(airlock, redirection)(*scripted(airlock), code=0)
    assert (done.out, done.err) == ("42\n", "")
    assert into(airlock, redirection)("exec", "nowhere.py", "--context", "context.txt", code=2).out == ""


def test_the_reader_of_the_progress_falls_asleep(airlock: Airlock) -> None:
    """It keeps the pipe open and reads nothing: the query goes on when the pipe is full."""
    code = "```repl\nx = 1\n```\n" * 8
    script = airlock.file("long.yaml", f"root: {[code] * 29 + ['FINAL(42)']!r}")
    reading, writing = os.pipe()
    try:
        while True:
            os.set_blocking(writing, False)
            os.write(writing, b"x" * 1024)
    except BlockingIOError:
        os.set_blocking(writing, True)
    with airlock.started(
        "run", "What?", "--context", "context.txt", "--model", f"scripted:{script}", stderr=writing
    ) as query:
        assert query.line() == "42\n"
        assert query.process.wait(timeout=20) == 0
    os.close(reading)
    os.close(writing)


def lost(airlock: Airlock, done: Done, query: str) -> None:
    assert done.code == 4
    assert done.said == (
        "standard output cannot be written (No space left on device), and the answer is not there; "
        f"it is in the journal: airlock audit show {query}"
    )
    assert "42" in airlock("audit", "show", query, code=0).out


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_the_disk_is_full_when_the_answer_comes(airlock: Airlock, as_json: tuple[str, ...]) -> None:
    done = into(airlock, ">/dev/full")(*scripted(airlock), *as_json)
    lost(airlock, done, newest(airlock))
    assert airlock.closing()["status"] == "answered"
    airlock.file("cell.py", "FINAL(42)")
    done = into(airlock, ">/dev/full")("exec", "cell.py", "--context", "context.txt", *as_json)
    lost(airlock, done, newest(airlock))


def test_a_policy_that_keeps_nothing_has_no_copy(airlock: Airlock) -> None:
    policy = airlock.policy(audit_payloads="hash")
    done = into(airlock, ">/dev/full")(*scripted(airlock), "--policy", policy, code=4)
    assert done.said.endswith("and the answer is not there; the policy keeps no copy of it")


def test_the_disk_is_full_while_a_cell_prints(airlock: Airlock) -> None:
    airlock.file("cell.py", "print(42, flush=True)\nwhile True: print('more')")
    done = into(airlock, ">/dev/full")("exec", "cell.py", "--context", "context.txt")
    lost(airlock, done, newest(airlock))
    assert airlock.closing()["status"] == "cancelled"


@pytest.mark.parametrize("command", ["--help", "policy show", "models list", "doctor", "audit show"])
def test_the_disk_is_full_for_other_commands(airlock: Airlock, command: str) -> None:
    airlock("exec", airlock.file("cell.py", "pass"), "--context", "context.txt", code=0)
    done = into(airlock, ">/dev/full")(*command.split(), code=4)
    assert done.said == "standard output cannot be written: No space left on device"


@pytest.mark.parametrize("command", ["policy show", "audit show"])
def test_the_reader_of_other_commands_has_gone(airlock: Airlock, command: str) -> None:
    airlock("exec", airlock.file("cell.py", "pass"), "--context", "context.txt", code=0)
    reading, writing = os.pipe()
    os.close(reading)
    with airlock.started(*command.split(), stdout=writing) as running:
        os.close(writing)
        assert running.process.stderr is not None
        assert running.process.stderr.read() == b""
    assert running.process.returncode == 1


def test_a_reader_that_falls_asleep_does_not_stop_the_clock(airlock: Airlock) -> None:
    """What a cell prints is more than a pipe takes: the query ends in its time all the same, and nothing is lost."""
    airlock.file("cell.py", "print('x' * 900_000, flush=True)\nwhile True: pass")
    with airlock.started("exec", "cell.py", "--timeout", "1") as query:
        until(lambda: airlock.rows("SELECT id FROM queries WHERE status='limit'"))
        assert query.process.poll() is None
        done = query.end()
    assert (done.code, done.out) == (3, "x" * 900_000 + "\n")
    assert done.said.startswith("timeout: ")


def test_ctrl_c_ends_what_waits_for_a_reader(airlock: Airlock) -> None:
    airlock.file("cell.py", "print('x' * 900_000)")
    with airlock.started("exec", "cell.py") as query:
        until(lambda: airlock.rows("SELECT id FROM queries WHERE status='answered'"))
        query.process.send_signal(signal.SIGINT)
        assert query.process.wait(timeout=20) == 130


def newest(airlock: Airlock) -> str:
    return str(airlock.rows("SELECT id FROM queries ORDER BY opened_at DESC LIMIT 1")[0][0])


def test_a_large_answer_is_whole(airlock: Airlock, tmp_path: Path) -> None:
    airlock.file("cell.py", "FINAL('x' * 900_000)")
    with airlock.started("exec", "cell.py", "--context", "context.txt") as query:
        assert query.process.stdout is not None
        os.set_blocking(query.process.stdout.fileno(), True)
        assert len(query.line()) == 900_001
        assert query.process.wait(timeout=20) == 0
