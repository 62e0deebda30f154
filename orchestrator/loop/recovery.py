"""What becomes of money and records when nobody knows how a call ended."""

from __future__ import annotations

from orchestrator.core.events import Event
from orchestrator.core.units import usd
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey

ROOT = "root"  # the node of a query's own loop


def recover(db: Database) -> int:
    """Close the queries whose orchestrator died: what was held for calls is charged in full, for they may have been
    answered. Returns how many there were."""
    dead = db.dead_owners()
    if not dead:
        return 0

    def work(tx: journal.Connection) -> int:
        keys = journal.abandoned(tx, dead)
        for key in keys:
            close_abandoned(tx, key, "the process that ran this query ended without closing it")
        return len(keys)

    closed = db.write_sync(work)
    for owner in dead:
        db.forget_owner(owner)
    return closed


def close_abandoned(tx: journal.Connection, key: QueryKey, why: str) -> None:
    """Close a query that nobody runs any more, if it is open. What was held for calls may have been billed."""
    if journal.is_closed(tx, key.id):
        return
    for reservation, node, amount in ledger.open_reservations(tx, key.id):
        if ledger.is_set_aside(reservation):
            ledger.void(tx, reservation)
            continue
        pay(tx, key, reservation, node, amount, why)
    spent, _held = ledger.balance(tx, f"query:{key.id}")
    body = {"status": "failed", "reason": f"orchestrator-died: {why}", "cost_usd": usd(spent)}
    journal.close_query(tx, key, "failed", Event("query.closed", ROOT, body))


def pay(tx: journal.Connection, key: QueryKey, reservation: str, node: str, amount: int, why: str) -> None:
    """Settle in full a call of which nobody knows whether it was answered."""
    ledger.settle(tx, reservation, amount)
    body = {"call": reservation.split(":")[1], "outcome": "unknown", "detail": why, "cost_usd": usd(amount)}
    journal.append(tx, key, Event("call.result", node, {**body, "usage": None}))


async def sweep(db: Database) -> None:
    """TEMP"""
