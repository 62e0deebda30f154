"""Files under way: written and hashed in a folder of their own, then put in place under their SHA-256, or gone."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from orchestrator.core.errors import CountExceeded

_BUFFER = 1 << 20
_SYNC = 4 << 20  # bytes of a draft that are sent to the disk together
LATER = ThreadPoolExecutor(1)  # for removals that nobody may be seen to wait for
REMOVABLE = 0o1444  # the sticky bit, which means nothing on a file: it goes where the file goes, and with it


@contextmanager
def drafts(folder: Path) -> Generator[None]:
    """While drafts are written in the folder. Its lock is shared by all who do: whoever gets it alone may clear it.

    So what a killed process left behind goes with the next use, and never a draft that is under way.
    """
    with _folder(folder) as lock:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.iterdir():
                left.unlink(missing_ok=True)  # its owner may be at it, too
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def placing(root: Path, *, alone: bool = False) -> Generator[None]:
    """While files are put in place below the root, by any number at once; or alone, while some are taken away.

    Who wants to be alone is not kept out by an endless row of others: all of them come through the first lock, one by
    one, and wait there behind it.
    """
    with _folder(root / "manifests") as turnstile, _folder(root / "data") as lock:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        yield


@contextmanager
def _folder(path: Path) -> Generator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def is_removable(path: Path) -> bool:
    """Whether the file is there, and was never placed but as removable."""
    with suppress(FileNotFoundError):
        return bool(path.stat().st_mode & stat.S_ISVTX)
    return False


class Draft:
    """One file under way. stream: may be read from its start; only `write` may change it. check, most: see
    ContextStore.
    """

    def __init__(self, folder: Path, check: Callable[[], object] = lambda: None, most: int | None = None) -> None:
        self.size = 0
        self._told_nothing = False
        self._check, self._most = check, most
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
            if self._told_nothing:
                LATER.submit(self._path.unlink, missing_ok=True)
            else:
                self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self._check()
        if self._most is not None and self.size + len(data) > self._most:
            raise CountExceeded(f"the context has more than {self._most:,} bytes", limit=f"{self._most} bytes")
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

    def sync(self) -> None:
        """Have all that was written on the disk."""
        self.stream.flush()
        for sync in self._syncs:  # the kernel tells each error once
            sync.result()
        self._syncs.clear()
        os.fsync(self.stream.fileno())

    def place(self, folder: Path, *, removable: bool = False) -> str:
        """Put the file in the folder, durably and read-only, and return its name.

        A file of this name is replaced: it should be the same, and if the disk damaged it, it is whole again. Hard
        links to the old one stay as they are. removable: it says so of itself (`is_removable`), and replaces none: so
        what was ever placed without that word stays without it. Whether there was one is not to be told by the time
        that this takes.
        """
        os.fchmod(self.stream.fileno(), REMOVABLE if removable else 0o444)
        self.sync()
        self._hasher.shutdown()
        name = self._hash.hexdigest()
        if removable:
            self._told_nothing = True
            beside = folder / f"{name}.{self._path.name}"  # in any case: the folder is changed, and has to be synced
            beside.hardlink_to(self._path)
            with suppress(FileExistsError):
                (folder / name).hardlink_to(self._path)
            beside.unlink()
        else:
            self._path.replace(folder / name)
        with _folder(folder) as handle:
            os.fsync(handle)
        return name
