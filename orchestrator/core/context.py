"""What the host knows of a context: its identity, shape and files, never its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ContextKind = Literal["text", "documents", "json", "jsonl"]


@dataclass(frozen=True, slots=True)
class Context:
    """One context in the store.

    id      SHA-256 (hex) of the manifest, which holds the SHA-256 of the data
    sha256  SHA-256 (hex) of the data; for a text, what `sha256sum` says of the file
    kind    text: one str. documents: a folder, list of {"path", "text"}. json: any value. jsonl: list of values
    bytes   size of the data, UTF-8
    chars   number of characters
    items   documents, lines (jsonl) or top-level items (json list), else None
    shape   further facts for the root LM, printable: e.g. lengths of the first documents
    files   name inside the slot folder -> path in the store; what attaching links
    """

    id: str
    sha256: str
    kind: ContextKind
    bytes: int
    chars: int
    items: int | None
    files: Mapping[str, Path]
    shape: Mapping[str, str] = field(default_factory=dict[str, str])

    def facts(self) -> dict[str, str | int]:
        """What a record of the journal says of it."""
        return {
            "id": self.id,
            "sha256": self.sha256,
            "kind": self.kind,
            "bytes": self.bytes,
            "chars": self.chars,
        }
