"""Keys and what is sealed under them: a wrong key, a wrong place or a changed bit opens nothing."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import RequestError, StoreError
from orchestrator.store import journal, vault
from orchestrator.store.db import Database
from orchestrator.store.schema import keys
from orchestrator.store.vault import Keeper, Vault, open_vault
from tests.unit.helpers import Store

GIVEN = base64.b64encode(bytes(range(32))).decode()


def opened(db: Database, home: Path, given: str | None = None) -> Vault:
    return open_vault(db, home, given, journal.key_created)


@given(st.binary(max_size=200), st.data())
def test_what_is_sealed_opens_in_its_place_alone(data: bytes, change: st.DataObject):
    keeper = Keeper(bytes(32), "q1")
    sealed = keeper.seal(3, "code", b"s" * 16, data)
    assert keeper.open(3, "code", sealed) == (b"s" * 16, data)
    assert keeper.seal(3, "code", b"s" * 16, data) != sealed
    at, bit = change.draw(st.integers(0, len(sealed) - 1)), change.draw(st.integers(0, 7))
    assert keeper.open(3, "code", sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]) is None
    assert keeper.open(3, "code", sealed[:at]) is None
    assert keeper.open(3, "stdout", sealed) is None
    assert keeper.open(4, "code", sealed) is None
    assert Keeper(bytes(32), "q2").open(3, "code", sealed) is None
    assert Keeper(b"k" * 32, "q1").open(3, "code", sealed) is None


def test_keys_are_made_once_and_stay(store: Store):
    first = store.open()
    mine = opened(first, store.home)
    signer, sealed = mine.signer(), mine.keeper("acme", "q").seal(0, "code", b"", b"x")
    second = store.open()
    again = opened(second, store.home)
    assert str(again.signer().verifier) == str(signer.verifier) == str(second.read(vault.verifier))
    assert again.keeper("acme", "q").open(0, "code", sealed) is not None
    assert again.keeper("other", "q").open(0, "code", sealed) is None
    assert stat.S_IMODE((store.home / "master.key").stat().st_mode) == 0o600
    made = [json.loads(record)["body"]["key"] for record, _ in first.read(lambda tx: journal.chain(tx, "platform"))]
    assert made == ["signer", "tenants/acme", "tenants/other"]
    first.close()
    second.close()


def test_a_key_made_by_another_process_at_the_same_time_is_the_one(store: Store):
    first, second = store.open(), store.open()
    here, there = opened(first, store.home), opened(second, store.home)
    make: Any = here._make_signer  # pyright: ignore[reportPrivateUsage]
    assert there.signer().verifier == here.signer().verifier
    assert first.write_sync(make) == second.read(lambda tx: tx.execute(sa.select(keys.c.sealed)).scalar_one())
    first.close()
    second.close()


def test_a_signer_that_is_gone_is_not_replaced(store: Store):
    """Under a new key, what the old one had signed would not be held against what comes."""
    db = store.open()
    mine = opened(db, store.home)
    mine.signer()
    mine.keeper("acme", "q")
    db.write_sync(lambda tx: tx.execute(sa.delete(keys).where(keys.c.id == "signer")))
    with pytest.raises(StoreError, match="the signer's key is gone"):
        opened(db, store.home).signer()
    assert opened(db, store.home).existing_signer() is None
    db.close()


def test_the_master_key_can_be_given(db: Database, tmp_path: Path):
    home = tmp_path / "elsewhere"
    home.mkdir()
    signer = opened(db, home, GIVEN).signer()
    assert list(home.iterdir()) == []
    (home / "master.key").write_text(GIVEN + "\n")
    assert opened(db, home).signer().verifier == signer.verifier


def test_another_master_key_opens_nothing(db: Database, tmp_path: Path):
    opened(db, tmp_path, GIVEN).signer()
    other = opened(db, tmp_path, base64.b64encode(bytes(32)).decode())
    for use in (other.signer, lambda: opened(db, tmp_path).signer()):
        with pytest.raises(StoreError, match="AIRLOCK_MASTER_KEY"):
            use()
    assert not (tmp_path / "master.key").exists(), "a new master key would open nothing of what is there"


@pytest.mark.parametrize("text", ["x", "AAAA", GIVEN[:-4], GIVEN + GIVEN, "\u00e9" * 44])
def test_what_is_no_master_key(db: Database, tmp_path: Path, text: str):
    with pytest.raises(RequestError, match="AIRLOCK_MASTER_KEY is no master key"):
        opened(db, tmp_path, text)
    (tmp_path / "master.key").write_text(text)
    with pytest.raises(RequestError, match=r"master\.key is no master key"):
        opened(db, tmp_path)


def test_a_tenants_key_that_was_put_in_place_of_anothers_does_not_open(store: Store):
    db = store.open()
    mine = opened(db, store.home)
    for tenant in ("a", "b"):
        mine.keeper(tenant, "q")
    other = sa.select(keys.c.sealed).where(keys.c.id == "tenants/a").scalar_subquery()
    db.write_sync(lambda tx: tx.execute(sa.update(keys).where(keys.c.id == "tenants/b").values(sealed=other)))
    with pytest.raises(StoreError, match="tenants/b"):
        opened(db, store.home).keeper("b", "q")
    db.close()
