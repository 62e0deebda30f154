"""A query as the service shows it: a few indexed reads of journal and ledger, whatever it did."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from orchestrator.auditing import Books
from orchestrator.core.policy import Policy
from orchestrator.core.units import read_usd, usd
from orchestrator.proxy.account import Account
from orchestrator.server.paging import cut, read_cursor
from orchestrator.store import journal, ledger
from orchestrator.store.journal import Connection
from orchestrator.store.prepared import Prepared
from orchestrator.store.schema import payloads, queries, records, scopes

_SHOWN = {"open": "running"}  # the database's word -> ours
_BEFORE_WORK = 100  # records of a query that waits: two for each stop of the service
_CUT = 200  # characters of a question in a list
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{10}", re.ASCII)

_columns = (queries.c.id, queries.c.tenant, queries.c.status, queries.c.opened_at, queries.c.policy)
_find = Prepared(sa.select(*_columns).where(queries.c.id == sa.bindparam("q")))
_link = sa.select(records.c.record, records.c.hash).where(records.c.query == sa.bindparam("q"))
_PAYLOADS = ("question", "policy", "answer")  # that a view is made of
_seqs, _others = records.alias(), records.alias()
_newest = sa.select(sa.func.max(_others.c.seq)).where(_others.c.query == queries.c.id).scalar_subquery()
_first, _last = (Prepared(_link.order_by(order).limit(1)) for order in (records.c.seq, records.c.seq.desc()))


@dataclass(frozen=True, slots=True)
class Listed:
    """A row of the table of queries. policy: SHA-256 of the one that it is under."""

    id: str
    tenant: str
    status: str
    opened_at: str
    policy: str


def find(tx: Connection, query: str) -> Listed | None:
    """query: any text; what is no id is not there."""
    if not _ID.fullmatch(query):
        return None
    return next((Listed(*row) for row in _find(tx, {"q": query})), None)


def page(
    tx: Connection, tenant: str, most: int, cursor: str | None, status: str | None
) -> tuple[list[Listed], str | None]:
    """The tenant's queries, the newest first, from a cursor on; and where the next page begins. Raises Problem."""
    wanted = sa.select(*_columns).where(queries.c.tenant == tenant)
    if status is not None:
        wanted = wanted.where(queries.c.status == {ours: name for name, ours in _SHOWN.items()}.get(status, status))
    if cursor is not None:
        wanted = wanted.where(sa.tuple_(queries.c.opened_at, queries.c.id) < sa.tuple_(*read_cursor("queries", cursor)))
    rows = tx.execute(wanted.order_by(queries.c.opened_at.desc(), queries.c.id.desc()).limit(most + 1)).all()
    listed = [Listed(*row) for row in rows]
    return cut("queries", listed, most, lambda row: (row.opened_at, row.id))


def summaries(tx: Connection, books: Books, listed: Sequence[Listed]) -> list[dict[str, Any]]:
    """As a list has them: a few reads for all together, and of payloads none is opened that a list does not show."""
    ids = [query.id for query in listed]
    opened, ended = _of_each(tx, ids, _seqs.c.seq == 0), _of_each(tx, ids, _seqs.c.seq == _newest)
    wanted = sa.select(payloads.c.query, payloads.c.sealed)
    wanted = wanted.where(payloads.c.query.in_(ids), payloads.c.seq == 0, payloads.c.name == "question")
    # SQLite gives back whatever a file was edited to hold: what is no bytes is not kept.
    sealed = {row.query: row.sealed for row in tx.execute(wanted) if isinstance(row.sealed, bytes)}
    purses = sa.select(scopes.c.id, scopes.c.spent, scopes.c.held)
    purses = purses.where(scopes.c.id.in_([f"query:{query}" for query in ids]))
    balances: dict[str, tuple[int, int]] = {row.id: (row.spent, row.held) for row in tx.execute(purses)}

    def shown(query: Listed) -> dict[str, Any]:
        kept = [(0, "question", sealed[query.id])] if query.id in sealed else []
        texts = _texts(books, query, kept)
        last = ended[query.id] if _has_ended(query) else None
        made = _shown(query, opened[query.id], last, texts, balances.get(f"query:{query.id}", (0, 0)))
        made["limit_usd"] = _limits(tx, query, opened[query.id])["body"]["limit_usd"]
        del made["answer"]
        return made | {"question": made["question"] and made["question"][:_CUT]}

    return [shown(query) for query in listed]


def _of_each(tx: Connection, ids: Sequence[str], which: sa.ColumnElement[bool]) -> dict[str, dict[str, Any]]:
    """One record of each of the queries."""
    chosen = sa.select(_seqs.c.query, _seqs.c.record, _seqs.c.hash).where(_seqs.c.query == queries.c.id, which)
    rows = tx.execute(chosen.where(queries.c.id.in_(ids)))
    return {row.query: {**json.loads(row.record), "hash": row.hash} for row in rows}


def view(tx: Connection, books: Books, query: Listed, live: Account | None = None) -> dict[str, Any]:
    """The whole of it. live: of one that runs here, which knows how far it is."""
    opened = _record(tx, query.id, first=True)
    ended = _record(tx, query.id, first=False) if _has_ended(query) else None
    limits = _limits(tx, query, opened)
    kept = journal.payloads_of(tx, query.id, tuple({0, limits["seq"], *((ended["seq"],) if ended else ())}))
    texts = _texts(books, query, (row for row in kept if row[1] in _PAYLOADS))
    shown = _shown(query, opened, ended, texts, ledger.balance(tx, f"query:{query.id}"))
    shown["limit_usd"] = limits["body"]["limit_usd"]
    shown["time_limit_s"] = _time_limit(texts.get((limits["seq"], "policy")))
    if live and shown["iterations"] is None:
        shown |= {"iterations": live.turns, "sub_calls": live.sub_calls}
    return shown


def _limits(tx: Connection, query: Listed, opened: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record that says what it may: its first one, or the last that narrowed it, which all come before its work."""
    found = opened
    if query.policy != opened["policy"]:
        for stored, _digest in journal.links_after(tx, query.id, 0, _BEFORE_WORK):
            record = json.loads(stored)
            found = record if record["type"] == "query.narrowed" else found
    return found


def _has_ended(query: Listed) -> bool:
    """Or was interrupted: its last record says how."""
    return query.status not in ("open", journal.QUEUED)


def _shown(
    query: Listed,
    opened: Mapping[str, Any],
    ended: Mapping[str, Any] | None,
    texts: Mapping[tuple[int, str], str],
    balance: tuple[int, int],
) -> dict[str, Any]:
    """What list and view have in common; opened, ended: its first record and its last one."""
    spent, held = balance
    asked, end = opened["body"], ended["body"] if ended else dict[str, Any]()
    closed = ended if ended and ended["type"] == "query.closed" else None  # who was interrupted has not ended
    context = asked["context"]
    return {
        "id": query.id,
        "status": _SHOWN.get(query.status, query.status),
        "created_at": query.opened_at,
        "ended_at": closed["at"] if closed else None,
        "question": texts.get((0, "question")),
        "model": asked["model"],
        "sub_models": asked["sub_models"],
        "backend": asked["backend"],
        "isolation": asked["isolation"],
        "context": {**{name: context[name] for name in ("id", "kind", "bytes")}, "characters": context["chars"]},
        "cost_usd": usd(spent),
        "held_usd": usd(held),
        "limit_usd": None,
        "time_limit_s": None,
        "duration_s": end["duration_ms"] / 1000 if "duration_ms" in end else None,
        "answer": texts.get((ended["seq"], "answer")) if ended else None,
        "reason": end.get("reason", end.get("why", "")),
        "iterations": end.get("turns"),
        "sub_calls": end.get("sub_calls"),
        "journal_head": closed["hash"] if closed else None,
    }


def _record(tx: Connection, query: str, *, first: bool) -> dict[str, Any]:
    """The first or the last one of the chain."""
    ((record, digest),) = (_first if first else _last)(tx, {"q": query})
    return {**json.loads(record), "hash": digest}


def _texts(books: Books, query: Listed, kept: Iterable[tuple[int, str, bytes]]) -> dict[tuple[int, str], str]:
    """What is kept of these payloads: number of the record, name, what is stored."""
    keeper = books.vault.opener(query.tenant, query.id)
    opened = {(seq, name): keeper.open(seq, name, sealed) for seq, name, sealed in kept if keeper}
    return {place: text[1].decode("utf-8", "replace") for place, text in opened.items() if text}


def _time_limit(policy: str | None) -> float | None:
    """Seconds."""
    try:
        return None if policy is None else Policy.model_validate_json(policy, strict=False).time.query / 1000
    except ValidationError:  # of a newer Airlock
        return None


def last_number(tx: Connection, query: Listed) -> int | None:
    """Of the record that closed it; None while it is not closed."""
    return journal.length(tx, query.id) - 1 if journal.is_closed(tx, query.id) else None


def spend(tx: Connection, query: Listed) -> dict[str, Any]:
    """What it has cost so far, by model and by node."""
    spent, held = ledger.balance(tx, f"query:{query.id}")
    opened = _record(tx, query.id, first=True)["body"]
    purses = sa.select(scopes.c.id, scopes.c.spent, scopes.c.held)
    prefix = f"node:{query.id}:"
    children = {
        row.id.removeprefix(prefix): row
        for row in tx.execute(purses.where(scopes.c.id.startswith(prefix, autoescape=True)))
    }
    limits = {"root": opened["limit_usd"]}
    models: dict[str, dict[str, Any]] = {}
    asked: dict[str, str] = {}
    for record in _of_types(tx, query.id, ("call.intent", "call.result", "node.opened")):
        body = record["body"]
        if record["type"] == "node.opened":
            limits[record["node"]] = body["limit_usd"]
        elif record["type"] == "call.intent":
            asked[body["call"]] = body["model"]
        else:
            _count(models.setdefault(asked.get(body["call"], ""), _NOTHING.copy()), body)
    nodes = {
        name: {"spent_usd": usd(row.spent), "held_usd": usd(row.held), "limit_usd": limits.get(name)}
        for name, row in children.items()
    }
    nodes = {"root": {"spent_usd": usd(spent), "held_usd": usd(held), "limit_usd": limits["root"]}, **nodes}
    shown = {name: {**usage, "cost_usd": usd(usage["cost_usd"])} for name, usage in models.items()}
    return {
        "limit_usd": limits["root"],
        "spent_usd": usd(spent),
        "held_usd": usd(held),
        "models": shown,
        "nodes": nodes,
    }


_NOTHING: dict[str, Any] = {"calls": 0, "input_tokens": 0, "output_tokens": 0, "cost_usd": 0}


def _count(usage: dict[str, Any], body: Mapping[str, Any]) -> None:
    used: Mapping[str, int] = body.get("usage") or {}
    usage["calls"] += body["outcome"] == "answered"
    usage["input_tokens"] += used.get("input_tokens", 0)
    usage["output_tokens"] += used.get("output_tokens", 0)
    usage["cost_usd"] += read_usd(body["cost_usd"])


def _of_types(tx: Connection, query: str, types: tuple[str, ...]) -> list[dict[str, Any]]:
    wanted = sa.select(records.c.record).where(records.c.query == query).order_by(records.c.seq)
    found = (json.loads(record) for record in tx.execute(wanted).scalars())
    return [record for record in found if record["type"] in types]


def budgets(tx: Connection, tenant: str, policy: Policy, at: datetime) -> dict[str, Any]:
    """What the tenant has spent, and what it may; of calls, what counts in this minute. at: now, in UTC."""
    names = {
        "day": f"tenant-day:{tenant}:{at:%Y-%m-%d}",
        "month": f"tenant-month:{tenant}:{at:%Y-%m}",
        "minute": f"tenant-minute:{tenant}:{at:%Y-%m-%dT%H:%M}",
    }
    rows = {row.id: row for row in tx.execute(sa.select(scopes).where(scopes.c.id.in_(names.values())))}
    day, month, minute = (rows.get(name) for name in names.values())
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    next_month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    rates = policy.tenant
    return {
        "query": {"limit_usd": usd(policy.money.query)},
        "day": _purse(day, policy.money.tenant_day, midnight + timedelta(days=1)),
        "month": _purse(month, policy.money.tenant_month, next_month),
        "minute": {
            "requests": {"limit": rates.requests_minute, "used": minute.calls if minute else 0},
            "tokens": {"limit": rates.tokens_minute, "used": minute.tokens + minute.tokens_held if minute else 0},
        },
        "calls_in_flight": {"limit": rates.in_flight, "used": month.in_flight if month else 0},
    }


def _purse(row: Any, limit: int, resets: datetime) -> dict[str, str]:
    spent, held = (row.spent, row.held) if row else (0, 0)
    left = max(0, limit - spent - held)
    amounts = {"limit_usd": limit, "spent_usd": spent, "held_usd": held, "left_usd": left}
    return {name: usd(amount) for name, amount in amounts.items()} | {"resets_at": f"{resets:%Y-%m-%dT%H:%M:%SZ}"}
