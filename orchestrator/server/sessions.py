"""Browser sessions: a sealed note of which key began it, and until when. The service remembers none of them.

Each use looks the key up again, so a key that is revoked, or has expired, ends its sessions. The page's script gets a
token to send along with whatever changes something; nobody else's page can read it.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from starlette.responses import Response

from orchestrator.core.api_keys import is_key_id

LASTS_S = 8 * 3600
_PARTS = 4
_MOST = 200  # characters of a cookie


@dataclass(frozen=True, slots=True)
class Session:
    """csrf: what has to come along with unsafe requests."""

    key_id: str
    csrf: str


class Sessions:
    """secret: of the service alone, and of all processes that are one service."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, key_id: str, now: float) -> str:
        """The cookie's value. now: seconds since the epoch."""
        note = f"{key_id}.{int(now) + LASTS_S}.{secrets.token_urlsafe(16)}"
        return f"{note}.{self._sealed('session', note)}"

    def open(self, value: str, now: float) -> Session | None:
        """None for what was not issued here, and for what has expired."""
        parts = value.split(".")
        if len(value) > _MOST or len(parts) != _PARTS or not value.isascii():
            return None
        note = value.rpartition(".")[0]
        if not hmac.compare_digest(self._sealed("session", note), parts[3]) or not is_key_id(parts[0]):
            return None
        return Session(parts[0], self._sealed("csrf", note)) if now < int(parts[1]) else None

    def _sealed(self, purpose: str, note: str) -> str:
        return hmac.digest(self._secret, f"{purpose} {note}".encode(), "sha256").hex()


def cookie_name(*, secure: bool) -> str:
    """A browser takes the prefix from this host alone, over TLS alone (RFC 6265bis)."""
    return "__Host-airlock" if secure else "airlock"


def set_cookie(response: Response, value: str, *, secure: bool) -> None:
    """An empty value ends the session in this browser."""
    response.set_cookie(
        cookie_name(secure=secure),
        value,
        max_age=LASTS_S if value else 0,
        secure=secure,
        httponly=True,
        samesite="strict",
        path="/",
    )
