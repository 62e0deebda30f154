"""A process that has loaded Airlock already and forks for every command: most of a short command's time is imports.

What runs in the fork is the entry point of `airlock`, from its arguments to the end of the interpreter. Requests come
over standard input, a socket: JSON with the command line, environment and folder, and with it the three standard
descriptors. The answer is the exit code.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

_LOADED = (
    "alembic.command",
    "jsonschema",
    "orchestrator.lm.session",
    "orchestrator.wiring",
    "orchestrator.console",
    "orchestrator.doctor",
)

LONGEST_S = 60


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
        order = json.dumps([list(arguments), dict(env), str(folder), doom]).encode()
        socket.send_fds(self._socket, [order], list(stdio))
        return int(self._socket.recv(16))


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
        child = os.fork()
        if not child:
            arguments, env, folder, doomed = json.loads(order)
            orders.detach()
            for number, descriptor in enumerate(stdio):
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(env)
            os.chdir(folder)
            sys.argv = ["airlock", *arguments]
            signal.alarm(LONGEST_S)  # which ends it: nothing handles this signal
            if doomed:
                doom(**doomed)
            main()
        for descriptor in stdio:
            os.close(descriptor)
        orders.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    _serve()
