"""Figures of the service under load: 10 tenants, 100 queries at once, what others wait meanwhile, memory, a kill.

The scripted model answers at once, so all that takes time is ours, and the machine is as busy as it can be.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio

from tests.benchmarks.figures import Figure, at_most, ms, percentile
from tests.command import Airlock, until
from tests.load import ENDED, SCRIPT, Load, ask_all, crowd, memory_mb, money, price
from tests.service import Served, ask, served

TENANTS, QUERIES = 10, 100
SLOWEST_S, GROWTH_MB = 0.1, 32.0
CONFIG = "[server]\nrequests_minute = 1000000\n"


def service(home: Path, quick: bool) -> list[Figure]:
    return [
        *crowds(home / "service", 400 if quick else 1000),
        killed(home / "killed"),
        verified(home / "verified"),
    ]


@contextmanager
def running(airlock: Airlock, script: str = SCRIPT) -> Iterator[Served]:
    with served(airlock, *price(airlock), script=script, config=CONFIG) as server:
        yield server


def made(folder: Path) -> Airlock:
    folder.mkdir(exist_ok=True)
    return Airlock(folder / "home", folder)


def crowds(folder: Path, most: int) -> list[Figure]:
    """Waves of 100; the figures of a wave are of the first one after the service is warm."""
    airlock, memory, waves = made(folder), dict[int, float](), list[Load]()
    with running(airlock) as server:
        for asked in range(QUERIES, most + 1, QUERIES):
            waves.append(anyio.run(partial(crowd, server, TENANTS, QUERIES)))
            memory[asked] = memory_mb(server)
    wrong = [text for wave in waves for text in wave.wrong]
    assert not wrong, wrong[0]
    spent, cost, _each = money(airlock)
    assert spent == cost, (spent, cost)
    airlock.nothing_left()
    times = [wave.seconds for wave in waves[1:]]
    looks = [look for wave in waves[1:] for look in wave.looks]
    slowest = percentile(looks, 99)
    early, late = memory[2 * QUERIES], memory[most]
    return [
        Figure(
            f"{QUERIES} queries of {TENANTS} tenants over HTTP",
            f"all right; {percentile(times, 50):.1f} s, {ms(percentile(times, 50) / QUERIES)} each",
        ),
        Figure(
            "GET of a query meanwhile",
            f"p50 {ms(percentile(looks, 50))}, p99 {ms(slowest)}",
            f"{len(looks):,} looks",
            None,
            f"p99 <= {ms(SLOWEST_S)}",
            slowest <= SLOWEST_S,
        ),
        Figure(
            f"memory of the service after {most:,} queries",
            f"{late:.0f} MB",
            f"after {2 * QUERIES}: {early:.0f} MB",
            late / early,
            f"<= {GROWTH_MB:.0f} MB more",
            late - early <= GROWTH_MB,
        ),
    ]


def killed(folder: Path) -> Figure:
    """SIGKILL with all of them under way, and another service: each query ends, and is paid for once."""
    airlock = made(folder)
    with running(airlock, f"{SCRIPT}delay_s: 0.3\n") as server:
        asked = anyio.run(partial(ask_all, server, TENANTS, QUERIES))
        until(lambda: len(ended(airlock)) >= QUERIES // 4, 120)
        before = len(ended(airlock))
        server.stop(signal.SIGKILL)
    open_ = len(airlock.rows("SELECT id FROM queries WHERE status = 'open'"))
    begun = time.monotonic()
    with running(airlock) as server:
        until(lambda: len(ended(airlock)) == QUERIES, 300)
    seconds = time.monotonic() - begun
    how = [status for _query, status in airlock.rows("SELECT id, status FROM queries")]
    assert len(how) == len(asked) == QUERIES
    assert set(how) <= {"answered", "cancelled"}, how
    spent, cost, _each = money(airlock)
    assert spent == cost, (spent, cost)
    airlock.nothing_left()  # the journal verifies
    measured = f"{how.count('answered')} answered, {how.count('cancelled')} cancelled, in {seconds:.0f} s"
    beside = f"{before} had ended, {open_} ran"
    return Figure(f"{QUERIES} queries, killed in the middle", measured, beside, None, "money exact", ok=True)


def verified(folder: Path) -> Figure:
    """The journal's verdict on a query of a thousand sub-calls and more records, as the page of a query asks for it."""
    airlock = made(folder)
    asked = "llm_query_batched(['the number is 1'] * 1000)[0]"
    many = SCRIPT.replace('llm_query("Which number is it? " + context)', asked)
    with running(airlock, many) as server, server.client() as client:
        query = ask(client, wait=60)
        assert query["status"] == "answered", query
        taken: list[float] = []
        for _ in range(5):
            begun = time.perf_counter()
            assert client.get(f"/v1/audit/queries/{query['id']}/verify").json()["whole"]
            taken.append(time.perf_counter() - begun)
    records = len(airlock.records(query["id"]))
    return at_most(f"the verdict on {records:,} records over HTTP", taken, 0.0002 * records)


def ended(airlock: Airlock) -> list[str]:
    return [query for query, how in airlock.rows("SELECT id, status FROM queries") if how in ENDED]
