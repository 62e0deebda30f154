"""The standard streams of the command line: there, whatever the caller closed, and of one mind about what breaks.

Standard error is for progress: its reader may go away or fall asleep, its disk be full, its terminal be closed, and
what is said there is dropped. Standard output has the answer: what cannot be written there is an error, once.
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from collections import deque
from contextlib import suppress
from typing import Any, Self, TextIO

import anyio
import click

from orchestrator.console import safe_for

PATIENCE_S = 1.0  # for a reader of progress that does not read: the query's clock goes on meanwhile


class _Progress(io.FileIO):
    _patience = PATIENCE_S

    def write(self, b: Any) -> int:
        data = memoryview(b)
        try:
            if select.select([], [self], [], self._patience)[1]:
                self._patience = PATIENCE_S
                # What is no longer than this goes into a pipe that can be written without waiting.
                return super().write(data[: select.PIPE_BUF]) or 0
            self._patience = 0.0
        except OSError:
            pass
        return data.nbytes


class _Answer(io.FileIO):
    """lost: something could not be written. The rest is dropped then, by the interpreter's end as well."""

    lost = False

    def write(self, b: Any) -> int:
        if self.lost:
            return memoryview(b).nbytes
        try:
            written: Any = super().write(b)
            while written is None:  # who shares the pipe has set it to non-blocking
                select.select([], [self], [])
                written = super().write(b)
        except OSError:
            self.lost = True
            raise
        return written


def open_standard_streams() -> None:
    """What a caller closed would be taken by the next file or socket that is opened, and written to like a stream."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  for as long as the process lives
    sys.stdout = _text(sys.stdout, _Answer(1, "w", closefd=False), line_buffering=sys.stdout.isatty())
    sys.stderr = _text(sys.stderr, _Progress(2, "w", closefd=False), line_buffering=True)


def _text(before: TextIO, raw: io.FileIO, *, line_buffering: bool) -> TextIO:
    # An answer may have characters that this encoding has not.
    return io.TextIOWrapper(
        io.BufferedWriter(raw), before.encoding, errors="backslashreplace", line_buffering=line_buffering
    )


class Printer:
    """Prints what a cell prints, as it comes. A context manager around the query; at its end all is printed.

    A reader that does not read holds up nobody but itself: the event loop goes on, and with it the query's clock. What
    waits meanwhile is bounded by what the policy lets a cell print. When standard output breaks, what is in the block
    is cancelled, and `broken` is the error. whole: at the end, whether all of it was printed.
    """

    def __init__(self) -> None:
        self.broken: OSError | None = None
        self.whole = False
        self._waiting: deque[tuple[str, str]] = deque()
        self._more = anyio.Event()
        self._ending = False
        self._group = anyio.create_task_group()

    def put(self, stream: str, text: str) -> None:
        """stream: out or err."""
        self._waiting.append((stream, text))
        self._more.set()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self._print)
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        self._ending = True
        self._more.set()
        return await self._group.__aexit__(*error)

    async def _print(self) -> None:
        while self._waiting or not self._ending:
            if not self._waiting:
                await self._more.wait()
                self._more = anyio.Event()
                continue
            stream, text = self._waiting.popleft()
            try:
                if stream == "out":
                    await _write_out(safe_for(sys.stdout, text))
                else:
                    sys.stderr.write(safe_for(sys.stderr, text))
                    sys.stderr.flush()
            except OSError as error:
                self.broken = error
                self._group.cancel_scope.cancel()
                return
        self.whole = True


async def _write_out(text: str) -> None:
    data = text.encode(sys.stdout.encoding, "backslashreplace")
    handle = sys.stdout.fileno()
    mode = os.fstat(handle).st_mode
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(handle)  # others cannot be waited for
    while data:
        if waits:
            await anyio.wait_writable(handle)
        with suppress(BlockingIOError):
            data = data[os.write(handle, data[: select.PIPE_BUF if waits else len(data)]) :]


def answer_lost() -> bool:
    """Whether something could not be written to standard output."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Answer) and raw.lost


def say(stream: TextIO, text: str) -> None:
    """A line of text from a guest or a model: as it is into files and pipes, harmless on a terminal."""
    click.echo(safe_for(stream, text), file=stream, color=True)  # color: not to be stripped of escape sequences
