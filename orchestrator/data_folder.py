"""What is in a data folder, for whoever opens it: its configuration, its database, and the keys to that."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from orchestrator import settings
from orchestrator.core.errors import RequestError
from orchestrator.store import journal
from orchestrator.store.db import Database
from orchestrator.store.vault import Vault, open_vault


def load_config(home: Path) -> settings.Config:
    try:
        return settings.load_config(home)
    except ValueError as error:
        raise RequestError(str(error)) from None


def open_database(home: Path) -> Database:
    """Ledger and journal, where the configuration says that they are. Raises RequestError, StoreError."""
    return Database(home, database_address(home))


def open_keys(db: Database, home: Path, secrets: Iterable[str] = ()) -> Vault:
    """The keys of this database; secrets: what no payload may hold. Raises RequestError, StoreError."""
    given = settings.master_key()
    return open_vault(db, home, given.get_secret_value() if given else None, journal.key_created, secrets)


def database_address(home: Path) -> str | None:
    try:
        return settings.database(load_config(home))
    except ValueError as error:
        raise RequestError(str(error)) from None
