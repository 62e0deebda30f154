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
from orchestrator.server import access
from orchestrator.server.app import make_app
from orchestrator.server.service import Service
from orchestrator.settings import ServerSettings
from orchestrator.store import journal
from orchestrator.store.db import Database
from orchestrator.store.registry import Registry
from orchestrator.store.signing import Notary
from orchestrator.store.vault import open_vault
from tests.unit.helpers import DEFAULT, fill


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
def small(home: Path, *routers: APIRouter, secure: bool = True, **settings: Any) -> Generator[Small]:
    """routers: added to the service's own."""
    fill(home)
    db = Database(home)
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


@contextmanager
def _within_a_minute() -> Generator[None]:
    """What counts requests does so by the minutes of the clock: none ends while a test runs."""
    at = time.time() // 60 * 60 + 10
    clock = SimpleNamespace(time=lambda: at)
    with pytest.MonkeyPatch.context() as patch:
        for module in (limits.storage.memory, limits.strategies, access):
            patch.setattr(module, "time", clock)
        yield
