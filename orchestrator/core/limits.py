"""What a request may say of its limits: checked here for the command line and for `RLM(...)` alike.

Every function raises ValueError with what is wrong, to stand behind the name of the option. Whether the policy grants
as much is not looked at: the effective policy is the stricter of the two.
"""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal, InvalidOperation

from orchestrator.core.units import nano

MOST_USD = 1_000_000_000
LEAST_S, MOST_S = 0.001, 1_000_000
_MOST = 2**53 - 1  # the largest integer of canonical JSON


def budget(value: object) -> int:
    """USD, as a number or as text -> nano-USD. Zero is a budget: models on this machine cost nothing."""
    amount = Decimal(-1)
    if isinstance(value, int | float | str | Decimal) and not isinstance(value, bool):
        with suppress(InvalidOperation):
            amount = Decimal(str(value))
    if not amount.is_finite() or not 0 <= amount <= MOST_USD:
        raise ValueError(f"{value!r} is not an amount in USD, such as 0.25")
    return nano(amount)


def timeout(value: object) -> int:
    """Seconds -> milliseconds."""
    # What is not a number (NaN) is in no range.
    if not isinstance(value, int | float) or isinstance(value, bool) or not LEAST_S <= value <= MOST_S:
        raise ValueError(f"{value!r} is not a number of seconds from {LEAST_S} to {MOST_S:,}")
    return int(value * 1000)


def count(value: object, least: int) -> int:
    """A whole number, `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{value!r} is not a whole number from {least} up")
    return value
