"""What a cell asked for, as one hash: by it a replay finds what came of the same call before. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fingerprint(op: str, prompt: str, model: str | None, context: Iterable[str] = ()) -> str:
    """SHA-256 (hex). model: as the cell named it. context: of a child query, in any pieces; none for its parent's."""
    whole = hashlib.sha256()
    for part in (op, prompt, model or ""):
        data = part.encode("utf-8", "replace")
        whole.update(b"%d:" % len(data) + data)
    for piece in context:
        whole.update(piece.encode("utf-8", "replace"))
    return whole.hexdigest()


def digest(prompt: str) -> bytes:
    """What the answer to equal prompts is kept by: prompts are large, and there are many."""
    return hashlib.sha256(prompt.encode("utf-8", "replace")).digest()
