"""A database that another process holds for longer than anybody waits: nothing is sent, and later all is put right."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from orchestrator import AsyncRLM
from orchestrator.core.errors import StoreError
from orchestrator.store import sqlite
from tests.command import Airlock
from tests.fakes.provider import Provider, Say, Seen

pytestmark = pytest.mark.anyio


async def test_nothing_is_sent_while_the_database_is_locked(fresh: Airlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
    with Provider() as provider:
        options = {"model": "m", "base_url": provider.url, "api_key": "k", "prices": {"m": (1, 2)}, "home": fresh.home}
        async with AsyncRLM(**options) as asked:  # pyright: ignore[reportArgumentType]
            with closing(sqlite3.connect(fresh.home / "airlock.db", check_same_thread=False)) as other:

                def lock(_seen: Seen) -> Say:
                    other.execute("BEGIN IMMEDIATE")
                    return Say("```repl\nprint(llm_query('What?'))\n```")

                provider.answer = lock
                with pytest.raises(StoreError, match="ledger and journal cannot be used: database is locked"):
                    await asked.completion("q", "context")
                assert len(provider.requests) == 1
                with pytest.raises(StoreError, match="database is locked"):
                    await asked.completion("q", "context")
                assert len(provider.requests) == 1
                other.rollback()
            provider.answer = lambda _seen: Say("FINAL(42)")
            assert (await asked.completion("q", "context")).response == "42"
    assert sorted(fresh.rows("SELECT status FROM queries")) == [("answered",), ("interrupted",)]
    fresh.nothing_left()
