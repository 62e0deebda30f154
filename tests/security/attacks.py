"""Attacks are cells that print a line with BREACH for what they got. Each is run twice: against a sandbox as it is,
where it must get nothing, and against one with the defence in question taken away, where it must get something. So an
attack that fails for a reason of its own does not pass for a defence."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyseccomp
import pytest

from orchestrator.sandbox import bubblewrap
from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.sandbox.sandbox import CellResult
from tests.sandboxes import SECCOMP, Repl, open_repl

Edit = Callable[[list[str]], list[str]]

ALLOW_ALL = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}
SOME = ["--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup"]

PRELUDE = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
REFUSED = (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT)
def breach(*what):
    print('BREACH', *what)
def syscall(number, *arguments):
    "0, or the error's number."
    ctypes.set_errno(0)
    converted = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
    libc.syscall.restype = ctypes.c_long
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *converted) < 0 else 0
"""


def number(name: str) -> int:
    """Of a system call, on this machine."""
    found = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    assert found >= 0, name
    return found


def without(flag: str, values: int = 0) -> Edit:
    """bwrap's arguments with the last use of a flag, and its values, left out."""

    def edit(arguments: list[str]) -> list[str]:
        at = len(arguments) - 1 - arguments[::-1].index(flag)
        return arguments[:at] + arguments[at + 1 + values :]

    return edit


def with_more(*more: str) -> Edit:
    """More of bwrap's arguments, while the root can still be written."""

    def edit(arguments: list[str]) -> list[str]:
        at = arguments.index("--perms")
        return [*arguments[:at], *more, *arguments[at:]]

    return edit


def shared_network(arguments: list[str]) -> list[str]:
    at = arguments.index("--unshare-all")
    return [*arguments[:at], *SOME, *arguments[at + 1 :]]


class Weak:
    """Opens sandboxes with defences taken away."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self._home = home
        self._patch = patch
        self._command = bubblewrap.command

    @asynccontextmanager
    async def open(self, *edits: Edit, filtered: bool = True, **changes: Any) -> AsyncGenerator[Repl]:
        def command(*arguments: Any) -> list[str]:
            made = self._command(*arguments)
            for edit in edits:
                made = edit(made)
            return made

        profile = self._home / "allow-all.json"
        profile.write_text(json.dumps(ALLOW_ALL))
        with self._patch.context() as patch:
            patch.setattr(bubblewrap, "command", command)
            backend = Bubblewrap(self._home / "cache", SECCOMP if filtered else profile)
            async with open_repl(backend, self._home, **changes) as repl:
                yield repl


async def breaches(repl: Repl, attack: str, **values: Any) -> list[str]:
    """What the attack got. values: names it may use."""
    result = await attacked(repl, attack, **values)
    assert result.status in ("ok", "killed"), (result, result.text("err"))
    return [line.removeprefix("BREACH ") for line in result.text("out").splitlines() if line.startswith("BREACH ")]


async def attacked(repl: Repl, attack: str, **values: Any) -> CellResult:
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return await repl.run(PRELUDE + given + attack, 30.0)
