"""Tenants that share one Airlock: sandboxes, LM requests and the platform's money, on real sandboxes."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal

import anyio
import pytest

from orchestrator.choices import Choices
from orchestrator.core.errors import RequestError
from orchestrator.wiring import Platform, open_platform
from tests.command import Airlock
from tests.fakes.provider import Behaviour, Provider, Say, Seen

pytestmark = pytest.mark.anyio
PRICE = (Decimal(1), Decimal(2))


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


@asynccontextmanager
async def opened(fresh: Airlock, provider: Provider, settings: str, **changes: str) -> AsyncIterator[Platform]:
    fresh.home.mkdir()
    (fresh.home / "airlock.toml").write_text(settings)
    choices = Choices(
        model="fake",
        base_url=provider.url,
        api_key="key",
        prices={"fake": PRICE},
        backend="bubblewrap",
        policy=str(fresh.policy("development", **changes)),
    )
    async with open_platform(choices, fresh.home) as platform:
        yield platform
    fresh.nothing_left()


async def test_what_was_there_before_is_not_collected_over_and_over(fresh: Airlock, provider: Provider) -> None:
    """And is again when the platform is closed: it may be part of a larger program."""
    before = gc.get_freeze_count()
    async with opened(fresh, provider, ""):
        assert gc.get_freeze_count() > before + 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a\nb", "x" * 65])
async def test_a_tenant_of_no_name_is_refused_before_anything_is_done(
    fresh: Airlock, provider: Provider, name: str
) -> None:
    async with opened(fresh, provider, "") as platform:
        context = platform.contexts.ingest_value("text")
        for run in (platform.run("What?", context, tenant=name), platform.resume("20261125", tenant=name)):
            with pytest.raises(RequestError, match="is no name for a tenant: take 1 to 64 letters") as caught:
                await run
            assert "\n" not in str(caught.value)
    assert not fresh.rows("SELECT id FROM keys WHERE id != 'signer'")
    assert not fresh.rows("SELECT id FROM queries")


async def test_who_queues_many_queries_does_not_keep_others_from_a_sandbox(fresh: Airlock, provider: Provider) -> None:
    provider.answer = lambda _seen: Say("FINAL(done)")
    ended: list[str] = []
    third = anyio.Event()
    async with opened(fresh, provider, "[platform]\nsandboxes = 2\n") as platform:
        context = platform.contexts.ingest_value("text")

        async def one(tenant: str) -> None:
            closed = await platform.run("What?", context, tenant=tenant)
            assert closed.outcome.status == "answered", closed
            ended.append(tenant)
            if len(ended) == 3:
                third.set()

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(one, "greedy")
            await third.wait()
            before = len(ended)
            await one("quiet")
            # Two may have been under way, and the two places were given in turns from then on.
            assert ended.index("quiet") - before <= 4, ended
    assert len(ended) == 21


async def test_a_parent_does_not_hold_the_place_that_its_child_waits_for(fresh: Airlock, provider: Provider) -> None:
    def answer(seen: Seen) -> Behaviour:
        asked = str(seen.body["messages"][1]["content"]).split("\n")[0]
        deeper = {"Question: a": "b", "Question: b": "c"}.get(asked)
        if deeper is None or len(seen.body["messages"]) > 2:
            return Say("FINAL(the end)")
        return Say(f"```repl\nFINAL(rlm_query({deeper!r}, 'text'))\n```")

    provider.answer = answer
    ended: list[str | None] = []
    async with opened(fresh, provider, "[platform]\nsandboxes = 1\nin_flight = 1\n") as platform:
        context = platform.contexts.ingest_value("text")

        async def one() -> None:
            ended.append((await platform.run("a", context)).outcome.answer)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(one)
    assert ended == ["the end"] * 3


async def test_the_platforms_month_bounds_all_tenants_together(fresh: Airlock, provider: Provider) -> None:
    provider.answer = lambda seen: Say("FINAL(done)", usage="most")
    async with opened(fresh, provider, '[platform]\nmonth_usd = "0.05"\n', models_output_tokens="1000") as platform:
        context = platform.contexts.ingest_value("text")
        ends = [await platform.run("What?", context, tenant=f"tenant-{number}") for number in range(12)]
    status = [end.outcome.status for end in ends]
    assert status[0] == "answered"
    assert status[-1] == "refused"
    assert "the platform budget of 0.05 USD" in ends[-1].outcome.reason
    spent = sum(end.cost for end in ends)
    assert spent <= 50_000_000
    assert fresh.rows("SELECT spent, held FROM scopes WHERE id LIKE 'platform:%'") == [(spent, 0)]
