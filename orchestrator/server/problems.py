"""What the service says when it does not do what was asked: problem details (RFC 9457), one table for all errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema

from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    BudgetInFlight,
    Conflict,
    CountExceeded,
    LimitError,
    MachineError,
    NotKept,
    NotPermitted,
    ProviderError,
    RateLimited,
    RequestError,
    SandboxUnusable,
    StoreError,
)

MEDIA_TYPE = "application/problem+json"
MISWRITTEN = "is not written as this has to be: see /openapi.json"
RETRY_S = 5  # where nothing tells when to come again
_EXPECTED = ("stopping", "not-ready", "queue-full")  # a 503 with which the service does as it should


def is_fault(status: int, kind: str | None) -> bool:
    """Whether an answer of this status, with this kind of problem, is for the operator to look into."""
    return status >= 500 and kind not in _EXPECTED


class Problem(Exception):
    """Raised by whatever handles a request. kind: a stable name; detail: one line that says what to do.

    more: further members of the problem, JSON.
    """

    def __init__(
        self, status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})
        self.more = more

    def body(self) -> dict[str, Any]:
        """The members of RFC 9457, and what is said further."""
        title = HTTPStatus(self.status).phrase
        return {
            "type": f"urn:airlock:{self.kind}",
            "title": title,
            "status": self.status,
            "detail": self.detail,
            **self.more,
        }

    def response(self) -> JSONResponse:
        """As the native routes give it."""
        return JSONResponse(self.body(), self.status, self.headers, MEDIA_TYPE)


class FaultBody(BaseModel):
    """One thing that is wrong in a request."""

    at: str = Field(examples=["body.budget_usd"])
    what: str = Field(alias="is", examples=["Input should be a valid string"])


class ProblemBody(BaseModel):
    """Problem details (RFC 9457). type: `urn:airlock:KIND`. detail: one line that says what is wrong.

    rule: the policy's key that is in the way. errors: of a request that is not as it has to be, all that is wrong.
    """

    type: str = Field(examples=["urn:airlock:unauthorized"])
    title: str = Field(examples=["Unauthorized"])
    status: int = Field(examples=[401])
    detail: str = Field(examples=["this needs a valid API key, token or session"])
    rule: str | SkipJsonSchema[None] = Field(None, examples=["money.query"])
    errors: list[FaultBody] | SkipJsonSchema[None] = None


_SAID = {
    400: "the request cannot be read",
    402: "the money is spent",
    403: "it is not permitted",
    404: "it is not there",
    408: "the body came too slowly",
    409: "it does not go together with what is there",
    412: "it is of another version of the protocol",
    413: "it is too large",
    415: "it is of another media type",
    422: "something in the request is not as it has to be",
    423: "another request has it",
    429: "not now: try again after Retry-After",
    503: "the service cannot do this now: try again after Retry-After",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that can also end with these; 401 is every route's that asks who it is."""
    described = {401: "there is no credential, or none that is good", **_SAID}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {
        status: {"description": described[status], "model": ProblemBody, "content": content}
        for status in (401, *statuses)
    }


def not_found(what: str = "page") -> Problem:
    """The same words for what is not there and for what is another tenant's."""
    return Problem(404, "not-found", f"there is no such {what}")


def come_again(status: int, kind: str, detail: str, seconds: float = RETRY_S, **more: Any) -> Problem:
    """One that passes: 429 or 503, with Retry-After in whole seconds."""
    return Problem(status, kind, detail, headers={"Retry-After": str(max(1, math.ceil(seconds)))}, **more)


def problem_of(error: AirlockError) -> Problem:
    """The status that an error of ours has over HTTP. What machines are like inside is not told."""
    kind, text = error.kind, str(error)
    more: dict[str, Any] = {"rule": error.rule} if isinstance(error, LimitError) and error.rule else {}
    match error:
        case BudgetExhausted():
            return Problem(402, kind, text, **more)
        case RateLimited():
            return come_again(429, kind, text, error.retry_after, **more)
        case BudgetInFlight():
            return come_again(429, kind, text, **more)
        case CountExceeded(rule="tenant.queries_at_once"):
            return come_again(429, kind, text, **more)
        case CountExceeded():
            return Problem(413, kind, text, **more)
        case NotPermitted() | LimitError():
            return Problem(403, kind, text, **more)
        case NotKept() | Conflict():
            return Problem(409, kind, text)
        case StoreError() | SandboxUnusable():
            return come_again(503, kind, "the service cannot do this now; try again later")
        case MachineError():
            return Problem(500, kind, "the sandbox failed")
        case ProviderError():
            return Problem(502, kind, error.told)
        case RequestError():
            return Problem(422, kind, text)
        case _:
            return Problem(500, "error", "something went wrong in the service")
