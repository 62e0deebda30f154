"""Browser sessions: a sealed note of which key began it, and until when. The service remembers those that were ended.

Each use looks the key up again, so a key that is revoked, or has expired, ends its sessions. The page's script gets a
token to send along with whatever changes something; nobody else's page can read it. What was ended is remembered in
memory until it would have expired: by this process alone, and not after a restart.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from starlette.responses import Response

from orchestrator.core.api_keys import is_key_id

LASTS_S = 8 * 3600
MOST_ENDED = 64  # sessions of one key that are remembered one by one
_PARTS = 4
_MOST = 200  # characters of a cookie


@dataclass(frozen=True, slots=True)
class Session:
    """id: random. until: seconds since the epoch. csrf: what has to come along with unsafe requests."""

    key_id: str
    id: str
    until: int
    csrf: str


class Sessions:
    """secret: of the service alone, and of all processes that are one service."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._ended: dict[str, dict[str, int]] = {}  # key -> ids of sessions, and until when they would be good
        self._all_ended: dict[str, int] = {}  # key -> sessions that are good until then, or less long, have ended

    def issue(self, key_id: str, now: float) -> str:
        """The cookie's value. now: seconds since the epoch."""
        note = f"{key_id}.{int(now) + LASTS_S}.{secrets.token_urlsafe(16)}"
        return f"{note}.{self._sealed('session', note)}"

    def open(self, value: str, now: float) -> Session | None:
        """None for what was not issued here, for what has expired, and for what was ended."""
        parts = value.split(".")
        if len(value) > _MOST or len(parts) != _PARTS or not value.isascii():
            return None
        note = value.rpartition(".")[0]
        if not hmac.compare_digest(self._sealed("session", note), parts[3]) or not is_key_id(parts[0]):
            return None
        session = Session(parts[0], parts[2], int(parts[1]), self._sealed("csrf", note))
        return session if now < session.until and not self._has_ended(session) else None

    def end(self, session: Session, now: float) -> None:
        """It opens no more, whoever has a copy.

        Where a key has too many that were ended, all of its sessions that began no later end: nobody can make the
        service forget one by ending others.
        """
        ended = {id_: until for id_, until in self._ended.get(session.key_id, {}).items() if now < until}
        ended[session.id] = session.until
        if len(ended) > MOST_ENDED:
            self._all_ended[session.key_id] = max(ended.values())
            ended.clear()
        self._ended[session.key_id] = ended

    def _has_ended(self, session: Session) -> bool:
        return session.until <= self._all_ended.get(session.key_id, 0) or session.id in self._ended.get(
            session.key_id, ()
        )

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
