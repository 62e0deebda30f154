"""Fixtures that every folder of tests shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.bubblewrap import Bubblewrap
from tests.sandboxes import SECCOMP


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for all tests: the agent is packed and the filter compiled once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session", params=["bubblewrap"])
def backend(request: pytest.FixtureRequest, home: Path) -> Backend:
    """Every backend there is; a new one joins with its name and a line here."""
    return {"bubblewrap": lambda: Bubblewrap(home / "cache", SECCOMP)}[request.param]()
