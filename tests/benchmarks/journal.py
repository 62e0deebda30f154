"""Figures of the journal: how many records a second it takes and verifies, and what it adds to a sub-call.

Records are those of a sub-call (`call.intent` with its prompt, `call.result` with its completion), of the sizes that a
query's have, their payloads sealed. The database is SQLite with synchronous=FULL, written to as queries do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from orchestrator.audit.archive import Archive, write_archive
from orchestrator.audit.evidence import LiveEvidence, QueryEvidence
from orchestrator.audit.verdicts import Report
from orchestrator.audit.verify import verify
from orchestrator.core.events import Event
from orchestrator.core.policy import PAYLOADS
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault, open_vault
from tests.benchmarks.figures import Figure, at_most, interleaved, percentile

RECORDS, VERIFIED, EXPORT_S, BYTES, ADDED_S = 3000, 30_000, 5.0, 1024, 0.001
CALLS = 5000  # of the query that is verified and exported: 10,000 records and two more
LANES, SECONDS = 64, 4.0
PROMPT, COMPLETION = "Is this paragraph about money? " * 12, "No, it is about the sea. " * 2
INTENT = {
    "attempt": 1,
    "role": "sub",
    "model": "gpt-5-mini",
    "bound_usd": "0.001234",
    "output_tokens": 4096,
    "messages": 1,
    "shared": 0,
}
RESULT = {
    "outcome": "answered",
    "detail": "stop",
    "finish": "stop",
    "cost_usd": "0.00",
    "usage": {"input_tokens": 120, "output_tokens": 12},
}


def journals(home: Path, quick: bool) -> list[Figure]:
    home = home / "journal"
    home.mkdir()
    db = Database(home)
    keys = open_vault(db, home, None, journal.key_created)
    keys.signer()  # is the first thing that a new database has
    rate = anyio.run(written, db, keys, SECONDS / 2 if quick else SECONDS, backend_options={"use_uvloop": True})
    rounds = 300 if quick else 1500
    with_records, alone = anyio.run(a_call, home / "calls", rounds, backend_options={"use_uvloop": True})
    added = percentile(with_records, 50) - percentile(alone, 50)
    figures = [
        at_least("records a second, SQLite, 64 writers", rate, RECORDS),
        Figure(
            "what records add to a sub-call's two transactions",
            f"p50 {added * 1000:.2f} ms",
            f"the ledger alone {percentile(alone, 50) * 1000:.2f} ms",
            target="<= 1 ms",
            ok=added <= ADDED_S,
        ),
        *one_query(db, keys, home),
    ]
    db.close()
    return figures


def at_least(name: str, rate: float, least: int) -> Figure:
    return Figure(name, f"{rate:,.0f}", target=f">= {least:,}", ok=rate >= least)


def key_of(keys: Vault, query: str) -> QueryKey:
    return QueryKey(query, "acme", "0" * 64, keys.keeper("acme", query, frozenset(PAYLOADS)))


def intent(key: QueryKey, call: str) -> Callable[[Any], object]:
    event = Event("call.intent", "root", {"call": call, **INTENT}, {"prompt": PROMPT})
    return lambda tx: journal.append(tx, key, event)


def result(key: QueryKey, call: str) -> Callable[[Any], object]:
    event = Event("call.result", "root", {"call": call, **RESULT}, {"completion": COMPLETION})
    return lambda tx: journal.append(tx, key, event)


def open_(db: Database, key: QueryKey) -> None:
    opened = Event("query.opened", "root", {}, {"question": "Who?"})
    db.write_sync(lambda tx: journal.open_query(tx, key, db.owner, opened))


async def written(db: Database, keys: Vault, seconds: float) -> float:
    """Records a second, each waited for, by writers of eight queries."""
    all_keys = [key_of(keys, f"w{number}") for number in range(8)]
    for key in all_keys:
        open_(db, key)
    count, until = 0, time.monotonic() + seconds

    async def one(lane: int) -> None:
        nonlocal count
        key, made = all_keys[lane % 8], 0
        while time.monotonic() < until:
            await db.write((result if made % 2 else intent)(key, f"root.c{lane}-{made // 2}"))
            made += 1
            count += time.monotonic() < until

    async with anyio.create_task_group() as tasks:
        for lane in range(LANES):
            tasks.start_soon(one, lane)
    return count / seconds


async def a_call(home: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a call's two transactions, with its records and without, one after the other."""
    db = Database(home)  # of its own, for what has no records would be a fault
    key = key_of(open_vault(db, home, None, journal.key_created), "c")
    open_(db, key)
    purses = [Scope("query:c", 10**15), Scope("tenant-day:acme", 10**15), Scope("platform:now", None)]
    db.write_sync(lambda tx: ledger.open_scopes(tx, purses))
    taken: tuple[list[float], list[float]] = [], []
    for number in range(rounds * 2):
        records, call = number % 2 == 0, f"root.c{number}"

        def before(tx: Any, call: str = call, *, records: bool = records) -> None:
            ledger.reserve(tx, f"c:{call}:1", "c", "root", 0, purses)
            if records:
                intent(key, call)(tx)

        def after(tx: Any, call: str = call, *, records: bool = records) -> None:
            ledger.settle(tx, f"c:{call}:1", 0)
            if records:
                result(key, call)(tx)

        started = time.perf_counter()
        await db.write(before)
        await db.write(after)
        taken[number % 2].append(time.perf_counter() - started)
    db.close()
    return taken


def one_query(db: Database, keys: Vault, home: Path) -> list[Figure]:
    """Of a query with 10,000 records: verified, exported, and what a record takes on the disk."""
    key, notary = key_of(keys, "q"), Notary(keys.signer(), home / "heads", keys.stamp)
    before = pages(db)
    open_(db, key)
    for number in range(0, CALLS, 50):

        def calls(tx: Any, number: int = number) -> None:
            for call in range(number, number + 50):
                # Without payloads, as the figure asks.
                journal.append(tx, key, Event("call.intent", "root", {"call": f"root.c{call}", **INTENT}))
                journal.append(tx, key, Event("call.result", "root", {"call": f"root.c{call}", **RESULT}))

        db.write_sync(calls)
    closed = Event("query.closed", "root", {"status": "answered", "cost_usd": "0.00"}, {"answer": "42"})
    db.write_sync(lambda tx: journal.close_query(tx, key, "answered", closed))
    notary.remember(db.write_sync(lambda tx: notary.sign(tx, "acme")))
    size = (pages(db) - before) / (2 * CALLS + 2)
    tar = home / "q.tar"

    def export() -> float:
        started = time.perf_counter()
        with tar.open("wb") as out:
            db.read(lambda tx: write_archive(QueryEvidence(tx, keys, "q"), out))
        return time.perf_counter() - started

    def check_export() -> float:
        with Archive(tar) as archive:
            return rate(lambda: verify(archive))

    def check_all() -> float:
        return rate(lambda: db.read(lambda tx: verify(LiveEvidence(tx, keys))))

    exports, of_export, of_all = interleaved(3, export, check_export, check_all)
    return [
        Figure("a record on the disk, without payloads", f"{size:,.0f} B", target=f"< {BYTES:,} B", ok=size < BYTES),
        at_most("export of a query with 10,000 records", exports, EXPORT_S),
        at_least("records verified a second, of that export", statistics.median(of_export), VERIFIED),
        at_least("records verified a second, all of the database", statistics.median(of_all), VERIFIED),
    ]


def rate(check: Callable[[], Report]) -> float:
    started = time.perf_counter()
    report = check()
    seconds = time.perf_counter() - started
    faults = [fault for name, verdict in report.items() if name != "freshness" for fault in verdict.faults]
    assert not faults, faults
    return int(report["integrity"].note.split()[0].replace(",", "")) / seconds


def pages(db: Database) -> int:
    """Bytes of the database, but for what is free in it."""

    def count(tx: Any) -> int:
        of = [tx.exec_driver_sql(f"PRAGMA {what}").scalar() for what in ("page_count", "freelist_count", "page_size")]
        return (of[0] - of[1]) * of[2]

    return db.read(count)
