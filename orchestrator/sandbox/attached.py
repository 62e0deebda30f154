"""The channel's bytes over the engine's attach connection: how one is made, and what comes through it taken apart."""

from __future__ import annotations

import contextlib
import socket

from anyio.abc import ByteStream

from orchestrator.sandbox.hostsocket import HostSocket

API_TIMEOUT_S = 30  # for the engine to answer
WORDS = 4096  # bytes of standard error that are kept
_STDERR = 2  # stream number in the engine's frames


class Demultiplexer:
    """Takes the engine's frames apart: 8 bytes of header (stream, 0, 0, 0, size in big endian), then the data."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._stream = 0
        self.words = b""  # the end of standard error

    def feed(self, data: bytes) -> bytes:
        """What of `data` is standard output."""
        out: list[bytes] = []
        while data:
            if not self._left:
                need = 8 - len(self._head)
                self._head, data = self._head + data[:need], data[need:]
                if len(self._head) == 8:
                    self._stream, self._left = self._head[0], int.from_bytes(self._head[4:], "big")
                    self._head = b""
                continue
            piece, data = data[: self._left], data[self._left :]
            self._left -= len(piece)
            if self._stream == _STDERR:
                self.words = (self.words + piece)[-WORDS:]
            else:
                out.append(piece)
        return b"".join(out)


class AttachedStream(ByteStream):
    """The channel's bytes over an attach connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._raw = sock
        self._socket = HostSocket(sock)
        self._frames = Demultiplexer()

    @property
    def words(self) -> bytes:
        return self._frames.words

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while True:
            if data := self._frames.feed(await self._socket.receive(max_bytes)):
                return data

    async def send(self, item: bytes) -> None:
        await self._socket.send(item)

    async def send_eof(self) -> None:
        await self._socket.send_eof()

    async def aclose(self) -> None:
        await self._socket.aclose()

    def cut(self) -> None:
        """End the connection, from any thread. Idempotent."""
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)


def attach(engine: str, container: str) -> socket.socket:
    """A connection to a container's standard streams. Not the SDK's: that hands out parts of a response, never closed.

    https://docs.docker.com/reference/api/engine/ ContainerAttach. Raises OSError.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(API_TIMEOUT_S)
        connection.connect(engine)
        query = "stream=1&stdin=1&stdout=1&stderr=1"
        connection.sendall(
            f"POST /containers/{container}/attach?{query} HTTP/1.1\r\n"
            "Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):  # a byte at a time: what follows the head is the stream's
            piece = connection.recv(1)
            if not piece or len(head) > WORDS:
                raise ConnectionError(f"the engine did not attach: {head[:100]!r}")
            head += piece
        if not head.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(f"the engine did not attach: {head[:100]!r}")
    except BaseException:
        connection.close()
        raise
    return connection
