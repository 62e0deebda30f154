"""A way to a service that can be cut, as a network can."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit


class Relay:
    """Passes on what comes to `url`, byte by byte, to the service at `target`. came, cuts: connections."""

    def __init__(self, target: str = "") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lines: set[socket.socket] = set()
        self.came = self.cuts = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._take)]
        self.to(target)

    def to(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port) if parts.port else None

    def cut(self) -> None:
        """What is open now; who comes after is passed on."""
        for line in list(self._lines):
            self._lines.discard(line)
            self.cuts += 1
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()

    def _take(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            self.came += 1
            try:
                assert self._target
                there = socket.create_connection(self._target)
            except OSError:
                here.close()
                continue
            self._lines |= {here, there}
            for pair in ((here, there), (there, here)):
                self._threads.append(threading.Thread(target=self._pass, args=pair))
                self._threads[-1].start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for line in (source, target):
            self._lines.discard(line)
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            source.close()
