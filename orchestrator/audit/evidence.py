"""What an audit looks at: the same questions to a live database and to an export. All of it may have been forged."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from orchestrator.core.merkle import HASH
from orchestrator.core.notes import Verifier
from orchestrator.store import journal, logs, vault
from orchestrator.store.schema import checkpoints, payloads, queries, records, reservations, scopes, tiles
from orchestrator.store.vault import Keeper, Vault

_AT_ONCE = {"stream_results": True, "yield_per": 1000}


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it was found. chain, hash: what a database says of it; None where nobody says."""

    leaf: int
    record: bytes
    chain: str | None = None
    hash: str | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """settled: nano-USD, 0 while it is open. open: nano-USD that are still held."""

    query: str
    settled: int
    open: int
    scopes: str  # JSON


class Evidence(ABC):
    """whole: all that there is, so that what lacks is a fault; else it is the evidence of one query.

    Every method may raise ValueError on what cannot be read as what it should be.
    """

    whole: bool

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
    def notes(self, log: str) -> Iterator[str]:
        """Its checkpoints, from the smallest on."""

    @abstractmethod
    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        """The hashes of a tile as they are kept; None where they are not."""

    @abstractmethod
    def queries(self) -> Iterator[tuple[str, str, str]]:
        """(id, tenant, status) as the table of queries has them."""

    @abstractmethod
    def reservations(self) -> Iterator[Reservation]: ...

    @abstractmethod
    def scopes(self) -> Iterator[tuple[str, int, int]]:
        """(id, spent, held), in nano-USD."""

    @abstractmethod
    def payloads(self, tenant: str, query: str) -> Iterator[tuple[int, str, tuple[bytes, bytes] | None]]:
        """(seq, name, (salt, data)) of what is kept; None where it does not open."""


class LiveEvidence(Evidence):
    """A database, as one transaction sees it. keys: opens the payloads."""

    whole = True

    def __init__(self, tx: sa.Connection, keys: Vault) -> None:
        self._tx = tx
        self._vault = keys

    def verifier(self) -> Verifier | None:
        return vault.verifier(self._tx)

    def logs(self) -> list[str]:
        named = sa.union(sa.select(records.c.log).distinct(), sa.select(checkpoints.c.log).distinct())
        return sorted(self._tx.execute(named).scalars())

    def entries(self, log: str) -> Iterator[Entry]:
        columns = (records.c.leaf, records.c.query, records.c.record, records.c.hash)
        find = sa.select(*columns).where(records.c.log == log).order_by(records.c.leaf)
        for leaf, chain, record, digest in self._tx.execute(find.execution_options(**_AT_ONCE)):
            yield Entry(leaf, as_bytes(record), str(chain), str(digest))

    def notes(self, log: str) -> Iterator[str]:
        find = sa.select(checkpoints.c.note).where(checkpoints.c.log == log).order_by(checkpoints.c.size)
        yield from map(str, self._tx.execute(find).scalars())

    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        find = sa.select(tiles.c.hashes).where(tiles.c.log == log, tiles.c.level == level, tiles.c.n == n)
        found = self._tx.execute(find).scalar()
        return None if found is None else as_bytes(found)[: 32 * width]

    def queries(self) -> Iterator[tuple[str, str, str]]:
        for row in self._tx.execute(sa.select(queries.c.id, queries.c.tenant, queries.c.status).order_by(queries.c.id)):
            yield str(row.id), str(row.tenant), str(row.status)

    def reservations(self) -> Iterator[Reservation]:
        table = reservations.c
        find = sa.select(table.query, table.amount, table.settled, table.state, table.scopes)
        for query, amount, settled, state, names in self._tx.execute(find.execution_options(**_AT_ONCE)):
            held = int(amount) if state == "open" else 0
            yield Reservation(str(query), int(settled or 0) if state != "open" else 0, held, str(names))

    def scopes(self) -> Iterator[tuple[str, int, int]]:
        for row in self._tx.execute(sa.select(scopes.c.id, scopes.c.spent, scopes.c.held)):
            yield str(row.id), int(row.spent), int(row.held)

    def payloads(self, tenant: str, query: str) -> Iterator[tuple[int, str, tuple[bytes, bytes] | None]]:
        find = sa.select(payloads).where(payloads.c.query == query).order_by(payloads.c.seq, payloads.c.name)
        keeper: Keeper | None = None
        for row in self._tx.execute(find):
            keeper = keeper or self._vault.opener(tenant, query)
            sealed = as_bytes(row.sealed)
            yield int(row.seq), str(row.name), keeper.open(row.seq, row.name, sealed) if keeper else None


class QueryEvidence(LiveEvidence):
    """Of one query: its records, and what is on record about it in its tenant's own chain."""

    whole = False

    def __init__(self, tx: sa.Connection, keys: Vault, query: str) -> None:
        super().__init__(tx, keys)
        self._query = query
        self._log = logs.tenants_log(journal.tenant_of(tx, query))
        self._tiles = logs.tiles_of(tx, self._log)

    def logs(self) -> list[str]:
        return [self._log]

    def entries(self, log: str) -> Iterator[Entry]:
        columns = (records.c.leaf, records.c.query, records.c.record)
        find = sa.select(*columns).where(records.c.log == log, records.c.query.in_((self._query, log)))
        for leaf, chain, record in self._tx.execute(find.order_by(records.c.leaf)):
            if chain == self._query or json.loads(record)["body"].get("query") == self._query:
                yield Entry(leaf, as_bytes(record))

    def notes(self, log: str) -> Iterator[str]:
        newest = list(super().notes(log))[-1:]
        yield from newest

    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        return self._tiles(level, n, width)[: HASH * width]

    def queries(self) -> Iterator[tuple[str, str, str]]:
        yield from (row for row in super().queries() if row[0] == self._query)

    def reservations(self) -> Iterator[Reservation]:
        yield from (one for one in super().reservations() if one.query == self._query)

    def scopes(self) -> Iterator[tuple[str, int, int]]:
        yield from ()


def as_bytes(value: object) -> bytes:
    """SQLite gives back whatever a file was edited to hold, also in a column of bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
