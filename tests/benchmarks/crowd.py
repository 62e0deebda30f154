"""Figures of many at once: 100 sandboxes that do nothing, and 50 queries on one orchestrator."""

from __future__ import annotations

import re
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from orchestrator.rlm import AsyncRLM
from orchestrator.sandbox.slots import UID_BASE
from tests.benchmarks.figures import Figure, ms
from tests.benchmarks.sandboxes import answer, make_backend, opened
from tests.sandboxes import processes_of

IDLE, PRIVATE_MB = 100, 15.0
QUERIES, SLOWEST = 50, 1.25
SCRIPT = """
root:
  - |
    ```repl
    print(len(context))
    ```
  - |
    ```repl
    found = [line for line in context.splitlines() if "magic" in line]
    print(found)
    ```
  - FINAL_VAR(found)
"""


async def idle(home: Path) -> list[Figure]:
    """Private memory of all processes of a sandbox, after a first cell: what each one adds to the machine's use."""
    backend = make_backend(home)
    async with AsyncExitStack() as stack:
        slots: list[int] = []
        for _ in range(IDLE):
            sandbox = await stack.enter_async_context(opened(backend, home))
            await answer(sandbox, "pass")
            slots.append(sandbox._spec.slot.number)  # pyright: ignore
        await anyio.sleep(0.2)  # until the last snapshot is made
        each = [sum(map(_private_mb, processes_of(UID_BASE + slot))) for slot in slots]
    measured = f"mean {sum(each) / IDLE:.1f} MB, most {max(each):.1f} MB"
    return [
        Figure(
            f"{IDLE} idle sandboxes, private memory of each",
            measured,
            "",
            None,
            f"<= {PRIVATE_MB:.0f} MB",
            max(each) <= PRIVATE_MB,
        )
    ]


def _private_mb(process: int) -> float:
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(int(found) for found in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE)) / 1000


async def crowd(home: Path) -> list[Figure]:
    """All asked at the same moment: none fails, and the slowest is not far behind the one in the middle."""
    script, policy = home / "crowd.yaml", home / "policy.yaml"
    script.write_text(SCRIPT)
    default = (Path(__file__).parents[2] / "policies" / "default.yaml").read_text()
    policy.write_text(re.sub(r"queries_at_once: \d+", f"queries_at_once: {QUERIES}", default))
    context = "hay\n" * 25_000 + "the magic number is 42\n"
    taken: list[float] = []
    async with AsyncRLM("bubblewrap", model=f"scripted:{script}", policy=policy, home=home) as rlm:

        async def ask() -> float:
            started = time.perf_counter()
            done = await rlm.completion("What is the magic number?", context)
            assert done.response, done
            assert "42" in done.response, done
            return time.perf_counter() - started

        async def one() -> None:
            taken.append(await ask())

        alone = min([await ask() for _ in range(5)])
        begun = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for _ in range(QUERIES):
                tasks.start_soon(one)
        whole = time.perf_counter() - begun
    taken.sort()
    middle, slowest = taken[QUERIES // 2], taken[-1]
    measured = f"{len(taken)} answered in {ms(whole)}; slowest {ms(slowest)}"
    beside = f"median {ms(middle)}; one alone {ms(alone)}"
    ratio = slowest / middle
    return [Figure(f"{QUERIES} queries at once", measured, beside, ratio, f"<= {SLOWEST:g}x", ok=ratio <= SLOWEST)]
