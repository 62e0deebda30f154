"""Every error Airlock raises on purpose, split by what the caller can do about it.

    AirlockError
    ├── RequestError            fix the request                         exit 2
    │   ├── ContextError          the context cannot be read as asked
    │   ├── PolicyError           a policy file is not valid
    │   ├── ModelError            no such model, or no model configured
    │   ├── PriceUnknown          the model has no price, so it cannot be bounded
    │   └── Conflict              what is there already stands in the way
    ├── LimitError              raise the limit, or ask for less        exit 3
    │   ├── NotPermitted          the policy does not allow it at all
    │   ├── BudgetExhausted       spent money blocks it
    │   ├── BudgetInFlight        money held by calls in flight blocks it: try again
    │   ├── CountExceeded         iterations, sub-calls, batch or prompt size
    │   ├── RateLimited           requests or tokens of this minute, or calls in flight: try again
    │   ├── TimeExceeded          wall clock of the query or of a cell
    │   └── ChildStopped          a child query ended without an answer
    ├── MachineError            mend the machine                        exit 4
    │   ├── SandboxUnusable       the isolation asked for is not to be had here
    │   ├── SandboxDied           the guest ended, or was killed
    │   ├── ProtocolViolation     the guest broke the channel's rules, and was killed
    │   ├── NotKept               what a replay takes is gone: payloads
    │   │   └── ContextGone         or the context, which another machine may have
    │   ├── NotRebuilt            an interrupted query's REPL cannot be had again by running its cells again
    │   ├── Interrupted           a query that has just been resumed cannot go on now; it can be resumed again
    │   └── StoreError            ledger, journal or context store cannot be written
    └── ProviderError           try later, or fix the key               exit 5
        ├── ProviderRefused       the provider refused the request (401, 400, 404 ...)
        ├── ProviderBusy          429, 5xx, connection refused: nothing was used, safe to retry
        └── OutcomeUnknown        sent, but what it used is not known: charged at the bound

`kind` is the stable name that journal records, JSON output and the guest's typed exceptions carry.
"""

from __future__ import annotations

from collections.abc import Iterator


class AirlockError(Exception):
    """Base of every deliberate error. `str()` is one line that says what is wrong and what to do."""

    kind: str = "error"  # these two are a class's, but for what a service tells of its errors
    exit_code: int = 1

    @property
    def told(self) -> str:
        """What a guest is told of it."""
        return str(self)


class RequestError(AirlockError):
    kind = "bad-request"
    exit_code = 2


class ContextError(RequestError):
    kind = "bad-context"


class PolicyError(RequestError):
    kind = "bad-policy"


class ModelError(RequestError):
    kind = "bad-model"


class PriceUnknown(RequestError):
    kind = "price-unknown"


class Conflict(RequestError):
    kind = "conflict"


class LimitError(AirlockError):
    """A limit stands in the way.

    limit, asked, left: what the limit is, what was asked for and what is left, as printable text with units. rule: the
    key of the policy that says so, such as `counts.sub_calls`.
    """

    kind = "limit"
    exit_code = 3

    def __init__(self, message: str, *, limit: str = "", asked: str = "", left: str = "", rule: str = "") -> None:
        super().__init__(message)
        self.limit = limit
        self.asked = asked
        self.left = left
        self.rule = rule


class NotPermitted(LimitError):
    kind = "not-permitted"


class BudgetExhausted(LimitError):
    kind = "budget-exhausted"


class BudgetInFlight(LimitError):
    kind = "budget-in-flight"


class CountExceeded(LimitError):
    kind = "count-exceeded"


class TimeExceeded(LimitError):
    kind = "time-exceeded"


class RateLimited(LimitError):
    """retry_after: seconds until there can be room again."""

    kind = "rate-limited"

    def __init__(
        self, message: str, *, retry_after: float, limit: str = "", asked: str = "", left: str = "", rule: str = ""
    ) -> None:
        super().__init__(message, limit=limit, asked=asked, left=left, rule=rule)
        self.retry_after = retry_after


class ChildStopped(LimitError):
    """partial: the best answer that the child query had, or None."""

    kind = "child-stopped"

    def __init__(self, message: str, *, partial: str | None) -> None:
        super().__init__(message)
        self.partial = partial


class MachineError(AirlockError):
    kind = "machine"
    exit_code = 4


class SandboxUnusable(MachineError):
    kind = "sandbox-unusable"


class SandboxDied(MachineError):
    kind = "sandbox-died"


class ProtocolViolation(SandboxDied):
    kind = "protocol-violation"


class NotKept(MachineError):
    kind = "not-kept"


class ContextGone(NotKept):
    kind = "context-gone"


class NotRebuilt(MachineError):
    kind = "not-rebuilt"

    def __init__(self, why: str) -> None:
        super().__init__(f"the REPL cannot be rebuilt: {why}")


class Interrupted(MachineError):
    """cause: the error that passes. Never told to a guest, and never recorded."""

    kind = "interrupted"

    def __init__(self, cause: AirlockError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class StoreError(MachineError):
    kind = "store-unavailable"


class ProviderError(AirlockError):
    """server: what the message calls the provider's server; where that is, is no affair of a guest's."""

    kind = "provider"
    exit_code = 5
    server: str = ""

    @property
    def told(self) -> str:
        return str(self).replace(self.server, "the provider") if self.server else str(self)


class ProviderRefused(ProviderError):
    kind = "provider-refused"


class ProviderBusy(ProviderError):
    """retry_after: seconds the provider asked us to wait, or None."""

    kind = "provider-busy"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OutcomeUnknown(ProviderError):
    kind = "outcome-unknown"


def _kinds(error: type[AirlockError]) -> Iterator[type[AirlockError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _kinds(kind)


KINDS = {error.kind: error for error in _kinds(AirlockError)}


def read_reason(reason: str) -> AirlockError | None:
    """The error of a reason `kind: text`, as journal records have it; None for a reason of another form."""
    kind, _, text = reason.partition(": ")
    if (found := KINDS.get(kind)) is None or not text:
        return None
    if issubclass(found, RateLimited):
        return found(text, retry_after=0)
    if issubclass(found, ChildStopped):
        return found(text, partial=None)
    if issubclass(found, NotRebuilt | Interrupted):  # they say more than the text, and what is said is in it
        return MachineError(text)
    return found(text)
