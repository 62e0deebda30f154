"""PostgreSQL: a connection that broke neither writes nor lives, and what is wrong with a server is said in one line."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest
import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.core.events import Event
from orchestrator.loop.recovery import recover
from orchestrator.store import journal, ledger, postgres
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.schema import queries, scopes
from tests.command import until
from tests.postgres import PASSWORD, ROLE, Postgres
from tests.unit.helpers import Store, keeper

pytestmark = pytest.mark.anyio
KEY = QueryKey("q", "tenant", "policy")
PURSE = Scope("query:q", 100)
BROKE = "the connection to the database broke"


@pytest.fixture
def store(postgresql: Store) -> Store:
    return postgresql


@pytest.fixture
def server(postgresql: Store) -> Postgres:
    assert postgresql.server
    return postgresql.server


@pytest.fixture
def db(store: Store) -> Iterator[Database]:
    made = store.open()
    yield made
    made.close()


def put(name: str) -> Any:
    return lambda tx: tx.execute(sa.insert(scopes), {"id": name})


def names(db: Database) -> list[str]:
    return db.read(lambda tx: list(tx.execute(sa.select(scopes.c.id).order_by(scopes.c.id)).scalars()))


def session(db: Database) -> int:
    """The server's process for the connection that writes."""
    return db.write_sync(lambda tx: tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def end(server: Postgres, process: int) -> None:
    server.admin(f"SELECT pg_terminate_backend({process}, 10000)")


def with_money_held(tx: journal.Connection, owner: str) -> None:
    journal.open_query(tx, KEY, owner, Event("query.opened", "root", {}))
    ledger.open_scopes(tx, [PURSE])
    ledger.reserve(tx, "q:root.c1:1", "q", "root", 30, [PURSE])


async def test_a_connection_that_broke_never_writes_again(db: Database, server: Postgres):
    end(server, session(db))
    with pytest.raises(StoreError, match="ledger and journal cannot be used"):
        await db.write(put("a"))
    for _ in range(2):
        with pytest.raises(StoreError, match=BROKE):
            await db.write(put("a"))
    with pytest.raises(StoreError, match=BROKE):
        db.write_sync(put("a"))
    assert names(db) == []


async def test_a_connection_that_breaks_in_mid_transaction_never_writes_again(db: Database, server: Postgres):
    async def work(process: int) -> None:
        def break_it(tx: Any) -> None:
            put("a")(tx)
            end(server, process)
            put("b")(tx)

        await db.write(break_it)

    with pytest.raises(StoreError):
        await work(session(db))
    with pytest.raises(StoreError, match=BROKE):
        await db.write(put("c"))
    assert names(db) == []


async def test_a_connection_that_breaks_in_a_statement_of_a_call_never_writes_again(db: Database, server: Postgres):
    """Those go to the driver past SQLAlchemy."""
    process = session(db)

    def work(tx: journal.Connection) -> None:
        end(server, process)
        with_money_held(tx, db.owner)

    with pytest.raises(StoreError):
        await db.write(work)
    with pytest.raises(StoreError, match=BROKE):
        await db.write(put("c"))


async def test_an_owner_whose_connection_broke_is_dead_and_its_calls_are_charged(db: Database, store: Store):
    assert store.server
    await db.write(lambda tx: with_money_held(tx, db.owner))
    other = store.open()
    assert recover(other) == 0
    end(store.server, session(db))
    assert recover(other) == 1
    assert other.read(lambda tx: ledger.balance(tx, PURSE.id)) == (30, 0)
    with pytest.raises(StoreError):  # it lives, and knows of nothing; what it says now comes too late
        await db.write(lambda tx: ledger.settle(tx, "q:root.c1:1", 1))
    assert other.read(lambda tx: ledger.balance(tx, PURSE.id)) == (30, 0)
    other.close()


async def test_who_stops_in_mid_transaction_is_cut_off_before_the_others_lose_their_patience(
    db: Database, store: Store
):
    patience = "SET idle_in_transaction_session_timeout = '200ms'"
    await db.write(lambda tx: tx.exec_driver_sql(patience))
    begun, done = threading.Event(), threading.Event()

    def stop(tx: Any) -> None:
        put("a")(tx)
        begun.set()
        done.wait(20)

    other = store.open()
    async with anyio.create_task_group() as tasks:

        async def stopped() -> None:
            with pytest.raises(StoreError):
                await db.write(stop)

        tasks.start_soon(stopped)
        await anyio.to_thread.run_sync(begun.wait)
        await other.write(put("b"))
        done.set()
    assert names(other) == ["b"]
    other.close()


def test_a_session_is_durable_and_patient_whatever_the_server_says(store: Store, server: Postgres):
    name = str(store.url).partition("@/")[2].partition("?")[0]
    for setting in ("synchronous_commit = off", "default_transaction_isolation = 'serializable'", "lock_timeout = 0"):
        server.admin(f"ALTER DATABASE {name} SET {setting}")
    db = store.open()
    shown = ("synchronous_commit", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_isolation")
    found = db.write_sync(lambda tx: [tx.exec_driver_sql(f"SHOW {one}").scalar() for one in shown])
    assert found == ["on", "30s", "15s", "read committed"]
    read = db.read(lambda tx: [tx.exec_driver_sql(f"SHOW {one}").scalar() for one in shown[-1:]])
    assert read == ["repeatable read"]
    db.close()


def test_reading_changes_nothing(db: Database):
    with pytest.raises(StoreError, match="read-only transaction"):
        db.read(put("a"))


def test_readers_find_a_server_that_was_started_again(store: Store, tmp_path: Path):
    with Postgres() as server:
        db = Database(tmp_path, server.url(server.fresh()))
        db.write_sync(put("a"))
        assert names(db) == ["a"]
        server.stop()
        with pytest.raises(StoreError):
            names(db)
        with pytest.raises(StoreError):
            db.write_sync(put("b"))
        server.start()
        assert names(db) == ["a"]
        with pytest.raises(StoreError, match=BROKE):
            db.write_sync(put("b"))
        db.close()


# Erasing


def with_payloads(db: Database) -> list[bytes]:
    """Two small ones, and one that is kept out of line."""
    key = QueryKey("q", "tenant", "policy", keeper("q"))
    texts = {"code": "x" * 20, "stdout": "y" * 500, "answer": "z" * 20_000}

    def work(tx: journal.Connection) -> list[bytes]:
        journal.open_query(tx, key, db.owner, Event("query.opened", "root", {}))
        journal.close_query(tx, key, "answered", Event("query.closed", "root", {}, texts))
        return [sealed for _seq, _name, sealed in journal.kept_payloads(tx, "q")]

    return db.write_sync(work)


def erase(db: Database) -> None:
    assert db.write_sync(lambda tx: journal.erase(tx, "q", None, None, "")) == 3


def on_disk(server: Postgres, db: Database, sealed: list[bytes]) -> list[bytes]:
    """Those of which anything is in a file of the database."""
    server.admin("CHECKPOINT")
    path = db.read(lambda tx: tx.exec_driver_sql("SELECT pg_relation_filepath('payloads')").scalar_one())
    files = [file.read_bytes() for file in (server.folder / "data" / path).parent.iterdir()]
    parts = {blob: [blob[at : at + 24] for at in range(0, len(blob) - 24, 24)] for blob in sealed}
    return [blob for blob in sealed if any(part in file for file in files for part in parts[blob])]


def test_what_is_erased_is_in_no_file_of_the_database(db: Database, server: Postgres):
    sealed = with_payloads(db)
    assert on_disk(server, db, sealed) == sealed
    erase(db)
    assert on_disk(server, db, sealed) == sealed
    assert db.scrub()
    assert on_disk(server, db, sealed) == []


@pytest.mark.parametrize("table", ["payloads", "queries"])
def test_what_somebody_still_reads_is_told_not_to_be_gone(
    db: Database, server: Postgres, store: Store, monkeypatch: pytest.MonkeyPatch, table: str
):
    """A lock on the table, or a snapshot of before."""
    monkeypatch.setattr(postgres, "FREE_MS", 100)
    sealed, other = with_payloads(db), store.open()

    def work(tx: journal.Connection) -> None:
        tx.exec_driver_sql(f"SELECT count(*) FROM {table}")  # noqa: S608
        erase(db)
        assert not db.scrub()

    other.read(work)
    assert on_disk(server, db, sealed) == sealed
    with other.read(lambda tx: tx.engine).begin() as tx:
        assert tx.exec_driver_sql("SHOW lock_timeout").scalar() == "30s"
        assert not db.scrub()  # somebody writes
    assert db.scrub()
    assert on_disk(server, db, sealed) == []
    other.close()


def test_a_role_that_may_not_erase_for_good_is_told(store: Store, server: Postgres, tmp_path: Path):
    url = str(store.url)
    name = url.partition("@/")[2].partition("?")[0]
    server.admin(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}", name)
    db = Database(tmp_path, url.replace("postgres@", f"{ROLE}:{quote(PASSWORD, safe='')}@"))
    assert not db.scrub()
    server.admin(f"ALTER TABLE payloads OWNER TO {ROLE}", name)
    server.admin(f"GRANT CREATE ON SCHEMA public TO {ROLE}", name)
    assert db.scrub()  # without a checkpoint, which it may not ask for
    db.close()


def test_a_server_that_is_not_there_is_said(tmp_path: Path):
    for url in ("postgresql://u:secret@127.0.0.1:1/x", f"postgresql://u:secret@/x?host={tmp_path}"):
        said = refused(tmp_path, url)
        assert "cannot be reached" in said
        assert "start it, or look at AIRLOCK_DATABASE, or at `database` in airlock.toml" in said


def refused(home: Path, url: str) -> str:
    with pytest.raises(StoreError) as caught:
        Database(home, url)
    said = str(caught.value)
    assert "\n" not in said
    for secret in ("secret", PASSWORD, quote(PASSWORD, safe="")):
        assert secret not in f"{said} {caught.value!r}"
    return said


def test_a_database_in_another_encoding_is_said(server: Postgres, tmp_path: Path):
    server.admin("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0")
    try:
        assert "is in SQL_ASCII: create it again with ENCODING 'UTF8'" in refused(tmp_path, server.url("ascii"))
    finally:
        server.drop("ascii")


def test_a_password_is_used_and_a_wrong_one_is_said(store: Store, server: Postgres, tmp_path: Path):
    url = str(store.url)
    name = url.partition("@/")[2].partition("?")[0]
    server.admin(f"ALTER DATABASE {name} OWNER TO {ROLE}")
    for table in ("queries", "records", "payloads", "scopes", "reservations", "alembic_version"):
        server.admin(f"ALTER TABLE {table} OWNER TO {ROLE}", name)
    Database(tmp_path, url.replace("postgres@", f"{ROLE}:{quote(PASSWORD, safe='')}@")).close()
    said = refused(tmp_path, url.replace("postgres@", f"{ROLE}:secret@"))
    assert 'lets us not in: password authentication failed for user "airlock"' in said
    said = refused(tmp_path, url.replace(name, "elsewhere"))
    assert 'database "elsewhere" does not exist' in said


@pytest.mark.parametrize("url", ["postgresql://u:secret@h:secret/x", "postgresql+secret://u@h/x", "secret"])
def test_an_address_that_is_none_is_said_without_showing_it(tmp_path: Path, url: str):
    refused(tmp_path, url)


def test_without_the_driver_it_is_said_what_to_install(tmp_path: Path):
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from pathlib import Path; from orchestrator.store.db import Database\n"
        "Database(Path(sys.argv[1]), 'postgresql://h/x')"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert "a database on PostgreSQL needs psycopg: run `pip install 'airlock[postgres]'`" in done.stderr


def open_and_close(home: Path, url: str) -> None:
    Database(home, url).close()


def test_two_that_migrate_at_once_do_it_once(server: Postgres, tmp_path: Path):
    both = multiprocessing.get_context("fork")
    for kind in (both.Process, threading.Thread):
        name = server.fresh()
        started = [kind(target=open_and_close, args=(tmp_path, server.url(name))) for _ in range(3)]
        for one in started:
            one.start()
        for one in started:
            one.join()
        assert [getattr(one, "exitcode", 0) for one in started] == [0, 0, 0]
        db = Database(tmp_path, server.url(name))
        db.write_sync(put("a"))
        db.close()
        server.drop(name)


def test_an_owner_dies_with_its_process(store: Store):
    child = os.fork()
    if not child:
        try:
            mine = store.open()
            row = {"id": "q", "tenant": "t", "owner": mine.owner, "policy": "", "opened_at": "", "status": "open"}
            mine.write_sync(lambda tx: tx.execute(sa.insert(queries), row))
            os.kill(os.getpid(), 9)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 9
    db = store.open()
    until(lambda: len(db.dead_owners()) == 1)
    db.close()
