"""The worker processes of one sandbox: the runner, its snapshot, and the end of everything else.

The runner is always a child of the supervisor; a snapshot is the runner's child until the runner dies, and then, by
the rule for orphans, the supervisor's. Needs no /proc: process ids come from the kernel (SCM_CREDENTIALS) or are
scanned, which is safe because process 1 sees only the sandbox's own.
"""

from __future__ import annotations

import _ctypes  # the C half of ctypes: its Python half would double the time to start
import os
import resource
import select
import sys
import time
from _thread import allocate_lock, get_native_id, start_new_thread

from . import wire
from .lean import signal, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SNAPSHOT_S = 30.0  # for forking a worker of any size
LAST_WORD_S = 2.0  # for a snapshot to tell of itself whose runner has died, or has ended its next cell
RESERVE = 16 << 20  # bytes of memory that the agent has left in a worker whose cell used up its own
ENDING_S = 0.2  # from the closing of a dying process's descriptors to its end
PID_MAX = 4194304  # PID_MAX_LIMIT of Linux on 64 bits
WRAP_S = 0.2  # too short for a guest to use up all process ids, of which there are 32768 at least
OURS = 4  # processes that are not the guest's: supervisor, snapshot, the next snapshot, the probe
_SO_PASSCRED, _SCM_CREDENTIALS = 16, 2  # <asm/socket.h>, <linux/socket.h>
_CREDENTIALS = 12  # bytes: process, user and group id
_PR_SET_DUMPABLE = 4
_SA_NOCLDSTOP, _FLAGS = 1, 136  # <signal.h>; offset of the flags, the lowest byte first


class Generation:
    """One worker process, with the supervisor's ends of its socket and pipes."""

    def __init__(self) -> None:
        self.ctl, theirs = socket.socketpair()
        self.ctl.setsockopt(socket.SOL_SOCKET, _SO_PASSCRED, 1)
        self.out = self.err = -1
        self.theirs: tuple[int, int, int] = (theirs.detach(), *self.renew_outputs())
        self.pid = 0
        self.has_context = False
        self.buffer = bytearray()

    def renew_outputs(self) -> tuple[int, int]:
        """New pipes for what it writes; their other ends, for the worker. Whoever still has the old ones, writes to
        nobody."""
        self._close_outputs()
        (self.out, out), (self.err, err) = os.pipe(), os.pipe()
        for fd in (self.out, self.err):
            os.set_blocking(fd, False)
        return out, err

    def give(self) -> None:
        """Forget the worker's ends, which the worker now has."""
        for fd in self.theirs:
            os.close(fd)

    def close(self) -> None:
        self.ctl.close()
        self._close_outputs()

    def _close_outputs(self) -> None:
        for fd in (self.out, self.err):
            if fd >= 0:
                os.close(fd)
        self.out = self.err = -1


class Workers:
    """serve: runs in each new worker process, with its three descriptors; must not return."""

    def __init__(self, serve: Callable[[tuple[int, int, int]], None]) -> None:
        self._serve = serve
        self._swept, self._swept_at = os.getpid(), time.monotonic()
        self._replace = False
        self._left = False  # the last cell left something running
        self._unsaved = self._stale = False  # the runner's state, the snapshot's
        self._ended = 0  # the snapshot before this one, which its parent may not have collected yet
        self.death: int | None = None  # the runner's wait status, once it has ended
        self.making_until = 0.0
        self.making: Generation | None = None
        self.snapshot: Generation | None = None
        self.fresh = True  # no cell has changed the REPL yet, so a new worker is as good as a snapshot
        self.runner = self._new()

    @property
    def ready(self) -> bool:
        """Whether the runner may have its next cell.

        It need not be known yet that the snapshot is there, for the runner makes it before anything else. But what a
        cell left running ends first, if it left anything.
        """
        return not self.making or not self._left

    def go(self) -> None:
        """Let the runner run."""
        _signal(self.runner.pid, signal.SIGCONT)

    def cell_ended(self, *, is_last: bool) -> None:
        """End what the cell left running, then have a snapshot made; `making` is set until it is.

        is_last: most likely, for it gave an answer. Then a snapshot is made if there is another one all the same.
        """
        self.fresh = False
        if self.making:  # of the state before this cell, which was over sooner
            if select.select([self.making.ctl], [], [], LAST_WORD_S)[0]:
                self.snapshot_made(idle=False)
            self.give_up_making()
        # Threads cannot be ended from outside. A fork has none but its own, so it takes the runner's place.
        self._replace = self._sweep() or self._replace
        if is_last and not self._left:
            self._unsaved = True
        else:
            self._make_snapshot()

    def save(self) -> None:
        """Before a cell: have the snapshot made that was put off, if one was."""
        if self._unsaved:
            self._make_snapshot()

    def give_up_making(self) -> None:
        if self.making:
            self.making.close()
            self.making = None

    def snapshot_made(self, *, idle: bool) -> None:
        """The socket of `making` is readable: its process is there, or could not be made.

        idle: no cell runs, so all are to be stopped.
        """
        made, self.making = self.making, None
        if made is None:
            return
        made.pid = _sender(made.ctl)
        if made.pid:
            if self.snapshot:
                self._ended = self.snapshot.pid
                self._end(self.snapshot)
            self.snapshot = made
        else:  # the one before is better than none
            made.close()
        self._stale = not made.pid
        if idle and self._replace and not self._stale and self.snapshot:
            self._replace = False
            self._end(self.runner)
            self.runner, self.snapshot, self.death = self.snapshot, None, None
            self._sweep()
            self._make_snapshot()
        elif idle and self._left:
            self._sweep()
        elif idle:
            self._stop()

    def take_over(self) -> str:
        """The runner is dead: its snapshot goes on, or a new worker from nothing. What has become of the variables."""
        self.give_up_making()
        self.runner.close()
        kept, self.snapshot = self.snapshot, None
        if kept and _has_ended(kept.pid):  # the cell killed it, too
            kept.close()
            kept = None
        self.runner, self.death = kept or self._new(), None
        self._unsaved = self._replace = False
        self._sweep()
        if kept:
            self._make_snapshot()
        whole = not self._stale if kept else self.fresh
        self.fresh, self._stale = kept is None, False
        if whole:
            return "variables are as they were before it"
        return "variables of the last cells are gone" if kept else "the REPL was restarted, all variables are gone"

    def interrupt_runner(self) -> None:
        _signal(self.runner.pid, signal.SIGINT)

    def kill_runner(self) -> None:
        _signal(self.runner.pid, signal.SIGKILL)

    def runner_ends(self) -> bool:
        """Whether the runner, which closed its descriptors, did so by ending. Waits ENDING_S at most."""
        until = time.monotonic() + ENDING_S
        while time.monotonic() < until:
            if _has_ended(self.runner.pid):
                return True
            time.sleep(0.001)
        return False

    def reap(self) -> None:
        """Collect the dead; `death` is the runner's wait status when it is among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self.runner.pid:
                self.death = status
                self.making_until = min(self.making_until, time.monotonic() + LAST_WORD_S)

    def _new(self) -> Generation:
        new = Generation()
        new.pid = os.fork()
        if not new.pid:
            try:
                new.close()
                self._serve(new.theirs)
            finally:
                os._exit(1)
        new.give()
        return new

    def _make_snapshot(self) -> None:
        self._unsaved = False
        self.making = Generation()
        self.making.has_context = self.runner.has_context
        self.making_until = time.monotonic() + SNAPSHOT_S
        # One that is to be replaced is killed with its threads; until then what they write has to be read, see `_poll`.
        outputs = () if self._replace else self.runner.renew_outputs()
        try:
            fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (*outputs, *self.making.theirs))
            self.runner.ctl.sendmsg([wire.encode({"type": "snapshot"})], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except OSError:  # a runner that closed its socket or does not read it; `making` will see end of file
            self.kill_runner()
        self.making.give()
        for fd in outputs:
            os.close(fd)
        self.go()

    @staticmethod
    def _end(generation: Generation) -> None:
        _signal(generation.pid, signal.SIGKILL)
        generation.close()

    @staticmethod
    def _stop() -> None:
        """Stop every process but this one, at one instant."""
        _signal(-1, signal.SIGSTOP)

    def _sweep(self) -> bool:
        """Stop every process but this one, then kill all that are not ours.

        Whether the runner has threads that it did not have at the last sweep, by the kernel's word.
        """
        threads = left = False
        self._stop()
        keep = {generation.pid for generation in (self.runner, self.snapshot) if generation}
        probe = _newest_id()
        now = time.monotonic()
        first = self._swept + 1 if now - self._swept_at < WRAP_S else 2
        for pid in range(2, PID_MAX) if probe < self._swept else range(first, probe):
            if pid not in keep and _exists(pid):
                if _is_thread(pid, self.runner.pid):
                    threads = True
                else:
                    _signal(pid, signal.SIGKILL)
                    left = left or pid != self._ended
        self._swept, self._swept_at = probe, now
        self._left = threads or left
        return threads


def harden() -> None:
    """Put this process out of reach of others of the same user id (ptrace, /proc/PID/mem)."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def restrict(limits: dict[str, Any]) -> None:
    """Resource limits of a worker and all it starts; hard, so they cannot be raised again."""
    for what, most in (
        (resource.RLIMIT_DATA, limits["memory_bytes"] + RESERVE),  # `Repl` takes the reserve away while a cell runs
        (resource.RLIMIT_NPROC, limits["pids"] + OURS),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        try:
            _limit(what, int(most))
        except ValueError:  # gVisor refuses this one, and has no message queues
            if what != resource.RLIMIT_MSGQUEUE:
                raise


def restrict_addresses(most: int) -> None:
    """Bound the address space of a worker before its first cell: only then is it known which context it will map."""
    _limit(resource.RLIMIT_AS, most)


def not_when_stopped(number: int) -> None:
    """No SIGCHLD for a child that is stopped or goes on, as happens twice a cell: SA_NOCLDSTOP, which Python lacks."""
    # struct sigaction of the C library on 64 bits: handler, 128 bytes of mask, flags, restorer.
    char = type("char", (_ctypes._SimpleCData,), {"_type_": "c"})  # pyright: ignore
    action: Any = type("sigaction", (_ctypes.Array,), {"_type_": char, "_length_": 152})()  # pyright: ignore
    _call("sigaction", number, None, _ctypes.byref(action))  # pyright: ignore
    action[_FLAGS] = bytes([action[_FLAGS][0] | _SA_NOCLDSTOP])
    _call("sigaction", number, _ctypes.byref(action), None)  # pyright: ignore


def _limit(what: int, most: int) -> None:
    """Hard, so that it cannot be raised again."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _sender(ctl: socket.socket) -> int:
    """Process id, by the kernel's word, of who wrote to the other end; 0 at end of file."""
    try:
        data, ancillary, _flags, _address = ctl.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS))
    except OSError:
        return 0
    for level, kind, value in ancillary:
        if data and level == socket.SOL_SOCKET and kind == _SCM_CREDENTIALS:
            return memoryview(value[:_CREDENTIALS]).cast("i")[0]
    return 0


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _newest_id() -> int:
    """The newest process id: threads take theirs from the same numbers, and cost far less than a process."""
    ids: list[int] = []
    told = allocate_lock()
    told.acquire()

    def tell() -> None:
        ids.append(get_native_id())
        told.release()

    start_new_thread(tell, ())
    told.acquire()
    return ids[0]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _has_ended(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # collected already
        return True


def _is_thread(pid: int, process: int) -> bool:
    # kill(2) on a thread's id hits its whole process: the runner's threads must not be taken for strays.
    return _call("tgkill", process, pid, 0) == 0


def _call(name: str, *arguments: Any) -> int:
    function = _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # pyright: ignore
    return int(_ctypes.call_function(function, arguments))  # pyright: ignore
