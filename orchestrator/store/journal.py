"""The journal: each query's records as a hash chain, payloads kept apart. Everything else reads it.

Appending happens inside a transaction of `Database.write`, together with the ledger's change of the same step.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from orchestrator.core.events import GENESIS, Event, Recorded, Sealed, chain_fault, commitment, read_record, seal
from orchestrator.store.db import now
from orchestrator.store.prepared import Prepared
from orchestrator.store.schema import payloads, queries, records

_head = Prepared(
    sa.select(records.c.seq, records.c.hash)
    .where(records.c.query == sa.bindparam("q"))
    .order_by(records.c.seq.desc())
    .limit(1)
)
_add_query, _add_record, _add_payload = (Prepared(sa.insert(table)) for table in (queries, records, payloads))
_end_query = Prepared(sa.update(queries).where(queries.c.id == sa.bindparam("q")).values(status=sa.bindparam("how")))
_count_open = Prepared(
    sa.select(sa.func.count())
    .select_from(queries)
    .where(queries.c.status == "open", queries.c.tenant == sa.bindparam("of"))
)
SALT_BYTES = 16
INTERRUPTED = "interrupted"
Connection = sa.Connection  # the transaction that callers hand through, named here so that they need no SQLAlchemy


@dataclass(frozen=True, slots=True)
class QueryKey:
    """Whose record it is: what every record of a query repeats. keep: store payloads, or only their commitments."""

    id: str
    tenant: str
    policy: str
    keep: bool


def append(tx: sa.Connection, key: QueryKey, event: Event) -> Sealed:
    """Add `event` to the query's chain."""
    seq, prev = _next(tx, key.id)
    commitments: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, text in event.payloads.items():
        data, salt = text.encode("utf-8", "replace"), secrets.token_bytes(SALT_BYTES)
        commitments[name] = {"commitment": commitment(salt, data), "bytes": len(data)}
        rows.append({"query": key.id, "seq": seq, "name": name, "salt": salt, "data": data})
    sealed = seal(
        event,
        query=key.id,
        tenant=key.tenant,
        policy=key.policy,
        seq=seq,
        at=now(),
        prev=prev,
        payloads=commitments,
    )
    _add_record(tx, {"query": key.id, "seq": seq, "record": sealed.record, "hash": sealed.hash})
    if key.keep:
        for row in rows:
            _add_payload(tx, row)
    return sealed


def _next(tx: sa.Connection, query: str) -> tuple[int, str]:
    """The place of the query's next record, and the hash of the record before it."""
    head = _head(tx, {"q": query})
    return (head[0][0] + 1, head[0][1]) if head else (0, GENESIS)


def open_query(tx: sa.Connection, key: QueryKey, owner: str, event: Event) -> Sealed:
    """Begin a query's chain with its `query.opened`."""
    row = {
        "id": key.id,
        "tenant": key.tenant,
        "owner": owner,
        "policy": key.policy,
        "opened_at": now(),
        "status": "open",
    }
    _add_query(tx, row)
    return append(tx, key, event)


def close_query(tx: sa.Connection, key: QueryKey, status: str, event: Event) -> Sealed:
    """End a query's chain with its `query.closed`, which commits how many records there are."""
    length = _next(tx, key.id)[0] + 1
    _end_query(tx, {"q": key.id, "how": status})
    body = {**event.body, "records": length}
    return append(tx, key, Event(event.type, event.node, body, event.payloads))


def interrupt_query(tx: sa.Connection, key: QueryKey, event: Event) -> Sealed:
    """Its process died. It is not open any more, and belongs to nobody until it is resumed."""
    sealed = close_query(tx, key, INTERRUPTED, event)
    tx.execute(sa.update(queries).where(queries.c.id == key.id).values(owner=""))
    return sealed


def resume_query(tx: sa.Connection, key: QueryKey, owner: str, event: Event) -> Sealed | None:
    """Take an interrupted query; None where it is none, or another one was first."""
    mine = sa.update(queries).where(queries.c.id == key.id, queries.c.status == INTERRUPTED)
    taken = tx.execute(mine.values(status="open", owner=owner).returning(queries.c.id)).all()
    return append(tx, key, event) if taken else None


def status_of(tx: sa.Connection, query: str) -> tuple[str, str]:
    """(open, interrupted, or how it was closed; its tenant) of a query that there is."""
    row = tx.execute(sa.select(queries.c.status, queries.c.tenant).where(queries.c.id == query)).one()
    return row.status, row.tenant


def open_queries(tx: sa.Connection, tenant: str) -> int:
    """How many queries of the tenant are open."""
    return _count_open(tx, {"of": tenant})[0][0]


def abandoned(tx: sa.Connection, owners: list[str]) -> list[QueryKey]:
    """The open queries of these owners."""
    rows = tx.execute(sa.select(queries).where(queries.c.status == "open", queries.c.owner.in_(owners)))
    return [QueryKey(row.id, row.tenant, row.policy, keep=True) for row in rows]


def find_query(tx: sa.Connection, text: str) -> list[str]:
    """Ids of queries that begin with `text`, newest first, ten at most; `last` finds the newest of all."""
    find = sa.select(queries.c.id).order_by(queries.c.opened_at.desc()).limit(10)
    if text != "last":
        find = find.where(queries.c.id.startswith(text, autoescape=True))
    return list(tx.execute(find.limit(1) if text == "last" else find).scalars())


def chain(tx: sa.Connection, query: str) -> list[tuple[bytes, str]]:
    """(canonical record, its hash) in order."""
    rows = tx.execute(
        sa.select(records.c.record, records.c.hash).where(records.c.query == query).order_by(records.c.seq)
    )
    return [(_bytes(row.record), row.hash) for row in rows]


def kept_payloads(tx: sa.Connection, query: str) -> Iterator[tuple[int, str, bytes, bytes]]:
    """(seq, name, salt, data) of the query's payloads that are kept."""
    for row in tx.execute(
        sa.select(payloads).where(payloads.c.query == query).order_by(payloads.c.seq, payloads.c.name)
    ):
        yield row.seq, row.name, _bytes(row.salt), _bytes(row.data)


def history(tx: sa.Connection, query: str) -> list[Recorded]:
    """The query's records in order, with what is kept of their payloads. Its chain has to be whole."""
    texts: dict[int, dict[str, str]] = {}
    for seq, name, _salt, data in kept_payloads(tx, query):
        texts.setdefault(seq, {})[name] = data.decode("utf-8", "replace")
    return [read_record(record, texts.get(seq, {})) for seq, (record, _hash) in enumerate(chain(tx, query))]


def _bytes(value: object) -> bytes:
    """SQLite gives back whatever a file was edited to hold, also in a column of bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


def is_closed(tx: sa.Connection, query: str) -> bool:
    """Whether the table of queries says that the query has ended."""
    status = tx.execute(sa.select(queries.c.status).where(queries.c.id == query)).scalar()
    return status not in (None, "open", INTERRUPTED)


def fault(
    links: list[tuple[bytes, str]], kept: list[tuple[int, str, bytes, bytes]], *, closed: bool = False
) -> str | None:
    """What is wrong with a chain, or with the payloads that are kept of it; None when all is well.

    closed: the query has ended, so a chain that does not end with `query.closed` has lost its tail.
    """
    if broken := chain_fault(links):
        return broken
    if closed and (not links or json.loads(links[-1][0])["type"] != "query.closed"):
        return "the query is closed, and the record of that is missing: the chain was cut"
    for seq, name, salt, data in kept:
        committed = json.loads(links[seq][0])["payloads"].get(name) if seq < len(links) else None
        if committed is None or committed["commitment"] != commitment(salt, data):
            return f"payload {name} of record {seq} is not what was recorded"
    return None
