"""Figures of the ledger: how many reservations a second processes can make and settle, each in committed transactions.

One reservation is two writes, as the proxy makes them: `reserve` in one transaction, and when that is committed
`settle` in another, both waited for. It is held on four scopes: a query's own and three that all processes share. Each
process has as many calls at once as a query's policy permits (64), so writes are committed in groups, as in a query.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import anyio

from orchestrator.store import ledger
from orchestrator.store.db import Database
from orchestrator.store.ledger import Scope
from tests.benchmarks.figures import Figure
from tests.postgres import Postgres

SHARED = [
    Scope("tenant-day:t:2026-11-25", 10**15),
    Scope("tenant-month:t:2026-11", 10**15),
    Scope("platform:2026-11", None),
]
IN_FLIGHT, SECONDS, QUICK_SECONDS = 64, 5.0, 2.0
POSTGRESQL, SQLITE = 500, 1000  # a second
PROCESSES = 8


def ledgers(home: Path, quick: bool) -> list[Figure]:
    seconds = QUICK_SECONDS if quick else SECONDS
    alone = rate(home / "ledger", None, 1, seconds)
    with Postgres() as server:
        together = rate(home / "ledger", server.url(server.fresh()), PROCESSES, seconds)
    return [
        at_least("reservations a second, SQLite, 1 process", alone, SQLITE),
        at_least(f"reservations a second, PostgreSQL, {PROCESSES} processes", together, POSTGRESQL),
    ]


def at_least(name: str, rate: float, least: int) -> Figure:
    return Figure(f"{name}, 4 scopes", f"{rate:,.0f}", target=f">= {least:,}", ok=rate >= least)


def rate(home: Path, url: str | None, processes: int, seconds: float) -> float:
    """Of all processes together. What each has done is counted at the end of a time that is the same for all."""
    Database(home, url).close()
    context = multiprocessing.get_context("fork")
    ready, done = context.Barrier(processes), context.Queue()
    started = [context.Process(target=spend, args=(home, url, n, seconds, ready, done)) for n in range(processes)]
    for process in started:
        process.start()
    total = sum(done.get() for _ in started)
    for process in started:
        process.join()
    db = Database(home, url)
    spent, held = db.read(lambda tx: ledger.balance(tx, SHARED[0].id))
    db.close()
    assert held == 0
    assert spent >= total
    return total / seconds


def spend(home: Path, url: str | None, number: int, seconds: float, ready: Any, done: Any) -> None:
    db = Database(home, url)
    purses = [Scope(f"query:{number}", 10**15, calls=10**9), *SHARED]
    db.write_sync(lambda tx: ledger.open_scopes(tx, purses))
    ready.wait()
    done.put(anyio.run(calls, db, purses, seconds, backend_options={"use_uvloop": True}))
    db.close()


async def calls(db: Database, purses: list[Scope], seconds: float) -> int:
    until = time.monotonic() + seconds
    count = 0

    async def one(lane: int) -> None:
        nonlocal count
        made = 0
        while time.monotonic() < until:
            name, made = f"{purses[0].id}:{lane}:{made}", made + 1
            await db.write(lambda tx, name=name: ledger.reserve(tx, name, "q", "root", 7, purses, tokens=10))
            await db.write(lambda tx, name=name: ledger.settle(tx, name, 5, 5))
            count += time.monotonic() < until

    async with anyio.create_task_group() as tasks:
        for lane in range(IN_FLIGHT):
            tasks.start_soon(one, lane)
    return count
