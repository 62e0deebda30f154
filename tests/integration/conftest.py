"""Several parts together, in this process, on a real sandbox and a real store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import Airlock


@pytest.fixture
def fresh(tmp_path: Path) -> Airlock:
    """A data folder of its own, and the look from outside at what is left in it."""
    return Airlock(tmp_path / "home", tmp_path)
