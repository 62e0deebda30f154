"""Starts processes under other user ids, in sight of folders that those ids could not reach by path.

Under root, bwrap runs as a stranger, and a data folder below a private home is out of a stranger's reach. So a thread
of its own takes a private mount namespace, binds what is needed to a public path there, and starts the process from
inside: the host's own mounts stay as they are, and the namespace is gone with this process.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import queue
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.core.errors import SandboxUnusable

_VIEW = Path("/run/airlock/view")
_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19


class Launcher:
    """One thread, started on the first use; a sandbox's bwrap is told to die with the thread that started it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._private = False
        self._views: dict[Path, Path] = {}

    def call(self, job: Callable[[], Any]) -> Any:
        """Run `job` in the thread; its result, or its exception."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="airlock-launcher", daemon=True)
            self._thread.start()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._jobs.put((job, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # handed to the caller, whatever it is
                future.set_exception(error)

    def reach(self, path: Path) -> Path:
        """A path to `path` that every user id can traverse, from inside `call`. Raises SandboxUnusable."""
        if all(_open_to_all(parent) for parent in path.parents):
            return path
        folder = path.parent
        if folder not in self._views:
            try:
                self._views[folder] = self._bind(folder)
            except OSError as error:
                raise SandboxUnusable(
                    f"sandboxes cannot reach {folder} ({error.strerror}): use an AIRLOCK_HOME that every user may "
                    "traverse (chmod o+x its parents)"
                ) from None
        return self._views[folder] / path.name

    def _bind(self, folder: Path) -> Path:
        if not self._private:
            _VIEW.mkdir(parents=True, exist_ok=True, mode=0o755)
            _libc("unshare", _CLONE_NEWNS)
            _libc("mount", None, b"/", None, _MS_REC | _MS_SLAVE, None)
            _libc("mount", b"tmpfs", os.fsencode(_VIEW), b"tmpfs", 0, b"mode=0755,size=64k")
            self._private = True
        view = _VIEW / str(len(self._views))
        view.mkdir()
        _libc("mount", os.fsencode(folder), os.fsencode(view), None, _MS_BIND, None)
        return view


def _open_to_all(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IXOTH)


def _libc(name: str, *arguments: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    converted = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    if getattr(library, name)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
