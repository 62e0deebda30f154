from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from tests.sandboxes import open_repl
from tests.security.attacks import Weak


@pytest.fixture
async def repl(backend: Backend, home: Path):
    async with open_repl(backend, home) as opened:
        yield opened


@pytest.fixture
def weak(home: Path, monkeypatch: pytest.MonkeyPatch) -> Weak:
    return Weak(home, monkeypatch)
