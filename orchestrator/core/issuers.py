"""Whose tokens (JWT, RFC 7519) a tenant lets in: everything that decides is said here, and nothing by a token."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orchestrator.core.api_keys import EVERYDAY, SCOPES, Scope

MOST_KEYS = 32  # of an issuer
MOST_WORD = 512  # characters
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NOT_PUBLIC = {
    "d",
    "p",
    "q",
    "dp",
    "dq",
    "qi",
    "oth",
    "k",
    "priv",
}  # members of a JWK (RFC 7518) that only its owner has

_PUBLIC = ("kty", "kid", "use", "alg", "n", "e", "crv", "x", "y")  # that are looked at
_MOST_MEMBER = 4096  # characters

_EXAMPLE: dict[str, Any] = {
    "issuer": "https://login.example/",
    "audience": "airlock-acme",
    "algorithm": "RS256",
    "jwks_uri": "https://login.example/.well-known/jwks.json",
    "scopes": ["query", "read"],
}

Word = Annotated[str, Field(min_length=1, max_length=MOST_WORD, pattern=r"^[!-~]+$")]


class Issuer(BaseModel):
    """issuer, audience: what the token's `iss` and `aud` have to be; both together belong to one tenant alone.

    algorithm: the one that tokens are signed with; of a key pair, so that who can check a token cannot make one. jwks:
    the public keys (RFC 7517), or jwks_uri: where they are. scopes: words of the token's `scope` that are heeded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"examples": [_EXAMPLE]})

    issuer: Word
    audience: Word
    algorithm: Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
    jwks: dict[str, Any] | None = None
    jwks_uri: Word | None = None
    scopes: Annotated[tuple[Scope, ...], Field(max_length=len(SCOPES))] = EVERYDAY

    @field_validator("jwks_uri")
    @classmethod
    def _address(cls, uri: str | None) -> str | None:
        if uri is not None:
            parts = urlsplit(uri)
            if not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)):
                raise ValueError("has to be an address with https://")
            if not parts.hostname or parts.username is not None or parts.fragment:
                raise ValueError("has to be https://HOST/PATH, without a user or a fragment")
        return uri

    @field_validator("jwks")
    @classmethod
    def _keys(cls, jwks: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if jwks is None else {"keys": public_keys(jwks)}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.jwks is None) == (self.jwks_uri is None):
            raise ValueError("takes either jwks, the keys themselves, or jwks_uri, where they are")
        return self


def public_keys(jwks: Any) -> list[dict[str, str]]:
    """The keys of a JWK set, with what is used of them. Raises ValueError where it is none, or has a secret in it."""
    named: Any = cast("Any", jwks).get("keys") if isinstance(jwks, dict) else None
    listed = cast("list[Any]", named) if isinstance(named, list) else []
    keys = [cast("dict[str, Any]", key) for key in listed if isinstance(key, dict)]
    if not keys or len(keys) != len(listed):
        raise ValueError('has to be a JWK set: {"keys": [{"kty": ...}, ...]}')
    if len(keys) > MOST_KEYS:
        raise ValueError(f"has more than {MOST_KEYS} keys")
    if any(_NOT_PUBLIC & set(key) or key.get("kty") == "oct" for key in keys):
        raise ValueError("has a private or a shared key in it: give public keys alone")
    return [{name: key[name] for name in _PUBLIC if _is_member(key.get(name))} for key in keys]


def _is_member(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_MEMBER and value.isascii() and value.isprintable()
