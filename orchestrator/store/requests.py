"""Queries that came over HTTP: who asked, under which Idempotency-Key, and whether somebody asked for their end.

Like the journal's, these functions work inside a transaction of `Database.write`, or on a snapshot.
"""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.store.db import now
from orchestrator.store.journal import INTERRUPTED, QUEUED, Connection
from orchestrator.store.schema import queries, requests


def add(tx: Connection, query: str, tenant: str, asker: str, idempotency: str | None, fingerprint: str) -> None:
    """idempotency: hex SHA-256 of the tenant's key, which it has used for no other query."""
    row = {"query": query, "tenant": tenant, "asker": asker, "idempotency": idempotency}
    tx.execute(sa.insert(requests).values(**row, fingerprint=fingerprint, at=now()))


def asked_before(tx: Connection, tenant: str, idempotency: str) -> tuple[str, str] | None:
    """(query, fingerprint) of what this key was used for."""
    mine = sa.and_(requests.c.tenant == tenant, requests.c.idempotency == idempotency)
    row = tx.execute(sa.select(requests.c.query, requests.c.fingerprint).where(mine)).one_or_none()
    return None if row is None else (row.query, row.fingerprint)


def cancel(tx: Connection, query: str) -> None:
    """Have whichever process runs the query end it."""
    tx.execute(sa.update(requests).where(requests.c.query == query).values(cancelled_at=now()))


def to_cancel(tx: Connection, owner: str) -> list[str]:
    """Queries of this owner that somebody wants to end."""
    find = sa.select(queries.c.id).join(requests, requests.c.query == queries.c.id)
    mine = sa.and_(queries.c.owner == owner, queries.c.status.in_(("open", QUEUED)))
    return list(tx.execute(find.where(mine, requests.c.cancelled_at.is_not(None))).scalars())


def to_resume(tx: Connection) -> list[tuple[str, str, bool]]:
    """(query, tenant, whether somebody wants it to end) of those that were interrupted, the oldest first."""
    find = sa.select(queries.c.id, queries.c.tenant, requests.c.cancelled_at)
    find = find.join(requests, requests.c.query == queries.c.id).where(queries.c.status == INTERRUPTED)
    rows = tx.execute(find.order_by(queries.c.opened_at, queries.c.id))
    return [(row.id, row.tenant, row.cancelled_at is not None) for row in rows]
