"""Packs `orchestrator/guest` into the one file that runs inside every sandbox: `guest.pyz`."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import io
import marshal
import os
import tempfile
import zipfile
from functools import cache
from pathlib import Path

_MAIN = "from agent.supervisor import main\n\nmain()\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNCHECKED_HASH = (1).to_bytes(4, "little")  # PEP 552: a pyc that is never checked against its source


@cache
def _sources() -> dict[str, str]:
    package = importlib.resources.files("orchestrator") / "guest"
    texts = {
        f"agent/{entry.name}": entry.read_text(encoding="utf-8")
        for entry in package.iterdir()
        if entry.name.endswith(".py") and entry.name != "__main__.py"
    }
    return {"__main__.py": _MAIN, **texts}


def agent_version() -> str:
    """SHA-256 of the agent's sources. Not of the archive: marshal does not always write the same for the same code."""
    digest = hashlib.sha256()
    for name, source in sorted(_sources().items()):
        digest.update(f"{name} {len(source)}\n{source}".encode())
    return digest.hexdigest()


@cache
def agent_bytes() -> bytes:
    """The archive.

    Each module is there twice: as source for any Python from 3.9, and compiled for the Python that runs Airlock, which
    is most often the sandbox's too and then starts 20 ms sooner. zipimport takes the compiled one when it fits.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, source in sorted(_sources().items()):
            code = marshal.dumps(compile(source, f"/agent.pyz/{name}", "exec", dont_inherit=True))
            hashed = importlib.util.source_hash(source.encode())
            compiled = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + hashed + code
            archive.writestr(zipfile.ZipInfo(name + "c", _EPOCH), compiled)
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), source)
    return buffer.getvalue()


def agent_file(folder: Path) -> Path:
    """The archive as a file in `folder`, named by its hash; written once, readable by every user id."""
    data = agent_bytes()
    path = folder / f"guest-{hashlib.sha256(data).hexdigest()[:16]}.pyz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, 0o444)
        Path(temporary).rename(path)
    return path
