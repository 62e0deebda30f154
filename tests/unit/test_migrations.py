"""What the migrations make is what the code expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from orchestrator.core.errors import StoreError
from orchestrator.store import migrations
from orchestrator.store.db import Database
from orchestrator.store.schema import metadata


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return ScriptDirectory.from_config(config)


def test_head_is_the_newest_revision():
    assert scripts().get_heads() == [migrations.HEAD]


def test_the_file_of_a_revision_begins_with_its_number():
    for revision in scripts().walk_revisions():
        assert Path(revision.path).name.startswith(f"{revision.revision}_")


def test_the_schema_is_the_one_the_code_has(tmp_path: Path):
    db = Database(tmp_path)
    differences = db.read(
        lambda tx: compare_metadata(MigrationContext.configure(tx, opts={"compare_type": True}), metadata)
    )
    assert differences == []
    for table in metadata.sorted_tables:  # what compare_metadata does not look at
        keys = db.read(lambda tx, name=table.name: sa.inspect(tx).get_pk_constraint(name)["constrained_columns"])
        assert keys == [column.name for column in table.primary_key]
    db.close()


def test_opening_again_changes_nothing(tmp_path: Path):
    for _ in range(2):
        db = Database(tmp_path)
        versions = db.read(lambda tx: tx.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all())
        assert versions == [migrations.HEAD]
        db.close()


def test_a_database_from_the_future_is_refused(tmp_path: Path):
    db = Database(tmp_path)
    db.write_sync(lambda tx: tx.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'"))
    db.close()
    with pytest.raises(StoreError, match="is not of this version of Airlock"):
        Database(tmp_path)
