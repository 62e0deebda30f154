"""An ASGI application behind a real uvicorn, in a thread of this process, and what speaks to it byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from orchestrator.server.protocol import Protocol
from tests.command import until


@dataclass
class Address:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            yield connection

    def answer_to(self, request: bytes) -> bytes:
        """All that comes until the service closes the connection."""
        with self.connected() as connection:
            connection.sendall(request)
            return rest(connection)


def rest(connection: socket.socket) -> bytes:
    """What comes until the connection is closed, or reset."""
    got = b""
    try:
        while piece := connection.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    return got


@contextmanager
def run(app: Any, http: type[Protocol] = Protocol, *, grace_s: int = 5) -> Iterator[Address]:
    """It is asked to end with the block, and has to. grace_s: that answers under way have then."""
    config = uvicorn.Config(
        app,
        port=0,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        h11_max_incomplete_event_size=32 << 10,
        timeout_graceful_shutdown=grace_s,
    )
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            until(lambda: server.started)
            yield Address(bound.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
