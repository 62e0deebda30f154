"""How a query is watched from the command line, and what its end is as an exit code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from orchestrator.console import PlainView

if TYPE_CHECKING:
    from orchestrator.live import LiveView

INTERRUPTED = 130
STATUS_EXIT = {"answered": 0, "limit": 3, "refused": 3, "cancelled": INTERRUPTED, "interrupted": INTERRUPTED}


def make_view() -> LiveView | PlainView:
    """A live one on a terminal, else plain lines."""
    if sys.stderr.isatty():
        from orchestrator.live import LiveView  # which is slow to load

        return LiveView()
    return PlainView()
