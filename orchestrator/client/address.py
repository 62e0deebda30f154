"""Where a service is that a key may go to."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from orchestrator.core.errors import RequestError


def address(url: str) -> str:
    """The service's, without a slash at its end. Raises RequestError for one that a key must not go to."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        parts, host = None, ""
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not host
        or parts.query
        or parts.fragment
        or "@" in url
    ):
        raise RequestError("the address of a service is https://HOST, with a port and a path where it has them")
    if parts.scheme == "http" and not _is_here(host):
        raise RequestError(f"http://{parts.netloc} would have the API key go over a network in the clear: use https://")
    return url.rstrip("/")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
