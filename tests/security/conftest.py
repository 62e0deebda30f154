from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.registry import make_backend
from tests.sandboxes import BACKENDS, open_repl
from tests.security.frame import Stages

# A program that ends well when it is root's: geteuid, exit(it is not 0). Linked to nothing, so it runs anywhere.
_CODE = bytes.fromhex("b86b0000000f0531ff85c0400f95c7b83c0000000f05")
_ELF = (
    bytes.fromhex("7f454c4602010100000000000000000002003e0001000000780040000000000040000000000000000000000000000000")
    + bytes.fromhex("00000000400038000100000000000000")
    + bytes.fromhex("010000000500000000000000000000000000400000000000000040000000000000010000000000000001000000000000")
    + bytes.fromhex("0010000000000000")
)


@pytest.fixture(scope="module")
def yard() -> Iterator[Path]:
    """A folder of the host's that every user can reach, with a secret, a set-uid program and a place to write."""
    folder = Path(tempfile.mkdtemp(prefix="airlock-yard-", dir="/var/tmp"))  # a sandbox has a /tmp of its own
    try:
        folder.chmod(0o755)
        (folder / "secret").write_text("secret of the host")
        (folder / "program").write_bytes(_ELF + _CODE)
        (folder / "program").chmod(0o4755)
        (folder / "shared").mkdir()
        (folder / "shared").chmod(0o1777)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def stages(home: Path, yard: Path, image: str) -> AsyncGenerator[Stages]:
    """Of every backend: what cannot succeed on one is shown to work on another."""
    backends = {name: make_backend(name, least="namespace", home=home) for name in BACKENDS}
    stages = Stages(backends, home, yard)
    try:
        yield stages
    finally:
        await stages.aclose()
        for backend in backends.values():
            backend.close()


@pytest.fixture
async def repl(backend: Backend, home: Path):
    async with open_repl(backend, home) as opened:
        yield opened
