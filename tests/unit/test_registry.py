"""Tenants and keys: what is taken, what is on record, and what whoever can write to the database gains by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hmac import compare_digest
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.audit.evidence import LiveEvidence
from orchestrator.audit.verify import verify
from orchestrator.core.api_keys import SCOPES, make_key, parse_key
from orchestrator.core.errors import Conflict, RequestError, StoreError
from orchestrator.core.issuers import Issuer
from orchestrator.store import journal, registered, registry
from orchestrator.store.db import Database
from orchestrator.store.registry import Registry
from orchestrator.store.schema import api_keys, checkpoints, tenants
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault, open_vault
from tests.records import read
from tests.unit.helpers import DEFAULT, Store, policy

JWKS = {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "1"}]}


@pytest.fixture
def keys(db: Database, store: Store) -> Vault:
    return open_vault(db, store.home, None, journal.key_created)


@pytest.fixture
def made(db: Database, keys: Vault, store: Store) -> Iterator[Registry]:
    """A registry; at the end of each test its journal is whole, signed, and fits the schema."""
    notary = Notary(keys.signer(), store.home / "heads", keys.stamp)
    yield Registry(db, keys, notary)
    for record in db.read(lambda tx: tx.execute(sa.text("SELECT record FROM records")).scalars().all()):
        read(bytes(record))
    report = db.read(lambda tx: verify(LiveEvidence(tx, keys), remembered=notary.notes()))
    assert all(verdict.holds for verdict in report.values()), report
    for tenant in db.read(journal.tenants):
        log = f"tenants/{tenant}"
        signed = db.read(
            lambda tx, log=log: tx.scalar(sa.select(sa.func.max(checkpoints.c.size)).where(checkpoints.c.log == log))
        )
        head = notary.remembered(log)
        assert head
        assert head.size == signed == len(actions(db, tenant)), f"the last change of {tenant} is not signed"


def actions(db: Database, tenant: str) -> list[dict[str, str]]:
    chain = db.read(lambda tx: journal.chain(tx, journal.own_chain(tenant).id))
    return [json.loads(record)["body"] for record, _hash in chain]


def changed(db: Database, name: str, **values: Any) -> None:
    """What somebody who can write to the database makes of a key."""
    db.write_sync(lambda tx: tx.execute(sa.update(api_keys).where(api_keys.c.id == name).values(**values)))


def issuer(audience: str = "airlock", name: str = "https://login.example") -> Issuer:
    return Issuer(issuer=name, audience=audience, algorithm="EdDSA", jwks=JWKS)


# Tenants


def test_a_tenant_is_added_once(made: Registry, db: Database):
    row = made.add_tenant("acme", by="a test")
    assert made.tenant("acme") == row
    assert (row.policy, row.issuer, row.suspended_at) == (None, None, None)
    with pytest.raises(Conflict, match=r"^there is a tenant 'acme' already$"):
        made.add_tenant("acme", by="a test")
    assert actions(db, "acme") == [
        {"action": "tenant.added", "subject": "acme", "detail": "the platform's policy", "by": "a test"}
    ]
    assert db.read(journal.tenants) == ["acme"]


@pytest.mark.parametrize("name", ["", "a/b", "a\0", "é", "x" * 65, "\ud800", "a\n"])
def test_names_that_no_tenant_has(made: Registry, name: str):
    with pytest.raises(RequestError, match="is no name for a tenant") as caught:
        made.add_tenant(name, by="a test")
    assert "\n" not in str(caught.value)
    assert made.tenant(name) is None
    assert made.keys(name) == []
    for change in (
        lambda: made.suspend(name, by="a test"),
        lambda: made.create_key(name, by="a test"),
        lambda: made.revoke_key(name, "a" * 12, by="a test"),
    ):
        with pytest.raises(RequestError, match="there is no tenant"):
            change()


def test_tenants_are_listed_byte_by_byte(made: Registry):
    for name in ("b", "B", "a", "a-1", "A_1", "a.1"):
        made.add_tenant(name, by="a test")
    names = [row.name for row in made.tenants()]
    assert names == sorted(names)
    assert [row.name for row in made.tenants("a", 2)] == ["a-1", "a.1"]


def test_a_policy_comes_back_as_it_was(made: Registry, db: Database):
    rules = policy(money={"tenant_day": 3}, models={"root": (("a*",), ("*b",))})
    made.add_tenant("acme", rules, by="a test")
    first = made.tenant("acme")
    assert first
    assert first.policy == rules
    made.set_policy("acme", DEFAULT, by="a test")
    made.set_policy("acme", None, by="a test")
    second = made.tenant("acme")
    assert second
    assert second.policy is None
    said = [(record["action"], record["detail"]) for record in actions(db, "acme")]
    assert said == [
        ("tenant.added", f"policy {rules.sha256()}"),
        ("policy.set", f"policy {DEFAULT.sha256()}"),
        ("policy.removed", "the platform's policy"),
    ]


def test_a_damaged_row_is_no_affair_of_the_others(made: Registry, db: Database):
    for name in ("acme", "other"):
        made.add_tenant(name, DEFAULT, by="a test")
        made.set_issuer(name, issuer(name), by="a test")
    begin = registered.issuer_begins("https://login.example")
    for text in ("", "{", "null", '{"money": 1}', "[" * 100_000, f"{begin}"):
        values = {"policy": text, "issuer": begin + text}
        db.write_sync(lambda tx, values=values: tx.execute(sa.update(tenants).filter_by(name="acme").values(**values)))
        damaged, sound = made.tenants()
        assert (damaged.name, damaged.damaged, sound.damaged) == ("acme", ("policy", "issuer"), ())
        assert (sound.policy, sound.issuer) == (DEFAULT, issuer("other"))
        assert made.tenant("acme") == damaged
        with pytest.raises(StoreError, match="the policy of tenant acme is damaged"):
            _ = damaged.policy  # never None, which would be the platform's alone
        with pytest.raises(StoreError, match="the issuer of tenant acme is damaged"):
            _ = damaged.issuer
        assert [row.name for row, _ in made.issuers("https://login.example")] == ["other"]
    made.set_policy("acme", None, by="a test")
    made.set_issuer("acme", None, by="a test")
    assert [row.damaged for row in made.tenants()] == [(), ()]


def test_a_suspended_tenants_keys_say_so(made: Registry, db: Database):
    made.add_tenant("acme", by="a test")
    row, text = made.create_key("acme", by="a test")
    for _twice in range(2):
        made.suspend("acme", by="a test")
    found, same = made.check_key(text), made.live_key(row.id)
    assert found == same
    assert found
    assert found.suspended
    made.restore("acme", by="a test")
    made.restore("acme", by="a test")
    found = made.check_key(text)
    assert found
    assert not found.suspended
    kinds = [record["action"] for record in actions(db, "acme")]
    assert kinds == ["tenant.added", "key.created", "tenant.suspended", "tenant.restored"]


# Keys


def test_a_key_is_the_tenants_and_has_its_scopes(made: Registry, db: Database):
    made.add_tenant("acme", by="a test")
    row, text = made.create_key("acme", label="ci", scopes=["read", "query"], by="key k of ops")
    assert row.scopes == ("query", "read")
    assert made.check_key(text) == made.live_key(row.id) == row
    assert made.keys("acme") == [row]
    assert actions(db, "acme")[1] == {
        "action": "key.created",
        "subject": row.id,
        "detail": "ci: query, read; no expiry",
        "by": "key k of ops",
    }


def test_nothing_of_the_secret_is_stored(made: Registry, db: Database, store: Store):
    made.add_tenant("acme", by="a test")
    _, text = made.create_key("acme", by="a test")
    key = parse_key(text)
    assert key
    if store.url is None:
        files = [file.read_bytes() for file in store.home.rglob("*") if file.is_file()]
        assert any(key.id.encode() in content for content in files)
        assert not any(key.secret.encode() in content for content in files)
    for table in ("api_keys", "records", "tenants"):
        for line in db.read(lambda tx, table=table: tx.execute(sa.text(f"SELECT * FROM {table}")).all()):  # noqa: S608
            assert key.secret not in str([bytes(part) if isinstance(part, memoryview) else part for part in line])


def test_a_wrong_secret_is_worth_nothing(made: Registry):
    made.add_tenant("acme", by="a test")
    row, text = made.create_key("acme", by="a test")
    forged = make_key(bytes(40))
    named = type(forged)(row.id, forged.secret).text
    assert parse_key(named), "it is well-formed, so that the secret alone decides"
    for wrong in (named, forged.text, text[:-1], "", "\0", "al_" + row.id):
        assert made.check_key(wrong) is None


def test_an_unknown_id_takes_the_steps_of_a_wrong_secret(made: Registry, monkeypatch: pytest.MonkeyPatch):
    made.add_tenant("acme", by="a test")
    row, _ = made.create_key("acme", by="a test")
    forged = make_key(bytes(40))
    compared: list[tuple[int, int]] = []

    def compare(mine: bytes, there: bytes) -> bool:
        compared.append((len(mine), len(there)))
        return compare_digest(mine, there)

    monkeypatch.setattr(registry.hmac, "compare_digest", compare)
    assert made.check_key(type(forged)(row.id, forged.secret).text) is None
    assert made.check_key(forged.text) is None
    assert compared == [(32, 32)] * 2


def test_nobody_is_let_in_as_the_key_that_is_not_there(made: Registry, monkeypatch: pytest.MonkeyPatch):
    """Whatever the comparison says of it."""
    monkeypatch.setattr(registry.hmac, "compare_digest", lambda _mine, _there: True)
    assert made.check_key(make_key(bytes(40)).text) is None


@pytest.mark.parametrize(
    "values",
    [
        {"tenant": "other"},
        {"scopes": json.dumps(list(SCOPES))},
        {"expires_at": "2999-01-01T00:00:00.000Z"},
        {"expires_at": None},
        {"mac": bytes(32)},
        {"mac": b""},
    ],
)
def test_a_row_that_was_changed_lets_nobody_in(made: Registry, db: Database, values: dict[str, Any]):
    made.add_tenant("acme", by="a test")
    made.add_tenant("other", by="a test")
    row, text = made.create_key("acme", expires_at="2998-01-01T00:00:00Z", by="a test")
    assert made.check_key(text) == row
    changed(db, row.id, **values)
    assert made.check_key(text) is None


def test_a_key_of_another_master_key_is_none(made: Registry, db: Database, keys: Vault, store: Store):
    made.add_tenant("acme", by="a test")
    row, text = made.create_key("acme", by="a test")
    other = Vault(db, bytes(32), lambda *_: None, ())
    assert Registry(db, other, Notary(keys.signer(), store.home / "heads")).check_key(text) is None
    db.stamp_with(keys.stamp)
    assert made.check_key(text) == row


def test_two_keys_of_one_label_live(made: Registry, monkeypatch: pytest.MonkeyPatch):
    made.add_tenant("acme", by="a test")
    made.add_tenant("other", by="a test")
    first, _ = made.create_key("acme", by="a test")
    second, text = made.create_key("acme", expires_at="2900-01-01T00:00:00+01:00", by="a test")
    assert second.expires_at == "2899-12-31T23:00:00.000Z"
    with pytest.raises(Conflict, match=rf"has 2 live keys \({first.id}, {second.id}\): revoke one of them"):
        made.create_key("acme", by="a test")
    made.create_key("acme", label="another", by="a test")
    made.create_key("other", by="a test")
    made.revoke_key("acme", first.id, by="a test")
    third, _ = made.create_key("acme", by="a test")
    for module in (registered, registry):
        monkeypatch.setattr(module, "now", lambda: "2950-01-01T00:00:00.000Z")
    assert made.check_key(text) is None
    assert made.live_key(second.id) is None
    made.create_key("acme", by="a test")
    states = {row.id: row.status for row in made.keys("acme")}
    assert (states[first.id], states[second.id], states[third.id]) == ("revoked", "expired", "live")


def test_a_revoked_key_is_none_at_once(made: Registry, db: Database):
    made.add_tenant("acme", by="a test")
    made.add_tenant("other", by="a test")
    row, text = made.create_key("acme", by="a test")
    with pytest.raises(RequestError, match="tenant other has no key"):
        made.revoke_key("other", row.id, by="a test")
    assert made.check_key(text) == row
    for _twice in range(2):
        made.revoke_key("acme", row.id, by="a test")
    assert made.check_key(text) is None
    assert made.live_key(row.id) is None
    assert [record["action"] for record in actions(db, "acme")].count("key.revoked") == 1
    for name in ("", "a" * 12, "\0" * 12, "\ud800", "x" * 10**5):
        with pytest.raises(RequestError, match="has no key"):
            made.revoke_key("acme", name, by="a test")
        assert made.live_key(name) is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"label": ""}, "label has 1 to 64"),
        ({"label": "x" * 65}, "label has 1 to 64"),
        ({"label": "a\0b"}, "label has 1 to 64"),
        ({"label": "\ud800"}, "label has 1 to 64"),
        ({"scopes": []}, "no scope is named"),
        ({"scopes": ["root"]}, "'root' is no scope"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "cannot expire in the past"),
        ({"expires_at": "tomorrow"}, "is no time in RFC 3339"),
        ({"expires_at": "2900-01-01T00:00:00"}, "is no time in RFC 3339"),
        ({"expires_at": "2900-13-01T00:00:00Z"}, "is no time in RFC 3339"),
        ({"expires_at": "9999-12-31T23:59:59-23:59"}, "is no time in RFC 3339"),
        ({"expires_at": "2900-01-01T00:00:00Z\0"}, "is no time in RFC 3339"),
    ],
)
def test_keys_that_are_not_made(made: Registry, asked: dict[str, Any], said: str):
    made.add_tenant("acme", by="a test")
    with pytest.raises(RequestError, match=said) as caught:
        made.create_key("acme", **asked, by="a test")
    assert "\n" not in str(caught.value)
    assert made.keys("acme") == []


def test_a_use_is_noted_once_a_minute(made: Registry, db: Database, monkeypatch: pytest.MonkeyPatch):
    made.add_tenant("acme", by="a test")
    row, text = made.create_key("acme", by="a test")
    at, clock = 0.0, "2030-01-01T00:00:00.000Z"
    monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: at))
    monkeypatch.setattr(registry, "now", lambda: clock)
    made.touch(row.id)
    clock, at = "2030-01-01T00:00:59.000Z", 59.0
    made.touch(row.id)

    def used() -> str | None:
        db.read(lambda _tx: None)  # until what was posted is committed
        found = made.check_key(text)
        assert found
        return found.used_at

    assert used() == "2030-01-01T00:00:00.000Z"
    clock, at = "2030-01-01T00:01:00.000Z", 60.0
    made.touch(row.id)
    assert used() == "2030-01-01T00:01:00.000Z"


def test_a_change_and_its_record_are_one(made: Registry, db: Database, monkeypatch: pytest.MonkeyPatch):
    made.add_tenant("acme", by="a test")
    row, text = made.create_key("acme", by="a test")

    def broken(*_: object) -> None:
        raise RequestError("the record cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(registry.journal, "append", broken)
        for change in (
            lambda: made.revoke_key("acme", row.id, by="a test"),
            lambda: made.suspend("acme", by="a test"),
            lambda: made.add_tenant("other", by="a test"),
            lambda: made.create_key("acme", by="a test"),
        ):
            with pytest.raises(RequestError, match="cannot be written"):
                change()
    assert made.check_key(text) == row
    assert made.tenant("other") is None
    assert made.keys("acme") == [row]


# Issuers


def test_an_issuer_and_audience_are_one_tenants(made: Registry, db: Database):
    for name in ("acme", "other"):
        made.add_tenant(name, by="a test")
    made.set_issuer("acme", issuer(), by="a test")
    made.set_issuer("acme", issuer(), by="a test")  # its own again
    with pytest.raises(Conflict, match="are another tenant's") as caught:
        made.set_issuer("other", issuer(), by="a test")
    assert "acme" not in str(caught.value)
    made.set_issuer("other", issuer("other"), by="a test")
    assert [(row.name, found) for row, found in made.issuers("https://login.example")] == [
        ("acme", issuer()),
        ("other", issuer("other")),
    ]
    made.set_issuer("acme", None, by="a test")
    made.set_issuer("other", issuer(), by="a test")
    assert [record["action"] for record in actions(db, "acme")][1:] == ["issuer.set", "issuer.set", "issuer.removed"]


def test_issuers_are_found_by_their_exact_name(made: Registry):
    for number, name in enumerate(("https://a/%", 'https://a/"\\', "https://a/_b", "https://A/_B")):
        made.add_tenant(f"t{number}", by="a test")
        made.set_issuer(f"t{number}", issuer(name=name), by="a test")
        assert [row.name for row, _ in made.issuers(name)] == [f"t{number}"]
    for name in ("https://a/", "https://a/x", "", "%", "\0", "\ud800", "https://a/xb", "x" * 10**5):
        assert made.issuers(name) == []


def test_the_rows_in_the_database(made: Registry, db: Database):
    """No column has a text that its own table would not take on a server."""
    made.add_tenant("x" * 64, by="b" * 500)
    made.create_key("x" * 64, label="ü" * 64, scopes=list(SCOPES), by="b" * 500)
    assert db.read(lambda tx: tx.scalar(sa.select(sa.func.count()).select_from(tenants))) == 1
