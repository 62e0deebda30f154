"""Queries that are given up, or that lose their store, in the middle: nothing stays open, held or running."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator import RLM, AsyncRLM, RequestError
from orchestrator.choices import Choices
from orchestrator.core.errors import StoreError
from orchestrator.core.events import Event
from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.wiring import Watch, open_platform
from tests.command import Airlock
from tests.fakes.provider import Hang, Provider, Say, Seen

pytestmark = pytest.mark.anyio
LOOK = Say("```repl\nprint(llm_query_batched(['a', 'b']))\n```", usage=(100, 50))


def by_turn(seen: Seen) -> Say:
    if seen.role == "sub":
        return Say("sub", usage=(10, 5))
    return Say("FINAL(42)") if any(message["role"] == "assistant" for message in seen.body["messages"]) else LOOK


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        running.answer = by_turn
        yield running


def rlm(provider: Provider, airlock: Airlock) -> dict[str, Any]:
    return {"model": "m", "base_url": provider.url, "api_key": "k", "prices": {"m": (1, 2)}, "home": airlock.home}


def statuses(airlock: Airlock) -> Counter[str]:
    return Counter(dict(airlock.rows("SELECT id, status FROM queries")).values())


async def test_asyncios_own_cancel_at_any_moment(provider: Provider, fresh: Airlock) -> None:
    """wait_for and task.cancel() break through every shield of the task they hit, once or several times."""
    rng = random.Random(1)  # noqa: S311  the same moments each time, about
    async with AsyncRLM(**rlm(provider, fresh)) as asked:
        assert (await asked.completion("q", "context")).response == "42"
        for _ in range(60):
            task = asyncio.create_task(asked.completion("q", "context"))
            await asyncio.sleep(rng.random() * 0.15)
            for _ in range(rng.randrange(1, 4)):
                task.cancel()
                await asyncio.sleep(rng.random() * 0.01)
            with suppress(asyncio.CancelledError):
                await task
            assert not statuses(fresh)["open"]
        assert (await asked.completion("q", "context")).response == "42"
    assert statuses(fresh)["cancelled"] > 10
    fresh.nothing_left()


async def test_a_cancel_in_the_middle_of_a_launch(
    provider: Provider, fresh: Airlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tasks = Bubblewrap.launch, list[asyncio.Task[Any]]()

    async def cancelled(self: Bubblewrap, spec: Any) -> Any:
        asyncio.get_running_loop().call_soon(tasks[0].cancel)
        return await launch(self, spec)

    monkeypatch.setattr(Bubblewrap, "launch", cancelled)
    async with AsyncRLM(**rlm(provider, fresh)) as asked:
        tasks.append(asyncio.create_task(asked.completion("q", "context")))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
    assert statuses(fresh) == {"cancelled": 1}
    fresh.nothing_left()


async def test_closing_while_a_query_runs(provider: Provider, fresh: Airlock) -> None:
    provider.answer = lambda _seen: Hang()
    asked = AsyncRLM(**rlm(provider, fresh))
    task = asyncio.create_task(asked.completion("q", "context"))
    await anyio.to_thread.run_sync(provider.wait, "root")
    await asked.aclose()
    with pytest.raises(RequestError, match="closed while it ran"):
        await task
    assert statuses(fresh) == {"cancelled": 1}
    fresh.nothing_left()


def test_ctrl_c_in_the_sync_class(provider: Provider, fresh: Airlock) -> None:
    provider.answer = lambda _seen: Hang()

    def press() -> None:
        provider.wait("root")
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.main_thread().ident or 0
    thread = threading.Thread(target=press)
    with RLM(**rlm(provider, fresh)) as asked:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            asked.completion("q", "context")
        thread.join()
        assert statuses(fresh) == {"cancelled": 1}
    fresh.nothing_left()


@pytest.mark.parametrize("kind", ["sandbox.started", "cell.ended", "sandbox.ended", "context.verified"])
async def test_a_query_that_lost_a_record_is_closed_as_failed(provider: Provider, fresh: Airlock, kind: str) -> None:
    async with AsyncRLM(**rlm(provider, fresh)) as asked:
        await asked.completion("q", "context")
        lose(fresh.home, kind)
        with pytest.raises(StoreError, match="lost"):
            await asked.completion("q", "context")
    assert statuses(fresh) == {"answered": 1, "failed": 1}
    assert fresh.closing()["reason"].endswith("lost")
    fresh.nothing_left()


async def test_a_query_whose_end_could_not_be_written_is_interrupted_by_the_next(
    provider: Provider, fresh: Airlock
) -> None:
    """A tenant is not locked out by queries that only seem to run."""
    async with AsyncRLM(**rlm(provider, fresh)) as asked:
        await asked.completion("q", "context")
        lose(fresh.home, "query.closed")
        for _ in range(3):
            with pytest.raises(StoreError, match="lost"):
                await asked.completion("q", "context")
        assert statuses(fresh) == {"answered": 1, "open": 1, "interrupted": 2}
        with closing(sqlite3.connect(fresh.home / "airlock.db")) as db:
            db.execute("DROP TRIGGER lose")
        assert (await asked.completion("q", "context")).response == "42"
        assert statuses(fresh) == {"answered": 2, "interrupted": 3}
    fresh.nothing_left()


def lose(home: Path, kind: str) -> None:
    """Have the database refuse records of this type."""
    body = f"""SELECT RAISE(ABORT, 'lost') WHERE instr(CAST(NEW.record AS TEXT), '"type":"{kind}"')"""
    with closing(sqlite3.connect(home / "airlock.db")) as db:
        db.execute(f"CREATE TRIGGER lose BEFORE INSERT ON records BEGIN {body}; END")


async def test_a_query_that_could_not_be_closed_is_not_forgotten_by_those_that_begin_at_once(
    provider: Provider, fresh: Airlock
) -> None:
    provider.answer = lambda _seen: Say("FINAL(42)")
    fresh.home.mkdir()
    choices = Choices(model="m", base_url=provider.url, api_key="k", prices={"m": (Decimal(1), Decimal(2))})
    async with open_platform(choices, fresh.home) as platform:
        unclosed = platform._machinery.unclosed  # pyright: ignore[reportPrivateUsage]
        context = platform.contexts.ingest_value("text")
        earlier, later = [(await platform.run("q", context)).query_id for _ in range(2)]
        unclosed.add(earlier)

        def observe(event: Event) -> None:  # another one's end gets lost just then
            if event.type == "query.opened" and later not in seen:
                seen.append(later)
                unclosed.add(later)

        seen: list[str] = []
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(partial(platform.run, "q", context, watch=Watch(event=observe)))
        assert unclosed == {later}
