"""A policy by name or by path. Apart from `wiring`, as showing a policy needs nothing of what running a query does."""

from __future__ import annotations

from pathlib import Path

from orchestrator import settings
from orchestrator.core.errors import PolicyError
from orchestrator.core.policy import Policy
from orchestrator.core.policy_file import parse_policy
from orchestrator.files import Unreadable, read_text


def load_policy(name: str) -> Policy:
    """A policy by name (default, strict, development) or by path. Raises PolicyError."""
    shipped = settings.data_folder("policies") / f"{name}.yaml"
    path = shipped if name.isalnum() and shipped.exists() else Path(name)
    try:
        text = read_text(path)
    except Unreadable as why:
        names = ", ".join(sorted(found.stem for found in shipped.parent.glob("*.yaml")))
        raise PolicyError(f"cannot read policy {name!r} ({why}): give a file, or one of {names}") from None
    return parse_policy(text, path.name)
