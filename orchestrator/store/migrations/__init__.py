"""The database's schema over time, as Alembic revisions in `versions/`."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

HEAD = "0002"  # the newest revision; a test holds it to the folder


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to HEAD. The caller keeps other processes out."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
