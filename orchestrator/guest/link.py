"""The worker's end of its socket to the supervisor, safe against an interrupt at any instruction.

A cell's time limit arrives as SIGINT, hence as KeyboardInterrupt between any two bytecodes of the main thread. Half a
frame sent, or received bytes dropped, would corrupt the stream; so all handling of bytes happens under a `Shield`,
and only the waiting is open to interruption.
"""

from __future__ import annotations

import os
import select
from _thread import allocate_lock, get_ident

from . import wire
from .lean import loads, signal, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Shield:
    """While held by the main thread, SIGINT is remembered instead of raised; while disarmed, ignored. Re-entrant."""

    def __init__(self) -> None:
        self._depth = 0
        self._armed = False
        self._pending = False
        self._main = get_ident()

    def take_over(self) -> None:
        """Handle SIGINT (again: a cell may have replaced the handler). Main thread only, disarmed."""
        self._main = get_ident()
        signal.signal(signal.SIGINT, self._on_interrupt)

    def arm(self) -> None:
        """From here on SIGINT interrupts. Main thread only."""
        self._depth, self._pending, self._armed = 0, False, True

    def disarm(self) -> None:
        """Ignore SIGINT: between cells there is nothing to interrupt."""
        self._armed = self._pending = False

    def _on_interrupt(self, _signal: int, _frame: object) -> None:
        if not self._armed:
            return
        if self._depth:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise the interrupt that came while shielded, if any."""
        if self._pending and get_ident() == self._main:
            self._pending = False
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        if get_ident() == self._main:
            self._depth += 1

    def __exit__(self, kind: object, *_: object) -> None:
        if get_ident() == self._main:
            self._depth -= 1
            if not self._depth and kind is None:
                self.check()

    def wait_readable(self, fd: int) -> None:
        """Block until `fd` is readable. The one place where a shielded main thread can be interrupted."""
        mine = get_ident() == self._main
        depth = self._depth
        if mine:
            self.check()
            self._depth = 0
        try:
            select.select([fd], [], [])
        finally:
            if mine:
                self._depth = depth


class CellOver(Exception):
    """A thread that a cell left behind waits for a reply: from now on frames are for the worker only."""


class Link:
    """Frames over one stream socket; `run` and `snapshot` may carry file descriptors.

    While a cell runs, its threads take turns at reading; outside of cells only the worker reads.
    """

    def __init__(self, sock: socket.socket, shield: Shield) -> None:
        self._sock = sock
        self._shield = shield
        self._send_lock = allocate_lock()
        self._receive_lock = allocate_lock()
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._word = b""  # the supervisor's for the cell that runs, or ran last
        self._fds: list[int] = []
        self.in_cell = False

    def set_in_cell(self, in_cell: bool) -> None:
        with self._receive_lock:
            self.in_cell = in_cell

    def send(self, frame: dict[str, Any]) -> None:
        data = self._word + b" " + wire.encode(frame)
        with self._shield, self._send_lock:
            self._sock.sendall(data)

    def receive(self, for_cell: bool = False) -> dict[str, Any]:
        """The next frame; blocks. Call under the shield, or between cells.

        Raises EOFError when the supervisor has gone, CellOver when it is asked for a cell that is over.
        """
        while True:
            with self._receive_lock:
                if for_cell and not self.in_cell:
                    raise CellOver
                if not self._lines:
                    self._take(socket.MSG_DONTWAIT if for_cell else 0)
                if self._lines:
                    line = self._lines.pop(0)
                    if not line.startswith(b"{"):
                        self._word, _space, line = line.partition(b" ")
                    frame: dict[str, Any] = loads(line.decode())
                    return frame
            if for_cell:
                self._shield.wait_readable(self._sock.fileno())

    def wait(self) -> None:
        """Block until something has come, or the supervisor has gone."""
        self._shield.wait_readable(self._sock.fileno())

    def has_come(self) -> bool:
        """Whether a frame is there already."""
        if not self._lines:
            self._take(socket.MSG_DONTWAIT)
        return bool(self._lines)

    def _take(self, flags: int) -> None:
        """Whatever has come. With MSG_DONTWAIT without waiting for it."""
        try:
            # Not socket.recv_fds, which forgets its flags.
            data, ancillary, came, _addr = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(32), flags)
        except BlockingIOError:
            return
        if came & socket.MSG_CTRUNC:
            raise OSError("the cell has left too few descriptors to go on with")
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                for fd in memoryview(value).cast("i"):
                    os.set_inheritable(fd, False)
                    self._fds.append(fd)
        if not data:
            raise EOFError("the supervisor has gone")
        self._buffer += data
        if b"\n" in data:
            *lines, rest = bytes(self._buffer).split(b"\n")
            self._lines += lines
            self._buffer = bytearray(rest)

    def take_fds(self) -> list[int]:
        """The descriptors that came with the frames so far."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        self._sock.close()
