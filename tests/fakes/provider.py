"""An OpenAI-compatible server on 127.0.0.1 that behaves, or misbehaves, as a test tells it to.

A request with a system message is a root turn, any other a sub-call. Each kind has a list of behaviours: the n-th
request of that kind gets the n-th, the last one repeats; or `answer` decides. `requests` keeps what came in. Who asks
for a stream gets what is said as one, in pieces of a few letters, and with the usage when that was asked for.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Tokens = tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """One request. role: root or sub. text: the last message."""

    role: str
    path: str
    key: str
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def most(self) -> Tokens:
        """The most tokens that this request can use: one a byte of what was sent, and the cap on what comes back."""
        sent = sum(len(message["content"].encode()) for message in self.body["messages"])
        return sent, int(self.body["max_tokens"])


@dataclass(frozen=True)
class Say:
    """A completion. usage: tokens in and out, None to report none, `most` to report the most there can be."""

    text: str | Callable[[Seen], str]
    usage: Tokens | str | None = (10, 5)
    delay_s: float = 0.0
    finish: str = "stop"


@dataclass(frozen=True)
class Fail:
    """An error status."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "no reason"


@dataclass(frozen=True)
class Raw:
    """Status 200 with this body."""

    body: bytes
    kind: str = "application/json"


@dataclass(frozen=True)
class Hang:
    """No answer at all, until the server is closed or the client goes."""


@dataclass(frozen=True)
class Drip:
    """Headers, then a byte every 50 ms for as long as anybody listens: no single read ever times out."""


@dataclass(frozen=True)
class Cut:
    """Half of the body that the headers announce, then the connection is closed."""


@dataclass(frozen=True)
class Endless:
    """A stream that goes on for as long as anybody listens, whatever the cap."""

    piece: str = "word "


@dataclass(frozen=True)
class Dies:
    """A stream whose connection breaks after these words, before its end."""

    text: str


@dataclass(frozen=True)
class Refuses:
    """A request with this field is a bad one; without it, `then`."""

    field: str
    then: Say


@dataclass(frozen=True)
class HangUp:
    """The connection is closed without a word."""


Behaviour = Say | Fail | Raw | Hang | Drip | Cut | Endless | Dies | Refuses | HangUp


def completion(text: str, usage: Tokens | None, finish: str = "stop", model: str = "fake") -> bytes:
    message = {"role": "assistant", "content": text}
    body: dict[str, Any] = {"id": "c", "object": "chat.completion", "created": 0, "model": model}
    body["choices"] = [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}]
    if usage:
        body["usage"] = counted(usage)
    return json.dumps(body).encode()


def counted(usage: Tokens) -> dict[str, int]:
    return {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    """Of a stream, in an HTTP chunk of its own."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
    return chunk(json.dumps({"id": "c", "object": "chat.completion.chunk", "choices": choices}))


def chunk(data: str) -> bytes:
    sent = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(sent), sent)


def stream(text: str, usage: Tokens | None, finish: str) -> bytes:
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    out = [event({"role": "assistant", "content": ""}), *(event({"content": piece}) for piece in pieces)]
    out.append(event({}, finish))
    if usage:
        out.append(chunk(json.dumps({"id": "c", "choices": [], "usage": counted(usage)})))
    return b"".join([*out, chunk("[DONE]"), b"0\r\n\r\n"])


class Provider:
    """A context manager: it listens from `with` on, and no thread or socket of it is left after."""

    def __init__(self, root: Sequence[Behaviour] = (), sub: Sequence[Behaviour] = ()) -> None:
        self.behaviours = {"root": list(root), "sub": list(sub)}
        self.answer: Callable[[Seen], Behaviour] = self._by_turn
        self.requests: list[Seen] = []
        self.used: list[Tokens] = []
        self.most_at_once = 0
        self._running = 0
        self._changed = threading.Condition()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.provider = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()  # joins the handlers' threads
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def of(self, role: str) -> list[Seen]:
        return [request for request in self.requests if request.role == role]

    def wait(self, role: str, count: int = 1, seconds: float = 20.0) -> None:
        """Until `count` requests of this kind have come in."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(role)) >= count, seconds), self.requests

    def take(self, seen: Seen) -> Behaviour:
        with self._changed:
            self.requests.append(seen)
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            self._changed.notify_all()
        return self.answer(seen)

    def _by_turn(self, seen: Seen) -> Behaviour:
        script = self.behaviours[seen.role]
        if not script:
            return Fail(418, message=f"the test expected no {seen.role} request")
        return script[min(len(self.of(seen.role)), len(script)) - 1]

    def left(self) -> None:
        with self._changed:
            self._running -= 1

    def pause(self, seconds: float | None) -> bool:
        """Wait so long, or until the server closes; whether it is still open."""
        return not self._over.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 256
    provider: Provider

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a client that was killed between two requests there is nothing to say."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        """Wake the handlers that wait for a next request on a connection kept open."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the client has gone already
                continue


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name in the base class
        pass

    def do_POST(self) -> None:
        provider = self.server.provider
        sent = self.rfile.read(int(self.headers["content-length"]))
        if not sent:  # the client went before it had sent anything
            self.close_connection = True
            return
        body = json.loads(sent)
        role = "root" if any(message["role"] == "system" for message in body["messages"]) else "sub"
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        seen = Seen(role, self.path, key, body)
        behaviour = provider.take(seen)
        try:
            self._answer(provider, seen, behaviour)
        except OSError:  # the client has gone
            self.close_connection = True
        finally:
            provider.left()

    def _answer(self, provider: Provider, seen: Seen, behaviour: Behaviour) -> None:
        match behaviour:
            case Say():
                self._say(provider, seen, behaviour)
            case Fail(status, headers, message):
                self._send(status, json.dumps({"error": {"message": message}}).encode(), headers)
            case Raw(body, kind):
                self._send(200, body, {"content-type": kind})
            case Hang():
                self._until_gone(provider)
            case Drip():
                self._head(200, 1 << 20)
                while provider.pause(0.05):
                    self.wfile.write(b" ")
                self.close_connection = True
            case Cut():
                body = completion("half of this", (10, 5))
                self._head(200, len(body))
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            case Endless() | Dies():
                self._stream_badly(provider, behaviour)
            case Refuses(name, then):
                refused = Fail(400, message=f"Unrecognized request argument supplied: {name}")
                self._answer(provider, seen, refused if name in seen.body else then)
            case HangUp():
                self.close_connection = True

    def _say(self, provider: Provider, seen: Seen, say: Say) -> None:
        if say.delay_s and not provider.pause(say.delay_s):
            self.close_connection = True
            return
        text = say.text if isinstance(say.text, str) else say.text(seen)
        usage = seen.most if say.usage == "most" else say.usage
        tokens = usage if isinstance(usage, tuple) else None
        if tokens:
            provider.used.append(tokens)
        if not seen.body.get("stream"):
            self._send(200, completion(text, tokens, say.finish))
            return
        told = seen.body.get("stream_options", {}).get("include_usage")
        self._head(200)
        self.wfile.write(stream(text, tokens if told else None, say.finish))

    def _stream_badly(self, provider: Provider, behaviour: Endless | Dies) -> None:
        self.close_connection = True
        self._head(200)
        if isinstance(behaviour, Dies):
            self.wfile.write(event({"content": behaviour.text}))
            return
        while provider.pause(0):
            self.wfile.write(event({"content": behaviour.piece}))

    def _until_gone(self, provider: Provider) -> None:
        self.close_connection = True
        self.connection.settimeout(0.05)
        while provider.pause(0):
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), headers)
        self.wfile.write(body)

    def _head(self, status: int, length: int | None = None, headers: dict[str, str] | None = None) -> None:
        """length: of the body; None for a stream."""
        body = {"content-type": "application/json", "content-length": str(length)}
        if length is None:
            body = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
        self.send_response(status)
        for name, value in (body | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
