"""The host's end of the channel. Every byte from the guest is hostile until `wire.decode` has passed it."""

from __future__ import annotations

import time
from collections import deque

import anyio
from anyio.abc import ByteStream

from orchestrator.core.errors import ProtocolViolation, SandboxDied
from orchestrator.guest import wire

# Beyond either the host reads no further for the rest of the second, and the guest waits: it may not have more than a
# part of the host's time, whatever it sends.
FRAMES_PER_SECOND = 2_000
BYTES_PER_SECOND = 32 << 20


class Channel:
    """Frames over a byte stream. One task receives; any task may send."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._lines: deque[bytes] = deque()
        self._sending = anyio.Lock(fast_acquire=True)
        self._second = 0.0
        self._frames = 0
        self._bytes = 0

    async def send(self, frame: wire.Frame) -> None:
        """Raises SandboxDied when the guest has gone."""
        data = wire.encode(frame)
        try:
            async with self._sending:
                await self._stream.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise SandboxDied("the sandbox ended unexpectedly") from None

    async def receive(self) -> wire.Frame:
        """The next frame. Raises ProtocolViolation on what is none, SandboxDied at the end of the stream."""
        while not self._lines:
            try:
                data = await self._stream.receive(1 << 16)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                raise SandboxDied("the sandbox ended unexpectedly") from None
            self._buffer += data
            if b"\n" in data:
                *lines, rest = bytes(self._buffer).split(b"\n")
                self._lines.extend(lines)
                self._buffer = bytearray(rest)
            if len(self._buffer) > wire.MAX_LINE:
                raise ProtocolViolation(f"the guest sent a line of more than {wire.MAX_LINE:,} bytes")
        line = self._lines.popleft()
        await self._throttle(len(line))
        try:
            return wire.decode(line, wire.TO_HOST)
        except wire.Malformed as error:
            raise ProtocolViolation(f"the guest sent a malformed frame: {error}") from None

    async def _throttle(self, size: int) -> None:
        now = time.monotonic()
        if now - self._second >= 1.0:
            self._second, self._frames, self._bytes = now, 0, 0
        self._frames += 1
        self._bytes += size
        if self._frames > FRAMES_PER_SECOND or self._bytes > BYTES_PER_SECOND:
            await anyio.sleep(1.0 - (now - self._second))

    async def aclose(self) -> None:
        await self._stream.aclose()
