"""A query's writes: what is posted is kept in order, and never lost in silence."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.store.db import Database
from orchestrator.store.schema import scopes
from orchestrator.store.writer import Writer
from tests.unit.helpers import Store

pytestmark = pytest.mark.anyio


def put(name: str) -> Any:
    return lambda tx: tx.execute(sa.insert(scopes), {"id": name}).rowcount


def names(tx: Any) -> list[str]:
    return list(tx.execute(sa.select(scopes.c.id).order_by(scopes.c.id)).scalars())


def fail(_tx: Any) -> None:
    raise StoreError("the post failed")


async def test_what_was_posted_comes_before_what_is_written(db: Database):
    writer = Writer(db)
    writer.post(put("a"))
    writer.post(put("b"))
    assert await writer.write(lambda tx: (put("c")(tx), names(tx))[1]) == ["a", "b", "c"]


async def test_a_read_has_what_was_posted(db: Database):
    for number in range(50):
        Writer(db).post(put(f"{number:02}"))
        assert len(db.read(names)) == number + 1


async def test_what_was_posted_is_there_after_the_database_is_closed(db: Database, store: Store):
    writer = Writer(db)
    for name in "abc":
        writer.post(put(name))
    db.close()
    other = store.open()
    assert other.read(names) == ["a", "b", "c"]
    other.close()
    with pytest.raises(StoreError, match="closed"):
        writer.post(put("d"))


async def test_the_next_write_raises_what_a_post_raised_and_only_that_one_does(db: Database):
    writer, other = Writer(db), Writer(db)
    writer.post(fail)
    writer.post(put("a"))
    await other.write(put("b"))  # another query has no part in it
    with pytest.raises(StoreError, match="the post failed"):
        await writer.write(put("c"))
    await writer.write(put("d"))
    assert db.read(names) == ["a", "b", "c", "d"]


async def test_a_lost_post_is_told_even_when_the_write_fails_too(db: Database):
    writer = Writer(db)
    writer.post(fail)

    def refuse(_tx: Any) -> None:
        raise KeyError("no room")

    with pytest.raises(StoreError, match="the post failed"):
        await writer.write(refuse)
