"""What the service writes to its log: lines of JSON, or plain ones for a terminal, and one line for every request.

A line has what our code names and nothing of what was said: no path, no query string, no header, no body. Of an
exception it has the type and the places, not the text, for that may quote a payload. What looks like a key is taken out
of whatever others have written.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from secrets import token_hex
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.console import printable
from orchestrator.core.errors import KINDS
from orchestrator.core.events import Event
from orchestrator.core.redact import Redactor, excerpt
from orchestrator.server.metrics import METHODS, OTHER, Metrics
from orchestrator.server.problems import is_fault

if TYPE_CHECKING:
    from orchestrator.server.traces import Traces  # needs an extra

FIELDS = (  # of a line, beside its time, level, logger and message; what else a record has is left out
    "request_id",
    "method",
    "route",
    "status",
    "duration_ms",
    "problem",
    "tenant",
    "asker",
    "query",
    "outcome",
    "url",
    "version",
    "backend",
    "isolation",
    "error",
    "where",
)
MOST_CHARS = 500  # of a message, or a field
NO_ROUTE = "none"
GONE = 499  # the client went before there was an answer; the number is nginx's
_MOST_PLACES = 20  # of a traceback, the innermost
_QUERY = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{10}", re.ASCII)

_access = logging.getLogger("airlock.access")
_queries = logging.getLogger("airlock.queries")
_fault = logging.getLogger("airlock.fault")
_request: ContextVar[str] = ContextVar("request")


def query(event: Event, query: str) -> None:
    """A line for what a query's begin and end are. Of a reason only its kind: the rest may quote what was said."""
    match event.type:
        case "query.opened" | "query.resumed":
            _queries.info("a query %s", "began" if event.type == "query.opened" else "goes on", extra={"query": query})
        case "query.interrupted":
            _queries.info("a query was interrupted", extra={"query": query})
        case "query.closed":
            kind, _, _text = str(event.body.get("reason") or "").partition(":")
            said: dict[str, str] = {"query": query, "outcome": str(event.body["status"])}
            if kind in KINDS:
                said["error"] = kind
            _queries.info("a query ended", extra=said)
        case _:
            pass


def configure(*, json: bool, stream: TextIO | None = None) -> None:
    """All logging of the process from now on, to standard error; of libraries, only what went wrong."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JSONLines() if json else _PlainLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("airlock", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    threading.excepthook = _in_thread
    sys.unraisablehook = _unraisable


def _in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value:
        _fault.error("a thread ended", exc_info=args.exc_value)


def _unraisable(args: Any) -> None:
    _fault.error("an exception that nobody could be told", exc_info=args.exc_value)


class _JSONLines(JsonFormatter):
    """ASCII, so that nothing in a line can end it, or be obeyed by a terminal."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]  it is not annotated
        self._fields = _Fields()

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data.update(self._fields.of(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  the name in the base class
        return ""  # `add_fields` has what is told of it


class _PlainLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._fields = _Fields()

    def format(self, record: logging.LogRecord) -> str:
        fields = self._fields.of(record)
        head = " ".join(str(fields.pop(name)) for name in ("time", "level", "message"))
        line = " ".join([head, *(f"{name}={value}" for name, value in fields.items() if name != "logger")])
        return re.sub(r"\s", " ", printable(line)).encode("ascii", "backslashreplace").decode()


class _Fields:
    """What a line says."""

    def __init__(self) -> None:
        self._redact = Redactor().redact

    def of(self, record: logging.LogRecord) -> dict[str, Any]:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        # asyncio and others put what they speak of, payloads included, on the lines below the first.
        message = record.getMessage().strip().partition("\n")[0]
        fields: dict[str, Any] = {
            "time": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._clean(message),
        }
        raised = record.exc_info[1] if record.exc_info else None
        said: Mapping[str, Any] = {"request_id": _request.get(None), **_told(raised), **vars(record)}
        for name in FIELDS:
            if (value := said.get(name)) is not None:
                fields[name] = value if isinstance(value, int | float) else self._clean(str(value))
        return fields

    def _clean(self, text: str) -> str:
        return excerpt(text, MOST_CHARS, self._redact)


def _told(error: BaseException | None) -> dict[str, str]:
    """Of an exception: its type, and where it came from, the innermost place first."""
    return {"error": type(error).__name__, "where": ", ".join(_places(error.__traceback__))} if error else {}


def _places(trail: TracebackType | None) -> Iterator[str]:
    for frame, number in reversed([*traceback.walk_tb(trail)][-_MOST_PLACES:]):
        yield f"{frame.f_globals.get('__name__', '?')}:{number}"


class Accounted:
    """ASGI middleware, around all others: each request has an id, a line in the log, and is counted and timed.

    What it tells of a request beyond that, others have left in its state: principal (service.Principal), and problem
    (the kind of the problem that it ended in).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces | None = None) -> None:
        self._app, self._metrics, self._traces = app, metrics, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, send, self._metrics)
        token = _request.set(request.id)
        try:
            await self._app(scope, receive, request.send)
        except Exception:
            if not request.whole:  # else it was answered, and is in the log
                raise
        except BaseException:
            request.cancelled = True
            raise
        finally:
            try:
                request.account(self._traces)
            finally:
                _request.reset(token)


class _Request:
    def __init__(self, scope: Scope, send: Send, metrics: Metrics) -> None:
        self.id = token_hex(8)
        self.cancelled = self.whole = False
        self._scope, self._send, self._metrics = scope, send, metrics
        self._status: int | None = None
        self._stream = False
        self._location = ""
        self._began, self._at = time.perf_counter(), time.time_ns()
        scope.setdefault("state", {})["request_id"] = self.id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begin(message["status"], Headers(raw=message.get("headers", ())))
        await self._send(message)
        self.whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    def _begin(self, status: int, headers: Headers) -> None:
        self._status = status
        self._location = headers.get("location", "")
        self._stream = headers.get("content-type", "").startswith("text/event-stream")
        if self._stream:
            self._metrics.streams.inc()

    def account(self, traces: Traces | None) -> None:
        seconds = time.perf_counter() - self._began
        state, method = self._scope["state"], self._scope["method"]
        method, route = (
            method if method in METHODS else OTHER,
            getattr(self._scope.get("route"), "path_format", NO_ROUTE),
        )
        status = self._status or (
            GONE if self.cancelled else 500
        )  # 500: what the server says where the app says nothing
        problem = state.get("problem")
        if self._stream:
            self._metrics.streams.dec()
        if problem:
            self._metrics.refused("request", problem)
        fault = is_fault(status, problem)
        self._metrics.request(method, route, status, seconds, stream=self._stream, fault=fault)
        principal = state.get("principal")
        fields = {
            "request_id": self.id,
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "problem": problem,
            "tenant": getattr(principal, "tenant", None),
            "asker": getattr(principal, "asker", None),
            "query": self._query(),
        }
        _access.log(logging.ERROR if fault else logging.INFO, "request", extra=fields)
        if traces:
            traces.request(fields, self._at)

    def _query(self) -> str | None:
        """Which one it was about: that of its path, or the one that it made."""
        named = [*self._scope.get("path_params", {}).values(), self._location.rpartition("/")[2]]
        return next((name for name in named if isinstance(name, str) and _QUERY.fullmatch(name)), None)
