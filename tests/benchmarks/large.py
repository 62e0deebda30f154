"""Figures of a context of 1 GB: nothing is copied when it is attached, the first cell comes as soon, memory stays flat.

    python -m tests.benchmarks.large HOME FILE ROUNDS       prints the figures as JSON

A process of its own, so that its memory is that of a host which has handled this context and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import anyio

from orchestrator.core.context import Context
from orchestrator.sandbox.base import Backend
from orchestrator.store.contexts import ContextStore
from tests.benchmarks.figures import Figure, ms
from tests.benchmarks.sandboxes import answer, make_backend, opened

SIZE = 1_000_000_000
SLOWER_S = 0.05
GROWTH_BYTES = 50_000_000
_LINE = b"%09d: one line of a text that is far too large to be read\n"


def large(home: Path, quick: bool) -> list[Figure]:
    """Makes the file, measures in a process of its own."""
    text = home / "large.txt"
    with text.open("wb") as file:
        for number in range(0, SIZE // len(_LINE % 0), 10_000):
            file.write(b"".join(_LINE % n for n in range(number, number + 10_000)))
        file.truncate(SIZE)
    command = [sys.executable, "-m", "tests.benchmarks.large", str(home), str(text), "5" if quick else "15"]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    finally:
        text.unlink()
    return [Figure(**fields) for fields in json.loads(done.stdout)]


async def measure(home: Path, text: Path, rounds: int) -> list[Figure]:
    backend, store = make_backend(home), ContextStore(home / "contexts")
    little = home / "little.txt"
    little.write_bytes(text.open("rb").read(1000))
    small = store.ingest(little)
    await _first_cell(backend, home, small)  # whatever is loaded once is loaded now

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    started = time.perf_counter()
    big = store.ingest(text)
    ingest_s = time.perf_counter() - started
    linked, _ = await _first_cell(backend, home, big)
    growth = _status("VmHWM") - before

    times: dict[str, list[float]] = {small.id: [], big.id: []}
    for _ in range(rounds):
        for context in (small, big):
            times[context.id].append((await _first_cell(backend, home, context))[1])
    short, long = (statistics.median(times[context.id]) for context in (small, big))
    return [
        Figure("1 GB, attached", "hard link" if linked else "a copy", target="same inode", ok=linked),
        Figure(
            "1 GB, start to first cell", ms(long), f"1 kB {ms(short)}", long / short, "+50 ms", long - short <= SLOWER_S
        ),
        Figure(
            f"1 GB, growth of the host's memory (ingest took {ingest_s:.1f} s)",
            f"{growth / 1e6:.1f} MB",
            target=f"< {GROWTH_BYTES / 1e6:.0f} MB",
            ok=growth < GROWTH_BYTES,
        ),
    ]


async def _first_cell(backend: Backend, home: Path, context: Context) -> tuple[bool, float]:
    """Whether the slot has the store's own file, and the seconds from nothing to the first cell's answer."""
    started = time.perf_counter()
    async with opened(backend, home) as sandbox:
        sandbox.attach(context)
        await answer(sandbox, f"assert len(context) == {context.chars}; print(context[-80:])")
        seconds = time.perf_counter() - started
        kept = context.files["data"].stat()
        slots = [found.stat() for found in home.glob("slots/slot-*/data")]
        linked = any(os.path.samestat(kept, found) for found in slots) and kept.st_nlink == 1 + len(slots)
    return linked, seconds


def _status(name: str) -> int:
    """Bytes, from a line of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    figures = anyio.run(measure, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps([asdict(figure) for figure in figures]))
