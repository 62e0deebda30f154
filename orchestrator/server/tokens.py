"""Tokens (JWT) of a tenant's own issuer.

A token says of itself whose it is (`iss`, `aud`), and nothing else is believed before its signature is checked: with
the one algorithm that is configured, by a key that is configured or comes from the configured address.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import anyio
import anyio.to_thread
import httpx2
import jwt
from jwt.api_jwk import PyJWK
from jwt.utils import base64url_decode

from orchestrator.core.issuers import Issuer, public_keys
from orchestrator.server.service import Principal
from orchestrator.store.registered import TenantRow
from orchestrator.store.registry import Registry

LEEWAY_S = 30
FETCH_S = 5.0  # of an issuer's keys, in all
FRESH_S = 600.0  # that fetched keys are used without a further look
STALE_S = 3600.0  # that they are used while their address fails
AGAIN_S = 60.0  # between two fetches, whatever is asked for
MOST_BYTES = 256 * 1024  # of an issuer's keys
MOST_TOKEN = 8192  # characters
_MOST_SUBJECT = 128  # characters; what the database has for who asked
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Fetched:
    """What is known of the keys at one address. Times are monotonic seconds."""

    keys: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    at: float = -math.inf  # when they were had
    tried: float = -math.inf
    lock: anyio.Lock = field(default_factory=anyio.Lock)

    @property
    def age(self) -> float:
        return time.monotonic() - self.at


class Tokens:
    """fetch: the bytes at an address; raises OSError where they are not to be had."""

    def __init__(self, registry: Registry, fetch: Callable[[str], Awaitable[bytes]] | None = None) -> None:
        self._registry = registry
        self._fetch = fetch or fetch_keys
        self._fetched: dict[str, _Fetched] = {}

    async def check(self, text: str) -> tuple[Principal, TenantRow] | None:
        """Who the token is of, and the tenant; None for one that is not good, whatever is wrong with it."""
        said = _said(text)
        if said is None:
            return None
        found = await anyio.to_thread.run_sync(self._registry.issuers, said.issuer)
        ours = [(row, issuer) for row, issuer in found if issuer.audience in said.audiences]
        if len(ours) != 1:  # a token for two tenants at once is for neither
            return None
        row, issuer = ours[0]
        key = await self._key(issuer, said.key_id)
        claims = await anyio.to_thread.run_sync(_checked, text, key, issuer) if key else None
        return None if claims is None else _principal(claims, row, issuer)

    async def _key(self, issuer: Issuer, key_id: str | None) -> PyJWK | None:
        if issuer.jwks is not None:
            return _chosen(issuer.jwks["keys"], issuer, key_id)
        assert issuer.jwks_uri is not None, "an issuer has the one or the other"
        kept = self._fetched.setdefault(issuer.jwks_uri, _Fetched())
        key = _chosen(kept.keys, issuer, key_id)
        if key is None or kept.age >= FRESH_S:  # else nobody waits for what others have looked for
            await self._refresh(issuer.jwks_uri, kept)
            key = _chosen(kept.keys, issuer, key_id)
        return key if kept.age < STALE_S else None

    async def _refresh(self, uri: str, kept: _Fetched) -> None:
        async with kept.lock:
            if time.monotonic() - kept.tried < AGAIN_S:
                return
            kept.tried = time.monotonic()
            await self._get(uri, kept)

    async def _get(self, uri: str, kept: _Fetched) -> None:
        try:
            found: Any = json.loads(await self._fetch(uri))
            kept.keys, kept.at = public_keys(found), kept.tried
        except (OSError, ValueError, RecursionError) as error:
            _log.warning("the keys of a token issuer cannot be had from %s: %s", uri, str(error)[:200])


async def fetch_keys(uri: str) -> bytes:
    """Raises OSError. No redirect is followed, and nothing large or slow is waited for."""
    content = bytearray()
    try:
        with anyio.fail_after(FETCH_S):
            async with (
                httpx2.AsyncClient(follow_redirects=False, timeout=FETCH_S, trust_env=False) as client,
                client.stream("GET", uri, headers={"Accept": "application/json"}) as answer,
            ):
                if answer.status_code != 200:
                    raise OSError(f"it answers {answer.status_code}")
                async for part in answer.aiter_bytes():
                    content += part
                    if len(content) > MOST_BYTES:
                        raise OSError(f"it has more than {MOST_BYTES:,} bytes")
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
        raise OSError(str(error) or type(error).__name__) from None
    return bytes(content)


def require_usable(issuer: Issuer) -> None:
    """Raises ValueError where none of its inline keys can check a token."""
    if issuer.jwks is not None and not any(_public(json.dumps(key), issuer.algorithm) for key in issuer.jwks["keys"]):
        raise ValueError(f"none of the keys in jwks can be used with {issuer.algorithm}")


@dataclass(frozen=True, slots=True)
class _Said:
    issuer: str
    audiences: tuple[str, ...]
    key_id: str | None


def _said(text: str) -> _Said | None:
    """What a token says of itself, with nothing checked but its form."""
    if len(text) > MOST_TOKEN or not text.isascii() or text.count(".") != 2:
        return None
    try:
        header, claims = (json.loads(base64url_decode(part)) for part in text.split(".")[:2])
        named: Any = claims["aud"]
        audiences = tuple(cast("list[Any]", named)) if isinstance(named, list) else (named,)
        issuer, key_id = claims["iss"], header.get("kid")
        times = [claims["exp"], *(claims[name] for name in ("nbf", "iat") if name in claims)]
        sound = all(type(at) in (int, float) and math.isfinite(at) for at in times)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    sound = sound and all(isinstance(word, str) for word in (issuer, *audiences)) and isinstance(key_id, str | None)
    return _Said(issuer, audiences, key_id) if sound else None


def _chosen(keys: list[dict[str, Any]], issuer: Issuer, key_id: str | None) -> PyJWK | None:
    """The key that a token names; where it names none, the only one."""
    named = [key for key in keys if key_id is None or key.get("kid") == key_id]
    usable = [key for key in (_public(json.dumps(key), issuer.algorithm) for key in named) if key]
    return usable[0] if len(usable) == 1 else None


@lru_cache(256)
def _public(jwk: str, algorithm: str) -> PyJWK | None:
    """The key, if it is one to check signatures of this algorithm with."""
    fields = json.loads(jwk)
    if fields.get("use", "sig") != "sig" or fields.get("alg", algorithm) != algorithm:
        return None
    try:
        key = PyJWK(fields, algorithm)
        return (
            None if key.Algorithm.check_key_length(key.key) else key
        )  # what it says of a length is that it is too short
    except (jwt.PyJWTError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _checked(text: str, key: PyJWK, issuer: Issuer) -> dict[str, Any] | None:
    try:
        return jwt.decode(
            text,
            key,
            algorithms=[issuer.algorithm],
            audience=issuer.audience,
            issuer=issuer.issuer,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def _principal(claims: dict[str, Any], row: TenantRow, issuer: Issuer) -> tuple[Principal, TenantRow] | None:
    subject, scope = claims["sub"], claims.get("scope", "")
    if not (isinstance(subject, str) and 0 < len(subject) <= _MOST_SUBJECT and subject.isprintable()):
        return None
    words = set(scope.split(" ")) if isinstance(scope, str) else set[str]()
    return Principal(row.name, frozenset(words & set[str](issuer.scopes)), subject, "token"), row
