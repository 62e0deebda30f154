from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.registry import make_backend
from tests.sandboxes import open_repl
from tests.security.attacks import Weak


@pytest.fixture(scope="session", params=["bubblewrap"])
def backend(request: pytest.FixtureRequest, home: Path) -> Backend:
    """The attacks are written against this one; what containers hold is asserted by tests of their own so far."""
    return make_backend(request.param, least="namespace", home=home)


@pytest.fixture
async def repl(backend: Backend, home: Path):
    async with open_repl(backend, home) as opened:
        yield opened


@pytest.fixture
def weak(home: Path, monkeypatch: pytest.MonkeyPatch) -> Weak:
    return Weak(home, monkeypatch)
