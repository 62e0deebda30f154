"""Uploads under way: a file for each, and a row that keeps the room for it, so that no crowd of them passes a limit.

    folder/<id>        comes piece by piece, in any number of requests
    folder/<id>.part   comes in one request, and is of no use when that has ended

Who writes to a file, makes a context of it or removes it has its lock: there is one at a time, whichever process that
is. A row is written while the file is there and locked, and removed after it. So a file that can be locked and has no
row is one that a killed process left, and so is a row without a file.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from orchestrator.core.context import Context
from orchestrator.core.errors import AirlockError, CountExceeded, RateLimited, StoreError
from orchestrator.settings import ServerSettings
from orchestrator.store import holdings
from orchestrator.store.contexts import ContextStore
from orchestrator.store.db import Database, now
from orchestrator.store.holdings import Held
from orchestrator.store.readers import Encoding
from orchestrator.store.schema import uploads

LIVES = timedelta(hours=24)
DONE = 100  # of a tenant's uploads that have ended, so many are remembered
STEP = 16 << 20  # bytes of room that are taken at once for what does not say how long it is
Kind = Literal["text", "json", "jsonl"]


@dataclass(frozen=True, slots=True)
class Upload:
    """length: bytes it will have. context: the id of what became of it. at: since when, RFC 3339."""

    id: str
    tenant: str
    kind: Kind
    encoding: Encoding
    name: str
    length: int
    context: str | None
    at: str

    @property
    def expires(self) -> datetime:
        return datetime.fromisoformat(self.at) + LIVES


class Busy(Exception):
    """Another request has the upload."""


class Uploads:
    """Those below `home`. limits: of each tenant. Every method blocks, and is safe for threads and processes at once.

    check: see `ContextStore`.
    """

    def __init__(
        self, db: Database, home: Path, limits: ServerSettings, check: Callable[[], object] = lambda: None
    ) -> None:
        self._db, self._limits, self._check = db, limits, check
        self._folder, self._root = home / "uploads", home / "contexts"

    def begin(self, tenant: str, kind: Kind, encoding: Encoding, name: str, length: int) -> Upload:
        """One that comes piece by piece. Raises CountExceeded, RateLimited, StoreError."""
        upload = Upload(secrets.token_hex(16), tenant, kind, encoding, name, length, None, now())
        with self._created(upload, upload.id):
            return upload

    @contextmanager
    def whole(self, tenant: str, kind: Kind, encoding: Encoding, name: str, length: int | None) -> Generator[Incoming]:
        """One that comes now, in one go; nothing of it is left afterwards, but for the context if it was finished.

        length: None where that is not told. Raises as `begin` does.
        """
        upload = Upload(secrets.token_hex(16), tenant, kind, encoding, name, length or 0, None, now())
        with self._created(upload, f"{upload.id}.part") as (path, file):
            try:
                yield Incoming(self._db, upload, file, self._limits, self._ingest, grows=length is None)
            finally:
                self._forget(upload.id, path)

    def find(self, tenant: str, upload_id: str) -> Upload | None:
        """None for what is not there, is too old, or is another tenant's."""
        rows = sa.select(uploads).where(uploads.c.id == upload_id, uploads.c.tenant == tenant)
        row = self._db.look(lambda tx: tx.execute(rows).mappings().one_or_none())
        found = None if row is None else Upload(**row)
        return None if found is None or found.expires <= datetime.now(UTC) else found

    def offset(self, upload: Upload) -> int:
        """How many bytes of it have come."""
        if upload.context:
            return upload.length
        try:
            return (self._folder / upload.id).stat().st_size
        except OSError:
            raise _gone(upload) from None

    @contextmanager
    def resumed(self, upload: Upload) -> Generator[Incoming]:
        """To go on with it; its file is gone when it was finished. Raises Busy, StoreError."""
        path = self._folder / upload.id
        with self._locked(path) as file:
            if file is None:
                raise _gone(upload)
            incoming = Incoming(self._db, upload, file, self._limits, self._ingest)
            try:
                yield incoming
            finally:
                if incoming.is_finished:
                    path.unlink(missing_ok=True)

    def drop(self, upload: Upload) -> None:
        """Remove it; the context that became of it stays. Raises Busy."""
        path = self._folder / upload.id
        with self._locked(path):
            self._forget(upload.id, path)

    def sweep(self) -> int:
        """Remove what is too old and what killed processes left; how many files those were."""
        count = 0
        with _writing(self._folder):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for path in list(self._folder.iterdir()):
                with suppress(Busy), self._locked(path) as file:
                    if file is not None and (path.suffix or not self._is_alive(path.name)):
                        path.unlink()
                        count += 1
        for upload in self._db.look(_all):
            there = any((self._folder / f"{upload.id}{end}").exists() for end in ("", ".part"))
            if upload.expires <= datetime.now(UTC) if upload.context else not there:
                self._db.write_sync(_deletion(upload.id))
        return count

    def _is_alive(self, upload_id: str) -> bool:
        upload = next(iter(self._db.look(lambda tx: _all(tx, upload_id))), None)
        return upload is not None and upload.context is None and upload.expires > datetime.now(UTC)

    @contextmanager
    def _created(self, upload: Upload, name: str) -> Generator[tuple[Path, int]]:
        """Its file, locked, and its row."""
        path = self._folder / name
        with _writing(self._folder):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with self._locked(path) as file:
            if file is None:
                raise _gone(upload)
            try:
                self._db.write_sync(lambda tx: self._admit(tx, upload))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            yield path, file

    def _admit(self, tx: sa.Connection, upload: Upload) -> None:
        if upload.length > self._limits.upload_bytes:
            raise too_large(self._limits.upload_bytes)
        mine = sa.select(uploads.c.id).where(uploads.c.tenant == upload.tenant)
        under_way = mine.where(uploads.c.context.is_(None)).subquery()
        if tx.execute(sa.select(sa.func.count()).select_from(under_way)).scalar_one() >= self._limits.uploads:
            text = f"{self._limits.uploads} uploads are under way: finish one, or delete it"
            raise RateLimited(text, retry_after=10, limit=str(self._limits.uploads))
        holdings.require_room(tx, upload.tenant, upload.length, self._limits.stored_bytes)
        ended = mine.where(uploads.c.context.is_not(None)).order_by(uploads.c.at.desc(), uploads.c.id).offset(DONE)
        tx.execute(sa.delete(uploads).where(uploads.c.id.in_(ended)))
        tx.execute(sa.insert(uploads).values({c.name: getattr(upload, c.name) for c in uploads.columns}))

    @contextmanager
    def _locked(self, path: Path) -> Generator[int | None]:
        """The file, while nobody else has it; None where it is gone. Raises Busy."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise StoreError(f"{self._folder} cannot be read ({error.strerror}); check the disk") from None
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy from None
            yield file if os.fstat(file).st_nlink else None
        finally:
            os.close(file)

    def _forget(self, upload_id: str, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._db.write_sync(_deletion(upload_id))

    def _ingest(self, upload: Upload, file: int) -> tuple[Context, Held, bool]:
        """The context, how the tenant has it, and whether that is new to the tenant."""
        kept: list[tuple[Held, bool]] = []

        def placed(context: Context) -> None:
            try:
                kept.append(self._db.write_sync(lambda tx: self._finished(tx, upload, context)))
            except AirlockError:
                store.remove_later(context.id, lambda sizes: self._db.look(partial(holdings.wanted, sizes=sizes)))
                raise

        store = ContextStore(self._root, check=self._check, most=self._limits.upload_bytes, placed=placed)
        with os.fdopen(os.dup(file), "rb") as stream:
            stream.seek(0)
            context = store.ingest_stream(stream, kind=upload.kind, encoding=upload.encoding, name="context")
        return context, *kept[0]

    def _finished(self, tx: sa.Connection, upload: Upload, context: Context) -> tuple[Held, bool]:
        """Its room is the context's now: what it became may be larger than what came."""
        tx.execute(sa.update(uploads).where(uploads.c.id == upload.id).values(context=context.id))
        return holdings.hold(tx, upload.tenant, context, upload.name, self._limits.stored_bytes)


class Incoming:
    """An upload while its bytes come. offset: how many there are. grows: it takes room as it needs it."""

    def __init__(
        self,
        db: Database,
        upload: Upload,
        file: int,
        limits: ServerSettings,
        ingest: Callable[[Upload, int], tuple[Context, Held, bool]],
        *,
        grows: bool = False,
    ) -> None:
        self._db, self._file, self._limits, self._ingest, self._grows = db, file, limits, ingest, grows
        self.upload = upload
        self.offset = os.fstat(file).st_size
        self.is_finished = False
        self._room = upload.length

    @property
    def is_complete(self) -> bool:
        return self.offset == self.upload.length

    def write(self, data: bytes) -> None:
        """The next bytes. Raises CountExceeded for more than there may be, StoreError."""
        size = self.offset + len(data)
        if size > self._limits.upload_bytes:
            raise too_large(self._limits.upload_bytes)
        if size > self._room:
            self._take_room(size)
        with _writing(Path("uploads")):
            left = memoryview(data)
            while left:
                left = left[os.pwrite(self._file, left, size - len(left)) :]
        self.offset = size

    def sync(self) -> None:
        """Have what has come on the disk."""
        with _writing(Path("uploads")):
            os.fdatasync(self._file)

    def finish(self) -> tuple[Context, Held, bool]:
        """Make the context of it: that, how the tenant has it, and whether it is new to the tenant.

        Raises ContextError and CountExceeded where no context can come of it, StoreError where that may pass.
        """
        made = self._ingest(self.upload, self._file)
        self.is_finished = True
        return made

    def _take_room(self, size: int) -> None:
        if not self._grows:
            raise CountExceeded(f"it has more bytes than the {self.upload.length:,} it was to have")
        try:
            room = self._db.write_sync(lambda tx: self._reserve(tx, max(size, self._room + STEP)))
        except CountExceeded:
            room = self._db.write_sync(lambda tx: self._reserve(tx, size))
        self._room = room

    def _reserve(self, tx: sa.Connection, room: int) -> int:
        holdings.require_room(tx, self.upload.tenant, room - self._room, self._limits.stored_bytes)
        tx.execute(sa.update(uploads).where(uploads.c.id == self.upload.id).values(length=room))
        return room


def too_large(most: int) -> CountExceeded:
    return CountExceeded(f"a context has at most {most:,} bytes here", limit=f"{most} bytes")


def _gone(upload: Upload) -> StoreError:
    return StoreError(f"the file of upload {upload.id} is gone: begin it again")


def _deletion(upload_id: str) -> Callable[[sa.Connection], Any]:
    return lambda tx: tx.execute(sa.delete(uploads).where(uploads.c.id == upload_id))


def _all(tx: sa.Connection, upload_id: str | None = None) -> list[Upload]:
    rows = sa.select(uploads) if upload_id is None else sa.select(uploads).where(uploads.c.id == upload_id)
    return [Upload(**row) for row in tx.execute(rows).mappings()]


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror}); free space there") from None
