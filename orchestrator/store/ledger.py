"""Money and counters: reserve before a request, settle once after it. `spent + held <= limit` at every instant.

All functions work inside a transaction of `Database.write`, together with the journal's record of the same step. The
guard is one UPDATE whose WHERE clause is the limits: whatever the concurrency, the rows decide. Money is nano-USD.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import sqlalchemy as sa

from orchestrator.core.errors import LimitError, StoreError
from orchestrator.core.units import MOST
from orchestrator.store.prepared import Prepared
from orchestrator.store.refusal import Book, refusal
from orchestrator.store.schema import reservations, scopes
from orchestrator.store.scope import LIMITS, Scope

_LAST_WORD = ":last-word"
_USED: dict[str, Any] = {
    "limit": scopes.c.spent + scopes.c.held,
    "calls": scopes.c.calls,
    "tokens": scopes.c.tokens + scopes.c.tokens_held,
    "in_flight": scopes.c.in_flight,
    "children": scopes.c.children,
}
_ROW = (scopes.c.id, *_USED.values(), scopes.c.held, scopes.c.tokens)


class NotEnough(Exception):
    """Some scope cannot hold the reservation. free: where money refuses, the nano-USD that every scope has room for."""

    def __init__(self, error: LimitError, free: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.free = free


def _named(count: int) -> Any:
    return scopes.c.id.in_([sa.bindparam(f"scope{n}") for n in range(count)])


def _plus(column: Any, value: str) -> Any:
    return column + sa.bindparam(value)


def _minus(column: Any, value: str) -> Any:
    return column - sa.bindparam(value)


@lru_cache(maxsize=1024)
def _limits(scope: Scope) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What has a limit there, money always, and the limits. Asked for at every call, of the same few scopes."""
    limited = tuple(what for what in LIMITS if what == "limit" or getattr(scope, what) is not None)
    return limited, tuple(scope.most(what) for what in limited)


@cache
def _hold(shape: tuple[tuple[str, ...], ...]) -> Prepared:
    """Hold on those scopes whose limits permit it, in one statement; returns their ids. shape: the limits of each.

    The parameter `calls0` is how many calls the first scope may have at most, for this one to fit.
    """
    fits = [
        sa.and_(
            scopes.c.id == sa.bindparam(f"scope{number}"),
            *[_USED[what] <= sa.bindparam(f"{what}{number}") for what in limited],
        )
        for number, limited in enumerate(shape)
    ]
    return Prepared(
        sa.update(scopes)
        .where(_named(len(shape)), sa.or_(*fits))
        .values(
            held=_plus(scopes.c.held, "amount"),
            calls=_plus(scopes.c.calls, "calls"),
            tokens_held=_plus(scopes.c.tokens_held, "tokens"),
            in_flight=_plus(scopes.c.in_flight, "calls"),
            children=_plus(scopes.c.children, "children"),
        )
        .returning(scopes.c.id)
    )


@cache
def _release(count: int) -> Prepared:
    return Prepared(
        sa.update(scopes)
        .where(_named(count))
        .values(
            held=_minus(scopes.c.held, "amount"),
            spent=_plus(scopes.c.spent, "used"),
            tokens_held=_minus(scopes.c.tokens_held, "tokens"),
            tokens=_plus(scopes.c.tokens, "tokens_used"),
            in_flight=_minus(scopes.c.in_flight, "calls"),
        )
    )


@cache
def _look(count: int) -> Prepared:
    return Prepared(sa.select(*_ROW).where(_named(count)))


_taken = (reservations.c.amount, reservations.c.tokens, reservations.c.calls, reservations.c.scopes)
_is_open = (reservations.c.id == sa.bindparam("reservation"), reservations.c.state == "open")
_end = Prepared(
    sa.update(reservations)
    .where(*_is_open)
    .values(state=sa.bindparam("becomes"), settled=sa.bindparam("used"))
    .returning(*_taken)
)
_aside = Prepared(
    sa.select(reservations.c.id, reservations.c.amount, reservations.c.scopes).where(
        reservations.c.query == sa.bindparam("of"),
        reservations.c.state == "open",
        reservations.c.id.like(sa.bindparam("like")),
    )
)
_open = Prepared(
    sa.select(reservations.c.id, reservations.c.node, reservations.c.amount)
    .where(reservations.c.query == sa.bindparam("of"), reservations.c.state == "open")
    .order_by(reservations.c.id)
)
_balance = Prepared(sa.select(scopes.c.spent, scopes.c.held).where(scopes.c.id == sa.bindparam("scope")))
_columns = ("id", "query", "node", "amount", "tokens", "calls", "state", "scopes")
_add = Prepared(sa.insert(reservations).values({name: sa.bindparam(name) for name in _columns}))
_there = sa.exists().where(scopes.c.id == sa.bindparam("scope"))
_add_scope = Prepared(
    sa.insert(scopes)
    .from_select(["id"], sa.select(sa.bindparam("scope", type_=sa.String)).where(~_there))
    .returning(scopes.c.id)
)
# Of equal length, so that a tenant whose name begins like another's, and goes on with ":", loses none of its own.
_forget_minutes = Prepared(
    sa.delete(scopes).where(
        scopes.c.id >= sa.bindparam("first"),
        scopes.c.id < sa.bindparam("end"),
        sa.func.length(scopes.c.id) == sa.bindparam("length", type_=sa.Integer),
        scopes.c.held == 0,
        scopes.c.tokens_held == 0,
        scopes.c.in_flight == 0,
    )
)


def open_scopes(tx: sa.Connection, purses: Sequence[Scope]) -> None:
    """Make sure that the scopes' rows are there. A tenant's first of a minute forgets its minutes that are over.

    The minute before stays: for a process whose clock is a little behind, it is not over.
    """
    for scope in purses:
        if _add_scope(tx, {"scope": scope.id}) and scope.minute:
            first, end = scope.minutes_over()
            _forget_minutes(tx, {"first": first, "end": end, "length": len(end)})


def reserve(
    tx: sa.Connection,
    reservation: str,
    query: str,
    node: str,
    amount: int,
    purses: Sequence[Scope],
    *,
    calls: int = 1,
    tokens: int = 0,
    children: int = 0,
    clock: Callable[[], float] = time.time,
) -> None:
    """Hold `amount` and count the rest on every scope, or raise NotEnough (the caller's transaction part is undone).

    calls: are in flight from now on; they stay counted whatever comes of them. tokens: the most that they can use.
    children: child queries that are begun; they stay counted, too.
    """
    asked = {"limit": amount, "calls": calls, "tokens": tokens, "in_flight": calls, "children": children}
    assert min(asked.values()) >= 0, "less than nothing cannot be reserved"
    held: set[str] = set()
    room = min(MOST - most for most in asked.values())  # to what the database's integers can hold
    values: dict[str, Any] = {"amount": amount, "calls": calls, "tokens": tokens, "children": children}
    limits = [_limits(scope) for scope in purses]
    for number, (scope, (limited, mosts)) in enumerate(zip(purses, limits, strict=True)):
        values[f"scope{number}"] = scope.id
        for what, most in zip(limited, mosts, strict=True):
            values[f"{what}{number}"] = most - asked[what]
            room = min(room, most - asked[what])
    if room >= 0:  # what is above a limit needs no asking
        held.update(scope for (scope,) in _hold(tuple(limited for limited, _ in limits))(tx, values))
    if len(held) != len(purses):
        raise NotEnough(*refusal(list(_books(tx, query, node, purses, asked, held)), asked, clock()))
    row = {"id": reservation, "query": query, "node": node, "amount": amount, "tokens": tokens, "calls": calls}
    _add(tx, {**row, "state": "open", "scopes": json.dumps([scope.id for scope in purses])})


def _books(
    tx: sa.Connection, query: str, node: str, purses: Sequence[Scope], asked: dict[str, int], held: set[str]
) -> Iterator[Book]:
    """What the scopes had before this reservation, which those in `held` hold by now."""
    names = {f"scope{number}": scope.id for number, scope in enumerate(purses)}
    rows = {row[0]: row[1:] for row in _look(len(purses))(tx, names)}
    aside = list(_kept(tx, query, node))
    for scope in purses:
        if scope.id not in rows:
            raise StoreError(f"scope {scope.id} is not open")
        *used, held_money, tokens = rows[scope.id]
        mine = asked if scope.id in held else dict.fromkeys(LIMITS, 0)
        before = {what: value - mine[what] for what, value in zip(LIMITS, used, strict=True)}
        before["held"] = held_money - mine["limit"]
        # Held money comes free again, but for a last word's: where that and spent money refuse, waiting is of no use.
        kept = sum(amount for amount, names in aside if scope.id in names)
        firm = before | {"limit": before["limit"] - before["held"] + kept, "tokens": tokens, "in_flight": 0}
        yield Book(scope, before, firm)


def _kept(tx: sa.Connection, query: str, node: str) -> Iterator[tuple[int, list[str]]]:
    """(amount, scopes) of what is set aside by the node and by those above it: while it runs, they all wait."""
    for reservation, amount, names in _aside(tx, {"of": query, "like": f"{query}:%{_LAST_WORD}%"}):
        if f"{node}.".startswith(f"{reservation.split(':')[1]}."):
            yield amount, json.loads(names)


def settle(tx: sa.Connection, reservation: str, used: int, tokens: int | None = None) -> None:
    """End a reservation: `used` (at most what was reserved) is spent, the rest is free again. Once only.

    tokens: that were used; all that were held where nobody knows, and never more.
    """
    _close(tx, reservation, used, tokens, "settled")


def void(tx: sa.Connection, reservation: str) -> None:
    """End a reservation of which nothing was used. Its calls stay counted. Once only."""
    _close(tx, reservation, 0, 0, "void")


def _close(tx: sa.Connection, reservation: str, used: int, tokens: int | None, state: str) -> None:
    ended = _end(tx, {"reservation": reservation, "becomes": state, "used": used})
    if not ended:
        raise StoreError(f"reservation {reservation} is not open")
    amount, tokens_held, calls, names = ended[0]
    if not 0 <= used <= amount:
        raise StoreError(f"reservation {reservation} of {amount} cannot be settled to {used}")
    tokens_used = tokens_held if tokens is None else min(tokens, tokens_held)
    if tokens_used < 0:
        raise StoreError(f"reservation {reservation} cannot be settled to {tokens_used} tokens")
    purses = {f"scope{number}": scope for number, scope in enumerate(json.loads(names))}
    values = {"amount": amount, "used": used, "tokens": tokens_held, "tokens_used": tokens_used, "calls": calls}
    _release(len(purses))(tx, {**purses, **values})


def open_reservations(tx: sa.Connection, query: str) -> list[tuple[str, str, int]]:
    """(id, node, amount) of the query's reservations that are still open."""
    return [(name, node, amount) for name, node, amount in _open(tx, {"of": query})]


def balance(tx: sa.Connection, scope: str) -> tuple[int, int]:
    """(spent, held) of a scope; zeros when it was never used."""
    rows = _balance(tx, {"scope": scope})
    return (rows[0][0], rows[0][1]) if rows else (0, 0)


def left(tx: sa.Connection, purses: Sequence[Scope]) -> int:
    """nano-USD that every scope has room for; what a child query gets its slice of."""
    return max(0, min((scope.most("limit") - sum(balance(tx, scope.id)) for scope in purses), default=MOST))


def set_aside(query: str, node: str = "root", tries: int = 0) -> str:
    """The id of the reservation for a node's last word. It is held to the node's end: no other call can have it.

    tries: of the last word that came to nothing, for after each it is put aside anew.
    """
    return f"{query}:{node}{_LAST_WORD}" + (f":{tries}" if tries else "")


def times_set_aside(tx: sa.Connection, query: str, node: str) -> int:
    """How often a last word of the node was set aside so far: an id is used once."""
    named = set_aside(query, node)
    mine = sa.or_(reservations.c.id == named, reservations.c.id.startswith(f"{named}:", autoescape=True))
    count = sa.select(sa.func.count()).select_from(reservations).where(reservations.c.query == query, mine)
    return tx.execute(count).scalar_one()


def is_set_aside(reservation: str) -> bool:
    return _LAST_WORD in reservation
