"""The service under load, small; `make bench` has the full figures."""

from __future__ import annotations

import signal
from decimal import Decimal
from pathlib import Path

import anyio
import pytest

from tests.benchmarks.figures import percentile
from tests.command import Airlock, until
from tests.load import ENDED, SCRIPT, ask_all, crowd, memory_mb, money, price
from tests.service import served

TENANTS, QUERIES = 10, 40
SLOWEST_S, GROWTH_MB = 1.0, 16  # others may be at work on this machine; the figures are held to 100 ms


@pytest.fixture
def airlock(tmp_path: Path):
    command = Airlock(tmp_path / "home", tmp_path)
    yield command
    command.nothing_left()


def test_queries_of_many_tenants_at_once_all_end_right(airlock: Airlock):
    with served(airlock, *price(airlock), script=SCRIPT) as server:
        first = anyio.run(crowd, server, TENANTS, QUERIES)
        before = memory_mb(server)
        second = anyio.run(crowd, server, TENANTS, QUERIES)
        after = memory_mb(server)
    assert first.wrong + second.wrong == []
    assert len(first.ends | second.ends) == 2 * QUERIES
    assert percentile([*first.looks, *second.looks], 99) < SLOWEST_S
    assert after - before < GROWTH_MB
    spent, cost, each = money(airlock)
    assert spent == cost > 0
    shown = {query: Decimal(found["cost_usd"]) for query, found in (first.ends | second.ends).items()}
    assert shown == each


def test_a_service_that_is_killed_under_load_loses_nothing(airlock: Airlock):
    """Every query is seen to its end by the next one, and paid for once."""
    slow = f"{SCRIPT}delay_s: 0.3\n"
    with served(airlock, *price(airlock), script=slow) as server:
        queries = anyio.run(ask_all, server, TENANTS, QUERIES)
        until(lambda: len(ended(airlock)) >= QUERIES // 4, 60)
        assert len(ended(airlock)) < QUERIES, "there was nothing to be lost"
        server.stop(signal.SIGKILL)
    assert airlock.rows("SELECT id FROM queries WHERE status='open'"), "none was running"
    with served(airlock, *price(airlock), script=SCRIPT) as server:
        until(lambda: len(ended(airlock)) == QUERIES, 90)
        for query, (tenant, number) in queries.items():
            with server.client(tenant) as client:
                found = client.get(f"/v1/queries/{query}").json()
            if found["status"] != "answered":
                assert (found["status"], bool(found["reason"])) == ("cancelled", True), found
            else:
                assert found["answer"] == number
    spent, cost, each = money(airlock)
    assert spent == cost == sum(each.values())
    assert {row[0] for row in airlock.rows("SELECT id FROM queries")} == set(queries)


def ended(airlock: Airlock) -> list[str]:
    rows = airlock.rows("SELECT id, status FROM queries")
    return [query for query, status in rows if status in ENDED]
