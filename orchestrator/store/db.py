"""One database for ledger and journal, so that money and record change in the same transaction.

A commit that returned survives a power cut. One thread writes. Writes of concurrent tasks are committed in groups:
everything that queued up while the last commit was under way. Where it is (a file, a server) is a `Place`.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import anyio
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.core.errors import StoreError
from orchestrator.store.place import Place, store_error
from orchestrator.store.schema import queries, scopes
from orchestrator.store.sqlite import SQLiteFile

T = TypeVar("T")
LINGER_S = 0.01  # what nobody waits for is committed this much later, with what comes by then
MOST_AT_ONCE = 256  # parts of one commit
_STAMP = "airlock-stamp"
_TRIED = "tried"  # no purse is called that


def now() -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Job:
    """A transaction, or a part of one. told: set when it is done, where somebody waits."""

    work: Callable[[sa.Connection], Any]
    told: asyncio.Future[None] | threading.Event | None = None
    done: bool = False
    result: Any = None
    error: BaseException | None = None

    def outcome(self) -> Any:
        if self.error:
            raise self.error
        return self.result


class Database:
    """The database below `home`, or on the PostgreSQL server at `url`. Many processes may share it, or one twice.

    owner names this object in rows it is answerable for; other processes can tell whether it lives. When a server's
    connection broke, its owner is dead and every write raises StoreError: what goes on opens another `Database`.
    """

    def __init__(self, home: Path, url: str | None = None) -> None:
        self.owner = secrets.token_hex(10)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self._open = True
        self._place = _place(home, url)
        self._engine = self._place.engine
        with contextlib.ExitStack() as undone:
            undone.callback(self._place.leave)
            try:
                self._writer = undone.enter_context(self._place.claim(self.owner))
                self._migrate(home, url)
            except SQLAlchemyError as error:
                raise store_error(error) from None
            undone.pop_all()

    def _migrate(self, home: Path, url: str | None) -> None:
        from orchestrator.store.migrations import HEAD, upgrade

        with self._engine.connect().execution_options(**self._place.reading) as connection:
            if sa.inspect(connection).has_table("alembic_version"):
                table = sa.table("alembic_version", sa.column("version_num"))
                if connection.scalar(sa.select(table.c.version_num)) == HEAD:
                    return
        from alembic.util import CommandError  # a tenth of a second, and mostly there is nothing to migrate

        try:
            with self._place.migrating():
                upgrade(self._engine)
        except CommandError as error:
            where = f"in {home}" if url is None else "on the server"
            raise StoreError(f"the database {where} is not of this version of Airlock: {error}") from None

    def stamp_with(self, stamp: Callable[[bytes], bytes]) -> None:
        """What every record that is written here is authenticated with; see `stamp_of`."""
        self._writer.info[_STAMP] = stamp

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction, committed when this returns. An exception of `work` undoes its part alone.

        Raises StoreError when the database cannot be written. Once begun it is not cancelled: asyncio's own `cancel`,
        which no shield keeps off, ends the waiting and not the transaction, and later writes come after it.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job = self.post(work, done)
        with anyio.CancelScope(shield=True):
            await done
        return job.outcome()

    def post(
        self, work: Callable[[sa.Connection], object], told: asyncio.Future[None] | threading.Event | None = None
    ) -> Job:
        """`write` without waiting: `work` has its turn after everything that was posted or written before it.

        Without `told` it is committed with the next write, or LINGER_S later: a call's result with the next call's
        hold, instead of a commit of its own that this hold would have to wait for.
        """
        if not self._open:
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
            taken = self._take()
            batch = [job for job in taken if job]
            going = len(batch) == len(taken)
            self._commit(batch)
            _tell(batch)

    def _take(self) -> list[Job | None]:
        """What is to be committed together. None, from `close`, is the last."""
        taken = [self._jobs.get()]
        until = time.monotonic() + LINGER_S
        waited_for = False
        while len(taken) < MOST_AT_ONCE:
            waited_for = waited_for or taken[-1] is None or taken[-1].told is not None
            try:
                taken.append(self._jobs.get(timeout=0 if waited_for else max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        return taken

    def _commit(self, batch: list[Job]) -> None:
        try:
            with self._writing:
                if not self._commit_whole(batch):
                    with self._begin():
                        for job in batch:
                            self._run(job)
        except SQLAlchemyError as error:
            for job in batch:
                job.error = job.error or store_error(error)
        except BaseException as error:
            for job in batch:
                job.error = error

    def _begin(self) -> sa.RootTransaction:
        self._place.check(self._writer)
        return self._writer.begin()

    def _commit_whole(self, batch: list[Job]) -> bool:
        """All parts in one go. False, with nothing done, when one raised: then each has to get a savepoint of its own.

        So a part may run twice; it must do nothing but speak to the database.
        """
        with self._begin() as whole:
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
            job.error = store_error(error) if isinstance(error, SQLAlchemyError) else error

    def write_sync(self, work: Callable[[sa.Connection], T]) -> T:
        """`write` for code that runs before or after the event loop does."""
        job = Job(work)
        self._commit([job])
        return job.outcome()

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a snapshot that has all that was posted before. Blocks. Raises StoreError."""
        if self._thread is not None:
            reached = threading.Event()
            self.post(lambda _tx: None, reached)
            reached.wait()
        return self.look(work)

    def look(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a snapshot of what is committed. Blocks. Raises StoreError."""
        try:
            with self._engine.connect().execution_options(**self._place.reading) as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise store_error(error) from None

    def scrub(self) -> bool:
        """See `Place.scrub`. Blocks. Raises StoreError."""
        try:
            return self._place.scrub()
        except SQLAlchemyError as error:
            raise store_error(error) from None

    @property
    def lost(self) -> bool:
        """Nothing can be written with this one any more, whatever becomes of the database: open another."""
        return self._place.lost(self._writer)

    def dead_owners(self) -> list[str]:
        """Owners whose process has ended without `close`, or closed when it could not write the end of its queries.

        Raises StoreError.
        """
        unfinished = sa.select(queries.c.owner).where(queries.c.status.in_(("open", "queued"))).distinct()
        named = self.read(lambda tx: set(tx.execute(unfinished).scalars()))
        try:
            return [owner for owner in self._place.dead(named) if owner != self.owner]
        except SQLAlchemyError as error:
            raise store_error(error) from None

    def forget_owner(self, owner: str) -> None:
        self._place.forget(owner)

    def close(self) -> None:
        """Idempotent."""
        if self._open:
            self._open = False
            self._jobs.put(None)
            if self._thread is not None:
                self._thread.join()
            self._writer.close()
            self._place.leave()


def _tell(batch: list[Job]) -> None:
    """Wake each event loop once, with all that it waits for: at the first it would be at work, and in our way."""
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for job in batch:
        job.done = True
        if isinstance(job.told, threading.Event):
            job.told.set()
        elif job.told:
            waiting.setdefault(job.told.get_loop(), []).append(job.told)
    for loop, futures in waiting.items():
        with contextlib.suppress(RuntimeError):  # it is closed: nobody waits any more
            loop.call_soon_threadsafe(_set, futures)


def _set(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # asyncio's own `cancel` has ended the waiting
            future.set_result(None)


def try_out(tx: sa.Connection) -> None:
    """Change something, and leave nothing: a transaction that changes nothing is committed on a full disk, too."""
    tx.execute(sa.insert(scopes).values(id=_TRIED))
    tx.execute(sa.delete(scopes).where(scopes.c.id == _TRIED))


def stamp_of(tx: sa.Connection, record: bytes) -> bytes:
    """Empty where nobody has the keys."""
    stamp: Callable[[bytes], bytes] | None = tx.info.get(_STAMP)
    return stamp(record) if stamp else b""


def _place(home: Path, url: str | None) -> Place:
    try:
        if not home.exists():
            home.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise StoreError(f"cannot use the data folder {home}: {error.strerror}") from None
    if url is None:
        return SQLiteFile(home)
    from orchestrator.store.postgres import PostgresServer  # its driver is an extra

    return PostgresServer(url)
