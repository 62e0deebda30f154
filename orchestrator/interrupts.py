"""How a command is interrupted: a signal cancels what runs, and wakes what waits for standard input."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Self

import anyio


class StandardInput:
    """Standard input, for a thread to read. Whoever waits for it is woken at the end: a thread cannot be cancelled."""

    def __enter__(self) -> Self:
        self._woken, self._wake = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._wake)  # the other end stays for the thread that may be waiting

    def read(self, size: int) -> bytes:
        stdin = sys.stdin.fileno()
        if self._woken in select.select([stdin, self._woken], [], [])[0]:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return os.read(stdin, size)


@contextmanager
def cancelled_by_signals(scope: anyio.CancelScope) -> Generator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) cancels the scope.

    Further ones are ignored: what is left is to end in good order. So is a SIGHUP that we were started to ignore, as
    nohup does.
    """
    loop = asyncio.get_running_loop()

    def cancel(_number: int, _frame: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        loop.call_soon_threadsafe(scope.cancel)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, cancel)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is cancel:
                signal.signal(number, handler)
