"""Files that a person names: policies, scripts, schemas, configuration, exports."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 16 << 20


class Unreadable(ValueError):
    """`str()` says why, without the file's name: "permission denied", "it is not UTF-8 text"."""


class Missing(Unreadable):
    """There is no such file."""


class Unwritable(ValueError):
    """`str()` says why, as with Unreadable."""


def open_regular(path: Path) -> BinaryIO:
    """The file, to be read. Raises Unreadable, for a pipe or a device at once: to open one can take for ever."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise Missing("no such file") from None
    except OSError as error:
        raise Unreadable(_why(error)) from None
    except ValueError:  # a NUL in the name
        raise Unreadable("it is not the name of a file") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise Unreadable("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    return os.fdopen(handle, "rb")


def read_text(path: Path) -> str:
    """All of a file in UTF-8, less a byte order mark, which is no part of any text. Raises Unreadable."""
    with open_regular(path) as file:
        try:
            data = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise Unreadable(_why(error)) from None
    if len(data) > MOST_BYTES:
        raise Unreadable(f"it has more than {MOST_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 text (byte {error.start})") from None


@contextmanager
def draft(path: Path) -> Generator[BinaryIO]:
    """A file under way, for its owner alone; it takes the place of `path` when all went well, and else is gone.

    Raises Unwritable.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except (OSError, ValueError) as error:
        raise Unwritable(_why(error)) from None
    under_way = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        under_way.replace(path)
    except OSError as error:
        raise Unwritable(_why(error)) from None
    finally:
        under_way.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path) -> Generator[None]:
    """While no other process is in here with this file; the kernel lets go of one that was killed. Raises OSError."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _why(error: OSError | ValueError) -> str:
    return ((error.strerror if isinstance(error, OSError) else None) or str(error)).lower()
