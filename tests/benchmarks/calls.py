"""Figures of sub-calls through guest, channel, proxy, ledger and journal: one by one, in a wide batch, very many."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import openai

from orchestrator.choices import Choices
from orchestrator.wiring import Platform, Watch, open_platform
from tests.benchmarks.fake_lm import fake_lm
from tests.benchmarks.figures import Figure, ms, percentile

CALL_RATIO, CALL_MORE_S = 1.5, 0.003
BATCH, IN_FLIGHT, THINKS_S, IDEAL_SHARE = 1000, 64, 0.05, 0.9
MANY, FLAT_MB = 10_000, 16.0
_ONE_BY_ONE = """
import json, time
taken = []
for number in range({count}):
    started = time.perf_counter()
    llm_query("Line %d: is it there?" % number)
    taken.append(time.perf_counter() - started)
print(json.dumps(taken))
"""
_AT_ONCE = """
import json, time
started = time.perf_counter()
answers = llm_query_batched(["Part %d: is it there?" % number for number in range({count})])
print(json.dumps(time.perf_counter() - started))
assert answers == ["no"] * {count}
"""


async def calls(home: Path, quick: bool) -> list[Figure]:
    with fake_lm() as instant:
        figures = await _one_by_one(home, instant, 4 if quick else 12)
    with fake_lm(THINKS_S) as slow:
        figures.append(await _wide(home, slow, 1 if quick else 3))
    with fake_lm() as instant:
        figures.append(await _many(home, instant, 2000 if quick else MANY))
    return figures


@asynccontextmanager
async def _platform(home: Path, base_url: str) -> AsyncIterator[Platform]:
    policy = home / "calls.yaml"
    text = (Path(__file__).parents[2] / "policies" / "development.yaml").read_text()
    text = re.sub(r"sub_calls: \d+", "sub_calls: 100000", text)
    policy.write_text(re.sub(r"in_flight: 64", f"in_flight: {IN_FLIGHT}", text))
    price = (Decimal("0.01"), Decimal("0.01"))
    choices = Choices(
        model="fake",
        base_url=base_url,
        api_key="none",
        prices={"fake": price},
        policy=str(policy),
        backend="bubblewrap",
    )
    async with open_platform(choices, home) as platform:
        yield platform


async def _cell(platform: Platform, code: str) -> Any:
    """What a cell prints, as JSON."""
    said: list[str] = []
    watch = Watch(output=lambda stream, text: said.append(text) if stream == "out" else None)
    closed = await platform.run("", platform.contexts.nothing(), code=code, watch=watch)
    assert closed.cell, closed
    assert closed.cell.status == "ok", closed
    return json.loads("".join(said))


async def _one_by_one(home: Path, base_url: str, rounds: int) -> list[Figure]:
    """In turns with the bare client, each after a warm-up."""
    ours: list[float] = []
    bare: list[float] = []
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    async with _platform(home, base_url) as platform:
        for number in range(rounds + 1):
            mine = await _cell(platform, _ONE_BY_ONE.format(count=60))
            theirs: list[float] = []
            for line in range(60):
                started = time.perf_counter()
                await client.chat.completions.create(
                    model="fake",
                    messages=[{"role": "user", "content": f"Line {line}: is it there?"}],
                    max_tokens=4096,
                    n=1,
                )
                theirs.append(time.perf_counter() - started)
            if number:
                ours += mine[10:]
                bare += theirs[10:]
    await client.close()
    mine, other = percentile(ours, 50), percentile(bare, 50)
    measured = f"p50 {ms(mine)}, p95 {ms(percentile(ours, 95))}"
    beside = f"AsyncOpenAI p50 {ms(other)}"
    ratio = mine / other
    more = mine - other
    return [
        Figure("sub-call, LM at once", measured, beside, ratio, f"<= {CALL_RATIO:g}x", ratio <= CALL_RATIO),
        Figure("sub-call, LM at once, more", ms(more), "", None, f"<= {ms(CALL_MORE_S)}", more <= CALL_MORE_S),
    ]


async def _wide(home: Path, base_url: str, rounds: int) -> Figure:
    """Beside the time that as many waits of the LM take, with nothing between them; and what the bare client makes."""
    ideal = math.ceil(BATCH / IN_FLIGHT) * THINKS_S
    taken: list[float] = []
    bare: list[float] = []
    async with _platform(home, base_url) as platform:
        for _ in range(rounds):
            taken.append(await _cell(platform, _AT_ONCE.format(count=BATCH)))
            bare.append(await _bare(base_url))
    share = ideal / statistics.median(taken)
    beside = f"ideal {ms(ideal)}; AsyncOpenAI {ms(statistics.median(bare))}"
    measured = f"{ms(statistics.median(taken))}, {share:.2f} of the ideal"
    name = f"{BATCH:,} sub-calls, {IN_FLIGHT} in flight, LM of {ms(THINKS_S)}"
    return Figure(name, measured, beside, share, f">= {IDEAL_SHARE:g}", share >= IDEAL_SHARE)


async def _bare(base_url: str) -> float:
    """Seconds for the same requests by the SDK alone, as many in flight."""
    places = anyio.Semaphore(IN_FLIGHT)
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def one(number: int) -> None:
            async with places:
                await client.chat.completions.create(
                    model="fake",
                    messages=[{"role": "user", "content": f"Part {number}: is it there?"}],
                    max_tokens=4096,
                    n=1,
                )

        started = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for number in range(BATCH):
                tasks.start_soon(one, number)
        return time.perf_counter() - started


async def _many(home: Path, base_url: str, count: int) -> Figure:
    """How much larger this process is after all calls of one query than after a tenth of them."""
    sizes: list[float] = []

    async with _platform(home, base_url) as platform:
        await _cell(platform, _AT_ONCE.format(count=count // 10))
        sizes.append(_resident_mb())
        started = time.perf_counter()
        await _cell(platform, _AT_ONCE.format(count=count))
        seconds = time.perf_counter() - started
        sizes.append(_resident_mb())
    grown = sizes[1] - sizes[0]
    measured = f"+{grown:.1f} MB, {ms(seconds)}, {count / seconds:,.0f} a second"
    name = f"{count:,} sub-calls in one query, memory of the host"
    return Figure(
        name, measured, f"after {count // 10:,}: {sizes[0]:.0f} MB", None, f"<= {FLAT_MB:g} MB", grown <= FLAT_MB
    )


def _resident_mb() -> float:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1000
