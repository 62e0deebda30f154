"""What a failed sub-call raises in a cell. Typed, by the `kind` that the host sends."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class SubCallError(Exception):
    """A sub-call failed. `kind` names why; where a limit is why, `limit`, `asked` and `left` are texts with units."""

    kind = "provider"
    limit = ""
    asked = ""
    left = ""


class NotPermitted(SubCallError):
    """The policy does not allow this call at all."""


class BudgetExhausted(SubCallError):
    """The money is spent."""


class BudgetInFlight(SubCallError):
    """The money left is held by calls in flight: try again when some have ended."""


class CountExceeded(SubCallError):
    """Too many sub-calls, or a prompt that is too long."""


class TimeExceeded(SubCallError):
    """The query's time is over."""


class RateLimited(SubCallError):
    """The requests or tokens of this minute are used up. `retry_after`: seconds until there is room again."""

    retry_after = 0.0


class ChildStopped(SubCallError):
    """A child query ended without an answer. `partial`: the best that it had, or None."""

    partial: Any = None  # a str, if there is any


class ProviderFailed(SubCallError):
    """The LM provider failed or refused, after all retries."""


class BatchError(SubCallError):
    """At least one item of a batch failed. `results` has every item in order: a str, or that item's exception."""

    results: Sequence[Any] = ()


KINDS: dict[str, type[SubCallError]] = {
    "not-permitted": NotPermitted,
    "bad-context": SubCallError,
    "bad-model": NotPermitted,
    "price-unknown": NotPermitted,
    "budget-exhausted": BudgetExhausted,
    "budget-in-flight": BudgetInFlight,
    "count-exceeded": CountExceeded,
    "rate-limited": RateLimited,
    "time-exceeded": TimeExceeded,
    "child-stopped": ChildStopped,
}
EXCEPTIONS = (
    SubCallError,
    NotPermitted,
    BudgetExhausted,
    BudgetInFlight,
    CountExceeded,
    RateLimited,
    TimeExceeded,
    ChildStopped,
    ProviderFailed,
    BatchError,
)


def error_from(fields: dict[str, Any]) -> SubCallError:
    kind = str(fields.get("kind", "provider"))
    error = KINDS.get(kind, ProviderFailed)(str(fields.get("message", "the sub-call failed")))
    error.kind = kind
    error.limit, error.asked, error.left = (str(fields.get(name, "")) for name in ("limit", "asked", "left"))
    if isinstance(error, RateLimited):
        error.retry_after = float(fields.get("retry_after", 0.0))
    if isinstance(error, ChildStopped):
        error.partial = fields.get("partial")
    return error
