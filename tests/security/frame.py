"""Attacks and how each is proved: it gets nothing in a sandbox as it is, and something in one with the defence in
question taken away. So an attack that fails for a reason of its own does not pass for a defence."""

from __future__ import annotations

import textwrap
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyseccomp

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.sandbox import CellResult
from tests.sandboxes import BACKENDS, Repl
from tests.security.weak import WHOLE, Weak, open_weak

HELD, HOLE, NOT_IMPLEMENTED = "held", "HOLE", "not implemented"

PRELUDE = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
REFUSED = (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT)
def breach(*what):
    print('BREACH', *what, flush=True)
def call(number, *arguments):
    "The system call's result, or the error's number, negative."
    ctypes.set_errno(0)
    converted = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *converted)
    return -ctypes.get_errno() if result < 0 else result
def in_child(function):
    "Whether it returns something true, in a process of its own."
    pid = os.fork()
    if not pid:
        try:
            os._exit(not function())
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
"""

Attempt = Callable[["Stage"], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Attack:
    """attempt: what it gets on a stage, a text each. weak: where it has to get something, `expect` at least.

    elsewhere: backends on which it gets nothing however weak they are made; there docker's counter-run has to do.
    known: backends on which it succeeds, and why; SECURITY.md tells it among what is not defended.
    walls: where two defences stand in its way, each taken away alone: it still gets nothing.
    """

    group: str
    name: str
    attempt: Attempt
    weak: Weak
    expect: frozenset[str] | Callable[[], frozenset[str]] = frozenset()
    elsewhere: Sequence[str] = ()
    known: Mapping[str, str] = field(default_factory=dict[str, str])
    walls: Mapping[str, Sequence[Weak]] = field(default_factory=dict[str, Sequence[Weak]])

    def word(self, backend: str) -> str:
        """What the table says of it."""
        if backend in self.known:
            return HOLE
        return NOT_IMPLEMENTED if backend == "gvisor" and backend in self.elsewhere else HELD

    def expected(self) -> frozenset[str]:
        return self.expect() if callable(self.expect) else self.expect


class Stages:
    """Opens stages; a sandbox whose state no attack changes is shared among attacks."""

    def __init__(self, backends: Mapping[str, Backend], home: Path, yard: Path) -> None:
        assert set(backends) <= set(BACKENDS)
        self._backends, self.home, self.yard = backends, home, yard
        self._shared: dict[tuple[str, int], tuple[Repl, AsyncExitStack]] = {}
        self.proved: set[tuple[str, str]] = set()

    def stage(self, backend: str, weak: Weak = WHOLE) -> Stage:
        return Stage(self, backend, weak)

    @asynccontextmanager
    async def open(self, backend: str, weak: Weak, **changes: Any) -> AsyncGenerator[Repl]:
        async with open_weak(self._backends[backend], self.home, self.yard, weak, **changes) as repl:
            yield repl

    async def shared(self, backend: str, weak: Weak) -> Repl:
        key = (backend, id(weak))  # every Weak is a constant of some module
        if key not in self._shared:
            stack = AsyncExitStack()
            self._shared[key] = await stack.enter_async_context(self.open(backend, weak)), stack
        return self._shared[key][0]

    async def aclose(self) -> None:
        while self._shared:
            await self._shared.popitem()[1][1].aclose()


@dataclass(frozen=True, slots=True)
class Stage:
    """Where an attack is made: a backend, as it is or weakened."""

    stages: Stages
    backend: str
    weak: Weak

    @property
    def home(self) -> Path:
        return self.stages.home

    @property
    def yard(self) -> Path:
        return self.stages.yard

    @asynccontextmanager
    async def open(self, agent: str = "", **changes: Any) -> AsyncGenerator[Repl]:
        """A sandbox for this attack alone. agent: code at the end of the agent's, whether weakened or not."""
        weak = self.weak | Weak(agent=agent) if agent else self.weak
        async with self.stages.open(self.backend, weak, **changes) as repl:
            yield repl

    async def shared(self) -> Repl:
        return await self.stages.shared(self.backend, self.weak)


def number(name: str) -> int:
    """Of a system call, on this machine."""
    found = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    assert found >= 0, name
    return found


def breaches(result: CellResult) -> list[str]:
    assert result.status in ("ok", "killed"), (result, result.text("err"))
    return [line.removeprefix("BREACH ") for line in result.text("out").splitlines() if line.startswith("BREACH ")]


async def attacked(repl: Repl, code: str, given: Mapping[str, Any] | None = None, **options: Any) -> CellResult:
    values = "".join(f"{name} = {value!r}\n" for name, value in (given or {}).items())
    return await repl.run(PRELUDE + values + textwrap.dedent(code), 30.0, **options)


def cell(code: str, given: Callable[[Stage, Repl], Mapping[str, Any]] | None = None, **values: Any) -> Attempt:
    """A cell that says itself what it got."""

    async def attempt(stage: Stage) -> list[str]:
        repl = await stage.shared()
        return breaches(await attacked(repl, code, {**values, **(given(stage, repl) if given else {})}))

    return attempt


def seen(code: str, look: Callable[[Repl], set[str]], **values: Any) -> Attempt:
    """A cell that holds what it got while it calls `llm_query`; it counts if the host then sees more of it than before.

    So what a kernel inside the sandbox makes of its own, and the host's never hears of, is no breach.
    """

    async def attempt(stage: Stage) -> list[str]:
        repl = await stage.shared()
        before, after = look(repl), set[str]()

        async def on_call(_call: object) -> str:
            after.update(look(repl))
            return ""

        result = await attacked(repl, code, values, on_call=on_call)
        return breaches(result) if after - before else []

    return attempt


async def survives(repl: Repl, code: str, given: Mapping[str, Any] | None = None) -> list[str]:
    """What breaks a sandbox, or the variables of the cells before."""
    await repl.run("kept = 'kept'")
    try:
        result = await attacked(repl, code, given)
        kept = await repl.run("kept")
    except SandboxDied as error:
        return [f"sandbox: {error}"]
    return [] if kept.text("out") == "'kept'\n" else [f"variables: {result.detail}"]
