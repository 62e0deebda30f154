"""Whose a context is, how much a tenant may have, and when the files of one go."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.core.context import Context
from orchestrator.core.errors import ContextError, CountExceeded
from orchestrator.core.events import Event
from orchestrator.store import drafts, holdings, journal
from orchestrator.store.contexts import ContextStore
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.schema import queries

ROOM = 1000


class Shop:
    """A store that a service and the command line share, with the database in which tenants have contexts."""

    def __init__(self, db: Database, root: Path) -> None:
        self.db, self.root = db, root
        self.own = ContextStore(root)

    def give(self, tenant: str, value: object = "some text", name: str = "", room: int = ROOM) -> Context:
        return self.store(tenant, name, room).ingest_value(value)

    def store(self, tenant: str, name: str = "", room: int = ROOM) -> ContextStore:
        def placed(context: Context) -> None:
            self.db.write_sync(lambda tx: holdings.hold(tx, tenant, context, name, room))

        return ContextStore(self.root, placed=placed)

    def drop(self, tenant: str, context: Context) -> bool:
        found = self.db.write_sync(lambda tx: holdings.give_up(tx, tenant, context.id))
        self.collect()
        return found

    def collect(self) -> int:
        return self.own.remove(self.own.removable(), self.wanted)

    def wanted(self, sizes: Collection[int]) -> Mapping[str, int]:
        return self.db.look(partial(holdings.wanted, sizes=sizes))

    def files(self) -> int:
        return sum(path.is_file() for path in self.root.rglob("*"))


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Shop:
    return Shop(db, tmp_path / "contexts")


def test_what_one_tenant_has_is_nothing_to_another(shop: Shop, db: Database):
    context = shop.give("ann", name="minutes")
    assert db.look(lambda tx: holdings.holds(tx, "ann", context.id))
    assert not db.look(lambda tx: holdings.holds(tx, "bob", context.id))
    assert db.look(lambda tx: holdings.listed(tx, "bob", 10)) == []
    assert db.look(lambda tx: holdings.stored(tx, "bob")) == 0
    assert not shop.drop("bob", context)
    assert db.look(lambda tx: holdings.holds(tx, "ann", context.id))
    new = [db.write_sync(lambda tx: holdings.hold(tx, "bob", context, "", ROOM))[1] for _time in range(2)]
    assert new == [True, False]  # for bob it is new, whoever had it before


def test_files_go_with_the_last_who_has_them(shop: Shop):
    context = shop.give("ann")
    assert shop.give("bob") == context
    assert shop.drop("ann", context)
    assert shop.own.verify(context)
    assert shop.drop("bob", context)
    assert shop.files() == 0
    with pytest.raises(ContextError):
        shop.own.open(context.id)


@pytest.mark.parametrize("first", [True, False])
def test_what_the_command_line_stored_is_never_removed(shop: Shop, first: bool):
    if first:
        shop.own.ingest_value("some text")
    context = shop.give("ann")
    if not first:
        shop.own.ingest_value("some text")
    assert shop.drop("ann", context)
    assert shop.own.verify(context)


def test_data_that_another_context_shares_stays(shop: Shop):
    listed, text = shop.give("ann", [1, 2]), shop.give("bob", "1\n2\n")
    assert listed.sha256 == text.sha256
    assert listed.id != text.id
    assert shop.drop("ann", listed)
    assert shop.own.verify(text)
    assert not shop.own.verify(listed)
    assert shop.drop("bob", text)
    assert shop.files() == 0


@pytest.mark.parametrize("status", ["queued", "open", "interrupted"])
def test_a_query_that_is_not_finished_keeps_its_context(shop: Shop, db: Database, status: str):
    context = shop.give("ann")
    key = QueryKey("q1", "ann", "")
    event = Event("query.opened", "root", {"context": context.facts()})
    db.write_sync(lambda tx: journal.open_query(tx, key, db.owner, event))
    set_status(db, status)
    assert shop.drop("ann", context)
    assert shop.own.verify(context)
    set_status(db, "answered")
    assert shop.collect() == 1
    assert shop.files() == 0


def set_status(db: Database, status: str) -> None:
    db.write_sync(lambda tx: tx.execute(sa.update(queries).values(status=status)))


def test_what_does_not_fit_is_refused_and_leaves_nothing(shop: Shop, db: Database):
    shop.give("ann", "x" * 600)
    with pytest.raises(CountExceeded, match="400 bytes are left of the 1,000"):
        shop.give("ann", "y" * 401)
    assert db.look(lambda tx: holdings.stored(tx, "ann")) == 600
    assert shop.collect() == 1
    shop.give("ann", "y" * 400)
    shop.give("bob", "y" * 401)


def test_a_limit_holds_when_many_come_at_once(shop: Shop, db: Database):
    def give(number: int) -> bool:
        try:
            shop.give("ann", f"{number:02}" * 50)
        except CountExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(give, range(24))) == 10
    assert db.look(lambda tx: holdings.stored(tx, "ann")) == ROOM
    assert shop.collect() == 14


def test_who_comes_while_another_leaves_finds_all_there(shop: Shop):
    """Both have the same content; whoever has it at the end can read it, whatever came in between."""

    def come_and_go(tenant: str) -> None:
        for _round in range(20):
            assert shop.own.verify(shop.give(tenant))
            shop.drop(tenant, shop.give(tenant))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come_and_go, ["ann", "bob", "cid"]))
    assert shop.files() == 0


def test_a_list_goes_on_after_the_last_one(shop: Shop, db: Database):
    given = {shop.give("ann", text).id for text in ("a", "b", "c", "d", "e")}
    found: list[holdings.Held] = []
    while page := db.look(partial(listed_after, found=found)):
        assert len(page) <= 2
        found += page
    assert [each.id for each in found] == [each.id for each in sorted(found, key=lambda h: (h.at, h.id), reverse=True)]
    assert {each.id for each in found} == given


def listed_after(tx: sa.Connection, found: list[holdings.Held]) -> list[holdings.Held]:
    return holdings.listed(tx, "ann", 2, (found[-1].at, found[-1].id) if found else None)


def test_a_name_is_kept_and_changed(shop: Shop, db: Database):
    names: list[str] = []
    for given in ("first", "", "second"):
        context = shop.give("ann", name=given)
        found = db.look(lambda tx, context=context: holdings.find(tx, "ann", context.id))
        names.append(found.name if found else "none")
    assert names == ["first", "first", "second"]


@pytest.mark.parametrize("most", [1, 500])
def test_many_are_removed_at_once(shop: Shop, db: Database, monkeypatch: pytest.MonkeyPatch, most: int):
    monkeypatch.setattr(holdings, "MOST_SIZES", most)
    kept = shop.give("bob", "x" * 70)
    gone = [shop.give("ann", "y" * size) for size in (1, 2, 3, 70)]
    db.write_sync(lambda tx: [holdings.give_up(tx, "ann", context.id) for context in gone])
    assert shop.collect() == 4
    assert shop.own.removable() == [kept.id]
    assert db.look(holdings.owned) == {kept.id}
    assert shop.own.verify(kept)


def test_what_a_killed_process_left_beside_goes(shop: Shop):
    context = shop.give("ann")
    for path in context.files.values():
        path.with_suffix(".tmpx").hardlink_to(path)
    assert shop.collect() == 0
    assert shop.own.verify(context)
    assert sorted(path.name for path in context.files["data"].parent.iterdir()) == [context.sha256]
    assert shop.own.removable() == [context.id]


def test_whether_another_has_it_changes_nothing_that_is_done(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    """Time is not measured here, where it is noise; what is done to the disk is the same, and so is its order."""
    done: list[str] = []
    for name in ("fsync", "link", "unlink", "rename"):
        call: Callable[..., object] = getattr(os, name)
        monkeypatch.setattr(os, name, partial(noted, done, name, call))
    runs: list[list[str]] = []
    for tenant, text in (("ann", "some text"), ("bob", "some text"), ("bob", "other text")):
        done.clear()
        shop.give(tenant, text)
        drafts.LATER.submit(int).result()  # what is removed later, is by now
        runs.append(list(done))
    assert runs[0] == runs[1] == runs[2]
    assert (runs[0].count("link"), runs[0].count("unlink")) == (4, 2)  # no draft is removed meanwhile


def noted(done: list[str], name: str, call: Callable[..., object], *arguments: object, **options: object) -> object:
    if threading.current_thread() is threading.main_thread():
        done.append(name)
    return call(*arguments, **options)


def test_a_manifest_that_is_damaged_is_left_alone(shop: Shop, db: Database):
    context = shop.give("ann")
    manifest = context.files["manifest.json"]
    manifest.chmod(0o1644)
    manifest.write_text(json.dumps({"sha256": "../../airlock.db"}))
    give_up: Callable[[sa.Connection], bool] = lambda tx: holdings.give_up(tx, "ann", context.id)  # noqa: E731
    db.write_sync(give_up)
    other = shop.give("bob", "other")
    assert shop.drop("bob", other)
    assert not other.files["data"].exists()
    assert manifest.exists()


def test_a_removal_reads_no_whole_table(shop: Shop, db: Database):
    """All who store something wait for it."""
    shop.give("ann")
    assert plans(db, partial(holdings.wanted, sizes=[9])), "it asks something"
    for plan in plans(db, partial(holdings.wanted, sizes=[9, 10])):
        assert not re.search(r"\bSCAN\b|Seq Scan", plan), plan


def plans(db: Database, work: Callable[[sa.Connection], object]) -> list[str]:
    """How the database does what is asked of it."""

    def asked(tx: sa.Connection) -> list[str]:
        found: list[tuple[str, Any]] = []

        def note(_tx: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
            found.append((statement, parameters))

        sa.event.listen(tx, "before_cursor_execute", note)
        work(tx)
        sa.event.remove(tx, "before_cursor_execute", note)
        explain = "EXPLAIN QUERY PLAN"
        if tx.dialect.name == "postgresql":
            explain = "EXPLAIN"
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")  # it would read a table of two rows as a whole
        return ["\n".join(map(str, tx.exec_driver_sql(f"{explain} {text}", given))) for text, given in found]

    return db.look(asked)
