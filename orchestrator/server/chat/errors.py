"""What goes wrong, in the shape in which OpenAI's clients read it.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages[0].content", "code": null}}

Status and headers are those of the same problem elsewhere, but that a request which is not valid is 400, as OpenAI has
it. `code` is the problem's kind with underscores, or OpenAI's own word where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    BudgetInFlight,
    ProviderError,
    read_reason,
)
from orchestrator.server.chat.request import NOT_TAKEN, TAG
from orchestrator.server.problems import MISWRITTEN, Problem, problem_of

NO_RETRY = {"x-should-retry": "false"}  # which OpenAI's clients heed: another query would cost as much again
# What is here, what their clients ask for besides, and both where the base address lacks its end.
_PATHS = re.compile(
    r"(/v1)?/(chat|models|completions|responses|embeddings|files|moderations|images|audio|batches|assistants|threads)"
    r"(/.*)?",
    re.DOTALL,
)
_ADDRESS = re.compile(r"https?://\S+")  # of a provider's server, which is no affair of a client's
_TYPES = {401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "unauthorized": "invalid_api_key",
    "rate-limited": "rate_limit_exceeded",
    "bad-request": None,
}


class ErrorBody(BaseModel):
    message: str = Field(examples=["messages[0].content: has to be a text, or a list of parts of it"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["messages[0].content"])
    code: str | None = Field(examples=[None])


class ErrorAnswer(BaseModel):
    """What goes wrong, in OpenAI's shape."""

    error: ErrorBody


def speaks(path: str) -> bool:
    """Whether who asks for this path expects errors in OpenAI's shape."""
    return _PATHS.fullmatch(path) is not None


def no_such_path(path: str) -> str:
    """What to do, to who has found nothing there."""
    if path.startswith("/v1/"):
        return "of OpenAI's API there are POST /v1/chat/completions and GET /v1/models here, and nothing else"
    return "there is nothing here: the client's base_url has to end in /v1"


def error_response(problem: Problem) -> JSONResponse:
    return JSONResponse(body(problem), _status(problem), problem.headers)


def body(problem: Problem) -> dict[str, Any]:
    """`ErrorAnswer`."""
    message, param = _told(problem)
    status = _status(problem)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = _CODES.get(problem.kind, problem.kind.replace("-", "_"))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _status(problem: Problem) -> int:
    return 400 if problem.status == 422 and problem.kind == "bad-request" else problem.status


def _told(problem: Problem) -> tuple[str, str | None]:
    """The message, and the parameter that it is about."""
    faults: Sequence[Mapping[str, str]] = problem.more.get("errors", ())
    if not faults:
        return str(problem), problem.more.get("param")
    param = _param(faults[0]["at"])
    words = re.findall(r"\w+", param or "")
    if why := next((NOT_TAKEN[word] for word in (*words[:1], *words[-1:]) if word in NOT_TAKEN), None):
        return f"{param} is not taken: {why}", param
    if words[-1:] == ["file_id"] and faults[0]["is"] == MISWRITTEN:
        return f"{param}: has to be the id of a context, which is 64 hexadecimal digits: see GET /v1/contexts", param
    return f"{param or 'the body'}: {faults[0]['is']}", param


def _param(at: str) -> str | None:
    """`body.messages.0.content.as parts.1` -> `messages[0].content[1]`."""
    parts = [part for part in at.split(".")[1:] if not part.startswith(TAG)]
    named = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts)
    return named.removeprefix(".") or None


def model_not_found(model: str) -> Problem:
    text = f"The model {model[:200]!r} does not exist or you do not have access to it: see GET /v1/models"
    return Problem(404, "model-not-found", text, param="model")


def no_answer(query: Mapping[str, Any]) -> Problem:
    """Why a query that has ended has no answer. query: as the service shows it.

    402 where its money was used up, 422 where another limit was or it was cancelled: no status that clients take for a
    reason to ask again by themselves. What refused it or made it fail has its own status.
    """
    status, reason = query["status"], query["reason"]
    error = read_reason(reason)
    said = _ADDRESS.sub("the provider", str(error)) if isinstance(error, ProviderError) else str(error or reason)
    text = f"{said} (query {query['id']})"
    if status == "cancelled":
        return Problem(422, "cancelled", f"the query was cancelled: {text}", headers=NO_RETRY)
    if status == "limit":
        money = isinstance(error, BudgetExhausted | BudgetInFlight)
        code = 402 if money else 422  # never 408, which many clients take for a reason to ask again
        kind = error.kind if error else "limit"
        return Problem(code, kind, f"stopped by a limit, without an answer: {text}", headers=NO_RETRY)
    found = problem_of(error or AirlockError(reason))
    headers = found.headers if status == "refused" else {**found.headers, **NO_RETRY}
    shown = text if isinstance(error, ProviderError) else f"{found} (query {query['id']})"
    return Problem(found.status, found.kind, shown, headers=headers, **found.more)


_SAID = {
    400: "the request is not valid, or asks for what is not to be had here",
    401: "there is no credential, or none that is good",
    402: "the money is spent",
    403: "it is not permitted",
    404: "there is no such model, or no such file",
    408: "the body came too slowly",
    409: "the answer is not kept",
    413: "it is too large",
    422: "a limit was reached or the query cancelled before there was an answer, or an Idempotency-Key is another's",
    429: "not now: try again after Retry-After",
    500: "the sandbox failed, or the service did",
    502: "the provider failed",
    503: "the service cannot do this now: try again after Retry-After",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that can also end with these."""
    return {status: {"description": _SAID[status], "model": ErrorAnswer} for status in statuses}
