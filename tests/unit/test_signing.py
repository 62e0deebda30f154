"""Who signs the logs never signs a smaller or a forked one, and what it signed can be held against it."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.core.events import Event
from orchestrator.core.merkle import leaf_hash
from orchestrator.core.notes import Signer, open_checkpoint
from orchestrator.store import journal, logs
from orchestrator.store.db import Database
from orchestrator.store.journal import own_chain
from orchestrator.store.schema import checkpoints, records
from orchestrator.store.signing import Notary, Signed
from tests.unit.helpers import Store, fill

SIGNER = Signer("airlock-test", bytes(range(32)))


@pytest.fixture
def notary(tmp_path: Path) -> Notary:
    return Notary(SIGNER, tmp_path / "heads")


def add(db: Database, count: int, tenant: str = "acme") -> None:
    def work(tx: Any) -> None:
        for number in range(count):
            journal.append(tx, own_chain(tenant), Event("admin.action", "root", {"number": number}))

    db.write_sync(work)


def sign(db: Database, notary: Notary, tenant: str = "acme") -> Signed:
    signed = db.write_sync(lambda tx: notary.sign(tx, tenant))
    notary.remember(signed)
    return signed


def test_a_tenants_head_is_an_entry_of_the_platforms_log(db: Database, notary: Notary):
    add(db, 300)
    signed = sign(db, notary)
    head = open_checkpoint(signed.note, notary.verifier)
    assert (head.origin, head.size) == ("airlock-test/tenants/acme", 300)
    assert head.root == db.read(lambda tx: logs.tree(tx, "tenants/acme").root())
    above = open_checkpoint(signed.heads["platform"][1], notary.verifier)
    ((record, digest),) = db.read(lambda tx: journal.chain(tx, "platform"))
    body = json.loads(record)["body"]
    assert body == {"tenant": "acme", "size": 300, "root": base64.b64encode(head.root).decode()}
    assert (above.size, above.root) == (1, leaf_hash(record))
    assert digest == leaf_hash(record).hex()
    assert notary.remembered("platform") == above
    assert notary.remembered("tenants/acme") == head


def test_each_checkpoint_goes_on_from_the_one_before(db: Database, notary: Notary):
    heads = []
    for count in (1, 254, 1, 1, 300):
        add(db, count)
        heads.append(open_checkpoint(sign(db, notary).note, notary.verifier))
    assert [head.size for head in heads] == [1, 255, 256, 257, 557]
    tree = db.read(lambda tx: [logs.tree(tx, "tenants/acme").root(head.size) for head in heads])
    assert tree == [head.root for head in heads]


def test_nothing_new_is_signed_when_nothing_is_new(db: Database, notary: Notary):
    add(db, 3)
    first = sign(db, notary)
    assert sign(db, notary) == first
    assert db.read(lambda tx: tx.scalar(sa.select(sa.func.count()).select_from(checkpoints))) == 2


def cut(db: Database) -> None:
    db.write_sync(lambda tx: tx.execute(sa.delete(records).where(records.c.log == "tenants/acme", records.c.leaf > 5)))


def forge(db: Database) -> None:
    """One record is another, and everything that the database knows of it fits."""
    other = {"record": b"{}", "hash": leaf_hash(b"{}").hex()}
    db.write_sync(
        lambda tx: tx.execute(
            sa.update(records).where(records.c.log == "tenants/acme", records.c.leaf == 4).values(**other)
        )
    )


@pytest.mark.parametrize("attack", [cut, forge])
@pytest.mark.parametrize("forgets", ["database", "folder", "neither"])
def test_a_smaller_or_a_forked_log_is_not_signed(
    db: Database, notary: Notary, tmp_path: Path, attack: Any, forgets: str
):
    add(db, 9)
    sign(db, notary)
    attack(db)
    if forgets == "database":
        db.write_sync(lambda tx: tx.execute(sa.delete(checkpoints)))
    elif forgets == "folder":
        shutil.rmtree(tmp_path / "heads")
    add(db, 2)
    refused = r"9 were signed|is not the one that was signed at 9"
    with pytest.raises(StoreError, match=refused):
        db.read(lambda tx: notary.require_whole(tx, "acme"))
    with pytest.raises(StoreError, match=refused):
        sign(db, notary)
    assert db.read(lambda tx: journal.chain(tx, "platform"))[1:] == [], "what is refused leaves nothing behind"


def test_a_database_from_a_backup_is_not_gone_on_with(tmp_path: Path, notary: Notary):
    home = tmp_path / "home"
    home.mkdir()
    fill(home)
    db = Database(home)
    add(db, 5)
    sign(db, notary)
    db.close()
    backup = (home / "airlock.db").read_bytes()
    db = Database(home)
    add(db, 5)
    sign(db, notary)
    db.close()
    (home / "airlock.db").write_bytes(backup)
    db = Database(home)
    add(db, 1)
    with pytest.raises(StoreError, match="an older one"):
        sign(db, notary)
    db.close()


def test_what_was_not_committed_is_not_remembered(db: Database, notary: Notary):
    add(db, 3)

    def work(tx: Any) -> None:
        notary.sign(tx, "acme")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.write_sync(work)
    assert notary.remembered("tenants/acme") is None
    sign(db, notary)


def test_what_is_remembered_never_gets_older(db: Database, notary: Notary):
    add(db, 3)
    first = sign(db, notary)
    add(db, 3)
    sign(db, notary)
    notary.remember(first)
    newest = notary.remembered("tenants/acme")
    assert newest is not None
    assert newest.size == 6


@pytest.mark.parametrize("content", [b"\xff", b"", SIGNER.sign("x\n1\n").encode(), b"1\n"])
def test_a_memory_that_is_not_what_was_signed_is_no_memory_to_pass_over(
    db: Database, notary: Notary, tmp_path: Path, content: bytes
):
    add(db, 3)
    sign(db, notary)
    for file in (tmp_path / "heads").iterdir():
        file.write_bytes(content)
    add(db, 1)
    with pytest.raises(StoreError, match="what was signed last of log"):
        sign(db, notary)


def test_another_key_does_not_go_on(db: Database, notary: Notary, tmp_path: Path):
    add(db, 3)
    sign(db, notary)
    add(db, 3)
    with pytest.raises(StoreError, match="not signed by"):
        sign(db, Notary(Signer("other", bytes(32)), tmp_path / "others"))


def test_two_processes_sign_one_log(store: Store, tmp_path: Path):
    both = [(store.open(), Notary(SIGNER, tmp_path / f"heads{n}")) for n in range(2)]
    for _ in range(5):
        for db, notary in both:
            add(db, 3)
            sign(db, notary)
    assert both[0][0].read(lambda tx: logs.size(tx, "tenants/acme")) == 30
    for db, _ in both:
        db.close()
