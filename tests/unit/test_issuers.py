"""Whose tokens a tenant lets in: what cannot be said of an issuer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.core.api_keys import EVERYDAY
from orchestrator.core.issuers import Issuer

PUBLIC = {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "1"}
SAID: dict[str, Any] = {
    "issuer": "https://login.example",
    "audience": "airlock",
    "algorithm": "RS256",
    "jwks": {"keys": [PUBLIC]},
}


def test_an_issuer():
    found = Issuer.model_validate(SAID)
    assert found.scopes == EVERYDAY, "nobody administers by a token unless that is said"
    assert Issuer.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("algorithm", ["none", "HS256", "HS512", "rs256", "", None, ["RS256"]])
def test_the_algorithm_is_one_of_a_key_pair(algorithm: Any):
    with pytest.raises(ValidationError):
        Issuer.model_validate({**SAID, "algorithm": algorithm})


@pytest.mark.parametrize(
    "uri",
    ["https://login.example/keys", "https://[::1]/keys", "http://127.0.0.1:8000/keys", "http://localhost/keys"],
)
def test_where_keys_may_be(uri: str):
    assert Issuer.model_validate({**SAID, "jwks": None, "jwks_uri": uri}).jwks_uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "http://login.example/keys",
            "http://127.0.0.1.example/keys",
            "http://127.0.0.1@login.example/",
            "file:///etc/k",
        ),
        *("https:///keys", "https://user@login.example/keys", "https://a/#b", "//login.example", "", "https://a b/"),
    ],
)
def test_where_keys_may_not_be(uri: str):
    with pytest.raises(ValidationError):
        Issuer.model_validate({**SAID, "jwks": None, "jwks_uri": uri})


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [1],
        {},
        None,
        [{**PUBLIC, "d": "AQAB"}],
        [PUBLIC, {"kty": "oct", "k": "AAAA"}],
        [{"kty": "oct"}],
        [PUBLIC] * 33,
    ],
)
def test_keys_that_are_none_or_not_public(keys: Any):
    with pytest.raises(ValidationError):
        Issuer.model_validate({**SAID, "jwks": {"keys": keys}})


@pytest.mark.parametrize(
    "change",
    [
        {"jwks": None},
        {"jwks_uri": "https://login.example/keys"},
        {"issuer": ""},
        {"issuer": "a\0"},
        {"issuer": "a b"},
        {"audience": "\ud800"},
        {"audience": "x" * 513},
        {"scopes": ["root"]},
        {"scopes": ["read"] * 6},
        {"more": 1},
    ],
)
def test_what_is_no_issuer(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        Issuer.model_validate({**SAID, **change})
