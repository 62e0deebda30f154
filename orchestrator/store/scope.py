"""Scopes: what has a limit. A reservation is held on several of them at once, or on none."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.core.units import MOST

LIMITS = ("limit", "calls", "tokens", "in_flight", "children")
_OWNERS = {"platform": "the platform's", "query": "the query's", "node": "the child query's"}
_MINUTE = "tenant-minute:"
_MONEY = {
    "query": "money.query",
    "node": "money.child_share",
    "tenant-day": "money.tenant_day",
    "tenant-month": "money.tenant_month",
    "platform": "platform.month_usd",
}
_COUNTS = {
    "calls": "tenant.requests_minute",
    "tokens": "tenant.tokens_minute",
    "in_flight": "tenant.in_flight",
    "children": "counts.children",
}
_MINUTE_CHARS = len("2026-11-25T18:43")


@dataclass(frozen=True, slots=True)
class Scope:
    """A purse, and counters beside it; None is no limit.

    id: `platform:2026-11`, `tenant-month:NAME:2026-11`, `tenant-day:NAME:2026-11-25`, `query:ID`, `node:QUERY:root.1`,
    `tenant-minute:NAME:2026-11-25T18:43`; times in UTC. limit: nano-USD, spent and held. calls, children: ever made.
    tokens: used, and the most that calls in flight can use. in_flight: calls.
    """

    id: str
    limit: int | None
    calls: int | None = None
    tokens: int | None = None
    in_flight: int | None = None
    children: int | None = None

    @property
    def title(self) -> str:
        return self.id.split(":")[0]

    @property
    def owner(self) -> str:
        """Whose limits these are, for a message: "the tenant's"."""
        return _OWNERS.get(self.title, "the tenant's")

    @property
    def minute(self) -> datetime | None:
        """The beginning of the minute that a tenant-minute scope is for."""
        return datetime.fromisoformat(self.id[-_MINUTE_CHARS:] + "+00:00") if self.id.startswith(_MINUTE) else None

    def rule(self, what: str) -> str:
        """The key of the policy, or of the configuration, that a limit is from."""
        return _MONEY[self.title] if what == "limit" and self.title in _MONEY else _COUNTS.get(what, "")

    def most(self, what: str) -> int:
        """The limit; where there is none, the most that the database can count to."""
        found: int | None = getattr(self, what)
        return MOST if found is None else found

    def minutes_over(self) -> tuple[str, str]:
        """The ids of the tenant's minutes that are over lie from the first of these up to the second, exclusive."""
        assert self.minute
        prefix = self.id[:-_MINUTE_CHARS]
        return prefix, f"{prefix}{self.minute - timedelta(minutes=1):%Y-%m-%dT%H:%M}"
