"""What an audit looks at: the same questions to a live database and to an export. All of it may have been forged."""

from __future__ import annotations

import heapq
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any

import sqlalchemy as sa

from orchestrator.core.merkle import HASH, whole
from orchestrator.core.notes import Verifier
from orchestrator.store import journal, logs, vault
from orchestrator.store.schema import checkpoints, payloads, queries, records, reservations, scopes, tiles
from orchestrator.store.vault import Keeper, Vault

_AT_ONCE = {"stream_results": True, "yield_per": 1000}


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it was found. chain, seq, hash: what a database says of it; None where nobody says.

    is_ours: an Airlock with the master key wrote it, as far as can be told.
    """

    leaf: int
    record: bytes
    chain: str | None = None
    seq: int | None = None
    hash: str | None = None
    is_ours: bool = True


@dataclass(frozen=True, slots=True)
class Reservation:
    """settled: nano-USD, 0 while it is open. open: nano-USD that are still held. calls: that it counts."""

    id: str
    query: str
    settled: int
    open: int
    is_open: bool
    calls: int
    scopes: str  # JSON


class Evidence(ABC):
    """whole: all that there is, so that what lacks is a fault; else it is the evidence of one query. has_tiles: whole
    tiles have to be there.

    Every method may raise ValueError on what cannot be read as what it should be.
    """

    whole: bool
    has_tiles = False

    def oddities(self) -> list[str]:
        """What has no place where the evidence was found."""
        return []

    @abstractmethod
    def verifier(self) -> Verifier | None:
        """Who is said to have signed the logs."""

    @abstractmethod
    def logs(self) -> list[str]:
        """Their names."""

    @abstractmethod
    def entries(self, log: str) -> Iterator[Entry]:
        """In the order of the log."""

    @abstractmethod
    def notes(self, log: str) -> Iterator[tuple[int, str]]:
        """(size, note) of its checkpoints, from the smallest on."""

    @abstractmethod
    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        """The hashes of a tile as they are kept; None where they are not."""

    @abstractmethod
    def queries(self) -> Iterator[tuple[str, str, str]]:
        """(id, tenant, status) as the table of queries has them."""

    @abstractmethod
    def reservations(self) -> Iterator[Reservation]: ...

    @abstractmethod
    def scopes(self) -> Iterator[tuple[str, int, int, int, int]]:
        """(id, spent, held, calls, in flight); money in nano-USD."""

    @abstractmethod
    def payloads(self, tenant: str, query: str) -> Iterator[tuple[int, str, tuple[bytes, bytes] | None]]:
        """(seq, name, (salt, data)) of what is kept; None where it does not open."""


class LiveEvidence(Evidence):
    """A database, as one transaction sees it. keys: opens the payloads."""

    whole = True
    has_tiles = True

    def __init__(self, tx: sa.Connection, keys: Vault) -> None:
        self._tx = tx
        self._vault = keys

    def oddities(self) -> list[str]:
        """Triggers and views: they make of a row what they like when it is read or written."""
        if self._tx.dialect.name == "sqlite":
            find = "SELECT type || ' ' || name FROM sqlite_master WHERE type IN ('trigger', 'view')"
        else:
            find = (
                "SELECT 'trigger ' || trigger_name FROM information_schema.triggers "
                "UNION SELECT 'view ' || table_name FROM information_schema.views "
                "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
            )
        return [
            f"the database has a {name}, which is none of ours" for name in self._tx.exec_driver_sql(find).scalars()
        ]

    def verifier(self) -> Verifier | None:
        """Of the key that the master key opens; what the database says of it has to be the same."""
        signer, named = self._vault.existing_signer(), vault.verifier(self._tx)
        if named != (signer.verifier if signer else None):
            raise ValueError("the database names another signer than its key is of")
        return named

    def logs(self) -> list[str]:
        named = sa.union(sa.select(records.c.log).distinct(), sa.select(checkpoints.c.log).distinct())
        return sorted(self._tx.execute(named).scalars())

    def entries(self, log: str) -> Iterator[Entry]:
        table = records.c
        columns = (table.leaf, table.query, table.seq, table.record, table.hash, table.mac)
        find = sa.select(*columns).where(records.c.log == log).order_by(records.c.leaf)
        rows: Any = self._tx.execute(find.execution_options(**_AT_ONCE))
        for leaf, chain, seq, record, digest, mac in rows:
            content = as_bytes(record)
            is_ours = compare_digest(self._vault.stamp(content), as_bytes(mac))
            yield Entry(int(leaf), content, str(chain), seq, str(digest), is_ours)

    def notes(self, log: str) -> Iterator[tuple[int, str]]:
        columns = (checkpoints.c.size, checkpoints.c.note)
        for size, note in self._tx.execute(sa.select(*columns).where(checkpoints.c.log == log).order_by(columns[0])):
            yield size, str(note)

    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        find = sa.select(tiles).where(tiles.c.log == log, tiles.c.level == level, tiles.c.n == n)
        found = self._tx.execute(find).one_or_none()
        if found is None:
            return None
        hashes = as_bytes(found.hashes)
        # Its root is what trees are made from, so one that is not of these hashes makes the tile a wrong one.
        return hashes[: HASH * width] if as_bytes(found.root) == whole(hashes) else b""

    def queries(self) -> Iterator[tuple[str, str, str]]:
        columns = (queries.c.id, queries.c.tenant, queries.c.status)
        for row in self._tx.execute(self._of_query(sa.select(*columns), queries.c.id).order_by(queries.c.id)):
            status = "open" if row.status == journal.QUEUED else str(row.status)
            yield str(row.id), str(row.tenant), status

    def reservations(self) -> Iterator[Reservation]:
        table = reservations.c
        columns = (table.id, table.query, table.amount, table.settled, table.state, table.calls, table.scopes)
        find = self._of_query(sa.select(*columns), table.query)
        rows: Any = self._tx.execute(find.execution_options(**_AT_ONCE))
        for name, query, amount, settled, state, calls, names in rows:
            is_open = state == "open"
            held, paid = (amount, 0) if is_open else (0, settled or 0)
            yield Reservation(str(name), str(query), int(paid), int(held), is_open, int(calls), str(names))

    def _of_query(self, find: Any, column: sa.Column[str]) -> Any:
        """Of the query alone where the evidence is of one."""
        del column
        return find

    def scopes(self) -> Iterator[tuple[str, int, int, int, int]]:
        columns = (scopes.c.id, scopes.c.spent, scopes.c.held, scopes.c.calls, scopes.c.in_flight)
        for name, *counts in self._tx.execute(sa.select(*columns)):
            spent, held, calls, in_flight = map(int, counts)
            yield str(name), spent, held, calls, in_flight

    def payloads(self, tenant: str, query: str) -> Iterator[tuple[int, str, tuple[bytes, bytes] | None]]:
        find = sa.select(payloads).where(payloads.c.query == query).order_by(payloads.c.seq, payloads.c.name)
        keeper: Keeper | None = None
        for row in self._tx.execute(find):
            keeper = keeper or self._vault.opener(tenant, query)
            sealed = as_bytes(row.sealed)
            yield int(row.seq), str(row.name), keeper.open(row.seq, row.name, sealed) if keeper else None


class QueryEvidence(LiveEvidence):
    """Of one query: its records, and what is on record about it in its tenant's own chain.

    Of one that goes on, as much as the newest checkpoint has: it may have got further since that was signed.
    """

    whole = False
    has_tiles = False

    def __init__(self, tx: sa.Connection, keys: Vault, query: str) -> None:
        super().__init__(tx, keys)
        self._query = query
        self._log = logs.tenants_log(journal.tenant_of(tx, query))
        self._tiles = logs.tiles_of(tx, self._log)
        self._leaves = self._seqs = 2**63 - 1  # how many of the log's, and of the query's own, are looked at
        if not journal.is_closed(tx, query):
            self._leaves = max((size for size, _note in self.notes(self._log)), default=0)
            signed = sa.and_(records.c.query == query, records.c.leaf < self._leaves)
            self._seqs = tx.execute(sa.select(sa.func.count()).select_from(records).where(signed)).scalar_one()

    def logs(self) -> list[str]:
        return [self._log]

    def entries(self, log: str) -> Iterator[Entry]:
        # Each chain by itself, as it is indexed: the log may hold many times what is wanted of it.
        yield from heapq.merge(self._chain(log, self._query), self._about(log), key=lambda entry: entry.leaf)

    def _chain(self, log: str, chain: str) -> Iterator[Entry]:
        columns = (records.c.leaf, records.c.record)
        find = sa.select(*columns).where(records.c.query == chain, records.c.log == log)
        find = find.where(records.c.leaf < self._leaves).order_by(records.c.seq)
        rows: Any = self._tx.execute(find.execution_options(**_AT_ONCE))
        for leaf, record in rows:
            yield Entry(int(leaf), as_bytes(record))

    def _about(self, log: str) -> Iterator[Entry]:
        named = json.dumps(self._query).encode()  # canonical JSON has one spelling
        for entry in self._chain(log, log):
            if named in entry.record and json.loads(entry.record)["body"].get("query") == self._query:
                yield entry

    def notes(self, log: str) -> Iterator[tuple[int, str]]:
        find = sa.select(checkpoints.c.size, checkpoints.c.note).where(checkpoints.c.log == log)
        for size, note in self._tx.execute(find.order_by(checkpoints.c.size.desc()).limit(1)):
            yield size, str(note)

    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        return self._tiles(level, n, width)[: HASH * width]

    def _of_query(self, find: Any, column: sa.Column[str]) -> Any:
        return find.where(column == self._query)

    def scopes(self) -> Iterator[tuple[str, int, int, int, int]]:
        yield from ()

    def payloads(self, tenant: str, query: str) -> Iterator[tuple[int, str, tuple[bytes, bytes] | None]]:
        yield from (kept for kept in super().payloads(tenant, query) if kept[0] < self._seqs)


def as_bytes(value: object) -> bytes:
    """SQLite gives back whatever a file was edited to hold, also in a column of bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
