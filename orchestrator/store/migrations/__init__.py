"""The database's schema over time, as Alembic revisions in `versions/`."""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy as sa

HEAD = "0004"  # the newest revision; a test holds it to the folder


_one_at_a_time = threading.Lock()  # Alembic's context is the process's


def upgrade(engine: sa.Engine, revision: str = HEAD) -> None:
    """Bring the database to this revision. The caller keeps other processes out."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with _one_at_a_time, engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
