"""Whether a client has a thing already (RFC 9110 section 13.1.2)."""

from __future__ import annotations

from starlette.requests import Request


def is_known(request: Request, tag: str) -> bool:
    """tag: the thing's ETag, with its quotes."""
    known = [known.strip().removeprefix("W/") for known in request.headers.get("If-None-Match", "").split(",")]
    return tag in known or known == ["*"]
