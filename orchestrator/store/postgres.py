"""The database on a PostgreSQL server, for processes on many machines.

Where SQLite says BEGIN IMMEDIATE, every writing transaction takes one advisory lock here. They would wait for each
other anyway, for nearly all of them change the platform's row; taken in no fixed order, row locks would deadlock.

An owner lives while the connection that writes for it does, because that connection holds the owner's lock. So one
whose connection broke is dead to all others, and it cannot write either: it never connects again by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, ProgrammingError

from orchestrator.core.errors import StoreError
from orchestrator.store.place import BUSY_S, Place

_CONNECT_S = 10
# Of the space of two integers, where no owner's lock is: those are one large one.
_WRITERS = (0x41495231, 1)
# Waiting for the writers' lock ends as SQLite's does. Who stops in mid-transaction, or is cut off from the network,
# loses its connection before the others lose their patience, and with it the lock and the right to write.
_SESSION = f"""
SET lock_timeout = '{BUSY_S}s'; SET idle_in_transaction_session_timeout = '{BUSY_S // 2}s';
SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 2;
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
FREE_MS = 5000  # how long erasing waits for those who read payloads, while all who write wait for it
_LOCK_NOT_AVAILABLE = "55P03"
_FILE = "SELECT pg_relation_filepath('payloads')"
# While nobody writes: what may still be shown what was deleted before.
_OLD_SNAPSHOTS = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND (datname = current_database() OR datname IS NULL)
    AND (age(backend_xmin) > 0 OR age(backend_xid) > 0)
) OR EXISTS (SELECT FROM pg_replication_slots WHERE xmin IS NOT NULL)
OR EXISTS (SELECT FROM pg_prepared_xacts WHERE database = current_database())
"""
_LOOK = "look at AIRLOCK_DATABASE, or at `database` in airlock.toml"


class PostgresServer(Place):
    """A database of its own on the server at `url`: postgresql://USER:PASSWORD@HOST/NAME. Raises StoreError."""

    reading = {"readonly": True, "isolation_level": "REPEATABLE READ", "postgresql_readonly": True}  # noqa: RUF012  as in Place

    def __init__(self, url: str) -> None:
        try:
            self._url = sa.make_url(url).set(drivername="postgresql+psycopg")
            self.engine = _engine(self._url)
        except (ArgumentError, ValueError):  # what they say of it may show a part of the password
            raise StoreError(f"the address of the database is not a postgresql:// one: {_LOOK}") from None
        except ImportError:
            raise StoreError("a database on PostgreSQL needs psycopg: run `pip install 'airlock[postgres]'`") from None

    def claim(self, owner: str) -> sa.Connection:
        try:
            writer = self.engine.connect()
            with writer.begin():
                alone = writer.scalar(sa.select(sa.func.pg_try_advisory_lock(_key(owner))))
        except DBAPIError as error:
            raise StoreError(self._explained(error)) from None
        assert alone, "two owners of one name"
        return writer

    def _explained(self, error: DBAPIError) -> str:
        """One line, without the password. libpq says one or more for each address that it has tried."""
        lines = [line.strip() for line in str(error.orig).splitlines() if line.strip()]
        said = next((line for line in lines if "FATAL:" in line), lines[0] if lines else "no reason was given")
        said = said.rpartition("FATAL:")[2].strip().removeprefix("connection failed: ")
        for secret in (self._url.password, self._url.query.get("password")):
            if secret:
                said = said.replace(str(secret), "***")
        where = f"{self._url.host or self._url.query.get('host') or 'this machine'}"
        if "FATAL:" in str(error.orig):
            return f"the database server on {where} lets us not in: {said}: {_LOOK}"
        return f"the database server on {where} cannot be reached: {said}: start it, or {_LOOK}"

    def check(self, writer: sa.Connection) -> None:
        if writer.invalidated:
            raise StoreError("the connection to the database broke, and what was in flight is charged: start again")

    def lost(self, writer: sa.Connection) -> bool:
        return writer.invalidated

    @contextmanager
    def migrating(self) -> Generator[None]:
        yield  # a migration is one transaction, and has the writers' lock as every other

    def dead(self, named: Iterable[str]) -> list[str]:
        # Shared, so that two who ask at the same time do not take each other for the owner.
        with self.engine.connect().execution_options(**self.reading) as connection:
            free = sa.func.pg_try_advisory_xact_lock_shared
            return [owner for owner in named if connection.scalar(sa.select(free(_key(owner))))]

    def scrub(self) -> bool:
        """Write the table anew, and remove the old files: what is only deleted stays in them.

        A snapshot from before is shown what was deleted, and so it would be written anew, too. The server's write-ahead
        log and its backups keep what they have until they are removed.
        """
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT", readonly=True) as connection:
            connection.detach()  # closed after this, and with it the patience and the lock of this session end
            connection.exec_driver_sql(f"SET lock_timeout = {FREE_MS}")
            try:
                connection.exec_driver_sql(f"SELECT pg_advisory_lock{_WRITERS}")
                if connection.exec_driver_sql(_OLD_SNAPSHOTS).scalar_one():
                    return False
                before = connection.exec_driver_sql(_FILE).scalar_one()
                connection.exec_driver_sql("VACUUM FULL payloads")
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", "") == _LOCK_NOT_AVAILABLE:
                    return False
                raise
            with suppress(ProgrammingError):  # not everybody may; the server does it by itself in a while
                connection.exec_driver_sql("CHECKPOINT")
            # Who does not own the table gets a warning, and nothing is done.
            return connection.exec_driver_sql(_FILE).scalar_one() != before

    def leave(self) -> None:
        self.engine.dispose()


def _key(owner: str) -> int:
    return int.from_bytes(hashlib.sha256(owner.encode()).digest()[:8], signed=True)


def _engine(url: sa.URL) -> sa.Engine:
    # READ COMMITTED: each statement sees what was committed before the writers' lock was had.
    engine = sa.create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,  # of readers: a server that was started again is no fault to them
        hide_parameters=True,
        connect_args={"connect_timeout": _CONNECT_S, "application_name": "airlock", "client_encoding": "utf8"},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":  # SQL_ASCII, of a server that was made without a locale, takes any bytes for a text
            raise StoreError(f"the database is in {encoding}: create it again with ENCODING 'UTF8' TEMPLATE template0")
        connection.execute(_SESSION)
        connection.commit()

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        if not connection.get_execution_options().get("readonly"):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock{_WRITERS}")

    return engine
