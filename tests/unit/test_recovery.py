"""What a dead process held comes free while others work: at once, once, and for everybody who waits for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy as sa

from orchestrator.core.errors import BudgetInFlight, RateLimited, StoreError
from orchestrator.core.events import Event
from orchestrator.core.notes import Signer
from orchestrator.loop import recovery
from orchestrator.loop.recovery import leave, recover, sweep
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import NotEnough, Scope
from orchestrator.store.schema import queries, records
from orchestrator.store.signing import Notary
from tests.command import until
from tests.unit.helpers import Store

pytestmark = pytest.mark.anyio
DAY = Scope("tenant-day:t:2026-11-25", 100, in_flight=2, tokens=1000)


def scope(name: str) -> Scope:
    return Scope(f"query:{name}", 1000)


def begin(tx: Any, db: Database, name: str, tenant: str = "t", day: Scope = DAY) -> None:
    """A query with a call in flight, and last words set aside for itself and for a child."""
    journal.open_query(tx, QueryKey(name, tenant, "p"), db.owner, Event("query.opened", "root", {}))
    purses = [scope(name), day]
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


TENANTS = {"q1": "damaged", "q2": "damaged", "q3": "well"}  # query -> its tenant


@pytest.fixture
def notary(tmp_path: Path) -> Notary:
    return Notary(Signer("airlock-test", bytes(32)), tmp_path / "heads")


def die_with(store: Store) -> None:
    """A process that runs TENANTS, and ends as `kill -9` ends it."""
    child = os.fork()
    if not child:
        try:
            mine = store.open()
            for name, tenant in TENANTS.items():
                day = Scope(f"tenant-day:{tenant}:2026-11-25", 1000)
                mine.write_sync(partial(begin, db=mine, name=name, tenant=tenant, day=day))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def statuses(db: Database) -> dict[str, str]:
    rows = db.read(lambda tx: tx.execute(sa.select(queries.c.id, queries.c.status)).all())
    return {row.id: row.status for row in rows}


UNUSABLE = {
    "gone": sa.delete(records),
    "no JSON": sa.update(records).values(record=b"{"),
    "no object": sa.update(records).values(record=b"[]"),
    "no body": sa.update(records).values(record=b'{"at":"","body":""}'),
}


@pytest.mark.parametrize("damage", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_query_whose_chain_is_unusable_stops_no_other(db: Database, store: Store, notary: Notary, damage: Any):
    die_with(store)
    until(lambda: len(db.dead_owners()) == 1)
    (dead,) = db.dead_owners()
    db.write_sync(lambda tx: tx.execute(damage.where(records.c.query == "q1")))
    assert recover(db, notary) == 2
    assert statuses(db) == {"q1": "open", "q2": "failed", "q3": "failed"}
    assert db.read(lambda tx: len(ledger.open_reservations(tx, "q1"))) == 3  # nothing of it is done by halves
    assert db.read(lambda tx: ledger.open_reservations(tx, "q2")) == []
    assert db.dead_owners() == [dead]  # so the next one comes by it again
    assert recover(db, notary) == 0


def test_a_tenant_whose_log_is_damaged_stops_no_other(db: Database, store: Store, notary: Notary):
    die_with(store)
    until(lambda: len(db.dead_owners()) == 1)
    signed = db.write_sync(lambda tx: notary.sign(tx, "damaged"))
    notary.remember(signed)
    db.write_sync(lambda tx: tx.execute(sa.update(records).where(records.c.query == "q2").values(hash="0" * 64)))
    assert recover(db, notary) == 1
    assert statuses(db) == {"q1": "open", "q2": "open", "q3": "failed"}
    assert db.read(lambda tx: len(ledger.open_reservations(tx, "q1"))) == 3
    assert notary.remembered("tenants/well")
    assert len(db.dead_owners()) == 1


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_query_of_no_tenant_stops_no_other(db: Database, store: Store, notary: Notary, name: str):
    die_with(store)
    until(lambda: len(db.dead_owners()) == 1)
    db.write_sync(lambda tx: tx.execute(sa.update(queries).where(queries.c.id == "q1").values(tenant=name)))
    assert recover(db, notary) == 2
    assert statuses(db) == {"q1": "open", "q2": "failed", "q3": "failed"}
    assert not [record for record, _ in db.read(lambda tx: journal.chain(tx, "q1")) if b"query.closed" in record]


def test_an_owner_of_nothing_more_is_forgotten(db: Database, store: Store, notary: Notary):
    die_with(store)
    until(lambda: len(db.dead_owners()) == 1)
    assert recover(db, notary) == 3
    assert set(statuses(db).values()) == {"failed"}
    assert db.dead_owners() == []


async def test_what_nobody_is_at_is_left_by_name_and_of_one_owner_alone(db: Database, store: Store, notary: Notary):
    other = store.open()
    event = Event("query.opened", "root", {"payloads": "keep"})
    for name, owner in (("q1", db), ("q2", db), ("q3", other)):
        await owner.write(partial(journal.open_query, key=QueryKey(name, "t", "p"), owner=owner.owner, event=event))
    for _time in range(2):
        await db.write(partial(leave, owner=db.owner, left={"q1", "q3"}, notary=notary))
    found = db.read(lambda tx: {row.id: row.status for row in tx.execute(sa.select(queries))})
    assert found == {"q1": "interrupted", "q2": "open", "q3": "open"}
    other.close()
