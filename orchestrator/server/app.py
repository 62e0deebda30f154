"""The application: every route, what its errors are over HTTP, and its OpenAPI document."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from orchestrator.core.errors import AirlockError
from orchestrator.server.access import Door
from orchestrator.server.openapi import Rendered, document, operation_id
from orchestrator.server.problems import MISWRITTEN, Problem, problem_of
from orchestrator.server.routes import admin, audit, chat, contexts, ops, queries, uploads, viewer
from orchestrator.server.service import Service

_log = logging.getLogger("airlock.app")
_MOST_FAULTS = 20  # of one request that are told
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


def make_app(service: Service) -> FastAPI:
    """The routes of one service."""
    app = FastAPI(
        title="Airlock",
        version=version("airlock"),
        summary="Recursive Language Model queries over untrusted context: isolated, bounded, on record",
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # rendered anew for each request; see `Rendered`
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
    )
    app.state.service = service
    app.add_middleware(Door, answer=_answer)
    for room in (queries, contexts, uploads, audit, admin, chat, ops, viewer):
        app.include_router(room.router)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(AirlockError, _airlock_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _fault)
    app.openapi = lambda: _openapi(app)
    app.add_route("/openapi.json", Rendered(app.openapi).answer, include_in_schema=False)
    return app


def _answer(request: Request, problem: Problem) -> Response:
    """As the route's clients expect it."""
    request.scope.setdefault("state", {})["problem"] = problem.kind  # for the log
    return chat.error_response(problem) if chat.speaks(request.scope["path"]) else problem.response()


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _answer(request, error)


async def _airlock_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AirlockError)
    return _answer(request, problem_of(error))


async def _http(request: Request, error: Exception) -> Response:
    """No such page, no such method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        taken = ", ".join(_methods(request))
        return _answer(request, Problem(405, "method-not-allowed", f"this takes {taken}", headers={"Allow": taken}))
    path, text = request.scope["path"], str(error.detail).lower()
    if error.status_code == 404:
        return _answer(request, Problem(404, "not-found", chat.no_such_path(path) if chat.speaks(path) else text))
    return _answer(request, Problem(error.status_code, "bad-request", text, headers=error.headers))


def _methods(request: Request) -> list[str]:
    """What the path takes, of all its routes: the framework names those of the first one alone."""

    def is_taken(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return list(filter(is_taken, _METHODS))


async def _not_valid(request: Request, error: Exception) -> Response:
    """What is wrong, and where; never what was there."""
    assert isinstance(error, RequestValidationError)
    faults: Sequence[Any] = error.errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        return _answer(request, Problem(400, "bad-request", "the body is not JSON"))
    if any(fault["loc"] == ("body",) for fault in faults) and not request.headers.get("content-type", "").count("json"):
        return _answer(request, Problem(422, "bad-request", "send a body with Content-Type: application/json"))
    told = [{"at": _place(fault["loc"]), "is": _said(fault)} for fault in faults[:_MOST_FAULTS]]
    first = f"{told[0]['at']}: {told[0]['is']}" if told else "it is not as it has to be"
    return _answer(request, Problem(422, "bad-request", first[:500], errors=told))


def _said(fault: Mapping[str, Any]) -> str:
    """A regular expression is no line that says what to do; the document has it, and an example."""
    if fault["type"] == "string_pattern_mismatch":
        return MISWRITTEN
    return str(fault["msg"])


def _place(where: Sequence[object]) -> str:
    """Of names from outside only what can be shown."""
    return ".".join(str(part) if str(part).isprintable() else "?" for part in where)[:200]


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of our own: told to the log, and to nobody else."""
    _log.error(
        "a request failed", exc_info=error, extra={"request_id": request.scope.get("state", {}).get("request_id")}
    )
    return _answer(request, Problem(500, "error", "something went wrong in the service"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if not app.openapi_schema:
        app.openapi_schema = document(app)
    return app.openapi_schema
