"""The service when its database is away: nothing is taken on, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest

from tests.command import Airlock, until
from tests.postgres import Postgres
from tests.service import SCRIPT, ask, served

BODY = {"question": "q", "context": {"text": "a"}}


@pytest.fixture
def server() -> Iterator[Postgres]:
    """One of its own, to be stopped."""
    with Postgres() as made:
        yield made


def test_a_file_that_is_away_is_503_until_it_is_back(airlock: Airlock):
    with served(airlock) as service, service.client() as client:
        ask(client)
        away = [(path, path.with_name(f"away-{path.name}")) for path in airlock.home.glob("airlock.db*")]
        for path, other in away:
            path.rename(other)
        refused = client.post("/v1/queries", json=BODY)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert str(airlock.home) not in refused.text
        for path, other in away:
            path.unlink(missing_ok=True)
            other.rename(path)
        assert ask(client)["status"] == "answered"


def test_a_server_that_went_away_ends_the_service_and_the_next_one_goes_on(airlock: Airlock, server: Postgres):
    there = replace(airlock, env={"AIRLOCK_DATABASE": server.url(server.fresh())})
    slow = SCRIPT + "delay_s: 2\n"
    with served(there, script=slow, config="[server]\ndrain_s = 0\n") as service, service.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        server.stop()
        assert service.process.wait(60) == 4
        assert "broke" in service.log.read_text()
    server.start()
    with served(there) as service, service.client() as client:
        ended = until(lambda: (got := client.get(f"/v1/queries/{query}").json())["journal_head"] and got)
        assert ended["answer"] == "it is short"
    with psycopg.connect(there.env["AIRLOCK_DATABASE"]) as connection:
        assert connection.execute("SELECT id FROM scopes WHERE held <> 0 OR in_flight <> 0").fetchall() == []
