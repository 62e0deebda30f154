"""The viewer: pages and what they are made of, as they are in the package, and a browser's way to log in.

A page holds nothing of any tenant: what it shows it asks the API for, as whoever has logged in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath

from orchestrator.server.problems import not_found

router = APIRouter(tags=["viewer"])

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
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    if file.tag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index(request: Request) -> Response:
    return await _answer(request, "index.html")


@router.api_route("/q/{query}", methods=["GET", "HEAD"], include_in_schema=False)
async def query(request: Request, query: Annotated[str, InPath(pattern=r"^[0-9]{8}-[0-9]{6}-[0-9a-f]{10}$")]) -> Response:
    """The same page whatever the id: whether there is such a query, the API tells to whom it belongs."""
    return await _answer(request, "query.html")


@router.api_route("/login", methods=["GET", "HEAD"], include_in_schema=False)
async def login_page(request: Request) -> Response:
    return await _answer(request, "login.html")


@router.api_route("/static/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    if name.endswith(".html"):  # pages have addresses of their own
        raise not_found()
    return await _answer(request, name)
