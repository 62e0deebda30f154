"""API keys: `al_ID_SECRETCHECK`, and what a key may be for.

ID names the key and is no secret: 60 bits in base32. SECRET is 256 bits in base62. CHECK is the CRC-32 of `ID_SECRET`
in base62: a key that was cut or mistyped is told from a wrong one without a look at the database, and whoever searches
texts for keys knows one when he sees it.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Scope = Literal["query", "read", "audit", "metrics", "admin"]
SCOPES: dict[Scope, str] = {
    "query": "ask and cancel queries, give contexts",
    "read": "see queries, contexts and budgets",
    "audit": "see records, proofs and exports; replay",
    "metrics": "see what the service as a whole does",
    "admin": "manage tenants, keys and policies of the whole platform",
}
EVERYDAY: tuple[Scope, ...] = ("query", "read", "audit")  # of a key for which nothing else is said
RANDOM_BYTES = 8 + 32  # what a new key takes

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID, _SECRET, _CHECK = 12, 43, 6  # characters
_KEY = re.compile(rf"al_([a-z2-7]{{{_ID}}})_([0-9A-Za-z]{{{_SECRET}}})([0-9A-Za-z]{{{_CHECK}}})", re.ASCII)
_KEY_ID = re.compile(rf"[a-z2-7]{{{_ID}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    secret: str

    def __repr__(self) -> str:
        return f"ApiKey({self.id!r})"  # a traceback shows no secret

    @property
    def text(self) -> str:
        """What its holder has."""
        return f"al_{self.id}_{self.secret}{_check(self.id, self.secret)}"


def make_key(random: bytes) -> ApiKey:
    """A key out of RANDOM_BYTES that nobody can guess."""
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"a key takes {RANDOM_BYTES} random bytes, not {len(random)}")
    name = base64.b32encode(random[:8]).decode().lower()[:_ID]
    return ApiKey(name, _base62(int.from_bytes(random[8:]), _SECRET))


def parse_key(text: str) -> ApiKey | None:
    """None for what no Airlock has made."""
    found = _KEY.fullmatch(text)
    if found is None or _check(found[1], found[2]) != found[3]:
        return None
    return ApiKey(found[1], found[2])


def is_key_id(text: str) -> bool:
    return _KEY_ID.fullmatch(text) is not None


def in_order(scopes: Iterable[str]) -> tuple[Scope, ...]:
    """As SCOPES has them, each once. Raises ValueError on an unknown one, and on none at all."""
    named = set(scopes)
    if unknown := sorted(named - set[str](SCOPES)):
        raise ValueError(f"{unknown[0][:40]!r} is no scope: take some of {', '.join(SCOPES)}")
    if not named:
        raise ValueError(f"no scope is named: take some of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in named)


def _check(name: str, secret: str) -> str:
    return _base62(zlib.crc32(f"{name}_{secret}".encode()), _CHECK)


def _base62(number: int, width: int) -> str:
    digits = ""
    for _ in range(width):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits
