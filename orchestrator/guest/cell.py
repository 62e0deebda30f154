"""The cell that is running, as the supervisor sees it: its time, its sub-calls, and what the host is told of it.

What it writes is read up to its cap, gathered for a moment, and sent in frames of bounded size.
"""

from __future__ import annotations

import codecs
import os
import time

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FLUSH_S = 0.02  # output waits this long for more: a flood of short writes must not be a flood of frames
READ = 1 << 16  # more, and each read would map and unmap its memory


class Cell:
    """`why` says why the supervisor is ending it, if it is. send: gives the host a frame."""

    def __init__(
        self, number: int, timeout_s: float, limits: dict[str, Any], send: Callable[[dict[str, Any]], None]
    ) -> None:
        self.deadline = time.monotonic() + timeout_s
        self.why = ""
        self._number = number
        self._send = send
        self._newest_call = 0
        self._calls: set[int] = set()
        self._calls_in_flight = int(limits["calls_in_flight"])
        self._room = int(limits["output_bytes"])
        self._dropped = 0
        self._flush_at = 0.0
        self._pending: list[tuple[str, str]] = []
        self._pending_chars = 0
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"out": decoder("replace"), "err": decoder("replace")}

    def may_call(self, number: int) -> bool:
        """Whether a sub-call keeps the rules; then it is in flight, until it has its reply."""
        if number <= self._newest_call or len(self._calls) >= self._calls_in_flight:
            return False
        self._newest_call = number
        self._calls.add(number)
        return True

    def has_reply(self, number: int) -> None:
        self._calls.discard(number)

    @property
    def due(self) -> float:
        """When it has to be looked at again: it is out of time, or its output has waited long enough."""
        return min(self.deadline, self._flush_at) if self._pending else self.deadline

    def flush_if_due(self, now: float) -> None:
        if self._pending and now >= self._flush_at:
            self._flush()

    def take(self, name: str, fd: int) -> bool:
        """Read what is there into its output, up to the cap. False at end of file or when there is nothing."""
        try:
            data = os.read(fd, READ)
        except BlockingIOError:
            return False
        if data:
            kept = data[: max(0, self._room)]
            self._room -= len(kept)
            self._dropped += len(data) - len(kept)
            self.write(name, self._decoders[name].decode(kept))
        return bool(data)

    def take_rest(self, outputs: list[tuple[str, int]]) -> None:
        # What it wrote fits in its pipes by now. Bounded, for something it left running may go on writing.
        for name, fd in outputs:
            for _ in range(4):
                if not self.take(name, fd):
                    break

    def write(self, name: str, text: str) -> None:
        """Add to its output. The cap is on what `take` reads."""
        if not text:
            return
        if not self._pending:
            self._flush_at = time.monotonic() + FLUSH_S
        if self._pending and self._pending[-1][0] == name:
            self._pending[-1] = (name, self._pending[-1][1] + text)
        else:
            self._pending.append((name, text))
        self._pending_chars += len(text)
        if self._pending_chars >= wire.OUTPUT_CHUNK:
            self._flush()

    def done(self, status: str, detail: str, answer: str | None, names: list[str]) -> None:
        """Tell the host of its end, after what is left of its output, characters that were begun included."""
        for name, decoder in self._decoders.items():
            self.write(name, decoder.decode(b"", True))
        self._flush()
        done: dict[str, Any] = {"type": "done", "cell": self._number, "status": status, "detail": detail}
        done.update(answer=answer, names=names, dropped=self._dropped)
        self._send(done)

    def _flush(self) -> None:
        pending, self._pending, self._pending_chars = self._pending, [], 0
        for name, text in pending:
            for start in range(0, len(text), wire.OUTPUT_CHUNK):
                part = text[start : start + wire.OUTPUT_CHUNK]
                self._send({"type": "output", "cell": self._number, "stream": name, "text": part})
