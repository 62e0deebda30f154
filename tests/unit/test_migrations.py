"""What the migrations make is what the code expects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from orchestrator.core.errors import StoreError
from orchestrator.store import ledger, migrations
from orchestrator.store.postgres import PostgresServer
from orchestrator.store.schema import metadata, scopes
from orchestrator.store.sqlite import SQLiteFile
from tests.postgres import Postgres
from tests.unit.helpers import Store


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return ScriptDirectory.from_config(config)


def test_head_is_the_newest_revision():
    assert scripts().get_heads() == [migrations.HEAD]


def test_the_file_of_a_revision_begins_with_its_number():
    for revision in scripts().walk_revisions():
        assert Path(revision.path).name.startswith(f"{revision.revision}_")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A place for a database, of either kind, that holds nothing yet."""
    if request.param == "sqlite":
        yield Store(tmp_path)
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.fresh()
    yield Store(tmp_path, server.url(name), server)
    server.drop(name)


def test_the_schema_is_the_one_the_code_has(empty: Store):
    db = empty.open()
    differences = db.read(
        lambda tx: compare_metadata(MigrationContext.configure(tx, opts={"compare_type": True}), metadata)
    )
    assert differences == []
    for table in metadata.sorted_tables:  # what compare_metadata does not look at
        keys = db.read(lambda tx, name=table.name: sa.inspect(tx).get_pk_constraint(name)["constrained_columns"])
        assert keys == [column.name for column in table.primary_key]
        found = db.read(lambda tx, name=table.name: sa.inspect(tx).get_columns(name))
        defaults = {column["name"]: column["default"] is not None for column in found}
        assert defaults == {column.name: column.server_default is not None for column in table.columns}
    db.close()


def test_opening_again_changes_nothing(empty: Store):
    for _ in range(2):
        db = empty.open()
        versions = db.read(lambda tx: tx.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all())
        assert versions == [migrations.HEAD]
        db.close()


def test_a_database_from_the_future_is_refused(empty: Store):
    db = empty.open()
    db.write_sync(lambda tx: tx.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'"))
    db.close()
    with pytest.raises(StoreError, match="is not of this version of Airlock"):
        empty.open()


def test_money_and_holds_of_the_first_schema_come_along(empty: Store):
    place = SQLiteFile(empty.home) if empty.url is None else PostgresServer(empty.url)
    place.claim("me").close()
    migrations.upgrade(place.engine, "0001")
    with place.engine.begin() as tx:
        tx.exec_driver_sql("INSERT INTO scopes (id, spent, held) VALUES ('query:q', 5, 70)")
        for name, amount in (("q:root.c1:1", 30), ("q:last-word", 40)):
            values = f"'{name}', 'q', 'root', {amount}, 'open', '[\"query:q\"]'"
            columns = "id, query, node, amount, state, scopes"
            tx.exec_driver_sql(f"INSERT INTO reservations ({columns}) VALUES ({values})")  # noqa: S608  fixed text
    place.leave()
    db = empty.open()
    assert db.read(lambda tx: ledger.balance(tx, "query:q")) == (5, 70)
    names = [name for name, _node, _amount in db.read(lambda tx: ledger.open_reservations(tx, "q"))]
    assert [ledger.is_set_aside(name) for name in names] == [True, False]
    for name in names:
        db.write_sync(lambda tx, name=name: ledger.settle(tx, name, 10))
    assert db.read(lambda tx: ledger.balance(tx, "query:q")) == (25, 0)
    counted = db.read(lambda tx: tx.execute(sa.select(scopes)).mappings().one())
    counters = ("calls", "tokens", "tokens_held", "in_flight", "children")
    assert [counted[name] for name in counters] == [0] * 5
    db.close()
