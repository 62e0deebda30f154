"""Logs over the records: each is an entry of its tenant's log, and each signed head of one is one of the platform's.

A log is a Merkle tree (RFC 6962) whose leaves are the records in the order of their commits. Tiles that are whole are
stored; of those at the edge, the hashes are with the records, or with the tiles below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.core.merkle import HASH, HEIGHT, WIDTH, Tiles, Tree, whole
from orchestrator.core.tenants import is_tenant
from orchestrator.store.prepared import Prepared
from orchestrator.store.schema import records, tiles

PLATFORM = "platform"

_log: sa.BindParameter[str] = sa.bindparam("of", type_=sa.String)
_next = Prepared(sa.select(sa.func.max(records.c.leaf)).where(records.c.log == _log))
_hashes = Prepared(
    sa.select(records.c.hash)
    .where(records.c.log == _log, records.c.leaf >= sa.bindparam("low"), records.c.leaf < sa.bindparam("high"))
    .order_by(records.c.leaf)
)
_in_level = (tiles.c.log == _log, tiles.c.level == sa.bindparam("at"))
_roots = Prepared(
    sa.select(tiles.c.root)
    .where(*_in_level, tiles.c.n >= sa.bindparam("low"), tiles.c.n < sa.bindparam("high"))
    .order_by(tiles.c.n)
)
_tile = Prepared(sa.select(tiles.c.hashes).where(*_in_level, tiles.c.n == sa.bindparam("number")))
_add_tile = Prepared(sa.insert(tiles))


def tenants_log(tenant: str) -> str:
    """Raises StoreError for what is no tenant's name: an empty one or `a/b` would be a log of somebody else."""
    if not is_tenant(tenant):
        raise StoreError(f"{tenant[:80]!r} is no name of a tenant: it has no log")
    return f"tenants/{tenant}"


def size(tx: sa.Connection, log: str) -> int:
    """How many entries the log has."""
    return _count(_next(tx, {"of": log})[0][0])


def tiles_of(tx: sa.Connection, log: str) -> Tiles:
    """The log's tiles as it is in this transaction, those at its edge as well."""
    entries = size(tx, log)
    seen: dict[tuple[int, int], bytes] = {}

    def hashes(level: int, n: int, width: int) -> bytes:
        found = seen.get((level, n), b"")
        if len(found) < width * HASH:
            count = min(WIDTH, (entries >> (HEIGHT * level)) - n * WIDTH)
            found = seen[level, n] = _stored(tx, log, level, n) if count == WIDTH else _edge(tx, log, level, n, count)
        return found

    return hashes


def tree(tx: sa.Connection, log: str) -> Tree:
    return Tree(tiles_of(tx, log), size(tx, log))


def written_since(tx: sa.Connection, log: str, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(index, record, mac) of the entries from index `size` on."""
    find = sa.select(records.c.leaf, records.c.record, records.c.mac)
    rows: Any = tx.execute(find.where(records.c.log == log, records.c.leaf >= size).order_by(records.c.leaf))
    for leaf, *contents in rows:  # SQLite gives back whatever a file was edited to hold
        record, mac = (content if isinstance(content, bytes) else b"" for content in contents)
        yield leaf, record, mac


def complete(tx: sa.Connection, log: str, leaf: int) -> None:
    """Store the tiles that become whole with this entry, the log's newest."""
    level, n = 0, leaf
    while n % WIDTH == WIDTH - 1:
        n //= WIDTH
        hashes = _edge(tx, log, level, n, WIDTH)
        _add_tile(tx, {"log": log, "level": level, "n": n, "root": whole(hashes), "hashes": hashes})
        level += 1


def _edge(tx: sa.Connection, log: str, level: int, n: int, count: int) -> bytes:
    low = n * WIDTH
    values: dict[str, Any] = {"of": log, "low": low, "high": low + count}
    if level == 0:
        return b"".join([bytes.fromhex(digest) for (digest,) in _hashes(tx, values)])
    return b"".join([root for (root,) in _roots(tx, {**values, "at": level - 1})])


def _stored(tx: sa.Connection, log: str, level: int, n: int) -> bytes:
    rows = _tile(tx, {"of": log, "at": level, "number": n})
    return rows[0][0] if rows else b""


def _count(newest: int | None) -> int:
    return 0 if newest is None else newest + 1
