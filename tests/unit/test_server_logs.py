"""The service's log: what is in a line, and above all what is not."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from orchestrator.core.api_keys import RANDOM_BYTES, make_key
from orchestrator.server import logs
from orchestrator.server.metrics import Metrics

QUERY = "20261126-010203-0123456789"


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What is logged in this process, which is as it was before when the test ends."""
    root, hooks = logging.getLogger(), (threading.excepthook, sys.unraisablehook, warnings.showwarning)
    loggers = [root, logging.getLogger("airlock"), logging.getLogger("uvicorn")]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    out = io.StringIO()
    logs.configure(json=getattr(request, "param", "json") == "json", stream=out)
    yield out
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks


def read(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def fail(text: str) -> None:
    raise ValueError(text)


def test_a_line(lines: io.StringIO):
    logging.getLogger("airlock.desk").error("a query failed", extra={"query": QUERY, "error": "store", "body": "text"})
    (line,) = read(lines)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "error",
        "logger": "airlock.desk",
        "message": "a query failed",
        "query": QUERY,
        "error": "store",
    }


def test_of_an_exception_its_type_and_place_and_never_its_text(lines: io.StringIO):
    try:
        fail("the patient's name is Ada")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    (line,) = read(lines)
    assert line["message"] == "Exception in ASGI application"
    assert line["error"] == "ValueError"
    assert line["where"].startswith(f"{__name__}:")
    assert "Ada" not in lines.getvalue()


def test_what_a_task_died_of_is_told_without_its_text(lines: io.StringIO):
    """asyncio puts the exception, with its text, into the message itself."""

    async def die() -> None:
        fail("Ada")

    async def leave_one() -> None:
        task = asyncio.create_task(die())
        await asyncio.wait([task])
        del task

    asyncio.run(leave_one())
    (line,) = read(lines)
    assert (line["message"], line["error"]) == ("Task exception was never retrieved", "ValueError")
    assert "Ada" not in lines.getvalue()


def test_so_is_what_a_thread_and_a_finaliser_died_of(lines: io.StringIO):
    thread = threading.Thread(target=fail, args=("Ada",))
    thread.start()
    thread.join()

    class Final:
        def __del__(self) -> None:
            fail("Ada")

    Final()
    found = [(line["message"], line["error"]) for line in read(lines)]
    assert found == [
        ("a thread ended", "ValueError"),
        ("an exception that nobody could be told", "ValueError"),
    ]
    assert "Ada" not in lines.getvalue()


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line(lines: io.StringIO):
    warnings.warn("old", UserWarning, stacklevel=1)
    (line,) = read(lines)
    assert line["logger"] == "py.warnings"


def test_keys_are_taken_out_of_what_others_wrote(lines: io.StringIO):
    key = make_key(bytes(range(RANDOM_BYTES))).text
    logging.getLogger("some.library").warning("refused %s and sk-proj-%s", key, "aB3dE5fG7hI9" * 4)
    assert key not in lines.getvalue()
    assert "aB3dE5fG7hI9" not in lines.getvalue()
    assert "redacted" in read(lines)[0]["message"]


def test_libraries_are_heard_only_when_something_is_wrong(lines: io.StringIO):
    logging.getLogger("httpx2").info("HTTP Request: GET http://127.0.0.1/?secret=1")
    logging.getLogger("airlock.desk").info("said")
    assert [line["message"] for line in read(lines)] == ["said"]


@pytest.mark.parametrize("lines", ["json", "plain"], indirect=True)
def test_nothing_in_a_line_ends_it_or_is_obeyed(lines: io.StringIO):
    hostile = "a\r\x1b[2J\u2028b\u202e\x85c\ud800"
    logging.getLogger("airlock.desk").error(hostile, extra={"query": f"{hostile}\nlevel=info forged", "error": hostile})
    text = lines.getvalue()
    assert len(text.splitlines()) == 1
    assert text.isascii()
    assert text[:-1].isprintable()


@pytest.mark.parametrize("lines", ["plain"], indirect=True)
def test_a_plain_line(lines: io.StringIO):
    logging.getLogger("airlock.access").info("request", extra={"method": "GET", "status": 200})
    assert lines.getvalue().split(" ", 1)[1] == "info request method=GET status=200\n"


# Requests


async def hello(request: Request) -> Response:
    request.scope["state"]["principal"] = SimpleNamespace(tenant="acme", asker="k1")
    return PlainTextResponse("hello")


async def made(_request: Request) -> Response:
    return RedirectResponse(f"/v1/queries/{QUERY}", 202)


async def refuse(request: Request) -> Response:
    request.scope["state"]["problem"] = "budget-exhausted"
    return PlainTextResponse("no", 402)


async def away(request: Request) -> Response:
    request.scope["state"]["problem"] = request.query_params["why"]
    return PlainTextResponse("not now", 503)


async def broken(_request: Request) -> Response:
    raise ValueError("the patient's name is Ada")


class Watched:
    """An application with a stream, and what was accounted of it."""

    def __init__(self) -> None:
        self.metrics, self.open, self.seen = Metrics(), list[float | None](), dict[str, str]()
        routes = [Route(path, end, methods=["GET", "POST"]) for path, end in self.ends().items()]
        self.app = logs.Accounted(Starlette(routes=routes), self.metrics)

    def ends(self) -> dict[str, Any]:
        return {
            "/hello/{name}": hello,
            "/made": made,
            "/refuse": refuse,
            "/away": away,
            "/broken": broken,
            "/stream": self.stream,
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    async def stream(self, request: Request) -> Response:
        self.seen["id"] = request.scope["state"]["request_id"]

        async def pieces() -> AsyncIterator[bytes]:
            self.open.append(self.value("airlock_event_streams"))
            logging.getLogger("airlock.feed").info("within")
            yield b": keep-alive\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **more)


@pytest.mark.anyio
async def test_a_request_has_a_line_without_anything_that_it_said(lines: io.StringIO):
    watched = Watched()
    headers = {"authorization": "Bearer al_secret", "user-agent": "Ada"}
    await watched.ask("POST", "/hello/Ada%0aforged?secret=Ada", content=b"Ada", headers=headers)
    (line,) = read(lines)
    assert isinstance(line.pop("duration_ms"), float)
    assert len(line.pop("request_id")) == 16
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "airlock.access",
        "message": "request",
        "method": "POST",
        "route": "/hello/{name}",
        "status": 200,
        "tenant": "acme",
        "asker": "k1",
    }
    assert watched.value("airlock_http_requests_total", method="POST", route="/hello/{name}", status="200") == 1
    assert watched.value("airlock_http_request_seconds_count", route="/hello/{name}") == 1


@pytest.mark.anyio
async def test_a_page_that_is_not_there_makes_no_series(lines: io.StringIO):
    watched = Watched()
    for number in range(3):
        await watched.ask("BREW", f"/nowhere/{number}")
    assert watched.value("airlock_http_requests_total", method="other", route="none", status="404") == 3
    assert {line["route"] for line in read(lines)} == {"none"}


@pytest.mark.anyio
async def test_which_query_it_was_about(lines: io.StringIO):
    watched = Watched()
    await watched.ask("POST", "/made")
    await watched.ask("GET", f"/hello/{QUERY}")
    await watched.ask("GET", f"/hello/{QUERY}x")
    assert [line.get("query") for line in read(lines)] == [QUERY, QUERY, None]


@pytest.mark.anyio
async def test_what_a_request_was_refused_for_is_counted(lines: io.StringIO):
    watched = Watched()
    await watched.ask("POST", "/refuse")
    assert watched.value("airlock_refused_total", what="request", kind="budget-exhausted") == 1
    assert read(lines)[0]["problem"] == "budget-exhausted"


@pytest.mark.anyio
async def test_a_fault_of_ours_is_counted_and_told_once(lines: io.StringIO):
    watched = Watched()
    answer = await watched.ask("GET", "/broken")
    assert answer.status_code == 500
    assert watched.value("airlock_http_requests_total", method="GET", route="/broken", status="500") == 1
    (line,) = read(lines)  # what was answered is not raised to the server, which would tell it again
    assert (line["level"], line["status"]) == ("error", 500)
    assert "Ada" not in lines.getvalue()


@pytest.mark.anyio
async def test_a_service_that_is_away_in_good_order_is_no_error(lines: io.StringIO):
    watched = Watched()
    for why in ("store-unavailable", "stopping", "not-ready", "queue-full"):
        await watched.ask("GET", f"/away?why={why}")
    assert [line["level"] for line in read(lines)] == ["error", "info", "info", "info"]
    assert watched.value("airlock_http_faults_total") == 1


@pytest.mark.anyio
async def test_a_stream_counts_until_it_ends_and_is_not_timed(lines: io.StringIO):
    watched = Watched()
    await watched.ask("GET", "/stream")
    assert watched.open == [1.0]
    assert watched.value("airlock_event_streams") == 0
    assert watched.value("airlock_http_requests_total", method="GET", route="/stream", status="200") == 1
    assert watched.value("airlock_http_request_seconds_count", route="/stream") is None
    within, access = read(lines)
    assert within["request_id"] == access["request_id"] == watched.seen["id"]


@pytest.mark.anyio
async def test_a_client_that_has_gone(lines: io.StringIO):
    """The server cancels what it was waiting for: nothing was answered, and no stream stays open."""
    metrics, begun = Metrics(), anyio.Event()

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        begun.set()
        await anyio.sleep_forever()

    async def nothing(*_: Any) -> Message:
        raise AssertionError

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/"}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(logs.Accounted(app, metrics), scope, nothing, nothing)
        await begun.wait()
        tasks.cancel_scope.cancel()
    assert read(lines)[0]["status"] == logs.GONE
    assert metrics.registry.get_sample_value("airlock_event_streams") == 0
