"""The command line as a person uses it, on the machine that the tests run on; some of it takes root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.store.db import Database
from tests.command import Airlock, copy_home
from tests.sandboxes import SECCOMP, open_repl
from tests.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    with Warm() as process:
        yield process


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with its database made and its agent packed, to be copied: the first start is paid for once."""
    assert os.geteuid() == 0, "these tests take root, as `make test` has it in CI"
    folder = tmp_path_factory.mktemp("seed")
    home = folder / "home"
    Database(home).close()

    async def start_one() -> None:
        async with open_repl(Bubblewrap(home / "cache", SECCOMP), home) as repl:
            await repl.run("1")

    anyio.run(start_one)
    return home


@pytest.fixture
def airlock(seed: Path, warm: Warm, tmp_path: Path) -> Iterator[Airlock]:
    """The command with a data folder of its own; after every test nothing of a query is left anywhere."""
    command = Airlock(copy_home(seed, tmp_path / "home"), tmp_path, warm)
    command.file("context.txt", "one\ntwo\nthe magic number is 4711\n")
    yield command
    command.nothing_left()
