"""Logs in a real store: whatever the order of writers, they are the tree of RFC 6962 over the records."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.core import merkle
from orchestrator.core.events import Event
from orchestrator.store import journal, logs
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey, own_chain
from orchestrator.store.schema import records, tiles
from tests.unit.helpers import Store


def add(db: Database, key: QueryKey, count: int) -> None:
    def work(tx: Any) -> None:
        for number in range(count):
            journal.append(tx, key, Event("admin.action", "root", {"number": number}))

    db.write_sync(work)


def entries(db: Database, log: str) -> list[bytes]:
    find = sa.select(records.c.record).where(records.c.log == log).order_by(records.c.leaf)
    return list(db.read(lambda tx: tx.execute(find).scalars().all()))


def plain_root(entries: list[bytes]) -> bytes:
    """As RFC 6962 section 2.1 writes it."""
    if len(entries) == 1:
        return merkle.leaf_hash(entries[0])
    half = 1 << (len(entries) - 1).bit_length() - 1
    return merkle.node_hash(plain_root(entries[:half]), plain_root(entries[half:]))


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])
def test_a_log_is_the_tree_over_its_records(db: Database, size: int):
    add(db, own_chain("a"), size)
    assert db.read(lambda tx: logs.size(tx, "tenants/a")) == size
    tree = db.read(lambda tx: logs.tree(tx, "tenants/a").root())
    assert tree == plain_root(entries(db, "tenants/a"))


def test_tenants_have_logs_of_their_own(db: Database):
    for _ in range(3):
        add(db, own_chain("a"), 100)
        add(db, own_chain("b"), 60)
        add(db, QueryKey("q1", "b", "p"), 40)
    sizes = db.read(lambda tx: [logs.size(tx, name) for name in ("tenants/a", "tenants/b", "platform", "tenants/c")])
    assert sizes == [300, 300, 0, 0]
    leaves = sa.select(records.c.leaf).where(records.c.log == "tenants/b").order_by(records.c.leaf)
    assert db.read(lambda tx: tx.execute(leaves).scalars().all()) == list(range(300))


def test_tiles_are_stored_when_they_are_whole_and_not_before(db: Database):
    add(db, own_chain("a"), 511)
    find = sa.select(tiles.c.level, tiles.c.n, sa.func.length(tiles.c.hashes))
    assert db.read(lambda tx: [tuple(row) for row in tx.execute(find)]) == [(0, 0, 8192)]
    add(db, own_chain("a"), 1)
    assert db.read(lambda tx: sorted(tuple(row) for row in tx.execute(find))) == [(0, 0, 8192), (0, 1, 8192)]


def test_a_higher_tile_is_made_of_the_roots_of_those_below(db: Database):
    """Of level 1, which is whole at 65,536 entries: made here of entries that are there already."""
    add(db, own_chain("a"), 256)
    one = db.read(lambda tx: tx.execute(sa.select(tiles)).one())
    same = {"log": "a", "root": one.root, "hashes": one.hashes}
    db.write_sync(lambda tx: tx.execute(sa.insert(tiles), [{**same, "level": 0, "n": n} for n in range(255)]))
    rows = [
        {
            "query": "q",
            "seq": seq,
            "record": b"",
            "hash": one.hashes[32 * (seq % 256) :][:32].hex(),
            "log": "a",
            "mac": b"",
        }
        for seq in range(65_536 - 256, 65_536)
    ]
    db.write_sync(lambda tx: tx.execute(sa.insert(records), [{**row, "leaf": row["seq"]} for row in rows]))
    db.write_sync(lambda tx: logs.complete(tx, "a", 65_535))
    made = db.read(lambda tx: tx.execute(sa.select(tiles).where(tiles.c.level == 1)).one())
    assert made.hashes == one.root * 256
    assert made.root == db.read(lambda tx: logs.tree(tx, "a").root()) == merkle.whole(one.root * 256)


def test_what_is_undone_is_in_no_log(db: Database):
    add(db, own_chain("a"), 255)

    def work(tx: Any) -> None:
        journal.append(tx, own_chain("a"), Event("admin.action", "root", {}))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.write_sync(work)
    assert db.read(lambda tx: logs.size(tx, "tenants/a")) == 255
    assert db.read(lambda tx: tx.execute(sa.select(tiles)).all()) == []


def test_processes_write_to_one_log(store: Store):
    one, other = store.open(), store.open()
    for _ in range(20):
        add(one, own_chain("a"), 7)
        add(other, QueryKey("q", "a", ""), 9)
    assert one.read(lambda tx: logs.tree(tx, "tenants/a").root()) == plain_root(entries(other, "tenants/a"))
    assert one.read(lambda tx: logs.size(tx, "tenants/a")) == 320
    one.close()
    other.close()
