"""Queries that wait for their turn, on record from the moment they are taken on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.core.events import Event
from orchestrator.core.units import usd
from orchestrator.loop.order import Machinery, Order, key_of, new_id, opened_event
from orchestrator.loop.recovery import ROOT, settle_open
from orchestrator.store import journal, ledger
from orchestrator.store.signing import Signed

Also = Callable[[journal.Connection, str], None]  # given the id of a query


async def enqueue(order: Order, machinery: Machinery, also: Also) -> Order:
    """Put on record that a query waits for its turn: `run_query` with what is returned begins it.

    Its log is signed with it, so that it cannot be dropped unseen. also: more for the same transaction. Raises
    StoreError, and what `also` raises.
    """
    key = await key_of(order, machinery, new_id())
    opened = opened_event(order, machinery)

    def work(tx: journal.Connection) -> None:
        also(tx, key.id)
        machinery.notary.require_whole(tx, order.tenant)
        journal.open_query(tx, key, machinery.db.owner, opened, journal.QUEUED)

    await machinery.db.write(work)
    return replace(order, id=key.id)


async def withdraw(query_id: str, tenant: str, why: str, machinery: Machinery) -> bool:
    """Close a query that was interrupted, or waits here, as cancelled. False where it is neither. Raises StoreError."""

    def work(tx: journal.Connection) -> Signed | None:
        if not (key := journal.withdraw(tx, query_id, tenant, machinery.db.owner)):
            return None
        settle_open(tx, key, why)
        spent, _held = ledger.balance(tx, f"query:{query_id}")
        body = {"status": "cancelled", "reason": why, "cost_usd": usd(spent)}
        journal.close_query(tx, key, "cancelled", Event("query.closed", ROOT, body))
        return machinery.notary.sign(tx, tenant)

    if signed := await machinery.db.write(work):
        machinery.notary.remember(signed)
    return signed is not None
