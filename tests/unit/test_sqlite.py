"""The embedded database: what the file system does to it, and how processes of one machine know of each other."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.store.db import Database
from orchestrator.store.schema import scopes
from tests.unit.helpers import database

pytestmark = pytest.mark.anyio


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = database(tmp_path)
    yield made
    made.close()


def put(name: str) -> Any:
    return lambda tx: tx.execute(sa.insert(scopes), {"id": name}).rowcount


def names(db: Database) -> list[str]:
    return db.read(lambda tx: sorted(tx.execute(sa.select(scopes.c.id)).scalars()))


async def test_a_full_disk_is_said_and_undone_and_then_mended(db: Database):
    pages = db.read(lambda tx: tx.exec_driver_sql("PRAGMA page_count").scalar())
    await db.write(lambda tx: tx.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar())
    big = sa.text("INSERT INTO payloads VALUES ('q', 1, 'x', zeroblob(1000000))")
    with pytest.raises(StoreError, match="full"):
        await db.write(lambda tx: tx.execute(big))
    await db.write(lambda tx: tx.exec_driver_sql("PRAGMA max_page_count=100000").scalar())
    await db.write(put("a"))
    assert names(db) == ["a"]


async def test_what_may_not_be_written_is_said(db: Database):
    await db.write(lambda tx: tx.exec_driver_sql("PRAGMA query_only=ON"))
    with pytest.raises(StoreError, match="ledger and journal cannot be used: attempt to write a readonly database"):
        await db.write(put("a"))


def test_a_commit_is_on_the_disk_when_it_returns(db: Database):
    wanted = ("journal_mode", "synchronous")
    assert db.read(lambda tx: [tx.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted]) == ["wal", 2]


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
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another who asks
        assert db.dead_owners() == ["gone"]
    db.forget_owner("gone")
    db.forget_owner("gone")
    assert db.dead_owners() == []


def test_a_folder_of_owners_that_cannot_be_read_is_said(db: Database, tmp_path: Path):
    owners = tmp_path / "owners"
    owners.rename(tmp_path / "aside")
    with pytest.raises(StoreError, match=r"cannot use the data folder .*: No such file or directory"):
        db.dead_owners()
    (tmp_path / "aside").rename(owners)
    (owners / "gone").mkdir()
    with pytest.raises(StoreError, match=r"cannot use the data folder .*: Is a directory"):
        db.forget_owner("gone")
    (owners / "gone").rmdir()
    assert db.dead_owners() == []


@pytest.mark.parametrize("then", ["removed", "replaced"])
async def test_a_file_that_has_lost_its_name_is_not_written_to(db: Database, tmp_path: Path, then: str):
    """SQLite would write on, to where nobody looks: whoever comes next would find all money unspent."""
    await db.write(put("a"))
    file, aside = tmp_path / "airlock.db", tmp_path / "aside"
    file.rename(aside)
    if then == "replaced":
        file.write_bytes(aside.read_bytes())
    said = "was removed or replaced: put it back, then start again"
    with pytest.raises(StoreError, match=said):
        await db.write(put("b"))
    with pytest.raises(StoreError, match=said):
        db.write_sync(put("c"))
    aside.rename(file)
    await db.write(put("d"))
    assert names(db) == ["a", "d"]
