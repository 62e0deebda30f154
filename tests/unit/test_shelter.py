"""Work in a shelter comes to its own end, however its caller is cancelled."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from orchestrator.core.errors import RequestError
from orchestrator.loop.shelter import Shelter

pytestmark = pytest.mark.anyio


class Work:
    """Waits for ever; when it is cancelled, takes a while to put things in order."""

    def __init__(self) -> None:
        self.begun, self.free = anyio.Event(), anyio.Event()
        self.ended = False

    async def __call__(self) -> str:
        try:
            self.begun.set()
            await self.free.wait()
            return "done"
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(20):
                    await asyncio.sleep(0)
            self.ended = True


async def test_a_result_and_an_exception_come_back():
    work = Work()
    work.free.set()
    assert await Shelter().run(work) == "done"

    async def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await Shelter().run(fail)


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_asyncios_own_cancel_waits_for_the_end(times: int):
    work = Work()
    task = asyncio.create_task(Shelter().run(work))
    await work.begun.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended


async def test_a_time_out_of_asyncios_is_one():
    work = Work()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Shelter().run(work), 0.01)
    assert work.ended


async def test_a_cancelled_scope_waits_for_the_end():
    work = Work()
    with anyio.move_on_after(0.01) as scope:
        await Shelter().run(work)
    assert scope.cancelled_caught
    assert work.ended


async def test_an_error_at_the_end_is_not_lost():
    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise KeyError("at the end")

    task = asyncio.create_task(Shelter().run(work))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(KeyError, match="at the end"):
        await task


async def test_closing_ends_what_runs():
    shelter, work = Shelter(), Work()
    task = asyncio.create_task(shelter.run(work))
    await work.begun.wait()
    await shelter.aclose()
    assert work.ended
    with pytest.raises(RequestError, match="closed while it ran"):
        await task
