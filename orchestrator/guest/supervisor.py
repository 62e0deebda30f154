"""Process 1 of the sandbox: owns the channel, runs no user code, and keeps the worker honest.

    host <--channel--> supervisor <--socket, pipes--> runner       holds the REPL, runs the cells
                                                  └-> snapshot     the runner's fork after the last cell, stopped

If a cell kills its runner, the snapshot takes over with the state from before that cell. After a cell, whatever it left
running is killed and a new snapshot made, while the LM thinks; between cells all are stopped, so that none of the
guest's code runs then. Process 1 cannot be signalled from inside its process id namespace, and when it ends the
kernel kills the rest.
"""

from __future__ import annotations

import os
import select
import sys
import time

from . import wire
from .cell import READ, Cell
from .lean import signal, socket
from .processes import Workers, harden, not_when_stopped, restrict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

GRACE_S = 2.0  # from a cell's interrupt to its kill


class Supervisor:
    """One sandbox's life. The limits come with the host's hello: memory_bytes, address_bytes, pids, files, file_bytes,
    output_bytes, answer_chars, calls_in_flight, batch."""

    def __init__(self, channel_in: int, channel_out: int, context_folder: str) -> None:
        self._in = channel_in
        self._out = channel_out
        self._folder = context_folder
        self._inbox = bytearray()
        self._frames: list[tuple[dict[str, Any], bytes]] = []  # with the line that each was
        self._cell: Cell | None = None
        self._attached = False
        self._note = ""
        self._fault = ""
        self._past, self._word = b"", _new_word()
        self._child_ended = False

    def serve(self) -> None:
        """Until the host says bye or closes the channel."""
        while not self._frames:
            self._read_channel()
        hello, _line = self._frames.pop(0)
        if hello["type"] != "hello" or hello["version"] != wire.VERSION:
            raise RuntimeError("the host speaks another version of the channel")
        self._limits = hello["limits"]
        harden()
        self._wake = self._wake_on_child()
        self._workers = Workers(self._be_worker)
        self._send({"type": "ready", "version": wire.VERSION, "python": "%d.%d.%d" % sys.version_info[:3]})
        while True:
            if self._child_ended:
                self._child_ended = False
                self._workers.reap()
            if self._workers.death is not None and not self._workers.making:
                self._runner_died(self._workers.death)
            elif self._frames and self._workers.ready:
                frame, line = self._frames.pop(0)
                if frame["type"] == "bye":
                    return
                self._run(frame, line)
            else:
                self._poll()
                self._watch_time()

    def _wake_on_child(self) -> tuple[int, int]:
        """A pipe that becomes readable when a child ends, so that waiting for input ends too."""
        ends = os.pipe()
        for fd in ends:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, self._on_child)
        not_when_stopped(signal.SIGCHLD)
        return ends

    def _on_child(self, _number: int, _frame: object) -> None:
        self._child_ended = True

    def _be_worker(self, fds: tuple[int, int, int]) -> None:
        for fd in (self._in, self._out, *self._wake):
            os.close(fd)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        restrict(self._limits)
        from .worker import Worker

        Worker(self._limits, self._folder).serve(socket.socket(fileno=fds[0]), fds[1], fds[2])

    def _poll(self) -> None:
        """Wait for something, and deal with it."""
        runner, making = self._workers.runner, self._workers.making
        if not self._cell and not making:
            self._read_channel()  # nobody else can have anything to say: all are stopped
            return
        ready = self._wait()
        if self._wake[0] in ready:
            _drain(self._wake[0])
        if self._in in ready:
            self._read_channel()
        if making and making.ctl.fileno() in ready:
            self._workers.snapshot_made(idle=not self._cell)
        if self._cell:
            # What a cell wrote before its end is in its pipes when its end is seen, for poll looks at the socket first.
            written = [(name, fd) for name, fd in (("out", runner.out), ("err", runner.err)) if fd in ready]
            for name, fd in written:
                if not self._cell.take(name, fd):
                    self._lost_runner("closed its output")
            if runner.ctl.fileno() in ready:
                self._read_worker(written)
        else:  # a thread that the cell left would wait for a reader, and hold the lock of the REPL's streams
            for fd in (self._workers.runner.out, self._workers.runner.err):
                _drain(fd)

    def _wait(self) -> set[int]:
        """The descriptors that can be read, of all that matter now."""
        runner, making = self._workers.runner, self._workers.making
        watched = [self._in, self._wake[0]]
        if making:
            watched.append(making.ctl.fileno())
        if self._cell:
            watched.append(runner.ctl.fileno())
        poller = select.poll()
        for fd in (*watched, runner.out, runner.err):
            poller.register(fd, select.POLLIN)
        return {fd for fd, _event in poller.poll(self._wait_ms())}

    # Time

    def _wait_ms(self) -> float | None:
        until = [self._cell.due] if self._cell else []
        if self._workers.making:
            until.append(self._workers.making_until)
        # An hour at most: poll takes no more than 24 days, and looking again costs nothing.
        return min(max(0.0, min(until) - time.monotonic()), 3600.0) * 1000 + 1 if until else None

    def _watch_time(self) -> None:
        now = time.monotonic()
        if self._workers.making and now >= self._workers.making_until:
            self._kill_runner("did not let itself be saved")
            if self._workers.death is not None:
                self._workers.give_up_making()
        cell = self._cell
        if cell is None:
            return
        cell.flush_if_due(now)
        if now >= cell.deadline:
            if cell.why:
                self._kill_runner("was interrupted by %s and went on" % cell.why)
            self._interrupt("its time limit")

    def _interrupt(self, why: str) -> None:
        cell = self._cell
        if cell and not cell.why:
            cell.why = why
            cell.deadline = time.monotonic() + GRACE_S
            self._workers.interrupt_runner()

    # The channel

    def _read_channel(self) -> None:
        data = os.read(self._in, READ)
        if not data:
            os._exit(0)  # the host has gone: nobody is left to work for
        for line in _lines(self._inbox, data):
            frame = wire.decode(line, wire.TO_GUEST)
            if frame["type"] == "reply":
                if self._cell:
                    self._cell.has_reply(frame["id"])
                    self._to_worker(line + b"\n")
            elif frame["type"] == "interrupt":
                self._interrupt("the host's word")
            else:
                self._frames.append((frame, line + b"\n"))

    def _send(self, frame: dict[str, Any]) -> None:
        view = memoryview(wire.encode(frame))
        while view:
            try:
                view = view[os.write(self._out, view) :]
            except BlockingIOError:
                select.select([], [self._out], [])
            except BrokenPipeError:
                os._exit(0)

    def _run(self, frame: dict[str, Any], line: bytes) -> None:
        """line: that the frame came as, which the worker gets if it says what it has to.

        With it comes a word that what is said in this cell begins with: what begins with another was said before, while
        the snapshot was made, and is not taken for this cell's.
        """
        self._workers.save()
        runner = self._workers.runner
        self._attached = self._attached or frame["context"]
        if frame["context"] != (self._attached and not runner.has_context):
            frame["context"] = not frame["context"]
            line = wire.encode(frame)
        runner.has_context = self._attached
        self._to_worker(self._word + b" " + line)
        self._workers.go()
        self._cell = Cell(frame["id"], frame["timeout_s"], self._limits, self._send)
        if self._note:
            self._cell.write("err", self._note)
            self._note = ""

    # The worker

    def _to_worker(self, line: bytes) -> None:
        """Give the runner a line; one that does not read for a second is killed, for it must not stall the channel."""
        runner, view, until = self._workers.runner, memoryview(line), time.monotonic() + 1.0
        while view:
            try:
                view = view[runner.ctl.send(view, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if not select.select([], [runner.ctl], [], max(0.0, until - time.monotonic()))[1]:
                    self._kill_runner("did not read a reply")
                    return
            except OSError:  # it is dying, or closed its socket; `reap` or the cell's deadline deals with it
                return

    def _read_worker(self, written: list[tuple[str, int]]) -> None:
        """written: the outputs that may hold more than has been read."""
        runner = self._workers.runner
        try:
            data = runner.ctl.recv(READ, socket.MSG_DONTWAIT)
            lines = _lines(runner.buffer, data) if data else None
        except BlockingIOError:
            return
        except OSError:
            lines = None
        if lines is None or len(runner.buffer) > wire.MAX_LINE + len(self._word) + 1:
            self._lost_runner("closed, or flooded, the agent's socket")
            return
        for line in lines:
            try:
                frame = self._said(line)
            except wire.Malformed:
                self._kill_runner("wrote to the agent's socket")
                return
            if frame is None:
                continue
            if frame["type"] == "call" and self._cell:
                self._call(self._cell, frame)
            elif frame["type"] == "end" and self._cell:
                self._cell_ended(self._cell, frame, written)

    def _said(self, line: bytes) -> dict[str, Any] | None:
        """The frame in a line of the runner's, None if it was said before this cell. Raises wire.Malformed."""
        word, _space, said = line.partition(b" ")
        if word == self._word:
            return wire.decode(said, wire.TO_SUPERVISOR)
        if word == self._past:
            return None
        raise wire.Malformed("without its cell's word")

    def _call(self, cell: Cell, frame: dict[str, Any]) -> None:
        """Let a call out, if it keeps the rules: for one that does not, the host would end the sandbox."""
        if cell.may_call(frame["id"]):
            self._send(frame)  # as it was understood here, not as it was written
        else:
            self._kill_runner("made sub-calls against the agent's rules")

    def _kill_runner(self, fault: str) -> None:
        self._fault = self._fault or "%s and was killed" % fault
        self._workers.kill_runner()

    def _lost_runner(self, fault: str) -> None:
        # The descriptors of a process that dies close a moment before it can be reaped: then `reap` knows the cause.
        if not self._workers.runner_ends():
            self._kill_runner(fault)

    def _cell_ended(self, cell: Cell, end: dict[str, Any], written: list[tuple[str, int]]) -> None:
        status = "timeout" if cell.why else end["status"] if end["status"] == "ok" else "error"
        detail = "interrupted by %s" % cell.why if cell.why else end["detail"][: wire.MAX_DETAIL]
        cell.take_rest(written)
        self._done(cell, status, detail, end["answer"], end["names"][: wire.MAX_NAMES])
        self._workers.cell_ended(is_last=end["answer"] is not None)

    def _runner_died(self, status: int) -> None:
        cell, why = self._cell, self._fault or _cause_of_death(status)
        self._fault = ""
        if cell:
            cell.take_rest([("out", self._workers.runner.out), ("err", self._workers.runner.err)])
        kept = self._workers.take_over()
        if cell is None:
            self._note = "[between cells, the REPL %s; variables of the last cells are gone]\n" % why
            return
        self._done(cell, "timeout" if cell.why else "killed", "the cell %s; %s" % (why, kept), None, [])

    def _done(self, cell: Cell, status: str, detail: str, answer: str | None, names: list[str]) -> None:
        cell.done(status, detail, answer, names)
        self._cell = None
        self._past, self._word = self._word, _new_word()


def _lines(buffer: bytearray, data: bytes) -> list[bytes]:
    """Add `data` to `buffer`, take the whole lines out of it."""
    buffer += data
    if b"\n" not in data:
        return []
    *lines, rest = bytes(buffer).split(b"\n")
    buffer[:] = rest
    return lines


def _drain(fd: int) -> None:
    try:
        while os.read(fd, READ):
            pass
    except BlockingIOError:
        return


def _new_word() -> bytes:
    return os.urandom(8).hex().encode()


def _cause_of_death(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return "ended its process with exit code %d" % os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL:
        return "was killed, most likely for using too much memory"
    from signal import Signals  # late: its import is not cheap

    return "crashed with %s" % Signals(number).name


def main() -> None:
    # The launcher may have left descriptors open; nothing but the channel is wanted, here or in a worker.
    os.closerange(3, 4096)
    # The kernel keeps from process 1 every signal it has no handler for; Python has one for this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getpid() != 1:
        sys.exit("the guest agent only runs as process 1 of a process id namespace of its own")
    channel_in, channel_out = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    Supervisor(channel_in, channel_out, "/context").serve()
