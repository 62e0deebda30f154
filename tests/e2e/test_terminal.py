"""The live view, on a terminal that is real but for the person before it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.command import Airlock
from tests.fakes.provider import Fail, Hang, Provider, Say

STREAMS = ("stdin", "stdout", "stderr")
PRICED = ("--price", "mine=1,2")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HOSTILE = r"print('\x1b]0;owned\x07 \x1b[2J \x9b31m \u202edrow\u202c done')"


class Screen:
    """What a program has written to its terminal. text: without the control sequences of the view itself."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master, self.process, self.raw = master, process, ""

    @property
    def text(self) -> str:
        return _CONTROL.sub("", self.raw)

    def read_until(self, *wanted: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not all(text in self.text for text in wanted):
            assert time.monotonic() < deadline, (wanted, self.text[-3000:])
            self._read(0.2)

    def end(self) -> int:
        deadline = time.monotonic() + 20
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text[-3000:]
            self._read(0.05)
        while self._read(0.0):
            pass
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)


@contextmanager
def terminal(airlock: Airlock, *arguments: object, columns: int = 100) -> Iterator[Screen]:
    """Run it on a terminal of 40 rows, which is afterwards as it was before."""
    master, slave = os.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        before = termios.tcgetattr(slave)
        airlock.env["TERM"] = "xterm-256color"
        with airlock.started(*arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as running:
            screen = Screen(master, running.process)
            yield screen
            screen.end()
        assert termios.tcgetattr(slave) == before
        assert screen.raw.rfind("\x1b[?25h") >= screen.raw.rfind("\x1b[?25l")  # the cursor is there again
        assert "\x1b[?1049h" not in screen.raw  # nor was the screen taken away
        for sequence in ("\x1b]0;", "\x1b[2J", "\x9b", "\u202e", "\x07"):
            assert sequence not in screen.raw
    finally:
        os.close(master)
        os.close(slave)


def test_turn_code_output_and_money_are_on_the_screen(airlock: Airlock) -> None:
    turns = [
        Say(f"```repl\nfor n in range(3): print('printed', n * 111)\n{HOSTILE}\n```", usage=(1000, 1000)),
        Say("```repl\nprint(llm_query_batched(['a', 'b']))\n```", usage=(1000, 1000)),
        Say("FINAL(it is \x1b[31m42)", usage=(1000, 1000), delay_s=0.3),
    ]
    with Provider(root=turns, sub=[Say("yes", usage=(1000, 0), delay_s=0.5)]) as provider:
        options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
        with terminal(airlock, "run", "What is it?", *options) as screen:
            screen.read_until("turn 2 of 30", "2 calls in flight", "cell 2 is running")
            screen.read_until("answered: 3 turns, 2 sub-calls")
            assert screen.end() == 0
    shown = screen.text
    for text in ("turn 1 of 30", "for n in range(3)", "printed 222", "2 sub-calls", "0.003 of 1.00 USD", "of 900 s"):
        assert text in shown, text
    assert r"\x1b]0;owned\x07" in shown
    assert r"\u202edrow" in shown
    assert r"it is \x1b[31m42" in shown  # the answer, below the view


def test_a_narrow_terminal_has_the_whole_id(airlock: Airlock) -> None:
    with Provider(root=[Say("```repl\nprint(llm_query('a'))\n```"), Say("FINAL(42)")], sub=[Say("b")]) as provider:
        options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
        with terminal(airlock, "run", "What?", *options, columns=40) as screen:
            assert screen.end() == 0
    (query,) = airlock.rows("SELECT id FROM queries")
    for text in (query[0], "turn 2 of 30", "1 sub-call, 0 calls in flight", "of 1.00 USD", "of 900 s"):
        assert text in screen.text, text
    assert all(len(line) <= 40 for line in screen.text.replace("\r", "\n").split("\n"))


def test_turns_are_counted_and_not_requests(airlock: Airlock) -> None:
    """A request that is tried again, a reply that is continued and a last word are no further turns."""
    turns = [
        Fail(429, {"Retry-After": "0"}),
        Say("```repl\nprint(", finish="length"),
        Say("1)\n```"),
        Say("```repl\nprint(2)\n```"),
        Say("FINAL(42)"),
    ]
    with Provider(root=turns) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED]
        policy = airlock.policy(counts_iterations="2")
        with terminal(airlock, "run", "What?", "--context", "context.txt", *options, "--policy", policy) as screen:
            assert screen.end() == 3
    assert len(provider.requests) == 5
    assert "limit: 2 turns" in screen.text
    assert set(re.findall(r"turn (\d+) of 2", screen.text)) <= {"0", "1", "2"}
    assert "turn 2 of 2" in screen.text


def test_ctrl_c_leaves_the_terminal_as_it_was(airlock: Airlock) -> None:
    with Provider(root=[Say(f"```repl\n{HOSTILE}\n```"), Hang()]) as provider:
        options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
        with terminal(airlock, "run", "What is it?", *options) as screen:
            screen.read_until("mine is thinking", "turn 2 of 30")
            os.killpg(screen.process.pid, signal.SIGINT)  # as the terminal does to all that runs on it
            assert screen.end() == 130
    assert re.search(r"airlock: cancelled\s*$", screen.text)
    assert "Traceback" not in screen.text
    assert airlock.closing()["status"] == "cancelled"


def test_a_terminal_that_is_closed_ends_the_query(airlock: Airlock) -> None:
    with Provider(root=[Say("```repl\nprint(1)\n```"), Hang()]) as provider:
        options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
        master, slave = os.openpty()
        airlock.env["TERM"] = "xterm-256color"
        airlock.prefix = ["setsid", "--ctty"]
        with airlock.started("run", "What is it?", *options, **dict.fromkeys(STREAMS, slave)) as running:
            os.close(slave)
            Screen(master, running.process).read_until("mine is thinking", "turn 2 of 30")
            os.close(master)  # the kernel sends SIGHUP, and what is written to it fails from now on
            assert running.process.wait(timeout=20) == 130
    assert airlock.closing()["status"] == "cancelled"


def test_a_cell_s_output_cannot_command_the_terminal(airlock: Airlock) -> None:
    code = HOSTILE + "\nimport sys\nprint('\\x1b[2J', file=sys.stderr)\nFINAL('\\x1b]0;x\\x07')"
    with terminal(airlock, "exec", airlock.file("cell.py", code), "--context", "context.txt") as screen:
        assert screen.end() == 0
    assert r"\x1b]0;owned\x07" in screen.text
    with terminal(airlock, "audit", "show") as screen:
        assert screen.end() == 0
    assert r"\x1b]0;owned\x07" in screen.text
