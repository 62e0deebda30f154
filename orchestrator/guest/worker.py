"""The process that runs cells: takes frames from the supervisor, one cell at a time, and forks snapshots of itself.

User code shares this interpreter and may do anything to it. Nothing here is relied on for safety: the supervisor
checks what it is told, and kills the process when it does not behave.
"""

from __future__ import annotations

import os
import sys

from .lean import socket
from .link import Link, Shield
from .processes import restrict_addresses
from .repl import Repl, renew_streams, restore_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


# What the first cell of a query is likely to need.
_LIKELY = ("json", "re", "threading", "%s.calls" % __package__, "%s.context" % __package__)


class Worker:
    def __init__(self, limits: dict[str, Any], context_folder: str) -> None:
        self._limits = limits
        self._folder = context_folder
        self._shield = Shield()
        self._saved: list[int] = []
        self._bounded = False
        self._snapshots: list[int] = []

    def serve(self, ctl: socket.socket, out: int, err: int) -> None:
        """Work until the supervisor goes. Does not return in the child of a fork before that either."""
        self._process = os.getpid()
        self._link = self._open(ctl, out, err)
        self._repl = Repl(self._link, self._shield, self._limits)
        self._shield.take_over()
        while True:
            frame = self._link.receive()
            if frame["type"] == "run":
                self._run(frame)
                self._let_go()
            elif frame["type"] == "snapshot":
                self._snapshot()

    def _open(self, ctl: socket.socket, out: int, err: int) -> Link:
        self._write_to(out, err)
        return Link(ctl, self._shield)

    def _write_to(self, out: int, err: int) -> None:
        self._let_go()
        self._saved = [out, err]
        restore_fds(self._saved)

    def _let_go(self) -> None:
        """Of what fds 1 and 2 are restored from: before its next cell this process gets others, and needs room."""
        for fd in self._saved:
            os.close(fd)
        self._saved = []

    def _run(self, frame: dict[str, Any]) -> None:
        if frame["context"]:
            self._repl.load_context(self._folder)
        if not self._bounded:
            self._before_first(frame["id"], frame["context"])
        self._link.set_in_cell(True)
        end: dict[str, Any]
        try:
            self._shield.arm()
            end = self._repl.run(frame["code"], frame["id"])
            self._shield.disarm()
        except KeyboardInterrupt:  # in the few instructions between the cell's end and disarm()
            self._shield.disarm()
            end = {
                "type": "end",
                "status": "timeout",
                "detail": "interrupted",
                "answer": None,
                "names": [],
            }
        if os.getpid() != self._process:  # a process that the cell forked, and that came to the cell's end, too
            os._exit(end["status"] != "ok")
        self._repl.end_cell()
        self._link.send(end)
        self._shield.take_over()
        restore_fds(self._saved)

    def _before_first(self, number: int, attached: bool) -> None:
        """number: of the cell. 0 is a trial, of a sandbox that was started before it is needed: there is time."""
        if number:
            mapped = os.stat(self._folder + "/data").st_size if attached else 0  # noqa: PTH116  pathlib is not cheap
            restrict_addresses(int(self._limits["address_bytes"]) + mapped)
            self._bounded = True
        else:
            for name in _LIKELY:
                __import__(name)

    def _snapshot(self) -> None:
        """Fork a process that has this one's state and waits, on descriptors of its own, to be needed.

        This one gets new outputs, if it is to go on: what the cell left running may write to the old ones.
        """
        import warnings

        *mine, ctl, out, err = self._link.take_fds()
        if mine:
            self._write_to(*mine)
        fds = [ctl, out, err]
        threads = len(sys._current_frames()) > 1  # pyright: ignore[reportPrivateUsage]
        self._snapshots = [pid for pid in self._snapshots if not _reaped(pid)]
        try:
            fds += os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # threads that a cell left running are no concern of the child
                pid = os.fork()
        except OSError:  # no process or no memory to be had: closing the descriptors tells the supervisor
            pid = -1
        if pid:
            if pid > 0:
                self._snapshots.append(pid)
                try:
                    if not self._link.has_come():  # else the next cell does it, and waits for nothing
                        self._warm_up()
                except OSError:  # the cell has left no descriptor to be had: the next one will be a little slower
                    self._shield.disarm()
            for fd in fds:
                os.close(fd)
            return
        held, waiting = fds[3:]
        os.close(waiting)
        os.read(held, 1)  # until the runner has done so: once this process tells of itself, all are stopped
        os.close(held)
        self._link.close()
        # All of its arguments, or it would ask the kernel for each.
        self._link = self._open(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, ctl), out, err)
        self._link.send({"type": "snapshot"})  # the kernel adds this process's id
        self._let_go()
        # Most snapshots are never needed. Until this one is, it does nothing: each page it writes to has to be copied.
        self._link.wait()
        self._snapshots = []
        self._process = os.getpid()
        if threads:
            renew_streams()
        self._repl.connect(self._link, self._shield)

    def _warm_up(self) -> None:
        """An empty cell, all the way: the pages that every cell touches are copied now, while the LM thinks."""
        link, (here, there) = self._link, socket.socketpair()
        self._link, supervisor = Link(here, self._shield), Link(there, self._shield)
        try:
            supervisor.send({"type": "run", "id": 0, "code": "", "timeout_s": 0, "context": False})
            self._run(self._link.receive())
        finally:
            supervisor.close()
            self._link.close()
            self._link = link


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # the cell waited for it
        return True
