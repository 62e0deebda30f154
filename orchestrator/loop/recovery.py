"""What becomes of money and records when nobody knows how a call ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread

from orchestrator.core.errors import StoreError
from orchestrator.core.events import Event
from orchestrator.core.units import read_usd, usd
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.signing import Notary, Signed

ROOT = "root"  # the node of a query's own loop
LOST = "the process that ran this query ended without closing it"
NOT_RECORDED = "what came of this query could not be recorded when it came"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # of records that are none, or are not there
SWEEP_S = 5.0  # between two sweeps: who asks for one is being refused, and may be refused again and again


def recover(db: Database, notary: Notary | None = None, tell: Callable[[str], object] = lambda _query: None) -> int:
    """Interrupt the queries whose orchestrator died: what was held for calls is charged in full, for they may have been
    answered. One whose payloads are not kept cannot be resumed, and is closed.

    What is damaged stops nobody else: a query whose chain cannot be read, and all of a tenant whose log cannot be gone
    on from, stay open, for `audit verify` to name.

    notary: signs what that adds to logs. Returns how many there were; tells the ids of those that can be resumed.
    """
    dead = db.dead_owners()
    if not dead:
        return 0
    found = 0
    for tenant in dict.fromkeys(key.tenant for key in db.read(partial(journal.abandoned, owners=dead))):
        try:
            ended, signed = db.write_sync(partial(_recover, dead=dead, tenant=tenant, notary=notary))
        except (StoreError, *UNREADABLE):
            continue
        if signed:
            assert notary, "somebody has signed"
            notary.remember(signed)
        found += len(ended)
        for query, resumable in ended.items():
            if resumable:
                tell(query)
    for owner in dead:
        if not db.read(partial(journal.abandoned, owners=[owner])):
            db.forget_owner(owner)
    return found


def _recover(
    tx: journal.Connection, dead: list[str], tenant: str, notary: Notary | None
) -> tuple[dict[str, bool], Signed | None]:
    """Those of one tenant: query -> whether it can be resumed."""
    ended = dict[str, bool]()
    for key in journal.abandoned(tx, dead):
        if key.tenant == tenant:
            with suppress(*UNREADABLE), tx.begin_nested():
                ended[key.id] = _interrupt(tx, key)
    return ended, notary.sign(tx, tenant) if notary and ended else None


def _interrupt(tx: journal.Connection, key: QueryKey, why: str = LOST, kind: str = "orchestrator-died") -> bool:
    """Whether it can be resumed. Raises what is in UNREADABLE."""
    records = journal.chain(tx, key.id)
    opened, last = (json.loads(records[number][0]) for number in (0, -1))
    if opened["body"].get("payloads") != "keep":
        close_abandoned(tx, key, why)
        return False
    settle_open(tx, key, why)
    # until: how far it is known to have run, for the time that it took counts.
    body = {"why": f"{kind}: {why}", "until": last["at"]}
    journal.interrupt_query(tx, key, Event("query.interrupted", ROOT, body))
    return True


@dataclass(slots=True)
class _Sweeps:
    """Of one Database. count: how many have ended. closed: queries that the last one closed or interrupted."""

    turn: anyio.Lock = field(default_factory=anyio.Lock)
    count: int = 0
    closed: int = 0
    after: float = 0.0


_sweeps: WeakKeyDictionary[Database, _Sweeps] = WeakKeyDictionary()


async def sweep(db: Database, notary: Notary | None = None) -> int:
    """`recover` while queries run, for a call that is about to be refused because of what others hold.

    Returns how many queries were closed or interrupted: with some, the call may be tried again. Whoever comes while a
    sweep is under way waits for its result; for SWEEP_S after one there is none. Raises StoreError.
    """
    mine = _sweeps.setdefault(db, _Sweeps())
    seen = mine.count
    async with mine.turn:
        if mine.count != seen:
            return mine.closed
        if time.monotonic() < mine.after:
            return 0
        mine.closed = 0
        try:
            mine.closed = await anyio.to_thread.run_sync(recover, db, notary)
        finally:
            mine.count += 1
            mine.after = time.monotonic() + SWEEP_S
        return mine.closed


def leave(tx: journal.Connection, owner: str, left: Collection[str], notary: Notary) -> None:
    """Interrupt those of the owner's queries that nobody is at, because the store did not take what came of them.

    What has ended, or is interrupted, stays as it is; so does what is damaged, as in `recover`.
    """
    for key in journal.abandoned(tx, [owner]) if left else ():
        if key.id in left:
            with suppress(StoreError, *UNREADABLE), tx.begin_nested():
                notary.require_whole(tx, key.tenant)
                _interrupt(tx, key, NOT_RECORDED, "store-failed")


def close_abandoned(tx: journal.Connection, key: QueryKey, why: str) -> None:
    """Close a query that nobody runs any more, if it is open. What was held for calls may have been billed."""
    if journal.is_closed(tx, key.id):
        return
    settle_open(tx, key, why)
    spent, _held = ledger.balance(tx, f"query:{key.id}")
    body = {"status": "failed", "reason": f"orchestrator-died: {why}", "cost_usd": usd(spent)}
    journal.close_query(tx, key, "failed", Event("query.closed", ROOT, body))


def settle_open(
    tx: journal.Connection, key: QueryKey, why: str, sent: Callable[[str], bool] = lambda _call: True
) -> None:
    """End what is still held for a query. Calls that were sent may have been answered: each is charged at its bound."""
    held = ledger.open_reservations(tx, key.id)
    calls = [one for one in held if not ledger.is_set_aside(one[0])]
    for reservation, _node, _amount in held:
        if ledger.is_set_aside(reservation):
            ledger.void(tx, reservation)
    bounds = _bounds(tx, key.id) if calls else {}
    for reservation, node, amount in calls:
        _query, call, attempt = reservation.split(":")
        body = {"call": call, "usage": None, "finish": None}
        if sent(reservation):
            cost = min(amount, bounds.get((call, int(attempt)), amount))  # for a last word, more may be held
            ledger.settle(tx, reservation, cost)
            body |= {"outcome": "unknown", "detail": why, "cost_usd": usd(cost)}
        else:
            ledger.void(tx, reservation)
            body |= {"outcome": "void", "detail": "it was not sent", "cost_usd": usd(0)}
        journal.append(tx, key, Event("call.result", node, body))


def _bounds(tx: journal.Connection, query: str) -> dict[tuple[str, int], int]:
    """(call, attempt) -> nano-USD, of the intents on record."""
    records = (json.loads(record) for record, _hash in journal.chain(tx, query))
    intents = (record["body"] for record in records if record["type"] == "call.intent")
    return {(body["call"], body["attempt"]): read_usd(body["bound_usd"]) for body in intents}
