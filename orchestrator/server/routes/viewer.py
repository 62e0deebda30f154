"""The viewer: pages and what they are made of, as they are in the package, and a browser's way to log in.

A page holds nothing of any tenant: what it shows it asks the API for, as whoever has logged in.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import parse_qs

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, Field

from orchestrator.server.access import principal_of, require_own_origin, the_gate, unauthorized
from orchestrator.server.etags import is_known
from orchestrator.server.problems import Problem, documented, not_found
from orchestrator.server.service import Principal, the_service
from orchestrator.server.sessions import set_cookie
from orchestrator.server.structure import JsonRoute

router = APIRouter(tags=["viewer"], route_class=JsonRoute)

_QUERY = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{10}", re.ASCII)
_MOST_LOGIN = 8192  # bytes of a request to log in
_FOLDER = Path(__file__).parents[1] / "viewer"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, but asked about each time: a page is never older than its service
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    tag: str


@cache
def _files() -> dict[str, _File]:
    """By name. A request picks one of them, and names no path. Blocks."""
    found = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
    return {
        name: _File(content, _TYPES[Path(name).suffix], f'"{sha256(content).hexdigest()[:32]}"')
        for name, content in found.items()
    }


async def _answer(request: Request, name: str) -> Response:
    """A file, or that the browser has it already. Raises Problem."""
    file = (await anyio.to_thread.run_sync(_files)).get(name)
    if file is None:
        raise not_found()
    headers = _HEADERS | {"ETag": file.tag}
    if is_known(request, file.tag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index(request: Request) -> Response:
    return await _answer(request, "index.html")


@router.api_route("/q/{query}", methods=["GET", "HEAD"], include_in_schema=False)
async def query(request: Request, query: str) -> Response:
    """The same page whatever the id: whether there is such a query, the API tells to whom it belongs."""
    if not _QUERY.fullmatch(query):
        raise not_found()
    return await _answer(request, "query.html")


@router.api_route("/login", methods=["GET", "HEAD"], include_in_schema=False)
async def login_page(request: Request) -> Response:
    return await _answer(request, "login.html")


@router.api_route("/static/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    if name.endswith(".html"):  # pages have addresses of their own
        raise not_found()
    return await _answer(request, name)


class SessionView(BaseModel):
    """Who has logged in. csrf: what unsafe requests of a session have to send along; null without a session."""

    tenant: str = Field(examples=["acme"])
    scopes: list[str] = Field(examples=[["query", "read"]])
    csrf: str | None = Field(examples=["cS1y0bVbV2m0cXl6c2xhbmd1YWdl"])


@router.get("/v1/session", responses=documented(403, 429, 503), summary="Who has logged in.")
async def get_session(
    request: Request, response: Response, principal: Annotated[Principal, Depends(principal_of)]
) -> SessionView:
    """The tenant, what the key may do, and the token that a page sends along with whatever changes something."""
    response.headers["Cache-Control"] = "no-store"
    found = the_gate(request).session(request) if principal.via == "session" else None
    return SessionView(tenant=principal.tenant, scopes=sorted(principal.scopes), csrf=found.csrf if found else None)


@router.post("/login", include_in_schema=False)
async def login(request: Request) -> Response:
    """Begin a session: 204 for a key in JSON, and for one from a form the way to the first page."""
    require_own_origin(request)
    key, from_form = _key_in(request, await _body(request))
    service = the_service(request)
    try:
        row = await the_gate(request).log_in(request, key)
    except Problem:
        if from_form:
            return RedirectResponse("/login?later", 303)
        raise
    if row is None:
        if from_form:
            return RedirectResponse("/login?refused", 303)
        raise unauthorized()
    if row.suspended:
        raise Problem(403, "suspended", "the tenant is suspended: ask whoever runs this service")
    response: Response = RedirectResponse("/", 303) if from_form else Response(status_code=204)
    set_cookie(response, the_gate(request).sessions.issue(row.id, time.time()), secure=service.secure)
    return response


@router.post("/logout", include_in_schema=False)
async def logout(request: Request) -> Response:
    """End the session, in this browser and for whoever has a copy of its cookie."""
    gate = the_gate(request)
    if session := gate.session(request):
        gate.require_same_page(request)
        gate.sessions.end(session, time.time())
    response = Response(status_code=204)
    set_cookie(response, "", secure=the_service(request).secure)
    return response


async def _body(request: Request) -> bytes:
    """Raises Problem where it is too long for what it is."""
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > _MOST_LOGIN:
            raise Problem(413, "too-large", f"send the key alone, in at most {_MOST_LOGIN:,} bytes")
    return bytes(found)


def _key_in(request: Request, body: bytes) -> tuple[str, bool]:
    """The key, and whether a form had it. Raises Problem."""
    try:
        if request.headers.get("Content-Type", "").partition(";")[0].strip() == "application/json":
            given: Any = json.loads(body)
            key = cast("dict[str, Any]", given).get("key") if isinstance(given, dict) else None
            if isinstance(key, str):
                return key, False
        else:
            return parse_qs(body.decode(), strict_parsing=True, max_num_fields=4)["key"][0], True
    except (ValueError, KeyError, RecursionError):
        pass
    raise Problem(422, "bad-request", "send the key as the field `key`, of a form or of JSON")
