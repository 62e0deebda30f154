"""Records are followed while they are written, by this process and by others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from orchestrator.auditing import AT_ONCE, Books, follow
from orchestrator.core.events import Event, Recorded
from orchestrator.server.feed import Feed
from orchestrator.store import journal
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.vault import open_vault
from tests.unit.helpers import Everything, Store


@pytest.fixture
def books(store: Store, tmp_path: Path) -> Iterator[Books]:
    db = store.open()
    yield Books(tmp_path, db, open_vault(db, tmp_path, None, journal.key_created))
    db.close()


def key(books: Books) -> QueryKey:
    return QueryKey("q1", "acme", "0" * 64, books.vault.keeper("acme", "q1", Everything()))


def begin(books: Books) -> None:
    mine, opened = key(books), Event("query.opened", "root", {}, {"question": "Who?"})
    books.db.write_sync(lambda tx: journal.open_query(tx, mine, "me", opened))


def add(books: Books, db: Database, count: int) -> None:
    def work(tx: journal.Connection) -> None:
        for number in range(count):
            journal.append(
                tx, key(books), Event("cell.started", "root", {"cell": number}, {"code": f"print({number})"})
            )

    db.write_sync(work)


def end(books: Books, db: Database) -> None:
    mine, closed = key(books), Event("query.closed", "root", {"status": "answered"}, {"answer": "42"})
    db.write_sync(lambda tx: journal.close_query(tx, mine, "answered", closed))


@pytest.mark.anyio
async def test_what_is_written_is_seen_in_order_up_to_the_end(books: Books, store: Store):
    begin(books)
    other = store.open()
    seen: list[Recorded] = []
    more = anyio.Event()

    async def watch() -> None:
        nonlocal more
        async for record in follow(books, "q1"):
            seen.append(record)
            more.set()
            more = anyio.Event()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            for written, db in ((4, books.db), (7, other), (10, books.db)):
                await anyio.to_thread.run_sync(add, books, db, 3)
                while len(seen) < written:
                    await more.wait()
            await anyio.to_thread.run_sync(end, books, other)
    other.close()
    assert [record.seq for record in seen] == list(range(11))
    assert seen[0].payloads == {"question": "Who?"}
    assert [record.payloads.get("code") for record in seen[1:4]] == ["print(0)", "print(1)", "print(2)"]
    assert seen[-1].type == "query.closed"


@pytest.mark.anyio
async def test_it_goes_on_from_where_one_was(books: Books):
    begin(books)
    add(books, books.db, AT_ONCE + 20)
    end(books, books.db)
    found = [record.seq async for record in follow(books, "q1", after=4)]
    assert found == list(range(5, AT_ONCE + 22))


@pytest.mark.anyio
async def test_an_interruption_is_an_end_for_who_wants_one(books: Books):
    begin(books)
    event = Event("query.interrupted", "root", {"why": "gone", "until": "2026-01-01T00:00:00.000Z"})
    mine = key(books)
    books.db.write_sync(lambda tx: journal.interrupt_query(tx, mine, event))
    assert [record.seq async for record in follow(books, "q1", to_interruption=True)] == [0, 1]
    with anyio.move_on_after(0.5) as scope:
        assert [record async for record in follow(books, "q1")] == []
    assert scope.cancelled_caught, "it may go on"


@pytest.mark.anyio
async def test_what_was_erased_is_followed_without_its_text(books: Books):
    begin(books)
    end(books, books.db)
    books.db.write_sync(lambda tx: journal.erase(tx, "q1", None, None, ""))
    assert [dict(record.payloads) async for record in follow(books, "q1")] == [{}, {}]
    assert books.db.scrub()


@pytest.mark.anyio
async def test_who_asks_from_a_record_that_never_comes_is_not_kept_when_the_query_ends(books: Books):
    begin(books)
    feed = Feed(books, 1, lambda _query: True)
    got: list[Recorded] = []

    async def watch() -> None:
        got.extend([record async for record in feed.follow("acme", "q1", after=999_999)])

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(end, books, books.db)
            feed.wake("q1")
    assert got == []
