"""What a dead process held comes free while others work: at once, once, and for everybody who waits for it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import anyio
import pytest

from orchestrator.core.errors import BudgetInFlight, RateLimited, StoreError
from orchestrator.core.events import Event
from orchestrator.loop import recovery
from orchestrator.loop.recovery import sweep
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import NotEnough, Scope
from tests.command import until
from tests.unit.helpers import Store

pytestmark = pytest.mark.anyio
DAY = Scope("tenant-day:t:2026-11-25", 100, in_flight=2, tokens=1000)


def scope(name: str) -> Scope:
    return Scope(f"query:{name}", 1000)


def begin(tx: Any, db: Database, name: str) -> None:
    """A query with a call in flight, and last words set aside for itself and for a child."""
    journal.open_query(tx, QueryKey(name, "t", "p"), db.owner, Event("query.opened", "root", {}))
    purses = [scope(name), DAY]
    ledger.open_scopes(tx, purses)
    for node in ("root", "root.1"):
        ledger.reserve(tx, ledger.set_aside(name, node), name, node, 20, purses, calls=0)
    ledger.reserve(tx, f"{name}:root.c1:1", name, "root", 30, purses, tokens=400)


def run_a_query(store: Store, ready: Any) -> None:
    db = store.open()
    db.write_sync(lambda tx: begin(tx, db, "q1"))
    ready.set()
    signal.pause()


@pytest.fixture
def dying(store: Store) -> Iterator[BaseProcess]:
    """A process with a query under way, to be killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=run_a_query, args=(store, ready))
    child.start()
    assert ready.wait(20)
    yield child
    kill(child)


def kill(child: BaseProcess) -> None:
    child.kill()
    child.join()


async def ask(db: Database, amount: int, calls: int = 1) -> None:
    purses = [scope("q2"), DAY]
    await db.write(lambda tx: ledger.open_scopes(tx, purses))
    await db.write(lambda tx: ledger.reserve(tx, "q2:root.c1:1", "q2", "root", amount, purses, calls=calls))


async def refusal(db: Database, amount: int, calls: int = 1) -> Any:
    with pytest.raises(NotEnough) as caught:
        await ask(db, amount, calls)
    return caught.value.error


async def test_what_a_dead_process_held_comes_free_and_a_living_one_keeps_it(db: Database, dying: BaseProcess):
    assert isinstance(await refusal(db, 60), BudgetInFlight)
    assert isinstance(await refusal(db, 1, calls=2), RateLimited)
    assert await sweep(db) == 0
    assert isinstance(await refusal(db, 60), BudgetInFlight)
    kill(dying)
    recovery._sweeps[db].after = 0  # SWEEP_S later
    until(db.dead_owners)
    assert await sweep(db) == 1
    # The call may have been answered, so it is paid and its tokens are used; the last words come free.
    assert db.read(lambda tx: ledger.balance(tx, DAY.id)) == (30, 0)
    assert db.read(lambda tx: ledger.open_reservations(tx, "q1")) == []
    await ask(db, 60, calls=2)
    links = db.read(lambda tx: journal.chain(tx, "q1"))
    kept = db.read(lambda tx: list(journal.kept_payloads(tx, "q1")))
    assert journal.fault(links, kept, closed=True) is None


async def test_all_who_wait_for_a_sweep_have_its_result_and_there_is_one_in_a_while(
    db: Database, dying: BaseProcess, monkeypatch: pytest.MonkeyPatch
):
    kill(dying)
    until(db.dead_owners)
    looks = 0
    look = recovery.recover

    def counted(of: Database, notary: Any) -> int:
        nonlocal looks
        looks += 1
        return look(of, notary)

    monkeypatch.setattr(recovery, "recover", counted)
    found = list[int]()

    async def one() -> None:
        found.append(await sweep(db))

    async with anyio.create_task_group() as tasks:
        for _ in range(64):
            tasks.start_soon(one)
    assert found == [1] * 64
    assert await sweep(db) == 0
    assert looks == 1
    recovery._sweeps[db].after = 0
    assert await sweep(db) == 0
    assert looks == 2


async def test_the_event_loop_goes_on_while_a_sweep_waits(db: Database, store: Store, dying: BaseProcess):
    """Another process is in the middle of a transaction."""
    kill(dying)
    until(db.dead_owners)
    other = store.open()
    held, free = anyio.Event(), anyio.Event()

    async def hold() -> None:
        def work(_tx: Any) -> None:
            anyio.from_thread.run_sync(held.set)
            anyio.from_thread.run(free.wait)

        await anyio.to_thread.run_sync(other.write_sync, work)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        await held.wait()
        tasks.start_soon(sweep, db)
        await anyio.wait_all_tasks_blocked()  # which needs the loop
        assert db.read(lambda tx: ledger.balance(tx, DAY.id)) == (0, 70)
        free.set()
    assert db.read(lambda tx: ledger.balance(tx, DAY.id)) == (30, 0)
    other.close()


async def test_two_that_sweep_at_once_close_a_query_once(db: Database, store: Store, dying: BaseProcess):
    kill(dying)
    other = store.open()
    until(db.dead_owners)
    found = list[int]()

    async def one(of: Database) -> None:
        found.append(await sweep(of))

    async with anyio.create_task_group() as tasks:
        for each in (db, other):
            tasks.start_soon(one, each)
    assert 1 in found
    assert db.read(lambda tx: ledger.balance(tx, DAY.id)) == (30, 0)
    kinds = [record.count(b'"type":"query.closed"') for record, _ in db.read(lambda tx: journal.chain(tx, "q1"))]
    assert sum(kinds) == 1
    other.close()


async def test_a_sweep_that_cannot_write_says_so_and_the_next_one_waits_its_turn(
    db: Database, dying: BaseProcess, monkeypatch: pytest.MonkeyPatch
):
    def fail(_db: Database, _notary: object) -> int:
        raise StoreError("no room")

    monkeypatch.setattr(recovery, "recover", fail)
    with pytest.raises(StoreError, match="no room"):
        await sweep(db)
    assert await sweep(db) == 0
