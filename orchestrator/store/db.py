"""One database for ledger and journal, so that money and record change in the same transaction.

SQLite in WAL mode with synchronous=FULL: a commit that returned survives a power cut. One thread writes. Writes of
concurrent tasks are committed in groups: everything that queued up while the last commit was under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import anyio
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.core.errors import StoreError

T = TypeVar("T")
BUSY_S = 30  # how long a writer waits for another process's transaction

metadata = sa.MetaData()
queries = sa.Table(
    "queries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("owner", sa.String(40), nullable=False),
    sa.Column("policy", sa.String(64), nullable=False),
    sa.Column("opened_at", sa.String(32), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),  # open, or how it was closed
    sa.Index("queries_by_status", "status", "tenant"),
)
records = sa.Table(
    "records",
    metadata,
    sa.Column("query", sa.String(40), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("record", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)
payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("query", sa.String(40), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
scopes = sa.Table(
    "scopes",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("spent", sa.BigInteger, nullable=False),
    sa.Column("held", sa.BigInteger, nullable=False),
)
reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("query", sa.String(40), nullable=False),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("settled", sa.BigInteger),
    sa.Column("state", sa.String(8), nullable=False),  # open, settled, void
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Index("reservations_by_query", "query", "state"),
)


def now() -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Job:
    """A transaction, or a part of one. told: called from the writing thread when it is done."""

    work: Callable[[sa.Connection], Any]
    told: Callable[[], object] = lambda: None
    done: bool = False
    result: Any = None
    error: BaseException | None = None

    def outcome(self) -> Any:
        if self.error:
            raise self.error
        return self.result


class Database:
    """The database below `home`. One process may have several; several processes may share one `home`.

    owner names this object in rows it is answerable for; a lock on its file tells other processes that it lives.
    """

    def __init__(self, home: Path) -> None:
        self.owner = secrets.token_hex(10)
        self._owners = home / "owners"
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self._lock = -1
        try:
            if not home.exists():
                home.mkdir(parents=True, mode=0o700)
            self._owners.mkdir(exist_ok=True, mode=0o700)
            # The folder may have been there, with rights of its own. SQLite gives -wal and -shm those of the database.
            os.close(os.open(home / "airlock.db", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._be_owner()
            self._engine = _engine(home / "airlock.db")
            self._migrate(home)
            self._writer = self._engine.connect()
        except OSError as error:
            self._be_nobody()
            raise StoreError(f"cannot use the data folder {home}: {error.strerror}") from None
        except SQLAlchemyError as error:
            self._be_nobody()
            raise _store_error(error) from None

    def _be_owner(self) -> None:
        # The file gets its name when it is locked: by that name, an owner without a lock is a dead one.
        file = self._owners / f".{self.owner}"
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        file.rename(self._owners / self.owner)

    def _be_nobody(self) -> None:
        if self._lock >= 0:
            self.forget_owner(self.owner)
            os.close(self._lock)
            self._lock = -1

    def _migrate(self, home: Path) -> None:
        from orchestrator.store.migrations import HEAD, upgrade

        with self._engine.connect() as connection:
            if sa.inspect(connection).has_table("alembic_version"):
                table = sa.table("alembic_version", sa.column("version_num"))
                if connection.scalar(sa.select(table.c.version_num)) == HEAD:
                    return
        from alembic.util import CommandError  # a tenth of a second, and mostly there is nothing to migrate

        handle = os.open(home / "migrate.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            upgrade(self._engine)
        except CommandError as error:
            raise StoreError(f"the database in {home} is not of this version of Airlock: {error}") from None
        finally:
            os.close(handle)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction, committed when this returns. An exception of `work` undoes its part alone.

        Raises StoreError when the database cannot be written. Once begun it is not cancelled: asyncio's own `cancel`,
        which no shield keeps off, ends the waiting and not the transaction, and later writes come after it.
        """
        done, loop = anyio.Event(), asyncio.get_running_loop()
        job = self.post(work, lambda: loop.call_soon_threadsafe(done.set))
        with anyio.CancelScope(shield=True):
            await done.wait()
        return job.outcome()

    def post(self, work: Callable[[sa.Connection], object], told: Callable[[], object] = lambda: None) -> Job:
        """`write` without waiting: `work` has its turn after everything that was posted or written before it."""
        if self._lock < 0:
            raise StoreError("the database is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="airlock-writer", daemon=True)
            self._thread.start()
        job = Job(work, told)
        self._jobs.put(job)
        return job

    def _serve(self) -> None:
        going = True
        while going:
            taken = [self._jobs.get()]
            while not self._jobs.empty():
                taken.append(self._jobs.get())
            batch = [job for job in taken if job]
            going = len(batch) == len(taken)
            self._commit(batch)
            for job in batch:
                job.done = True
                with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody waits any more
                    job.told()

    def _commit(self, batch: list[Job]) -> None:
        try:
            with self._writing:
                if not self._commit_whole(batch):
                    with self._writer.begin():
                        for job in batch:
                            self._run(job)
        except SQLAlchemyError as error:
            for job in batch:
                job.error = job.error or _store_error(error)
        except BaseException as error:
            for job in batch:
                job.error = error

    def _commit_whole(self, batch: list[Job]) -> bool:
        """All parts in one go. False, with nothing done, when one raised: then each has to get a savepoint of its own.

        So a part may run twice; it must do nothing but speak to the database.
        """
        with self._writer.begin() as whole:
            try:
                for job in batch:
                    job.result = job.work(self._writer)
            except Exception:  # whosever it was: the second time round tells
                whole.rollback()
                return False
        return True

    def _run(self, job: Job) -> None:
        part = self._writer.begin_nested()
        try:
            job.result = job.work(self._writer)
            part.commit()
        except Exception as error:  # the caller's: handed back to it, and only its part is undone
            try:
                part.rollback()
            except SQLAlchemyError as lost:  # the database has given up the whole transaction, and with it the batch
                raise (error if isinstance(error, SQLAlchemyError) else lost) from None
            job.error = _store_error(error) if isinstance(error, SQLAlchemyError) else error

    def write_sync(self, work: Callable[[sa.Connection], T]) -> T:
        """`write` for code that runs before or after the event loop does."""
        job = Job(work)
        self._commit([job])
        return job.outcome()

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a snapshot that has all that was posted before. Blocks. Raises StoreError."""
        if self._thread is not None:
            reached = threading.Event()
            self.post(lambda _tx: None, reached.set)
            reached.wait()
        try:
            with self._engine.connect().execution_options(readonly=True) as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise _store_error(error) from None

    def dead_owners(self) -> list[str]:
        """Owners whose process has ended without `close`, or closed when it could not write the end of its queries."""
        unfinished = sa.select(queries.c.owner).where(queries.c.status == "open").distinct()
        named = self.read(lambda tx: list(tx.execute(unfinished).scalars()))
        filed = [path.name for path in self._owners.iterdir() if not path.name.startswith(".")]
        return [owner for owner in {*named, *filed} - {self.owner} if _is_dead(self._owners / owner)]

    def forget_owner(self, owner: str) -> None:
        (self._owners / owner).unlink(missing_ok=True)

    def close(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            self._jobs.put(None)
            if self._thread is not None:
                self._thread.join()
            self._writer.close()
            self._engine.dispose()
            self._be_nobody()


def _is_dead(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)), connect_args={"check_same_thread": False, "timeout": BUSY_S}
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # transactions begin below, and nowhere else
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=1000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        readonly = connection.get_execution_options().get("readonly")
        connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")

    return engine


def _store_error(error: SQLAlchemyError) -> StoreError:
    cause = getattr(error, "orig", None) or error
    return StoreError(f"ledger and journal cannot be used: {str(cause).splitlines()[0]}")
