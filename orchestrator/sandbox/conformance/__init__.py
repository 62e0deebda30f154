"""The conformance suite: one list of promises that every backend keeps, for the tests and for `airlock doctor`.

A backend's known deviations are named (`Backend.deviations`), and it is held to them as well: a promise that is kept
although a deviation says otherwise means that the deviation is out of date.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal

import anyio

from orchestrator.core.errors import SandboxUnusable
from orchestrator.sandbox.conformance import bounds, calls, containment, endings, lifetimes, repl
from orchestrator.sandbox.conformance.promise import Bench, Promise, Repl

LONGEST_S = 30.0  # for one try of a promise
_TRIES = 3  # of one that a deviation says is not kept, until it is called out of date

PROMISES: tuple[Promise, ...] = tuple(
    found
    for module in (repl, calls, endings, containment, lifetimes, bounds)
    for found in vars(module).values()
    if isinstance(found, Promise)
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """deviates: not kept, in the one way that a named deviation of the backend says. text: what was seen otherwise."""

    promise: Promise
    state: Literal["kept", "deviates", "broken"]
    text: str = ""

    def __str__(self) -> str:
        return f"{self.promise.name}: {self.state}" + (f" ({self.text})" if self.text else "")


async def judge(promise: Promise, bench: Bench, sandbox: Repl | None = None) -> Verdict:
    """Try one promise, for at most LONGEST_S each time. sandbox: one to try it in, else a new one is opened.

    Raises SandboxUnusable when no sandbox can be had; whatever else happens is a verdict.
    """
    named = promise.unless.keys() & bench.backend.deviations.keys()
    try:
        for _ in range(_TRIES if named else 1):  # a busy machine may keep what a deviation permits to fail
            with anyio.fail_after(LONGEST_S):
                await _try(promise, bench, sandbox)
    except SandboxUnusable:
        raise
    except Exception as error:  # a guest's doing, or a fault of the check: either way nothing has been shown to hold
        for name in named:
            if isinstance(error, promise.unless[name]):
                return Verdict(promise, "deviates", bench.backend.deviations[name])
        told = f"no end within {LONGEST_S:.0f} s" if isinstance(error, TimeoutError) else " ".join(str(error).split())
        safe = "".join(char if char.isprintable() else "?" for char in told)  # a guest may have had a say in it
        return Verdict(promise, "broken", safe or type(error).__name__)
    if named:
        return Verdict(promise, "broken", f"it is kept, so the deviation {sorted(named)[0]!r} is out of date")
    return Verdict(promise, "kept")


async def _try(promise: Promise, bench: Bench, sandbox: Repl | None) -> None:
    if promise.opens:
        await promise.check(bench)
    elif sandbox:
        await promise.check(sandbox)
    else:
        async with bench.open() as own:
            await promise.check(own)


async def conform(bench: Bench) -> list[Verdict]:
    """All verdicts, in the order of PROMISES. Raises SandboxUnusable.

    Promises on a sandbox share one, which has to live through all of them; beside it run those that open their own, or
    after it where all sandboxes are under one user id: what is left of one could not be told from another then.
    """
    verdicts: dict[str, Verdict] = {}
    lanes = [[promise for promise in PROMISES if promise.opens is opens] for opens in (False, True)]
    if os.geteuid():
        lanes = [[*lanes[0], *lanes[1]]]
    try:
        async with anyio.create_task_group() as tasks:
            for lane in lanes:
                tasks.start_soon(_lane, bench, lane, verdicts)
    except BaseExceptionGroup as group:
        unusable = group.subgroup(SandboxUnusable)
        raise (unusable.exceptions[0] if unusable else group) from None
    return [verdicts[promise.name] for promise in PROMISES]


async def _lane(bench: Bench, promises: Sequence[Promise], verdicts: dict[str, Verdict]) -> None:
    async with AsyncExitStack() as stack:
        shared: Repl | None = None
        for promise in promises:
            if promise.opens:
                await stack.aclose()
                shared = None
            elif shared is None:
                shared = await stack.enter_async_context(bench.open())
            verdict = verdicts[promise.name] = await judge(promise, bench, shared)
            if verdict.state != "kept" and not promise.opens:  # what is left of it is not to be blamed on others
                await stack.aclose()
                shared = None
