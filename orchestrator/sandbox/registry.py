"""Backends by name: imported when used, strongest last, `auto` for the strongest that this machine and policy allow."""

from __future__ import annotations

import importlib
from pathlib import Path

from orchestrator.core.errors import NotPermitted, RequestError, SandboxUnusable
from orchestrator.sandbox.base import Backend, Isolation

_CLASSES = {"bubblewrap": "orchestrator.sandbox.bubblewrap:Bubblewrap"}
NAMES = tuple(_CLASSES)


def make_backend(name: str, *, least: str, cache: Path, seccomp: Path) -> Backend:
    """The backend called `name`, or, for `auto`, the strongest there is.

    Raises RequestError for an unknown name, NotPermitted when the policy asks for more isolation than it gives,
    SandboxUnusable when it cannot be loaded. Weaker isolation than `least` is never picked.
    """
    if name != "auto" and name not in _CLASSES:
        raise RequestError(f"there is no backend {name!r}; there are {', '.join(NAMES)} and auto")
    chosen = NAMES[-1] if name == "auto" else name
    module, _, attribute = _CLASSES[chosen].partition(":")
    try:
        kind: type[Backend] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise SandboxUnusable(f"backend {chosen} cannot be loaded: {error}; run `make setup` again") from None
    if kind.isolation < Isolation[least]:
        raise NotPermitted(
            f"the policy asks for isolation of at least {least!r}, and backend {chosen} gives {kind.isolation.name!r}",
            limit=least,
            asked=kind.isolation.name,
        )
    return kind(cache, seccomp)  # pyright: ignore[reportCallIssue]  every backend's constructor takes these two
