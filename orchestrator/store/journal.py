"""The journal: each query's records as a hash chain, payloads kept apart. Everything else reads it.

Appending happens inside a transaction of `Database.write`, together with the ledger's change of the same step.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from orchestrator.core.errors import NotKept, RequestError
from orchestrator.core.events import GENESIS, Event, Recorded, Sealed, chain_fault, commitment, read_record, seal
from orchestrator.core.redact import excerpt
from orchestrator.store import logs
from orchestrator.store.db import now, stamp_of
from orchestrator.store.prepared import Prepared
from orchestrator.store.schema import payloads, queries, records
from orchestrator.store.schema import tenants as registered
from orchestrator.store.vault import SALT_BYTES, Keeper, sealed_payload

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
QUEUED, INTERRUPTED = "queued", "interrupted"
SAID: dict[str, dict[str, int]] = {  # what others may have said: characters of it that are recorded, as in the schema
    "call.result": {"detail": 500},
    "call.refused": {"detail": 1000},
    "cell.ended": {"detail": 1000},
    "limit.hit": {"detail": 1000},
    "node.closed": {"reason": 1000},
    "query.interrupted": {"why": 1000},
    "query.closed": {"reason": 1000},
    "admin.action": {"detail": 1000},
}
Connection = sa.Connection  # the transaction that callers hand through, named here so that they need no SQLAlchemy


@dataclass(frozen=True, slots=True)
class QueryKey:
    """Whose record it is: what every record of a chain repeats. keeper: of payloads; None: only commitments are kept.

    A log has a chain of its own, for what is of no query; its id is that of the log.
    """

    id: str
    tenant: str
    policy: str
    keeper: Keeper | None = None

    @property
    def log(self) -> str:
        return logs.tenants_log(self.tenant) if self.tenant else logs.PLATFORM


PLATFORM = QueryKey(logs.PLATFORM, "", "")


def own_chain(tenant: str) -> QueryKey:
    """Of the tenant's log."""
    return QueryKey(logs.tenants_log(tenant), tenant, "")


def append(tx: sa.Connection, key: QueryKey, event: Event) -> Sealed:
    """Add `event` to the chain, and to its log."""
    seq, prev = _next(tx, key.id)
    commitments: dict[str, Any] = {}
    for name, text in event.payloads.items():
        kept = key.keeper is not None and name in key.keeper.names
        clean, redacted = key.keeper.redact(text) if key.keeper and kept else (text, 0)
        data = clean.encode("utf-8", "replace")
        if key.keeper and kept:
            committed, sealed = sealed_payload(key.keeper, seq, name, data)
            _add_payload(tx, {"query": key.id, "seq": seq, "name": name, "sealed": sealed})
        else:
            committed = commitment(secrets.token_bytes(SALT_BYTES), data)
        commitments[name] = {"commitment": committed, "bytes": len(data), "kept": kept}
        if redacted:
            commitments[name]["redacted"] = redacted
    sealed_event = seal(
        _clean(event, key.keeper),
        query=key.id,
        tenant=key.tenant,
        policy=key.policy,
        seq=seq,
        at=now(),
        prev=prev,
        payloads=commitments,
    )
    leaf = logs.size(tx, key.log)
    row = {"query": key.id, "seq": seq, "record": sealed_event.record, "hash": sealed_event.hash}
    mac = stamp_of(tx, sealed_event.record)
    _add_record(tx, {**row, "log": key.log, "leaf": leaf, "mac": mac})
    logs.complete(tx, key.log, leaf)
    return sealed_event


def _clean(event: Event, keeper: Keeper | None) -> Event:
    """Errors of providers and of guests' code may have a key in them, and are as long as they please."""
    most = SAID.get(event.type, {})
    said = {name: event.body[name] for name in most if event.body.get(name)}
    redact = keeper.redact if keeper else None
    clean = {name: excerpt(text, most[name], redact) for name, text in said.items()}
    return event if clean == said else replace(event, body={**event.body, **clean})


def key_created(tx: sa.Connection, name: str, public: str | None) -> None:
    """Put a new key of the vault on record."""
    append(tx, PLATFORM, Event("key.created", "root", {"key": name, "public": public}))


def _next(tx: sa.Connection, query: str) -> tuple[int, str]:
    """The place of the chain's next record, and the hash of the record before it."""
    head = _head(tx, {"q": query})
    return (head[0][0] + 1, head[0][1]) if head else (0, GENESIS)


def open_query(tx: sa.Connection, key: QueryKey, owner: str, event: Event, status: str = "open") -> Sealed:
    """Begin a query's chain with its `query.opened`. status: open, or QUEUED until `begin_query`."""
    row = {
        "id": key.id,
        "tenant": key.tenant,
        "owner": owner,
        "policy": key.policy,
        "opened_at": now(),
        "status": status,
    }
    _add_query(tx, row)
    return append(tx, key, event)


def begin_query(tx: sa.Connection, key: QueryKey, owner: str) -> bool:
    """Whether it was this owner's, and waited: it is open now."""
    mine = sa.update(queries).where(queries.c.id == key.id, queries.c.owner == owner, queries.c.status == QUEUED)
    return tx.execute(mine.values(status="open")).rowcount == 1


def narrow_query(tx: sa.Connection, key: QueryKey, event: Event) -> Sealed:
    """From now on the query is under the policy of `key`."""
    tx.execute(sa.update(queries).where(queries.c.id == key.id).values(policy=key.policy))
    return append(tx, key, event)


def withdraw(tx: sa.Connection, query: str, tenant: str, owner: str) -> QueryKey | None:
    """Take a query of this tenant's to close it, that was interrupted or is this owner's and waits; None for any other.

    Another owner has a task that waits for its turn.
    """
    idle = sa.or_(queries.c.status == INTERRUPTED, sa.and_(queries.c.status == QUEUED, queries.c.owner == owner))
    mine = sa.update(queries).where(queries.c.id == query, queries.c.tenant == tenant, idle)
    row = tx.execute(mine.values(status="open").returning(queries.c.policy)).one_or_none()
    return None if row is None else QueryKey(query, tenant, row.policy)


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
    """Take an interrupted query; None where it is none, or another one was first.

    Raises NotKept where anything of it was ever erased: it was read in another transaction, and may go on from what was
    erased since.
    """
    mine = sa.update(queries).where(queries.c.id == key.id, queries.c.status == INTERRUPTED)
    taken = tx.execute(mine.values(status="open", owner=owner).returning(queries.c.id)).all()
    if taken and _was_erased(tx, key):
        raise NotKept(f"payloads of query {key.id} were erased: it cannot be resumed any more")
    return append(tx, key, event) if taken else None


def _was_erased(tx: sa.Connection, key: QueryKey) -> bool:
    """Whether the tenant's own chain has that a payload of the query was erased. Canonical JSON has one spelling."""
    erasures = (record for record, _ in chain(tx, own_chain(key.tenant).id) if b'"type":"payload.erased"' in record)
    query = f'"query":{json.dumps(key.id)}'.encode()
    return any(query in record and b'"payloads":0,' not in record for record in erasures)


def length(tx: sa.Connection, query: str) -> int:
    """How many records the chain has."""
    return _next(tx, query)[0]


def status_of(tx: sa.Connection, query: str) -> tuple[str, str]:
    """(open, interrupted, or how it was closed; its tenant) of a query that there is."""
    row = tx.execute(sa.select(queries.c.status, queries.c.tenant).where(queries.c.id == query)).one()
    return row.status, row.tenant


def open_queries(tx: sa.Connection, tenant: str) -> int:
    """How many queries of the tenant are open."""
    return _count_open(tx, {"of": tenant})[0][0]


def abandoned(tx: sa.Connection, owners: list[str]) -> list[QueryKey]:
    """Queries of these owners that run or wait; no payload of what is added to them is kept."""
    rows = tx.execute(sa.select(queries).where(queries.c.status.in_(("open", QUEUED)), queries.c.owner.in_(owners)))
    return [QueryKey(row.id, row.tenant, row.policy) for row in rows]


def find_query(tx: sa.Connection, text: str) -> list[str]:
    """Ids of queries that begin with `text`, newest first, ten at most; `last` finds the newest of all."""
    find = sa.select(queries.c.id).order_by(queries.c.opened_at.desc()).limit(10)
    if text != "last":
        find = find.where(queries.c.id.startswith(text, autoescape=True))
    return list(tx.execute(find.limit(1) if text == "last" else find).scalars())


def tenant_of(tx: sa.Connection, query: str) -> str:
    return tx.execute(sa.select(queries.c.tenant).where(queries.c.id == query)).scalar_one()


def chain(tx: sa.Connection, query: str) -> list[tuple[bytes, str]]:
    """(canonical record, its hash) in order."""
    rows = tx.execute(
        sa.select(records.c.record, records.c.hash).where(records.c.query == query).order_by(records.c.seq)
    )
    return [(_bytes(row.record), row.hash) for row in rows]


def kept_payloads(tx: sa.Connection, query: str) -> Iterator[tuple[int, str, bytes]]:
    """(seq, name, what is stored) of the query's payloads that are kept."""
    for row in tx.execute(
        sa.select(payloads).where(payloads.c.query == query).order_by(payloads.c.seq, payloads.c.name)
    ):
        yield row.seq, row.name, _bytes(row.sealed)


def payloads_of(tx: sa.Connection, query: str, numbers: Sequence[int]) -> Iterator[tuple[int, str, bytes]]:
    """Likewise, of the records with these numbers."""
    wanted = sa.select(payloads).where(payloads.c.query == query, payloads.c.seq.in_(numbers))
    for row in tx.execute(wanted):
        yield row.seq, row.name, _bytes(row.sealed)


def history(tx: sa.Connection, query: str, keeper: Keeper | None) -> list[Recorded]:
    """The query's records in order, with what is kept of their payloads. Its chain has to be whole."""
    texts: dict[int, dict[str, str]] = {}
    for seq, name, sealed in kept_payloads(tx, query):
        if opened := keeper.open(seq, name, sealed) if keeper else None:
            texts.setdefault(seq, {})[name] = opened[1].decode("utf-8", "replace")
    return [read_record(record, texts.get(seq, {})) for seq, (record, _hash) in enumerate(chain(tx, query))]


def _bytes(value: object) -> bytes:
    """SQLite gives back whatever a file was edited to hold, also in a column of bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


def after(
    tx: sa.Connection, query: str, seq: int, most: int, keeper: Keeper | None
) -> list[tuple[bytes, dict[str, str]]]:
    """(record, name -> text of the payloads that are kept) of at most `most` records after number `seq`."""
    find = sa.select(records.c.seq, records.c.record).where(records.c.query == query, records.c.seq > seq)
    rows = tx.execute(find.order_by(records.c.seq).limit(most)).all()
    texts: dict[int, dict[str, str]] = {}
    if rows and keeper:
        kept = sa.select(payloads).where(payloads.c.query == query, payloads.c.seq.between(rows[0].seq, rows[-1].seq))
        for row in tx.execute(kept):
            if opened := keeper.open(row.seq, row.name, _bytes(row.sealed)):
                texts.setdefault(row.seq, {})[row.name] = opened[1].decode("utf-8", "replace")
    return [(_bytes(row.record), texts.get(row.seq, {})) for row in rows]


def links_after(tx: sa.Connection, query: str, seq: int, most: int) -> list[tuple[bytes, str]]:
    """`chain`, of at most `most` records after number `seq`."""
    find = sa.select(records.c.record, records.c.hash).where(records.c.query == query, records.c.seq > seq)
    rows = tx.execute(find.order_by(records.c.seq).limit(most))
    return [(_bytes(row.record), row.hash) for row in rows]


def tenants(tx: sa.Connection) -> list[str]:
    """Those that have a log: by their queries, or by having been added."""
    named = sa.union(sa.select(queries.c.tenant), sa.select(registered.c.name))
    return sorted(tx.execute(named).scalars())


def all_queries(tx: sa.Connection) -> list[str]:
    """Their ids, the oldest first."""
    return list(tx.execute(sa.select(queries.c.id).order_by(queries.c.opened_at, queries.c.id)).scalars())


def leaf_of(tx: sa.Connection, query: str, seq: int) -> tuple[int, bytes] | None:
    """(index in its log, record); None where there is none."""
    find = sa.select(records.c.leaf, records.c.record).where(records.c.query == query, records.c.seq == seq)
    row = tx.execute(find).one_or_none()
    return None if row is None else (row.leaf, _bytes(row.record))


def erase(tx: sa.Connection, query: str, seq: int | None, name: str | None, why: str) -> int:
    """Remove a query's payloads, those of record `seq`, or one of them, and put that on record. How many there were.

    Raises RequestError while the query is open, here and not before: it may be resumed at any time.
    """
    status, tenant = status_of(tx, query)
    if status in ("open", QUEUED):
        raise RequestError(f"query {query} is not closed: its payloads are still needed")
    gone = sa.delete(payloads).where(payloads.c.query == query)
    if seq is not None:
        gone = gone.where(payloads.c.seq == seq)
    if name is not None:
        gone = gone.where(payloads.c.name == name)
    count = tx.execute(gone).rowcount
    body = {"query": query, "seq": seq, "name": name, "payloads": count, "why": why}
    append(tx, own_chain(tenant), Event("payload.erased", "root", body))
    return count


def is_closed(tx: sa.Connection, query: str) -> bool:
    """Whether the table of queries says that the query has ended."""
    status = tx.execute(sa.select(queries.c.status).where(queries.c.id == query)).scalar()
    return status not in (None, "open", QUEUED, INTERRUPTED)


def fault(
    links: list[tuple[bytes, str]],
    kept: Sequence[tuple[int, str, bytes]] = (),
    keeper: Keeper | None = None,
    *,
    closed: bool = False,
) -> str | None:
    """What is wrong with a chain, or with the payloads that are kept of it; None when all is well.

    closed: the query has ended, so a chain that does not end with `query.closed` has lost its tail.
    """
    if broken := chain_fault(links):
        return broken
    if closed and (not links or json.loads(links[-1][0])["type"] != "query.closed"):
        return "the query is closed, and the record of that is missing: the chain was cut"
    for seq, name, sealed in kept:
        committed = json.loads(links[seq][0])["payloads"].get(name) if seq < len(links) else None
        opened = keeper.open(seq, name, sealed) if keeper else None
        if committed is None or opened is None or committed["commitment"] != commitment(*opened):
            return f"payload {name} of record {seq} is not what was recorded"
    return None
