"""The service's OpenAPI document: what routes do not say each for itself is said here, once for all of them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.server.chat.errors import speaks
from orchestrator.server.etags import is_known
from orchestrator.server.problems import MEDIA_TYPE

Moment = Annotated[
    str, WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-11-26T01:02:03.004Z"]})
]

DESCRIPTION = """\
Recursive Language Model queries over untrusted context: isolated, bounded, on record.

**Authentication.** `Authorization: Bearer KEY`, with an API key (`al_...`) or a token of the tenant's own issuer. Keys
have scopes: `query` asks and gives contexts, `read` looks, `audit` checks the journal, `admin` and `metrics` are the
operator's. What is another tenant's is answered as what is not there. Browsers log in at `/login`.

**Money** is text in USD, exact to a thousand-millionth: `"0.001234"`. Times are RFC 3339 in UTC; durations are seconds.

**Errors** are problem details (RFC 9457): `type` is `urn:airlock:KIND`, and `detail` one line that says what is wrong.
`/v1/chat/completions` and `/v1/models` answer in OpenAI's shape instead. 429 and 503 pass: come again after
`Retry-After`. `RateLimit` says how many requests are left in this minute.

**Lists** take `limit` and `cursor`; `next` is the cursor of the next page, null on the last. A query's records are
numbered instead: `after` is the number of the last one that is known.

**Idempotency.** `POST /v1/queries` and `POST /v1/chat/completions` take an `Idempotency-Key`: sent again with the same
body, it gives the query of before; with another body it is refused (422).
"""
TAGS = [
    {"name": "queries", "description": "Ask, look, watch and cancel; and what it costs."},
    {"name": "contexts", "description": "What queries are asked over: sent whole, or in pieces (tus 1.0.0)."},
    {
        "name": "audit",
        "description": "The journal of the tenant's queries: records, verdicts, proofs, exports, replays.",
    },
    {"name": "admin", "description": "Tenants, keys, policies and issuers, for whoever runs the service."},
    {"name": "openai", "description": "Chat completions and models, for what speaks to OpenAI."},
    {"name": "operations", "description": "Whether the service lives and is ready, and its metrics."},
    {"name": "viewer", "description": "What the pages of the viewer ask."},
]
# What can be answered before a route has its say, or when it fails.
_ANYWHERE = {
    "400": ("NotHttp", "it is no HTTP request, or no JSON"),
    "408": ("TooSlow", "the body came too slowly"),
    "413": ("TooLarge", "the body is too large"),
    "415": ("OtherMediaType", "the body is of another media type, or encoded"),
    "421": ("OtherHost", "the service is not called by this name"),
    "431": ("HeadersTooLarge", "the headers are too many, or too large"),
    "500": ("Fault", "something went wrong in the service"),
}
_NOT_OURS = ("HTTPValidationError", "ValidationError")  # shapes of FastAPI's own
_CHAT = "InChat"  # the same, in OpenAI's shape
_WITH_BODY = ("408", "413", "415")
_HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {"description": "by which the log has the request", "schema": {"type": "string"}},
    "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "what to let in by", "schema": {"type": "string"}, "example": "Bearer"},
    "RateLimit": {
        "description": "requests that are left (r), and seconds until there are more (t)",
        "schema": {"type": "string"},
        "example": '"minute";r=599;t=60',
    },
    "RateLimit-Policy": {
        "description": "requests (q) in so many seconds (w)",
        "schema": {"type": "string"},
        "example": '"minute";q=600;w=60',
    },
}


def operation_id(route: APIRoute) -> str:
    """The name of the function: `ask_query` makes a good method of a client."""
    return route.name


def document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.2, the first that can say what a stream of events holds."""
    made = get_openapi(
        title=app.title,
        openapi_version="3.2.0",
        version=app.version,
        summary=app.summary,
        description=DESCRIPTION,
        tags=TAGS,
        routes=app.routes,
    )
    parts: dict[str, Any] = made.setdefault("components", {})
    for name in _NOT_OURS:
        parts.get("schemas", {}).pop(name, None)
    parts["headers"] = _HEADERS
    parts["responses"] = {
        name + after: {
            "description": said,
            "headers": {"X-Request-Id": _reference("headers", "X-Request-Id")},
            "content": {media_type: {"schema": _reference("schemas", schema)}},
        }
        for after, media_type, schema in (("", MEDIA_TYPE, "ProblemBody"), (_CHAT, "application/json", "ErrorAnswer"))
        for name, said in _ANYWHERE.values()
        if schema in parts["schemas"]
    }
    for path, item in made["paths"].items():
        for operation in item.values():
            _complete(path, operation)
    return made


def _complete(path: str, operation: dict[str, Any]) -> None:
    operation["summary"], operation["description"] = _words(operation)
    if not operation["description"]:
        del operation["description"]
    responses: dict[str, Any] = operation["responses"]
    if _NOT_OURS[0] in str(responses.get("422")):  # of a route whose parameters refuse nothing
        del responses["422"]
    for status, answer in responses.items():
        if MEDIA_TYPE in answer.get("content", {}):  # and not also as what the route gives when all is well
            answer["content"] = {MEDIA_TYPE: answer["content"][MEDIA_TYPE]}
        headers: dict[str, Any] = answer.setdefault("headers", {})
        for name in _headers(path, status):
            headers.setdefault(name, _reference("headers", name))
    for status, (name, _said) in _ANYWHERE.items():
        if status not in _WITH_BODY or "requestBody" in operation:
            responses.setdefault(status, _reference("responses", name + _CHAT if speaks(path) else name))
    operation["responses"] = dict(sorted(responses.items()))


def _words(operation: dict[str, Any]) -> tuple[str, str]:
    """The first sentence of what the function says of itself, and the rest; or the summary that the route gives."""
    said: str = operation.get("description", "")
    if operation["summary"] != operation["operationId"].replace("_", " ").title():
        return operation["summary"], said
    first, *rest = re.split(r"(?<=[.?])\s+", said, maxsplit=1)
    return first, "".join(rest)


def _headers(path: str, status: str) -> list[str]:
    names = ["X-Request-Id"]
    if status == "401":
        return [*names, "WWW-Authenticate"]
    if status in ("429", "503"):
        names.append("Retry-After")
    if path.startswith("/v1/") or path == "/metrics":
        names += ["RateLimit", "RateLimit-Policy"]
    return names


def _reference(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}


@dataclass(frozen=True, slots=True)
class _Form:
    """The document as it is sent."""

    content: bytes
    headers: dict[str, str]


class Rendered:
    """The document as bytes. Anybody may ask for it: it is rendered at the first request, and never again."""

    def __init__(self, made: Callable[[], dict[str, Any]]) -> None:
        self._made = made
        self._rendering = anyio.Lock()
        self._forms: dict[bool, _Form] | None = None  # whether it is packed -> it

    async def answer(self, request: Request) -> Response:
        """The document, or that the client has it already."""
        async with self._rendering:
            if self._forms is None:
                self._forms = await anyio.to_thread.run_sync(self._render)
        form = self._forms[_takes_gzip(request.headers.get("Accept-Encoding", ""))]
        if is_known(request, form.headers["ETag"]):
            return Response(status_code=304, headers=form.headers)
        return Response(form.content, media_type="application/json", headers=form.headers)

    def _render(self) -> dict[bool, _Form]:
        plain = json.dumps(self._made(), ensure_ascii=False, separators=(",", ":")).encode()
        tag = sha256(plain).hexdigest()[:32]
        # Kept, but asked about each time, as pages are: it is never older than its service.
        headers = {"Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        return {
            False: _Form(plain, headers | {"ETag": f'"{tag}"'}),
            True: _Form(gzip.compress(plain), headers | {"ETag": f'"{tag}-gzip"', "Content-Encoding": "gzip"}),
        }


def _takes_gzip(accepted: str) -> bool:
    """Only where it is named; a quality of 0 says that it is not taken."""
    names = (part.partition(";") for part in accepted.lower().split(","))
    return any(name.strip() == "gzip" and not re.fullmatch(r"\s*q=0(\.0*)?\s*", q) for name, _, q in names)
