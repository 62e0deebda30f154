"""A folder as a service takes it: a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

Encoding = Literal["utf-8", "latin-1", "replace"]


@contextmanager
def as_lines(folder: Path, encoding: Encoding) -> Generator[Path]:
    """The folder's documents as a file of JSON lines, as the context store reads a folder."""
    from orchestrator.store.contexts import ContextStore

    with TemporaryDirectory(prefix="airlock-") as name:
        context = ContextStore(Path(name)).ingest(folder, encoding=encoding)
        lines = Path(name) / "lines"
        _write_lines(context.files["data"], context.files["manifest.json"], lines)
        yield lines


def _write_lines(data: Path, manifest: Path, out: Path) -> None:
    with data.open("rb") as texts, out.open("w") as lines:
        for path, _offset, size, *_ in json.loads(manifest.read_bytes())["documents"]:
            lines.write(json.dumps({"path": path, "text": texts.read(size).decode()}) + "\n")
