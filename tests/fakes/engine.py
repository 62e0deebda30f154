"""A Docker engine that answers who it is, and nothing else: for engines that this machine has not."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any


@contextmanager
def fake_engine(socket: Path, *, runc: str = "v1.3.3-0-g1", runtimes: tuple[str, ...] = ("runc",)) -> Iterator[str]:
    """Listens on `socket` while it lasts; gives what DOCKER_HOST has to be."""
    answers: dict[str, Any] = {
        "/version": {
            "Version": "29.0.0",
            "ApiVersion": "1.44",
            "MinAPIVersion": "1.24",
            "Components": [{"Name": "runc", "Version": runc}],
        },
        "/info": {
            "RuncCommit": {"ID": runc},
            "Runtimes": {name: {"path": f"/nowhere/{name}"} for name in runtimes},
            "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin"],
        },
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = next((body for path, body in answers.items() if self.path.endswith(path)), None)
            data = json.dumps(found or {"message": "there is nothing of that kind"}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def address_string(self) -> str:
            return "a socket"

        def log_message(self, *_: object) -> None:
            return

    with socketserver.ThreadingUnixStreamServer(str(socket), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"unix://{socket}"
        finally:
            server.shutdown()
            thread.join()
