"""What a request costs by how it ended. ARCHITECTURE.md has the same table, and a test compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from orchestrator.core.errors import ProviderBusy, ProviderRefused
from orchestrator.lm.base import Reply

Outcome = Literal["answered", "void", "unknown"]  # what the journal calls it
Charge = Literal["its price, never more than the bound", "the bound", "nothing"]


class Settlement(NamedTuple):
    outcome: Outcome
    charge: Charge


SETTLEMENTS: Mapping[str, Settlement] = {
    "answered, usage reported": Settlement("answered", "its price, never more than the bound"),
    "answered, no usage reported that can be true; cut at the cap": Settlement("answered", "the bound"),
    "refused (401, 404, 400 ...)": Settlement("void", "nothing"),
    "busy or failing (429, 5xx), never connected": Settlement("void", "nothing"),
    "timed out, cut off, cancelled, a fault of our own": Settlement("unknown", "the bound"),
}


def settlement(reply: Reply | None, error: BaseException | None) -> Settlement:
    """How the request ended that brought `reply`, or that raised `error`."""
    if reply is not None:
        how = "answered, usage reported"
        if reply.usage is None:
            how = "answered, no usage reported that can be true; cut at the cap"
    elif isinstance(error, ProviderRefused):
        how = "refused (401, 404, 400 ...)"
    elif isinstance(error, ProviderBusy):
        how = "busy or failing (429, 5xx), never connected"
    else:
        how = "timed out, cut off, cancelled, a fault of our own"
    return SETTLEMENTS[how]


def charged(settled: Settlement, bound: int, price: int | None) -> int:
    """nano-USD. price: of the usage that was reported, if any was."""
    if settled.charge == "nothing":
        return 0
    if settled.charge == "the bound" or price is None:
        return bound
    return min(price, bound)
