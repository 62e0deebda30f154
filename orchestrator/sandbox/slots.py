"""Slots: a number, a folder and, under root, a user id that one sandbox has to itself while it lives.

A slot is a locked file; the kernel drops the lock when its holder dies, so nothing needs to be released by hand and
what a dead orchestrator left in a slot is removed by the next one that takes it.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.core.errors import SandboxUnusable, StoreError
from orchestrator.sandbox.base import Slot
from orchestrator.sandbox.cgroup import group_of

UID_BASE = 2_000_000_000  # above what distributions, containers (subuid) and systemd give out
MOST = 4096
_MACHINE_WIDE = Path("/run/airlock/slots")


class Slots:
    """Under root the locks are machine-wide, since user ids and cgroups are; else they lie in the data folder."""

    def __init__(self, home: Path) -> None:
        self._folders = home / "slots"
        self._root = os.geteuid() == 0
        self._locks = _MACHINE_WIDE if self._root else home / "slots"

    @contextmanager
    def take(self) -> Generator[Slot]:
        """The first free slot, its folder empty and removed afterwards. Raises StoreError, SandboxUnusable."""
        self._make_folders()
        for number in range(MOST):
            handle = self._lock(number)
            if handle is None:
                continue
            slot = Slot(number, self._folders / f"slot-{number}", self._uid(number))
            try:
                _prepare(slot, handle)
                yield slot
                _mark(handle, b"")
            finally:
                shutil.rmtree(slot.folder, ignore_errors=True)
                os.close(handle)
            return
        raise SandboxUnusable(f"all {MOST} sandbox slots of this machine are taken; end some queries first")

    def clear_dead(self) -> int:
        """Remove what dead orchestrators left in this data folder's slots; how many there were. Raises StoreError."""
        self._make_folders()
        cleared = 0
        for folder in self._folders.glob("slot-*"):
            number = folder.name.removeprefix("slot-")
            if number.isdecimal() and folder.is_dir():
                cleared += self._clear_dead(Slot(int(number), folder, self._uid(int(number))))
        return cleared

    def _clear_dead(self, slot: Slot) -> bool:
        handle = self._lock(slot.number)
        if handle is not None:
            _clear(slot, _is_marked(handle))
            _mark(handle, b"")
            os.close(handle)
            return True
        if not self._root:
            return False  # the locks lie here: a living process of this data folder has it
        with _held(self._folders, fcntl.LOCK_EX):
            mark = (self._locks / f"{slot.number}.lock").read_bytes()
            if b":" not in mark or mark == mark_of(self._folders):
                return False
            shutil.rmtree(slot.folder, ignore_errors=True)  # another data folder has the slot, and has cleared the rest
        return True

    def _uid(self, number: int) -> int | None:
        return UID_BASE + number if self._root else None

    def _make_folders(self) -> None:
        try:
            for folder in (self._folders, self._locks):
                folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise StoreError(f"cannot make the slot folders: {error.strerror}: {error.filename}") from None

    def _lock(self, number: int) -> int | None:
        handle = os.open(self._locks / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle


def mark_of(folders: Path) -> bytes:
    """What tells one data folder's slots from another's, whatever path leads there. b"" where there are none."""
    try:
        found = folders.stat()
    except FileNotFoundError:
        return b""
    return b"%d:%d\n" % (found.st_dev, found.st_ino)


@contextmanager
def _held(folder: Path, how: int) -> Generator[None]:
    """Slots are taken (LOCK_SH) while none of them is looked at for what a dead one has left (LOCK_EX)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def _prepare(slot: Slot, handle: int) -> None:
    """The lock file holds a mark from here until the slot is given back in order. Raises StoreError."""
    try:
        with _held(slot.folder.parent, fcntl.LOCK_SH):
            used = _is_marked(handle)
            _mark(handle, mark_of(slot.folder.parent))  # first: whoever lost the slot sees at once that it is another's
            _clear(slot, used)
            slot.folder.mkdir(mode=0o755)
    except OSError as error:
        raise StoreError(f"cannot make a slot folder: {error.strerror}: {error.filename}") from None


def _is_marked(handle: int) -> bool:
    return os.fstat(handle).st_size > 0


def _mark(handle: int, mark: bytes) -> None:
    os.pwrite(handle, mark, 0)
    os.ftruncate(handle, len(mark))


def _clear(slot: Slot, used: bool) -> None:
    """used: whether the last one that had it may have left more than its folder."""
    if slot.uid is not None and used:
        _end_processes(slot.uid)
        if group := group_of(slot.number):
            group.remove()
    shutil.rmtree(slot.folder, ignore_errors=True)


def _end_processes(uid: int) -> None:
    """Kill what still runs under a slot's own user id, and wait for its end.

    A guest ends with its orchestrator, but a bwrap whose parent is killed in the middle of its start waits for ever.
    """
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            process = os.pidfd_open(int(entry.name))
        except OSError:  # it has ended since
            continue
        try:
            if _uid_of(entry) == uid:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], 5.0)
        except OSError:
            continue
        finally:
            os.close(process)


def _uid_of(entry: Path) -> int:
    """The real user id of a process; the owner of its folder is root where it is not dumpable."""
    status = (entry / "status").read_text(encoding="utf-8", errors="replace")
    return int(status.partition("\nUid:")[2].split(maxsplit=1)[0])
