"""Is the ledger what the records say? Each reservation is held to its call, each scope to its reservations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.audit.evidence import Evidence, Reservation
from orchestrator.audit.verdicts import Verdict
from orchestrator.core.units import usd

_OWNED = ("tenant-day", "tenant-month", "tenant-minute")
_NEEDED = {"query", "tenant-day", "tenant-month", "platform"}


@dataclass(slots=True)
class Spent:
    """What a query's calls cost, so far. print: of all of them in any order, so that none has to be remembered."""

    tenant: str
    is_over: bool = False
    total: int = 0
    print: int = 0

    def add(self, call: str, attempt: int, cost: int) -> None:
        self.total += cost
        self.print += _print(f"{call}:{attempt}", cost)


@dataclass(slots=True)
class _Sums:
    spent: int = 0
    held: int = 0
    calls: int = 0
    in_flight: int = 0


@dataclass(slots=True)
class _Reserved:
    total: int = 0
    print: int = 0
    by_scope: dict[str, _Sums] = field(default_factory=dict[str, _Sums])


def check_ledger(evidence: Evidence, queries: Mapping[str, Spent], verdict: Verdict) -> None:
    """Raises ValueError and the like on rows that cannot be read."""
    reserved: dict[str, _Reserved] = {}
    by_scope: dict[str, _Sums] = {}
    for one in evidence.reservations():
        mine = reserved.setdefault(one.query, _Reserved())
        for scope in _one(one, queries.get(one.query), mine, verdict):
            sums = by_scope.setdefault(scope, _Sums())
            sums.spent += one.settled
            sums.held += one.open
            sums.calls += one.calls
            sums.in_flight += one.calls if one.is_open else 0
    for query in sorted({*reserved, *(name for name, spent in queries.items() if spent.total)}):
        spent, mine = queries.get(query), reserved.get(query, _Reserved())
        if spent is None:
            verdict.fault(f"query {query}: the ledger has reservations of it, and the journal no record")
        elif spent.total != mine.total:
            verdict.fault(f"query {query}: the ledger has {usd(mine.total)} USD, its records {usd(spent.total)} USD")
        elif spent.print != mine.print:
            verdict.fault(f"query {query}: what its calls cost is not the same in the ledger and in its records")
    if evidence.whole:
        _scopes(evidence, by_scope, verdict)


def _one(one: Reservation, query: Spent | None, mine: _Reserved, verdict: Verdict) -> list[str]:
    """Count it for its query; the scopes that it is on."""
    scopes: list[str] = json.loads(one.scopes)
    mine.total += one.settled
    what = one.id.removeprefix(f"{one.query}:")
    if what.rpartition(":")[2].isdecimal() and ":last-word" not in what:
        mine.print += _print(what, one.settled)
    elif one.settled:
        verdict.fault(f"query {one.query}: {what} was paid, and is no call")
    if one.settled < 0 or one.open < 0 or one.calls < 0:
        verdict.fault(f"query {one.query}: reservation {what} is of less than nothing")
    if query is None:
        return scopes
    if query.is_over and one.is_open:
        verdict.fault(f"query {one.query}: {what} still holds money, and the query is over")
    titles = [scope.partition(":")[0] for scope in scopes]
    owned = all(
        scope.startswith(f"{title}:{query.tenant}:") if title in _OWNED else True
        for scope, title in zip(scopes, titles, strict=True)
    )
    if (
        not owned
        or not _NEEDED.issubset(titles)
        or f"query:{one.query}" not in scopes
        or len(set(scopes)) < len(scopes)
    ):
        verdict.fault(f"query {one.query}: reservation {what} is not on the scopes of its query")
    return scopes


def _scopes(evidence: Evidence, by_scope: dict[str, _Sums], verdict: Verdict) -> None:
    for scope, spent, held, calls, in_flight in evidence.scopes():
        found = by_scope.pop(scope, _Sums())
        if (spent, held) != (found.spent, found.held):
            verdict.fault(f"scope {scope}: spent {usd(spent)}, held {usd(held)} USD is not the sum of its calls")
        elif (calls, in_flight) != (found.calls, found.in_flight):
            verdict.fault(f"scope {scope}: {calls} calls, {in_flight} in flight is not the sum of its calls")
    for scope in by_scope:
        if not scope.startswith("tenant-minute:"):  # those that are over are forgotten
            verdict.fault(f"scope {scope} has calls, and the ledger lacks it")


def _print(what: str, cost: int) -> int:
    return int.from_bytes(hashlib.sha512(f"{what}={cost}".encode()).digest())
