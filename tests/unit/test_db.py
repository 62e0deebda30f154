"""The database: what was committed stays, what failed is undone alone, and what cannot be written is said."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import StoreError
from orchestrator.store.db import Database, now, try_out
from orchestrator.store.schema import queries, scopes
from tests.command import until
from tests.unit.helpers import Store, database, quick

pytestmark = pytest.mark.anyio


def put(name: str) -> Any:
    """A work that adds a row, and gives back 1."""
    return lambda tx: (tx.execute(sa.insert(scopes), {"id": name}), 1)[1]


def names(db: Database) -> list[str]:
    return db.read(lambda tx: sorted(tx.execute(sa.select(scopes.c.id)).scalars()))


class Gate:
    """A transaction that waits, so that others queue up behind it."""

    def __init__(self) -> None:
        self.begun, self.free = threading.Event(), threading.Event()

    def work(self, tx: Any) -> None:
        self.begun.set()
        assert self.free.wait(10)


async def behind_a_gate(db: Database, *works: Any) -> list[Any]:
    """The outcome of each, committed as one group."""
    gate, outcomes = Gate(), [None] * len(works)

    async def one(number: int, work: Any) -> None:
        try:
            outcomes[number] = await db.write(work)
        except Exception as error:  # the outcome
            outcomes[number] = error

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(db.write, gate.work)
        await anyio.to_thread.run_sync(gate.begun.wait)
        for number, work in enumerate(works):
            tasks.start_soon(one, number, work)
        await anyio.wait_all_tasks_blocked()
        gate.free.set()
    return outcomes


def fail(tx: Any) -> None:
    put("half")(tx)
    raise KeyError("mine")


async def test_a_result_comes_back(db: Database):
    assert await db.write(put("a")) == 1
    assert names(db) == ["a"]


async def test_an_exception_comes_back_and_undoes_its_part(db: Database):
    with pytest.raises(KeyError, match="mine"):
        await db.write(fail)
    assert names(db) == []


async def test_one_that_fails_leaves_the_others_of_its_group_committed(db: Database):
    outcomes = await behind_a_gate(db, put("a"), fail, put("b"))
    assert outcomes[::2] == [1, 1]
    assert isinstance(outcomes[1], KeyError)
    assert names(db) == ["a", "b"]


async def test_one_that_breaks_a_rule_of_the_database_leaves_the_others_committed(db: Database):
    await db.write(put("a"))
    outcomes = await behind_a_gate(db, put("b"), put("a"), put("c"))
    assert outcomes[::2] == [1, 1]
    assert isinstance(outcomes[1], StoreError)
    assert names(db) == ["a", "b", "c"]


async def test_what_queues_up_is_committed_together(db: Database):
    commits: list[object] = []
    sa.event.listen(db._engine, "commit", commits.append)
    await behind_a_gate(db, *[put(str(number)) for number in range(20)])
    assert len(commits) == 2
    assert len(names(db)) == 20


@settings(quick, max_examples=12)
@given(st.lists(st.sampled_from(["put", "fail", "again"]), max_size=8))
async def test_any_mix_of_writes(kinds: list[str]):
    async with anyio.TemporaryDirectory() as folder:
        db = database(Path(folder))
        await db.write(put("again"))
        works = [
            {"put": put(str(number)), "fail": fail, "again": put("again")}[kind] for number, kind in enumerate(kinds)
        ]
        outcomes = await behind_a_gate(db, *works)
        assert [outcome == 1 for outcome in outcomes] == [kind == "put" for kind in kinds]
        assert names(db) == sorted(["again", *[str(number) for number, kind in enumerate(kinds) if kind == "put"]])
        db.close()


async def test_a_database_that_another_holds_on_to_is_said(db: Database, store: Store):
    other = store.open()
    patience = "SET lock_timeout = '1ms'" if store.url else "PRAGMA busy_timeout=1"
    await other.write(lambda tx: tx.exec_driver_sql(patience))
    gate = Gate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(db.write, gate.work)
        await anyio.to_thread.run_sync(gate.begun.wait)
        with pytest.raises(StoreError, match="lock"):
            await other.write(put("a"))
        assert names(other) == []  # reading goes on
        gate.free.set()
    await other.write(put("a"))
    other.close()


async def test_a_write_that_has_begun_is_not_cancelled(db: Database):
    gate = Gate()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            tasks.start_soon(anyio.to_thread.run_sync, lambda: (gate.begun.wait(), gate.free.set()))

            def work(tx: Any) -> None:
                gate.work(tx)
                put("a")(tx)

            scope.cancel()
            await db.write(work)
            await anyio.lowlevel.checkpoint()
            raise AssertionError("the scope was cancelled")
    assert names(db) == ["a"]


async def test_a_cancellation_of_asyncios_own_leaves_the_writer_in_order(db: Database):
    # No shield keeps Task.cancel() off, and asyncio.wait_for uses it. A transaction is under way meanwhile.
    gate = Gate()
    first = asyncio.create_task(db.write(lambda tx: (gate.work(tx), put("a")(tx))))
    await anyio.to_thread.run_sync(gate.begun.wait)
    second = asyncio.create_task(db.write(put("b")))
    await anyio.wait_all_tasks_blocked()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    third = asyncio.create_task(db.write(put("c")))
    await anyio.wait_all_tasks_blocked()
    gate.free.set()
    assert [await second, await third] == [1, 1]
    assert names(db) == ["a", "b", "c"]


async def test_a_closed_database_says_so(db: Database):
    await db.write(put("a"))
    db.close()
    db.close()
    with pytest.raises(StoreError, match="closed"):
        await db.write(put("b"))


def test_writing_without_an_event_loop(db: Database):
    assert db.write_sync(put("a")) == 1
    with pytest.raises(KeyError):
        db.write_sync(fail)
    assert names(db) == ["a"]


def test_what_cannot_be_read_is_said(db: Database):
    with pytest.raises(StoreError, match=r"no such table|does not exist"):
        db.read(lambda tx: tx.exec_driver_sql("SELECT * FROM elsewhere"))


def open_a_query(db: Database, owner: str) -> None:
    row = {"id": owner, "tenant": "t", "owner": owner, "policy": "", "opened_at": now(), "status": "open"}
    db.write_sync(lambda tx: tx.execute(sa.insert(queries), row))


def test_an_owner_that_nobody_is_and_that_left_a_query_open_is_dead(db: Database):
    open_a_query(db, "gone")
    assert db.dead_owners() == ["gone"]
    db.forget_owner("gone")
    assert db.dead_owners() == ["gone"]  # until its query is closed


def test_an_owner_lives_while_its_database_is_open(db: Database, store: Store):
    other = store.open()
    for one in (db, other):
        open_a_query(one, one.owner)
    assert db.dead_owners() == other.dead_owners() == []
    other.close()
    until(lambda: db.dead_owners() == [other.owner])  # a server ends a session soon after it has heard of it


def test_many_who_ask_at_once_do_not_take_each_other_for_the_owner(db: Database, store: Store):
    open_a_query(db, "gone")
    others = [store.open() for _ in range(4)]
    found = list[list[str]]()
    for _ in range(20):
        threads = [threading.Thread(target=lambda one=one: found.append(one.dead_owners())) for one in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [["gone"]] * 80
    for other in others:
        other.close()


def test_times_are_rfc_3339():
    assert len(now()) == len("2026-11-22T01:50:26.297Z")
    assert now()[10] + now()[-1] == "TZ"


async def test_what_is_only_tried_leaves_nothing(db: Database):
    for _time in range(2):
        await db.write(try_out)
    assert names(db) == []
