"""Sandboxes that are kept ready: handed out once, watched while they wait, and gone when the pool is closed."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest

from orchestrator.core.errors import SandboxUnusable
from orchestrator.sandbox.base import Backend, Guest, SandboxSpec, Slot
from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.sandbox.pool import Figures, Pool
from orchestrator.sandbox.sandbox import Sandbox
from orchestrator.sandbox.slots import Slots
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import MIB, SECCOMP, Repl, spec_for, until

pytestmark = pytest.mark.anyio

MOST = 1024 * MIB


@asynccontextmanager
async def open_pool(home: Path, most_bytes: int = MOST) -> AsyncGenerator[Pool]:
    pool = Pool(Slots(home), most_bytes)
    try:
        yield pool
    finally:
        await pool.aclose()


async def ready(figures: Figures, count: int) -> None:
    await until(lambda: figures.ready == count, 30.0)


async def run(sandbox: Sandbox, code: str) -> str:
    """No slot is known here, nor needed."""
    return await Repl(sandbox, Slot(-1, Path(), None)).out(code)


async def test_any_context_is_attached_to_what_was_started_before_it(backend: Backend, home: Path, store: ContextStore):
    async with open_pool(home) as pool:
        pool.keep(backend, spec_for, 2)
        (figures,) = pool.figures()
        await ready(figures, 2)
        for text in ("of the first", "x" * (80 * MIB)):  # the other one is mapped, and larger than the address space
            async with pool.open(backend, spec_for) as sandbox:
                assert sandbox.cold_because == ""
                sandbox.attach(store.ingest_value(text))
                assert await run(sandbox, "len(context), context[:12]") == f"({len(text)}, {text[:12]!r})"
        assert (figures.warm, figures.cold) == (2, 0)
        await ready(figures, 2)  # filled up again


async def test_each_is_handed_out_once(backend: Backend, home: Path):
    async with open_pool(home) as pool:
        pool.keep(backend, spec_for, 1)
        (figures,) = pool.figures()
        for _ in range(2):
            await ready(figures, 1)
            async with pool.open(backend, spec_for) as sandbox:
                assert await run(sandbox, "'mark' in globals(), __import__('os').listdir('/tmp')") == "(False, [])"
                await run(sandbox, "mark = 1\nopen('/tmp/mark', 'w').close()")


async def test_an_empty_shelf_and_other_limits_start_cold(backend: Backend, home: Path):
    async with open_pool(home) as pool, pool.open(backend, spec_for) as first:
        assert first.cold_because == "no sandboxes are kept ready"
        pool.keep(backend, spec_for, 1)
        (figures,) = pool.figures()
        async with pool.open(backend, spec_for) as second:
            assert second.cold_because == "none was ready"
        await ready(figures, 1)
        async with pool.open(backend, lambda slot: spec_for(slot, pids=40)) as third:
            assert third.cold_because
            assert await run(third, "1 + 1") == "2"
        assert (figures.warm, figures.cold, figures.ready) == (0, 1, 1)


async def test_one_that_dies_while_it_waits_is_replaced(backend: Backend, home: Path):
    async with open_pool(home) as pool:
        pool.keep(backend, spec_for, 1)
        (figures,) = pool.figures()
        await ready(figures, 1)
        guest = next(iter(pool._shelves.values())).ready[0].sandbox._guest
        os.kill(host_process(guest), signal.SIGKILL)
        await until(lambda: figures.lost == 1, 30.0)
        await ready(figures, 1)
        async with pool.open(backend, spec_for) as sandbox:
            assert await run(sandbox, "'well'") == "'well'"


async def test_nothing_is_left_when_it_is_closed(backend: Backend, home: Path):
    slots = home / "slots"
    before = set(slots.glob("slot-*"))
    async with open_pool(home) as pool:
        pool.keep(backend, spec_for, 2)
        await ready(pool.figures()[0], 1)  # and one more is being started
        assert set(slots.glob("slot-*")) > before
    assert set(slots.glob("slot-*")) == before


# What is the pool's alone, whatever the backend


@pytest.fixture
def bubblewrap(home: Path) -> Bubblewrap:
    return Bubblewrap(home / "cache", SECCOMP)


async def test_it_holds_no_more_than_its_memory(bubblewrap: Bubblewrap, home: Path):
    async with open_pool(home) as pool:
        pool.keep(bubblewrap, spec_for, 1)
        await ready(pool.figures()[0], 1)
        one = pool.figures()[0].memory_bytes
    most = int(2.5 * one)
    async with open_pool(home, most) as pool:
        pool.keep(bubblewrap, spec_for, 9)
        pool.keep(bubblewrap, lambda slot: spec_for(slot, pids=40), 9)
        first, second = pool.figures()
        await until(lambda: first.ready + second.ready == 2, 30.0)
        peak = 0
        for _ in range(5):
            async with pool.open(bubblewrap, spec_for):
                await until(lambda: first.ready + second.ready == 2, 30.0)
                peak = max(peak, first.memory_bytes + second.memory_bytes)
        assert one < peak <= most


class Failing(Bubblewrap):
    """Cannot start until it is mended."""

    broken = True

    async def launch(self, spec: SandboxSpec) -> Guest:
        if self.broken:
            raise SandboxUnusable("out of order")
        return await super().launch(spec)


async def test_a_refill_that_fails_is_tried_again_and_told(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.sandbox.pool.LONGEST_BACKOFF_S", 0.01)
    backend = Failing(home / "cache", SECCOMP)
    async with open_pool(home) as pool:
        pool.keep(backend, spec_for, 1)
        (figures,) = pool.figures()
        await until(lambda: figures.failed >= 2)
        assert figures.fault == "out of order"
        with pytest.raises(SandboxUnusable, match="out of order"):  # the query is told the same
            async with pool.open(backend, spec_for):
                pass
        backend.broken = False
        await ready(figures, 1)
        assert figures.fault == ""


async def test_one_that_speaks_while_it_waits_is_thrown_away(bubblewrap: Bubblewrap, home: Path):
    async with open_pool(home) as pool:
        pool.keep(bubblewrap, spec_for, 1)
        (figures,) = pool.figures()
        await ready(figures, 1)
        sandbox = next(iter(pool._shelves.values())).ready[0].sandbox
        frame = {"type": "run", "id": 1, "code": "", "timeout_s": 5, "context": False}
        await sandbox._channel.send(frame)  # its `done` comes when nobody has asked
        await until(lambda: figures.lost == 1)


@pytest.mark.parametrize("when", [0.0, 0.001])
async def test_a_caller_that_is_cancelled_leaves_nothing(bubblewrap: Bubblewrap, home: Path, when: float):
    before = set((home / "slots").glob("slot-*"))
    async with open_pool(home) as pool:
        pool.keep(bubblewrap, spec_for, 1)
        await ready(pool.figures()[0], 1)
        with anyio.move_on_after(when):
            async with pool.open(bubblewrap, spec_for):
                await anyio.sleep_forever()
    assert set((home / "slots").glob("slot-*")) == before


async def test_a_crowd_is_served_in_order(bubblewrap: Bubblewrap, home: Path):
    """None of thirty at once fails, and those who came first are served first."""
    served: list[int] = []

    async def query(pool: Pool, number: int) -> None:
        async with pool.open(bubblewrap, spec_for) as sandbox:
            served.append(number)
            assert await run(sandbox, "1 + 1") == "2"

    async with open_pool(home) as pool, anyio.create_task_group() as tasks:
        for number in range(30):
            tasks.start_soon(query, pool, number)
    assert sorted(served) == list(range(30))
    assert max(abs(place - number) for place, number in enumerate(served)) < 10


def host_process(guest: Guest) -> int:
    """A process of the guest, as the host sees it."""
    with suppress(AttributeError):
        return guest._process.pid  # pyright: ignore
    pid: int = guest._api.inspect_container(guest._container)["State"]["Pid"]  # pyright: ignore
    return pid
