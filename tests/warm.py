"""A process that has loaded Airlock already and forks for every command: most of a short command's time is imports.

What runs in the fork is the entry point of `airlock`, from its arguments to the end of the interpreter. Requests come
over standard input, a socket: JSON with the command line, environment and folder, and with it the three standard
descriptors. The answer is the exit code; of a command that is only started it is the process id, and the process is
then a child of whoever asked.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any, Self

_LOADED = (
    "alembic.command",
    "jsonschema",
    "orchestrator.lm.session",
    "orchestrator.remote_runs",
    "orchestrator.server.app",
    "orchestrator.serving",
    "orchestrator.tenant_commands",
    "orchestrator.wiring",
    "orchestrator.console",
    "orchestrator.doctor",
)

LONGEST_S = 60
_SYS_CLONE = 56  # x86-64
_CLONE_PARENT = 0x8000


class Warm:
    """A context manager. `run` is for one thread at a time."""

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(LONGEST_S + 10)
        command = [sys.executable, "-m", "tests.warm"]
        self._process = subprocess.Popen(command, stdin=theirs, cwd=Path(__file__).parents[1])
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        assert self._process.wait(timeout=10) == 0

    def run(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        stdio: Sequence[int],
        doom: Mapping[str, Any] | None = None,
    ) -> int:
        """Run `airlock` with these arguments to its end; the exit code. doom: see `tests.doom`."""
        return self._ask([list(arguments), dict(env), str(folder), doom, False], stdio)

    def popen(self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, **pipes: Any) -> Popen[bytes]:
        """Start it, and have of it what `subprocess.Popen` has."""
        return _Forked(arguments, env=env, cwd=folder, warm=self, **pipes)

    def start(self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, stdio: Sequence[int]) -> int:
        """The process id of a new child of this process."""
        return self._ask([list(arguments), dict(env), str(folder), None, True], stdio)

    def _ask(self, order: list[Any], stdio: Sequence[int]) -> int:
        try:
            socket.send_fds(self._socket, [json.dumps(order).encode()], list(stdio))
            return int(self._socket.recv(16))
        except BaseException:
            self._socket.close()  # an answer that comes late would be taken for the next one's
            raise


class _Forked(Popen[bytes]):
    """Only how it comes to be differs. args: those of `airlock`."""

    def __init__(self, arguments: Sequence[str], *, warm: Warm, **options: Any) -> None:
        self._warm = warm
        super().__init__(arguments, **options)

    def _execute_child(self, args: Any, *given: Any) -> None:
        handles = given[9:15]  # of three pipes: what is read of it, and what is written to it
        stdio = [end if end != -1 else number for number, end in enumerate((handles[0], handles[3], handles[5]))]
        self.pid = self._warm.start(args, given[5], given[4], stdio)
        assert self.pid > 1
        self._child_created = True
        self._close_pipe_fds(*handles)


def _serve() -> None:
    for name in _LOADED:
        __import__(name)
    from orchestrator.cli import main
    from tests.doom import doom

    gc.freeze()
    orders = socket.socket(fileno=0)
    while True:
        order, stdio, _, _ = socket.recv_fds(orders, 1 << 20, 3)
        if not order:
            return
        arguments, env, folder, doomed, only_start = json.loads(order)
        child = _fork_beside() if only_start else os.fork()
        if not child:
            orders.detach()
            for number, descriptor in enumerate(stdio):
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(env)
            os.chdir(folder)
            sys.argv = ["airlock", *arguments]
            if not only_start:
                signal.alarm(LONGEST_S)  # which ends it: nothing handles this signal
            if doomed:
                doom(**doomed)
            main()
        for descriptor in stdio:
            os.close(descriptor)
        orders.send(b"%d" % (child if only_start else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def _fork_beside() -> int:
    """As `os.fork`, but for the parent, which is this process's own."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    child = ctypes.PyDLL(None).syscall(_SYS_CLONE, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    (python.PyOS_AfterFork_Parent if child else python.PyOS_AfterFork_Child)()
    assert child >= 0, "it cannot be forked"
    return child


if __name__ == "__main__":
    _serve()
