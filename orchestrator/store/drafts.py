"""Files under way: written and hashed in a folder of their own, then put in place under their SHA-256, or gone."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

_BUFFER = 1 << 20
_SYNC = 4 << 20  # bytes of a draft that are sent to the disk together


@contextmanager
def drafts(folder: Path) -> Generator[None]:
    """While drafts are written in the folder. Its lock is shared by all who do: whoever gets it alone may clear it.

    So what a killed process left behind goes with the next use, and never a draft that is under way.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.iterdir():
                left.unlink()
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


class Draft:
    """One file under way. stream: may be read from its start; only `write` may change it. check: see ContextStore."""

    def __init__(self, folder: Path, check: Callable[[], object] = lambda: None) -> None:
        self.size = 0
        self._check = check
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)  # large pieces are hashed while they are written
        self._hashed: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(1)  # on its way to the disk while more is written: the end waits less
        self._syncs: list[Future[None]] = []
        self._synced = 0
        handle, path = tempfile.mkstemp(dir=folder)
        self._path = Path(path)
        self.stream = os.fdopen(handle, "w+b", buffering=_BUFFER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._hasher.shutdown()
            self._syncer.shutdown()
            self.stream.close()
        finally:
            self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self._check()
        if self._hashed:
            self._hashed.result()
        if len(data) >= _BUFFER:
            self._hashed = self._hasher.submit(self._hash.update, data)
        else:
            self._hash.update(data)
        self.stream.write(data)
        self.size += len(data)
        if self.size - self._synced >= _SYNC:
            self._synced = self.size
            self._syncs.append(self._syncer.submit(os.fdatasync, self.stream.fileno()))

    def place(self, folder: Path) -> str:
        """Put the file in the folder, durably and read-only, and return its name.

        A file of this name is replaced: it should be the same, and if the disk damaged it, it is whole again. Hard
        links to the old one stay as they are.
        """
        self.stream.flush()
        for sync in self._syncs:  # the kernel tells each error once
            sync.result()
        os.fchmod(self.stream.fileno(), 0o444)
        os.fsync(self.stream.fileno())
        self._hasher.shutdown()
        name = self._hash.hexdigest()
        self._path.replace(folder / name)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return name
