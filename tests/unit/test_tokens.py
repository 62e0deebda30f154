"""Tokens of a tenant's issuer: what is configured decides, and not what a token says of itself."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from orchestrator.core.issuers import Issuer
from orchestrator.server import tokens
from orchestrator.server.service import Principal
from orchestrator.server.tokens import Tokens, fetch_keys, require_usable
from orchestrator.store import journal
from orchestrator.store.db import Database
from orchestrator.store.registry import Registry
from orchestrator.store.signing import Notary
from orchestrator.store.vault import open_vault
from tests.unit.helpers import fill

pytestmark = pytest.mark.anyio
ISSUER = "https://login.example"


@cache
def private(algorithm: str, number: int) -> Any:
    """A key of this kind; another number, another key."""
    assert number >= 0
    match algorithm[:2]:
        case "RS" | "PS":
            return rsa.generate_private_key(65537, 2048)
        case "ES":
            curve = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}[algorithm]
            return ec.generate_private_key(curve)
        case _:
            return ed25519.Ed25519PrivateKey.generate()


def jwk(algorithm: str = "RS256", number: int = 0, **more: Any) -> dict[str, Any]:
    """The public half."""
    kind: Any = get_default_algorithms()[algorithm]
    fields = kind.to_jwk(private(algorithm, number).public_key(), as_dict=True)
    fields.pop("key_ops", None)
    return {**fields, "kid": f"k{number}", **more}


def issuer(algorithm: str = "RS256", **more: Any) -> Issuer:
    said = {"issuer": ISSUER, "audience": "airlock", "algorithm": algorithm, "jwks": {"keys": [jwk(algorithm)]}}
    return Issuer.model_validate({**said, **more})


def claims(**more: Any) -> dict[str, Any]:
    said = {"iss": ISSUER, "aud": "airlock", "sub": "ann", "exp": time.time() + 300, "scope": "read query openid"}
    return {name: value for name, value in {**said, **more}.items() if value is not ...}


def signed(body: Any = None, algorithm: str = "RS256", number: int = 0, **header: Any) -> str:
    header = {"kid": f"k{number}", **header}
    text = body if isinstance(body, bytes) else json.dumps(claims() if body is None else body).encode()
    named = {name: value for name, value in header.items() if value is not ...}
    return jwt.api_jws.PyJWS().encode(text, private(algorithm, number), algorithm, headers=named)


def b64(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    fill(tmp_path)
    db = Database(tmp_path)
    vault = open_vault(db, tmp_path, None, journal.key_created)
    made = Registry(db, vault, Notary(vault.signer(), tmp_path / "heads", vault.stamp))
    made.add_tenant("acme", by="a test")
    made.add_tenant("other", by="a test")
    yield made
    db.close()


async def who(registry: Registry, text: str) -> Principal | None:
    found = await Tokens(registry).check(text)
    return found[0] if found else None


# What is taken


@pytest.mark.parametrize(
    "algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
)
async def test_a_token_of_the_tenants_issuer(registry: Registry, algorithm: str):
    registry.set_issuer("acme", issuer(algorithm), by="a test")
    said = Principal("acme", frozenset({"read", "query"}), "ann", "token")
    assert await who(registry, signed(algorithm=algorithm)) == said
    assert await who(registry, signed(algorithm=algorithm, kid=...)) == said, "it is the only key"
    assert await who(registry, signed(claims(aud=["x", "airlock"]), algorithm=algorithm)) == said


async def test_scopes_are_those_that_both_name(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    for scope, heeded in [
        ("admin metrics read", {"read"}),
        ("", set()),
        (..., set()),
        (["read"], set()),
        ("READ read\0", set()),
    ]:
        found = await who(registry, signed(claims(scope=scope)))
        assert found
        assert found.scopes == heeded
    registry.set_issuer("acme", issuer(scopes=["admin"]), by="a test")
    found = await who(registry, signed(claims(scope="admin metrics read")))
    assert found
    assert found.scopes == {"admin"}, "where that is configured, and then nothing else"


async def test_clocks_may_differ_a_little(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    now = time.time()
    for good in ({"exp": now - 20}, {"nbf": now + 20}, {"iat": now + 20}, {"nbf": now - 9, "iat": now - 9.5}):
        assert await who(registry, signed(claims(**good))), good


async def test_a_suspended_tenant_is_told_apart(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    registry.suspend("acme", by="a test")
    found = await Tokens(registry).check(signed())
    assert found
    assert found[1].suspended_at


# What is not


@pytest.mark.parametrize(
    "wrong",
    [
        {"exp": ...},
        {"exp": 1},
        {"exp": None},
        {"exp": "2999"},
        {"exp": True},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": -(10**400)},
        {"exp": time.time() - 40},
        {"nbf": 32_503_680_000},
        {"nbf": "x"},
        {"iat": 32_503_680_000},
        {"iat": None},
        {"iss": ...},
        {"iss": "https://evil.example"},
        {"iss": ISSUER.upper()},
        {"iss": ISSUER + "/"},
        {"iss": [ISSUER]},
        {"iss": "\ud800"},
        {"iss": "\0" * 600},
        {"aud": ...},
        {"aud": "another"},
        {"aud": []},
        {"aud": [1]},
        {"aud": {"airlock": 1}},
        {"aud": None},
        {"sub": ...},
        {"sub": ""},
        {"sub": 7},
        {"sub": "a\0"},
        {"sub": "\ud800"},
        {"sub": "x" * 129},
    ],
)
async def test_claims_that_are_not_good(registry: Registry, wrong: dict[str, Any]):
    registry.set_issuer("acme", issuer(), by="a test")
    assert await who(registry, signed(claims(**wrong))) is None
    assert await who(registry, signed()), "and without it, it is"


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff", b'{"exp":' + b"9" * 5000 + b"}", b"[" * 3000])
async def test_payloads_that_are_no_claims(registry: Registry, body: bytes):
    registry.set_issuer("acme", issuer(), by="a test")
    assert await who(registry, signed(body)) is None


async def test_a_token_without_a_signature(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    body = b64(json.dumps(claims()).encode())
    for name in ("none", "None", "NONE", "", None, "nOnE"):
        head = b64(json.dumps({"alg": name, "kid": "k0"}).encode())
        assert await who(registry, f"{head}.{body}.") is None
    head, body, _ = signed().split(".")
    assert await who(registry, f"{head}.{body}.") is None


@pytest.mark.parametrize("form", [PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1])
async def test_the_public_key_is_no_shared_secret(registry: Registry, form: PublicFormat):
    """Key confusion: HS256 with the issuer's public key, which everybody has."""
    registry.set_issuer("acme", issuer(), by="a test")
    public: Any = private("RS256", 0).public_key()
    head = b64(json.dumps({"alg": "HS256", "kid": "k0"}).encode())
    told = f"{head}.{b64(json.dumps(claims()).encode())}"
    secrets = [public.public_bytes(Encoding.PEM, form), public.public_bytes(Encoding.DER, form)]
    for secret in (*secrets, secrets[0].strip(), json.dumps(jwk()).encode(), b""):
        forged = f"{told}.{b64(hmac.digest(secret, told.encode(), 'sha256'))}"
        assert await who(registry, forged) is None


async def test_the_algorithm_is_the_one_that_is_configured(registry: Registry):
    """The same key, and a signature that is good: RS512 where RS256 is configured."""
    registry.set_issuer("acme", issuer(), by="a test")
    text = jwt.encode(claims(), private("RS256", 0), "RS512", headers={"kid": "k0"})
    assert await who(registry, text) is None
    assert await who(registry, jwt.encode(claims(), private("RS256", 0), "PS256", headers={"kid": "k0"})) is None


async def test_a_key_in_the_token_is_not_used(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    for header in ({"jwk": jwk(number=1)}, {"jku": "http://127.0.0.1:9/keys"}, {"x5u": "http://127.0.0.1:9/"}):
        assert await who(registry, signed(number=1, **{"kid": "k0", **header})) is None


async def test_another_key_of_the_same_name(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    assert await who(registry, signed(number=1, kid="k0")) is None
    assert await who(registry, signed(number=1)) is None
    assert await who(registry, signed(kid="k0\0")) is None
    for name in ("k0", 7, None, [], {"k0": 1}, "\ud800"):
        head = b64(json.dumps({"alg": "RS256", "kid": name}).encode())
        told = f"{head}.{signed().split('.')[1]}"
        signature = private("RS256", 0).sign(told.encode(), padding.PKCS1v15(), hashes.SHA256())
        assert bool(await who(registry, f"{told}.{b64(signature)}")) == (name == "k0")


async def test_a_changed_token(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    head, body, tail = signed().split(".")
    wider = b64(json.dumps(claims(scope="admin")).encode())
    for text in (f"{head}.{wider}.{tail}", f"{head}.{body}.{tail[:-8]}", f"{head}.{body}", f"{head}.{body}.{tail}.x"):
        assert await who(registry, text) is None


async def test_a_token_is_for_one_tenant(registry: Registry):
    """One issuer, two audiences, two tenants, and both with the same keys."""
    registry.set_issuer("acme", issuer(), by="a test")
    registry.set_issuer("other", issuer(audience="theirs"), by="a test")
    for audience, tenant in (("airlock", "acme"), ("theirs", "other")):
        found = await who(registry, signed(claims(aud=audience)))
        assert found
        assert found.tenant == tenant
    assert await who(registry, signed(claims(aud=["airlock", "theirs"]))) is None


async def test_one_tenants_issuer_speaks_for_no_other(registry: Registry):
    registry.set_issuer("acme", issuer(), by="a test")
    evil = issuer(issuer="https://evil.example", audience="evil", jwks={"keys": [jwk(number=1)]})
    registry.set_issuer("other", evil, by="a test")
    assert await who(registry, signed(number=1)) is None
    assert await who(registry, signed(claims(aud="evil"), number=1)) is None
    assert await who(registry, signed(claims(iss="https://evil.example"), number=1)) is None
    found = await who(registry, signed(claims(iss="https://evil.example", aud="evil"), number=1))
    assert found
    assert found.tenant == "other"
    registry.set_issuer("other", None, by="a test")
    assert await who(registry, signed(claims(iss="https://evil.example", aud="evil"), number=1)) is None


async def test_a_huge_token_is_not_looked_at(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    registry.set_issuer("acme", issuer(), by="a test")
    looked: list[str] = []
    monkeypatch.setattr(registry, "issuers", lambda name: looked.append(name) or [])
    assert await who(registry, signed(claims(more="x" * 8192))) is None
    assert await who(registry, "eyJ" + "A" * 10**7 + "..") is None
    assert await who(registry, "eyJ." * 10**5) is None
    assert looked == []
    await who(registry, signed())
    assert looked == [ISSUER]


# Keys


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "RSA"},
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "n": 1, "e": 2},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": ["RSA"]},
        {"n": "AA"},
        {**jwk("ES256")},
        {**jwk(), "use": "enc"},
        {**jwk(), "alg": "RS512"},
        {"kty": "RSA", "n": b64(b"\xff" * 64), "e": "AQAB"},
    ],
)
async def test_keys_that_cannot_be_used(registry: Registry, key: dict[str, Any]):
    unusable = issuer(jwks={"keys": [{**key, "kid": "k0"}]})
    with pytest.raises(ValueError, match="none of the keys in jwks can be used with RS256"):
        require_usable(unusable)
    registry.set_issuer("acme", unusable, by="a test")
    assert await who(registry, signed()) is None
    require_usable(issuer(jwks={"keys": [key, jwk()]}))


async def test_two_keys_of_one_name_are_none(registry: Registry):
    registry.set_issuer("acme", issuer(jwks={"keys": [jwk(), jwk(number=1, kid="k0")]}), by="a test")
    assert await who(registry, signed()) is None
    assert await who(registry, signed(kid=...)) is None


# Keys at an address


@dataclass
class Served:
    """A server of keys on this machine. asked: how often. hold: what it waits for; reached: that it does."""

    url: str
    asked: int = 0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hold: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def served() -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked += 1
            if found.hold:
                found.reached.set()
                found.hold.wait(20)
            self.send_response(found.status)
            for name, value in {"Content-Length": str(len(found.body)), **found.headers}.items():
                self.send_header(name, value)
            with suppress(OSError):  # whoever asked has not waited
                self.end_headers()
                self.wfile.write(found.body)

        def log_message(self, *_: object) -> None:
            """Nothing: standard error is the tests'."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = Served(f"http://127.0.0.1:{server.server_port}/keys", body=json.dumps({"keys": [jwk()]}).encode())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    if found.hold:
        found.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


def remote(served: Served, **more: Any) -> Issuer:
    return issuer(jwks=None, jwks_uri=served.url, **more)


async def test_keys_are_fetched_once(registry: Registry, served: Served):
    registry.set_issuer("acme", remote(served), by="a test")
    checks = Tokens(registry)
    assert served.asked == 0
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(checks.check, signed())
    assert await checks.check(signed())
    assert served.asked == 1


async def test_an_unknown_key_is_looked_for_once_a_minute(
    registry: Registry, served: Served, monkeypatch: pytest.MonkeyPatch
):
    registry.set_issuer("acme", remote(served), by="a test")
    checks, at = Tokens(registry), 1000.0
    monkeypatch.setattr(tokens, "time", SimpleNamespace(monotonic=lambda: at))
    assert await checks.check(signed())
    served.body = json.dumps({"keys": [jwk(number=1)]}).encode()
    for _ in range(20):
        assert await checks.check(signed(number=1)) is None
    assert served.asked == 1
    at += tokens.AGAIN_S
    assert await checks.check(signed(number=1))
    assert await checks.check(signed()) is None, "what is not there any more is not used any more"
    assert served.asked == 2


async def test_a_key_that_was_taken_back_is_not_used_for_long(
    registry: Registry, served: Served, monkeypatch: pytest.MonkeyPatch
):
    registry.set_issuer("acme", remote(served), by="a test")
    checks, at = Tokens(registry), 1000.0
    monkeypatch.setattr(tokens, "time", SimpleNamespace(monotonic=lambda: at))
    assert await checks.check(signed())
    served.body = json.dumps({"keys": [jwk(number=1)]}).encode()
    at += tokens.FRESH_S
    assert await checks.check(signed()) is None


async def test_while_the_address_fails_keys_are_used_for_an_hour(
    registry: Registry, served: Served, monkeypatch: pytest.MonkeyPatch
):
    registry.set_issuer("acme", remote(served), by="a test")
    checks, at = Tokens(registry), 1000.0
    monkeypatch.setattr(tokens, "time", SimpleNamespace(monotonic=lambda: at))
    assert await checks.check(signed())
    served.status = 500
    at += tokens.STALE_S - 1
    assert await checks.check(signed())
    at += 1
    assert await checks.check(signed()) is None
    assert served.asked == 2, "a failing address is not asked again and again"
    served.status = 200
    at += tokens.AGAIN_S
    assert await checks.check(signed())


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 404},
        {"status": 302, "headers": {"Location": "/keys"}},
        {"status": 307, "headers": {"Location": "http://127.0.0.1:9/"}},
        {"body": b"<html>"},
        {"body": b"[]"},
        {"body": b"{}"},
        {"body": b"[" * 100_000},
        {"body": b'{"keys": [{"kty": "oct", "k": "AAAA"}]}'},
        {"body": b'{"keys": []}'},
        {"body": b" " * (tokens.MOST_BYTES + 1)},
        {"body": b"", "headers": {"Content-Length": "100"}},
        {"body": b"\xff", "headers": {"Content-Encoding": "gzip"}},
    ],
)
async def test_answers_that_are_no_keys(registry: Registry, served: Served, answer: dict[str, Any]):
    registry.set_issuer("acme", remote(served), by="a test")
    for name, value in answer.items():
        setattr(served, name, value)
    assert await who(registry, signed()) is None
    assert served.asked == 1


async def test_nobody_waits_for_a_server_that_is_silent(
    registry: Registry, served: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens, "FETCH_S", 0.2)
    served.hold = threading.Event()
    with pytest.raises(OSError, match=r"(?i)time"):
        await fetch_keys(served.url)
    registry.set_issuer("acme", remote(served), by="a test")
    assert await who(registry, signed()) is None


async def test_who_has_a_known_key_does_not_wait_for_an_unknown_one(
    registry: Registry, served: Served, monkeypatch: pytest.MonkeyPatch
):
    registry.set_issuer("acme", remote(served), by="a test")
    checks, at = Tokens(registry), 1000.0
    monkeypatch.setattr(tokens, "time", SimpleNamespace(monotonic=lambda: at))
    assert await checks.check(signed())
    at += tokens.AGAIN_S
    served.hold = threading.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(checks.check, signed(number=1))
        assert await anyio.to_thread.run_sync(served.reached.wait, 10)
        assert await checks.check(signed())
        served.hold.set()


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1/", "http://localhost:0/", "https://127.0.0.1:1/", "http://[::1]:1/"]
)
async def test_addresses_where_nobody_is(uri: str):
    with pytest.raises(OSError, match=r"\S"):
        await fetch_keys(uri)
