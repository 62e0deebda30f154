from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import open_repl


@pytest.fixture
async def repl(backend: Backend, home: Path):
    async with open_repl(backend, home) as opened:
        yield opened


@pytest.fixture(scope="session")
def store(home: Path) -> ContextStore:
    return ContextStore(home / "contexts")
