"""The command with its ledger and journal on PostgreSQL, and what becomes of a query whose database goes away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from orchestrator.core.events import chain_fault
from tests.command import Airlock, until
from tests.fakes.provider import Provider, Say, Seen
from tests.postgres import Postgres

PRICED = ("--price", "mine=1,2")
CALL = Say("```repl\nprint(llm_query('What?'))\n```")


@pytest.fixture
def server() -> Iterator[Postgres]:
    """One of its own, to be stopped."""
    with Postgres() as made:
        yield made


@pytest.fixture
def there(airlock: Airlock, server: Postgres) -> Airlock:
    return replace(airlock, env={"AIRLOCK_DATABASE": server.url(server.fresh())})


def ask(airlock: Airlock, provider: Provider) -> list[object]:
    context = airlock.file("context.txt", "one\ntwo\n")
    return ["run", "What?", "--context", context, "--model", "mine", "--base-url", provider.url, *PRICED]


def rows(airlock: Airlock, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(airlock.env["AIRLOCK_DATABASE"]) as connection:
        return connection.execute(query.encode()).fetchall()


def charged(airlock: Airlock) -> None:
    """All chains are whole and closed, or interrupted, nothing is held, and what a call cost is in every purse."""
    assert rows(airlock, "SELECT id FROM queries WHERE status = 'open'") == []
    assert rows(airlock, "SELECT id FROM scopes WHERE held <> 0 OR in_flight <> 0") == []
    for (query,) in rows(airlock, "SELECT id FROM queries"):
        links = rows(airlock, f"SELECT record, hash FROM records WHERE query = '{query}' ORDER BY seq")  # noqa: S608
        assert chain_fault([(record, digest) for record, digest in links]) is None
        assert json.loads(links[-1][0])["type"] in ("query.closed", "query.interrupted")


def test_a_query_and_its_record_are_on_the_server(there: Airlock) -> None:
    with Provider(root=[CALL, Say("FINAL(42)")], sub=[Say("yes")]) as provider:
        assert there(*ask(there, provider), code=0).out == "42\n"
    charged(there)
    shown = there("audit", "show", "last", code=0)
    assert "llm_query" in shown.out
    assert there.rows("SELECT id FROM queries") == []  # nothing went to the file of before
    assert rows(there, "SELECT count(*) FROM queries") == [(1,)]


@pytest.mark.parametrize("moment", ["root", "sub"])
def test_the_server_stops_in_mid_query(there: Airlock, server: Postgres, moment: str) -> None:
    """Nothing is sent any more; whoever comes next charges what may have been billed, and closes the query."""

    def stop(seen: Seen) -> str:
        if seen.role == moment:
            server.stop()
        return "```repl\nprint(llm_query('What?'))\n```" if seen.role == "root" else "yes"

    with Provider(root=[Say(stop)], sub=[Say(stop)]) as provider:
        done = there(*ask(there, provider), code=4)
        assert [seen.role for seen in provider.requests] == (["root"] if moment == "root" else ["root", "sub"])
        assert done.out == ""
        assert "database" in done.said or "ledger and journal cannot be used" in done.said
        server.start()
        assert rows(there, "SELECT status FROM queries") == [("open",)]
        ((held,),) = rows(there, "SELECT held FROM scopes WHERE id LIKE 'tenant-day:%'")
        assert held > 0
        provider.behaviours = {"root": [Say("FINAL(42)")], "sub": []}
        assert there(*ask(there, provider), code=0).out == "42\n"
        charged(there)
        assert sorted(rows(there, "SELECT status FROM queries")) == [("answered",), ("interrupted",)]
        results = "SELECT record FROM records ORDER BY query, seq"
        bodies = [json.loads(record)["body"] for (record,) in rows(there, results) if b'"call.result"' in record]
        unknown = [body for body in bodies if body["outcome"] == "unknown"]
        assert len(unknown) == 1
        assert Decimal(unknown[0]["cost_usd"]) > 0
        ((query,),) = rows(there, "SELECT id FROM queries WHERE status = 'interrupted'")
        provider.behaviours = {"root": [Say("FINAL(43)")], "sub": [Say("yes")]}
        before = len(provider.requests)
        done = there("run", "--resume", query, "--base-url", provider.url, *PRICED, code=0)
        asked = [seen.role for seen in provider.requests[before:]]
    assert done.out == "43\n"
    assert asked == (["root"] if moment == "root" else ["sub", "root"])
    charged(there)


def test_a_server_that_is_not_there(airlock: Airlock) -> None:
    url = "postgresql://me:secret@127.0.0.1:1/airlock"
    with Provider() as provider:
        done = replace(airlock, env={"AIRLOCK_DATABASE": url})(*ask(airlock, provider), code=4)
        assert provider.requests == []
    assert "the database server on 127.0.0.1 cannot be reached" in done.said
    assert "secret" not in done.err
    (airlock.home / "airlock.toml").write_text('database = "mysql://me:secret@h/x"')
    done = airlock("audit", "show", "last", code=2)
    assert "is not postgresql://USER:PASSWORD@HOST/NAME" in done.said
    assert "secret" not in done.err


def test_the_file_is_removed_in_mid_query(airlock: Airlock) -> None:
    """SQLite would write on, and the next query would find all money unspent."""
    database, aside = airlock.home / "airlock.db", airlock.folder / "aside"

    def remove(_seen: Seen) -> str:
        database.rename(aside)
        return "```repl\nprint(llm_query('What?'))\n```"

    with Provider(root=[Say(remove)]) as provider:
        done = airlock(*ask(airlock, provider), code=4)
        assert len(provider.requests) == 1
        assert f"the database {database} was removed or replaced: put it back, then start again" in done.said
        aside.rename(database)
        provider.behaviours["root"] = [Say("FINAL(42)")]
        assert airlock(*ask(airlock, provider), code=0).out == "42\n"
    until(lambda: sorted(airlock.rows("SELECT status FROM queries")) == [("answered",), ("interrupted",)])
