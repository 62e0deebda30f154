"""The database: what was committed stays, what failed is undone alone, and what cannot be written is said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import StoreError
from orchestrator.store.db import Database, now, queries, scopes
from tests.unit.helpers import database, quick

pytestmark = pytest.mark.anyio


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = database(tmp_path)
    yield made
    made.close()


def put(name: str, spent: int = 0) -> Any:
    return lambda tx: tx.execute(sa.insert(scopes), {"id": name, "spent": spent, "held": 0}).rowcount


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


async def test_a_full_disk_is_said_and_undone_and_then_mended(db: Database):
    pages = db.read(lambda tx: tx.exec_driver_sql("PRAGMA page_count").scalar())
    await db.write(lambda tx: tx.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar())
    big = sa.text("INSERT INTO payloads VALUES ('q', 1, 'x', x'', zeroblob(1000000))")
    with pytest.raises(StoreError, match="full"):
        await db.write(lambda tx: tx.execute(big))
    await db.write(lambda tx: tx.exec_driver_sql("PRAGMA max_page_count=100000").scalar())
    await db.write(put("a"))
    assert names(db) == ["a"]


async def test_what_may_not_be_written_is_said(db: Database):
    await db.write(lambda tx: tx.exec_driver_sql("PRAGMA query_only=ON"))
    with pytest.raises(StoreError, match="ledger and journal cannot be used: attempt to write a readonly database"):
        await db.write(put("a"))


async def test_a_database_that_another_holds_on_to_is_said(db: Database, tmp_path: Path):
    other = Database(tmp_path)
    await other.write(lambda tx: tx.exec_driver_sql("PRAGMA busy_timeout=1"))
    gate = Gate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(db.write, gate.work)
        await anyio.to_thread.run_sync(gate.begun.wait)
        with pytest.raises(StoreError, match="locked"):
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


async def test_a_closed_database_says_so(tmp_path: Path):
    db = Database(tmp_path)
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


def test_a_commit_is_on_the_disk_when_it_returns(db: Database):
    wanted = ("journal_mode", "synchronous")
    assert db.read(lambda tx: [tx.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted]) == ["wal", 2]


def test_what_cannot_be_read_is_said(db: Database):
    with pytest.raises(StoreError, match="no such table"):
        db.read(lambda tx: tx.exec_driver_sql("SELECT * FROM elsewhere"))


def test_a_file_that_is_no_database_is_said(tmp_path: Path):
    (tmp_path / "airlock.db").write_bytes(b"not a database, " * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        Database(tmp_path)


def test_a_page_that_was_overwritten_is_said(tmp_path: Path):
    db = Database(tmp_path)
    db.write_sync(put("a"))
    db.close()
    with (tmp_path / "airlock.db").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 20_000)
    with pytest.raises(StoreError):
        Database(tmp_path)


def test_a_data_folder_that_is_a_file_is_said(tmp_path: Path):
    (tmp_path / "home").write_text("")
    with pytest.raises(StoreError, match="cannot use the data folder"):
        Database(tmp_path / "home")


def test_a_database_in_place_of_a_folder_is_said(tmp_path: Path):
    (tmp_path / "airlock.db").mkdir()
    with pytest.raises(StoreError, match="Is a directory"):
        Database(tmp_path)


def test_a_new_data_folder_is_for_its_owner_alone_and_any_database_is(tmp_path: Path):
    for folder, mode in ((tmp_path / "new", 0o700), (tmp_path / "shared", 0o755)):
        if mode == 0o755:
            folder.mkdir()
            folder.chmod(mode)
        Database(folder).close()
        assert folder.stat().st_mode & 0o777 == mode  # what was there is not ours to change
        assert (folder / "airlock.db").stat().st_mode & 0o777 == 0o600


def test_an_owner_lives_while_its_database_is_open(db: Database, tmp_path: Path):
    other = Database(tmp_path)
    assert db.dead_owners() == []
    other.close()
    assert db.dead_owners() == []
    assert [path.name for path in (tmp_path / "owners").iterdir()] == [db.owner]


def test_an_owner_whose_process_ended_is_dead(db: Database, tmp_path: Path):
    path = tmp_path / "owners" / "gone"
    path.write_text("")
    (path.parent / ".new").write_text("")  # one that is just being made, and not locked yet
    assert db.dead_owners() == ["gone"]
    db.forget_owner("gone")
    db.forget_owner("gone")
    assert db.dead_owners() == []


def test_an_owner_without_a_file_that_left_a_query_open_is_dead(db: Database):
    row = {"id": "q", "tenant": "t", "owner": "gone", "policy": "", "opened_at": now(), "status": "open"}
    db.write_sync(lambda tx: tx.execute(sa.insert(queries), row))
    assert db.dead_owners() == ["gone"]


def test_times_are_rfc_3339():
    assert len(now()) == len("2026-11-22T01:50:26.297Z")
    assert now()[10] + now()[-1] == "TZ"
