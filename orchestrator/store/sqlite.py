"""The embedded database: one SQLite file in the data folder, for any number of processes of this machine.

WAL mode with synchronous=FULL: a commit that returned survives a power cut. An owner is a file with a lock on it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from orchestrator.core.errors import StoreError
from orchestrator.store.place import BUSY_S, Place


class SQLiteFile(Place):
    """`airlock.db` below `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file = home / "airlock.db"
        self._owners = home / "owners"
        self._owner = ""
        self._lock = -1
        self.engine = _engine(self._file)

    def claim(self, owner: str) -> sa.Connection:
        with self._using():
            self._owners.mkdir(exist_ok=True, mode=0o700)
            # The folder may have been there, with rights of its own. SQLite gives -wal and -shm those of the database.
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._opened = _identity(os.fstat(handle))
            os.close(handle)
            self._owner = owner
            self._be_owner()
        return self.engine.connect()

    @contextmanager
    def _using(self) -> Generator[None]:
        """Raises StoreError where the data folder cannot be used, or this process may open nothing more."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot use the data folder {self._home}: {error.strerror}") from None

    def _be_owner(self) -> None:
        # The file gets its name when it is locked: by that name, an owner without a lock is a dead one.
        file = self._owners / f".{self._owner}"
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        file.rename(self._owners / self._owner)

    def check(self, writer: sa.Connection) -> None:
        """SQLite would write on to a file that has lost its name, where no other process looks."""
        try:
            same = _identity(self._file.stat()) == self._opened
        except OSError:
            same = False
        if not same:
            raise StoreError(f"the database {self._file} was removed or replaced: put it back, then start again")

    @contextmanager
    def migrating(self) -> Generator[None]:
        with self._using():
            handle = os.open(self._home / "migrate.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._using():
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def dead(self, named: Iterable[str]) -> list[str]:
        with self._using():
            filed = [path.name for path in self._owners.iterdir() if not path.name.startswith(".")]
        return [owner for owner in {*named, *filed} if _is_dead(self._owners / owner)]

    def forget(self, owner: str) -> None:
        with self._using():
            (self._owners / owner).unlink(missing_ok=True)

    def scrub(self) -> bool:
        """Deleted content is zeros (secure_delete); older pages are in the write-ahead log until that is emptied."""
        with self.engine.connect().execution_options(**self.reading) as connection:
            driver = connection.connection.cursor()
            busy, *_rest = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy

    def leave(self) -> None:
        self.engine.dispose()
        if self._lock >= 0:
            self.forget(self._owner)
            os.close(self._lock)
            self._lock = -1


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _is_dead(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        # Shared, so that two who ask at the same time do not take each other for the owner.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
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
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "wal_autocheckpoint=1000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        readonly = connection.get_execution_options().get("readonly")
        connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")

    return engine
