"""Every promise of the conformance suite, on every backend; and that the suite notices what is not kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.core.errors import SandboxDied, SandboxUnusable
from orchestrator.sandbox import bubblewrap, conformance
from orchestrator.sandbox.base import EXHAUSTION, Backend, Finding, Guest, SandboxSpec
from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.sandbox.conformance import PROMISES, judge
from orchestrator.sandbox.conformance.promise import Bench, Broken, Promise, expect
from orchestrator.sandbox.slots import Slots
from tests.sandboxes import SECCOMP

pytestmark = pytest.mark.anyio
TIMED = {"processors are bounded"}
assert {promise.name for promise in PROMISES} > TIMED


@pytest.mark.parametrize(
    "promise",
    [
        pytest.param(promise, id=promise.name, marks=[pytest.mark.alone] if promise.name in TIMED else [])
        for promise in PROMISES
    ],
)
async def test_promise(backend: Backend, home: Path, promise: Promise):
    verdict = await judge(promise, Bench(backend, Slots(home)))
    assert verdict.state != "broken", verdict


async def test_one_sandbox_lives_through_all_of_them(home: Path):
    verdicts = await conformance.conform(Bench(Bubblewrap(home / "cache", SECCOMP), Slots(home)))
    assert [verdict.promise for verdict in verdicts] == list(PROMISES)
    assert [str(verdict) for verdict in verdicts if verdict.state != "kept"] == []


def test_promises_have_names_of_their_own_and_show_every_invariant_that_can_be_seen_from_a_sandbox():
    assert len({promise.name for promise in PROMISES}) == len(PROMISES)
    assert {promise.invariant for promise in PROMISES} == {None, 1, 2, 3, 6, 7, 10}
    assert all(promise.text.endswith(".") for promise in PROMISES)


class Declared(Bubblewrap):
    """Says that it deviates where it does not."""

    @property
    def deviations(self) -> Mapping[str, str]:
        return {EXHAUSTION: "as declared"}


def promise_that(check: object, **options: object) -> Promise:
    return Promise("tried", "Something.", check, True, **options)  # pyright: ignore


async def verdict_on(check: object, home: Path, backend: type[Bubblewrap] = Declared) -> str:
    promise = promise_that(check, unless={EXHAUSTION: SandboxDied})
    return str(await judge(promise, Bench(backend(home / "cache", SECCOMP), Slots(home))))


async def test_a_backend_is_held_to_its_deviations(home: Path):
    async def kept(_bench: Bench) -> None:
        return

    async def deviates(_bench: Bench) -> None:
        raise SandboxDied("out of memory")

    async def kept_at_first(bench: Bench) -> None:
        tried.append(bench)
        if len(tried) > 2:
            raise SandboxDied("out of memory")

    tried: list[Bench] = []

    async def broken_otherwise(_bench: Bench) -> None:
        raise Broken("it has the host's memory")

    assert await verdict_on(deviates, home) == "tried: deviates (as declared)"
    assert await verdict_on(deviates, home, Bubblewrap) == "tried: broken (out of memory)"
    assert await verdict_on(kept, home) == "tried: broken (it is kept, so the deviation 'exhaustion' is out of date)"
    assert await verdict_on(kept_at_first, home) == "tried: deviates (as declared)"
    assert await verdict_on(kept, home, Bubblewrap) == "tried: kept"
    assert await verdict_on(broken_otherwise, home) == "tried: broken (it has the host's memory)"


async def test_whatever_happens_to_a_check_is_one_line(home: Path):
    async def many_lines(_bench: Bench) -> None:
        expect(False, "one\ntwo " + "x" * 1000)

    async def its_own_fault(_bench: Bench) -> None:
        raise KeyError

    said = await verdict_on(many_lines, home)
    assert said.startswith("tried: broken (one two xxx")
    assert len(said) < 400
    assert await verdict_on(its_own_fault, home) == "tried: broken (KeyError)"


async def test_a_check_that_hangs_is_ended(home: Path, monkeypatch: pytest.MonkeyPatch):
    async def hangs(bench: Bench) -> None:
        async with bench.open() as repl:
            await repl.run("while True: pass", 1000.0)

    monkeypatch.setattr(conformance, "LONGEST_S", 0.5)
    started = time.monotonic()
    assert (await verdict_on(hangs, home)).startswith("tried: broken (no end within")
    assert time.monotonic() - started < 10


class Nowhere(Bubblewrap):
    async def launch(self, spec: SandboxSpec) -> Guest:
        raise SandboxUnusable("there is none to be had")

    async def diagnose(self) -> list[Finding]:
        return []


async def test_without_a_sandbox_there_is_no_verdict(home: Path):
    bench = Bench(Nowhere(home / "cache", SECCOMP), Slots(home))
    with pytest.raises(SandboxUnusable, match="there is none to be had"):
        await conformance.conform(bench)


# What is taken away -> the promises that have to be broken then, and no others.
WEAK: dict[str, tuple[list[str], list[str], set[str]]] = {
    "the network": (["--unshare-all"], ["--unshare-ipc", "--unshare-pid", "--unshare-uts"], {"no network"}),
    "a read-only root": (["--remount-ro", "/"], [], {"nothing but tmp is written"}),
    "an empty environment": (["--clearenv"], ["--setenv", "API_KEY", "1"], {"no host environment"}),
    "bounds of /tmp": (["--size", str(8 << 20)], [], {"tmp is bounded"}),
}


@pytest.mark.parametrize("what", WEAK)
async def test_a_weakened_sandbox_breaks_its_promise(home: Path, what: str, monkeypatch: pytest.MonkeyPatch):
    without, instead, broken = WEAK[what]
    whole = bubblewrap.command

    def command(*arguments: object) -> list[str]:
        made = whole(*arguments)  # pyright: ignore
        at = next((n for n in range(len(made)) if made[n : n + len(without)] == without), None)
        return made if at is None else [*made[:at], *instead, *made[at + len(without) :]]

    backend = Bubblewrap(home / "cache", SECCOMP)
    monkeypatch.setattr(bubblewrap, "command", command)
    bench = Bench(backend, Slots(home))
    tried = [promise for promise in PROMISES if promise.name in set().union(*(names for _, _, names in WEAK.values()))]
    verdicts = [await judge(promise, bench) for promise in tried]
    assert {verdict.promise.name for verdict in verdicts if verdict.state == "broken"} == broken
