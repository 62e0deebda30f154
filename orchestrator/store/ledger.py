"""Money: reserve before a request, settle once after it. Integer nano-USD; `spent + held <= limit` at every instant.

All functions work inside a transaction of `Database.write`, together with the journal's record of the same step. The
guard is one UPDATE whose WHERE clause is the limit: whatever the concurrency, the row decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from orchestrator.core.errors import BudgetExhausted, BudgetInFlight, StoreError
from orchestrator.core.units import usd
from orchestrator.store.db import reservations, scopes
from orchestrator.store.prepared import Prepared


@dataclass(frozen=True, slots=True)
class Scope:
    """A purse: `query:ID`, `tenant-day:NAME:DATE` or `tenant-month:NAME:MONTH`, with its limit in nano-USD."""

    id: str
    limit: int

    @property
    def title(self) -> str:
        return self.id.split(":")[0]


class NotEnough(Exception):
    """Some scope cannot hold the amount. free: nano-USD that every scope still has room for."""

    def __init__(self, error: BudgetExhausted | BudgetInFlight, free: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.free = free


def _named(count: int) -> Any:
    return scopes.c.id.in_([sa.bindparam(f"scope{n}") for n in range(count)])


@cache
def _hold(count: int) -> Prepared:
    """Hold `amount` on those of `count` scopes whose limit permits it, in one statement; returns their ids."""
    limits: Any = [(scopes.c.id == sa.bindparam(f"scope{n}"), sa.bindparam(f"limit{n}")) for n in range(count)]
    return Prepared(
        sa.update(scopes)
        .where(_named(count))
        .where(scopes.c.spent + scopes.c.held + sa.bindparam("amount") <= sa.case(*limits))
        .values(held=scopes.c.held + sa.bindparam("amount"))
        .returning(scopes.c.id)
    )


@cache
def _release(count: int) -> Prepared:
    return Prepared(
        sa.update(scopes)
        .where(_named(count))
        .values(held=scopes.c.held - sa.bindparam("amount"), spent=scopes.c.spent + sa.bindparam("used"))
    )


_end = Prepared(
    sa.update(reservations)
    .where(reservations.c.id == sa.bindparam("reservation"), reservations.c.state == "open")
    .values(state=sa.bindparam("becomes"), settled=sa.bindparam("used"))
    .returning(reservations.c.amount, reservations.c.scopes)
)
_find = Prepared(
    sa.select(reservations.c.amount, reservations.c.scopes).where(
        reservations.c.id == sa.bindparam("reservation"), reservations.c.state == "open"
    )
)
_open = Prepared(
    sa.select(reservations.c.id, reservations.c.node, reservations.c.amount).where(
        reservations.c.query == sa.bindparam("of"), reservations.c.state == "open"
    )
)
_balance = Prepared(sa.select(scopes.c.spent, scopes.c.held).where(scopes.c.id == sa.bindparam("scope")))
_add = Prepared(sa.insert(reservations))
_add_scope = Prepared(insert(scopes).on_conflict_do_nothing())


def open_scopes(tx: sa.Connection, purses: Sequence[Scope]) -> None:
    """Make sure that the scopes' rows are there."""
    for scope in purses:
        _add_scope(tx, {"id": scope.id, "spent": 0, "held": 0})


def reserve(tx: sa.Connection, reservation: str, query: str, node: str, amount: int, purses: Sequence[Scope]) -> None:
    """Hold `amount` on every scope, or raise NotEnough (the caller's transaction part is then undone)."""
    held: set[str] = set()
    # An amount above the limit needs no asking, and may be larger than the database's integers.
    if all(amount <= scope.limit for scope in purses):
        values: dict[str, str | int] = {"amount": amount}
        for number, scope in enumerate(purses):
            values |= {f"scope{number}": scope.id, f"limit{number}": scope.limit}
        held.update(scope for (scope,) in _hold(len(purses))(tx, values))
    if len(held) != len(purses):
        raise _refusal(tx, query, held, amount, purses)
    names = json.dumps([scope.id for scope in purses])
    row = {"id": reservation, "query": query, "node": node, "amount": amount, "state": "open", "scopes": names}
    _add(tx, row)


def settle(tx: sa.Connection, reservation: str, used: int) -> None:
    """End a reservation: `used` (at most what was reserved) is spent, the rest is free again. Once only."""
    _close(tx, reservation, used, "settled")


def void(tx: sa.Connection, reservation: str) -> None:
    """End a reservation of which nothing was used. Once only."""
    _close(tx, reservation, 0, "void")


def _close(tx: sa.Connection, reservation: str, used: int, state: str) -> None:
    ended = _end(tx, {"reservation": reservation, "becomes": state, "used": used})
    if not ended:
        raise StoreError(f"reservation {reservation} is not open")
    amount, names = ended[0]
    if not 0 <= used <= amount:
        raise StoreError(f"reservation {reservation} of {amount} cannot be settled to {used}")
    purses = {f"scope{number}": scope for number, scope in enumerate(json.loads(names))}
    _release(len(purses))(tx, {**purses, "amount": amount, "used": used})


def open_reservations(tx: sa.Connection, query: str) -> list[tuple[str, str, int]]:
    """(id, node, amount) of the query's reservations that are still open."""
    return [(name, node, amount) for name, node, amount in _open(tx, {"of": query})]


def balance(tx: sa.Connection, scope: str) -> tuple[int, int]:
    """(spent, held) of a scope; zeros when it was never used."""
    rows = _balance(tx, {"scope": scope})
    return (rows[0][0], rows[0][1]) if rows else (0, 0)


def set_aside(query: str) -> str:
    """The id of the reservation for a query's last word. It is held to the end: no other call can ever have it."""
    return f"{query}:last-word"


def _refusal(tx: sa.Connection, query: str, held_by: set[str], amount: int, purses: Sequence[Scope]) -> NotEnough:
    """Why `amount` was refused by some scope; those in `held_by` hold it by now."""
    books: list[tuple[Scope, int, int]] = []
    for scope in purses:
        spent, held = balance(tx, scope.id)
        books.append((scope, spent, held - amount if scope.id in held_by else held))
    free = min(scope.limit - spent - held for scope, spent, held in books)
    # Held money comes free again, but for the last word's. Where that and spent money block one scope, waiting for what
    # others hold is of no use.
    last = _find(tx, {"reservation": set_aside(query)})
    amount_aside, names = last[0] if last else (0, "[]")
    aside = [amount_aside if scope.id in json.loads(names) else 0 for scope in purses]
    exhausted = [book for book, kept in zip(books, aside, strict=True) if book[1] + kept + amount > book[0].limit]
    scope, spent, held = exhausted[0] if exhausted else next(book for book in books if book[0].id not in held_by)
    left = scope.limit - spent - held
    fields = {"limit": f"{usd(scope.limit)} USD", "asked": f"{usd(amount)} USD", "left": f"{usd(left)} USD"}
    kind = BudgetExhausted if exhausted else BudgetInFlight
    error = kind(
        f"this call could cost {fields['asked']}, and the {scope.title} budget of {fields['limit']} "
        f"has {fields['left']} left" + (f" ({usd(held)} USD held by calls in flight)" if held else ""),
        **fields,
    )
    return NotEnough(error, max(0, free))
