"""Whose a context is: the store keeps each once and knows of no tenants, this is where it is told.

All of it is per tenant, so what another one has stored changes nothing. Each function works in the caller's
transaction: what is counted against a limit is counted and written in one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from orchestrator.core.context import Context
from orchestrator.core.errors import CountExceeded
from orchestrator.store.db import now
from orchestrator.store.journal import INTERRUPTED
from orchestrator.store.prepared import Prepared
from orchestrator.store.schema import contexts, queries, records, uploads

MOST_SIZES = 500  # that one statement names; beyond it takes all
UNFINISHED = ("queued", "open", INTERRUPTED)  # queries that may still take their context from the store

_of: sa.BindParameter[str] = sa.bindparam("of")
_kept = Prepared(sa.select(sa.func.sum(contexts.c.bytes)).where(contexts.c.tenant == _of))
_coming = Prepared(sa.select(sa.func.sum(uploads.c.length)).where(uploads.c.tenant == _of, uploads.c.context.is_(None)))
_find = Prepared(
    sa.select(contexts.c.id, contexts.c.name, contexts.c.kind, contexts.c.bytes, contexts.c.at).where(
        contexts.c.tenant == _of, contexts.c.id == sa.bindparam("id")
    )
)


@dataclass(frozen=True, slots=True)
class Held:
    """A context that a tenant has. name: what the tenant calls it, for display alone. at: since when, RFC 3339."""

    id: str
    name: str
    kind: str
    bytes: int
    at: str


def hold(tx: sa.Connection, tenant: str, context: Context, name: str, most: int) -> tuple[Held, bool]:
    """That the tenant has it now, and whether it is new to the tenant. An empty name leaves the one it has.

    most: bytes that a tenant may have stored, uploads under way among them. Raises CountExceeded.
    """
    if (found := find(tx, tenant, context.id)) is not None:
        named = Held(found.id, name or found.name, found.kind, found.bytes, found.at)
        tx.execute(sa.update(contexts).where(*_own(tenant, context.id)).values(name=named.name))
        return named, False
    require_room(tx, tenant, context.bytes, most)
    held = Held(context.id, name, context.kind, context.bytes, now())
    row = {"tenant": tenant, "id": held.id, "name": held.name, "kind": held.kind, "bytes": held.bytes, "at": held.at}
    tx.execute(sa.insert(contexts).values(row))
    return held, True


def require_room(tx: sa.Connection, tenant: str, size: int, most: int) -> None:
    """Raises CountExceeded where the tenant has no room for so many more bytes."""
    left = most - stored(tx, tenant)
    if size > left:
        text = f"{max(0, left):,} bytes are left of the {most:,} that may be stored: delete contexts or uploads"
        raise CountExceeded(text, limit=f"{most} bytes", asked=f"{size} bytes", left=f"{left} bytes")


def stored(tx: sa.Connection, tenant: str) -> int:
    """Bytes of what the tenant has, and of what is on its way."""
    return sum(int(total or 0) for statement in (_kept, _coming) for (total,) in statement(tx, {"of": tenant}))


def holds(tx: sa.Connection, tenant: str, context_id: str) -> bool:
    """Whether the tenant has it. In the transaction that puts a query on record, this keeps the context for it."""
    return find(tx, tenant, context_id) is not None


def find(tx: sa.Connection, tenant: str, context_id: str) -> Held | None:
    return next((Held(*row) for row in _find(tx, {"of": tenant, "id": context_id})), None)


def listed(tx: sa.Connection, tenant: str, most: int, after: tuple[str, str] | None = None) -> list[Held]:
    """The newest first; after: (at, id) of the last one that was listed before."""
    find = sa.select(contexts).where(contexts.c.tenant == tenant)
    if after:
        at, last = after
        find = find.where(sa.or_(contexts.c.at < at, sa.and_(contexts.c.at == at, contexts.c.id < last)))
    rows = tx.execute(find.order_by(contexts.c.at.desc(), contexts.c.id.desc()).limit(most))
    return [_held(row) for row in rows]


def give_up(tx: sa.Connection, tenant: str, context_id: str) -> bool:
    """That the tenant has it no more; whether it had. The files go with `ContextStore.remove`."""
    return tx.execute(sa.delete(contexts).where(*_own(tenant, context_id))).rowcount > 0


def wanted(tx: sa.Connection, sizes: Collection[int]) -> dict[str, int]:
    """Of contexts with these numbers of bytes, those that somebody has, or that a query which is not finished began
    with; id -> bytes.
    """
    held = sa.select(contexts.c.id, contexts.c.bytes)
    if len(sizes) <= MOST_SIZES:
        held = held.where(contexts.c.bytes.in_(sizes))
    found = {row.id: row.bytes for row in tx.execute(held)}
    first = sa.select(records.c.record).join(queries, queries.c.id == records.c.query)
    for record in tx.execute(first.where(records.c.seq == 0, queries.c.status.in_(UNFINISHED))).scalars():
        context = json.loads(record)["body"]["context"]
        found[context["id"]] = context["bytes"]
    return found


def owned(tx: sa.Connection) -> set[str]:
    """Ids of all contexts that somebody has."""
    return set(tx.execute(sa.select(contexts.c.id)).scalars())


def _own(tenant: str, context_id: str) -> Sequence[sa.ColumnElement[bool]]:
    return contexts.c.tenant == tenant, contexts.c.id == context_id


def _held(row: sa.Row[tuple[str, str, str, str, int, str]]) -> Held:
    return Held(row.id, row.name, row.kind, row.bytes, row.at)
