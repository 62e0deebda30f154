"""The application over a real store, with nothing that runs queries: for what needs none."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import limits.storage.memory
import limits.strategies
import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from orchestrator.auditing import Books
from orchestrator.core.events import Event
from orchestrator.server import access
from orchestrator.server.app import make_app
from orchestrator.server.service import Service
from orchestrator.settings import ServerSettings
from orchestrator.store import journal
from orchestrator.store.db import Database
from orchestrator.store.journal import QUEUED, QueryKey
from orchestrator.store.registry import Registry
from orchestrator.store.signing import Notary
from orchestrator.store.vault import open_vault
from tests.unit.helpers import DEFAULT, Everything, fill

QUESTION = "Who rang? " * 100
BODY = {
    "model": "m",
    "sub_models": ["sub"],
    "backend": "bubblewrap",
    "isolation": "namespace",
    "context": {"id": "0" * 64, "kind": "text", "bytes": 5, "chars": 5},
    "limit_usd": "1.00",
}
END = {"status": "answered", "reason": "", "duration_ms": 1500, "turns": 2, "sub_calls": 1}


@dataclass
class Small:
    """client: as if on https://airlock.example."""

    app: FastAPI
    service: Service
    client: TestClient

    @property
    def registry(self) -> Registry:
        return self.service.registry

    def key(self, tenant: str = "acme", *scopes: str) -> str:
        """A new key's text; the tenant is added when it is not there."""
        if self.registry.tenant(tenant) is None:
            self.registry.add_tenant(tenant, by="a test")
        asked: dict[str, Any] = {"scopes": scopes} if scopes else {}
        return self.registry.create_key(tenant, label=f"label {len(self.registry.keys(tenant))}", **asked, by="a test")[
            1
        ]

    def bearer(self, *scopes: str, tenant: str = "acme") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key(tenant, *scopes)}"}


@contextmanager
def small(
    home: Path, *routers: APIRouter, secure: bool = True, database: str | None = None, **settings: Any
) -> Generator[Small]:
    """routers: added to the service's own. database: a server's address, in place of a file in `home`."""
    fill(home)
    db = Database(home, database)
    try:
        vault = open_vault(db, home, None, journal.key_created)
        notary = Notary(vault.signer(), home / "heads", vault.stamp)
        platform: Any = SimpleNamespace(vault=vault, db=db, policy=DEFAULT, notary=notary)
        others: Any = SimpleNamespace()
        registry, books = Registry(db, vault, notary), Books(home, db, vault)
        more = (others, others, others, others)
        service = Service(home, ServerSettings(**settings), platform, books, registry, *more, secure)
        app = make_app(service)
        for router in routers:
            app.include_router(router)
        with TestClient(app, base_url="https://airlock.example") as client, _within_a_minute():
            yield Small(app, service, client)
    finally:
        db.close()


def add(service: Small, number: int, status: str, *, kept: bool = True, tenant: str = "acme") -> str:
    """A query with all its payloads; status: open, QUEUED, interrupted, or how it was closed."""
    vault, db = service.service.platform.vault, service.service.platform.db
    query = f"20261126-010203-{number:010x}"
    key = QueryKey(query, tenant, "0" * 64, vault.keeper(tenant, query, Everything()) if kept else None)

    def write(tx: journal.Connection) -> None:
        opened = Event("query.opened", "root", BODY, {"question": QUESTION, "policy": "{}", "schema": "{}"})
        journal.open_query(tx, key, "somebody", opened, status if status == QUEUED else "open")
        if status == "interrupted":
            journal.interrupt_query(tx, key, Event("query.interrupted", "root", {"why": "it was killed"}))
        elif status not in ("open", QUEUED):
            journal.close_query(tx, key, status, Event("query.closed", "root", END, {"answer": "It was Ann."}))

    db.write_sync(write)
    return query


@contextmanager
def _within_a_minute() -> Generator[None]:
    """What counts requests does so by the minutes of the clock: none ends while a test runs."""
    at = time.time() // 60 * 60 + 10
    clock = SimpleNamespace(time=lambda: at)
    with pytest.MonkeyPatch.context() as patch:
        for module in (limits.storage.memory, limits.strategies, access):
            patch.setattr(module, "time", clock)
        yield
