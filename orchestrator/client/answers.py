"""What a service answers, as its client hands it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

from orchestrator.core.errors import AirlockError

T = TypeVar("T")


class ServiceError(AirlockError):
    """What the service said no to, or that it is not to be reached.

    status: of the answer, 0 when none came. kind: the problem's stable name, such as `budget-exhausted`. detail: what
    the service says of it. retry_after: seconds until it can be asked again, or None.
    """

    kind = "service"

    def __init__(
        self, detail: str, *, status: int = 0, kind: str = "service", retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail, self.status, self.kind, self.retry_after = detail, status, kind, retry_after
        self.exit_code = _exit_code(status)


def _exit_code(status: int) -> int:
    """As the command line has them: 2 the request, 3 a limit or the policy, 4 the service's machine, 5 the provider."""
    if status in (402, 403, 413, 429):
        return 3
    if status == 502:
        return 5
    return 2 if 400 <= status < 500 else 4


@dataclass(frozen=True, slots=True)
class Stored:
    """A context at the service. bytes: of it as UTF-8. characters: None in a list."""

    id: str
    kind: Literal["text", "documents", "json", "jsonl"]
    bytes: int
    characters: int | None
    name: str
    created_at: str


@dataclass(frozen=True, slots=True)
class Query:
    """A query, as far as it is. Money is exact, as text. answer: None where there is none, or none is kept."""

    id: str
    status: Literal["queued", "running", "answered", "limit", "refused", "failed", "cancelled", "interrupted"]
    created_at: str
    ended_at: str | None
    question: str | None
    model: str | None
    sub_models: list[str]
    backend: str
    isolation: str
    context: dict[str, Any]
    cost_usd: str
    held_usd: str
    limit_usd: str
    time_limit_s: float | None
    duration_s: float | None
    reason: str
    iterations: int | None
    sub_calls: int | None
    journal_head: str | None
    answer: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the query's journal. payloads: those that are kept."""

    seq: int
    at: str
    type: str
    node: str
    body: dict[str, Any]
    payloads: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModelSpend:
    calls: int
    input_tokens: int
    output_tokens: int
    cost_usd: str


@dataclass(frozen=True, slots=True)
class NodeSpend:
    spent_usd: str
    held_usd: str
    limit_usd: str | None


@dataclass(frozen=True, slots=True)
class Spend:
    """What a query has cost so far, by model and by node."""

    limit_usd: str
    spent_usd: str
    held_usd: str
    models: dict[str, ModelSpend]
    nodes: dict[str, NodeSpend]


@dataclass(frozen=True, slots=True)
class Purse:
    limit_usd: str
    spent_usd: str
    held_usd: str
    left_usd: str
    resets_at: str


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the tenant may spend and has spent. minute, calls_in_flight, queries: counts, each with its limit."""

    query: dict[str, str]
    day: Purse
    month: Purse
    minute: dict[str, dict[str, int]]
    calls_in_flight: dict[str, int]
    queries: dict[str, int]


@dataclass(frozen=True, slots=True)
class Page:
    """Of a list of queries. next: the cursor of the page after it, None after the last."""

    queries: list[Query]
    next: str | None


@dataclass(frozen=True, slots=True)
class Upload:
    """In pieces. context: what was made of it, once all is there. offset: bytes that are."""

    context: Stored | None
    offset: int = 0


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ServiceError("the service's answer is not JSON") from None


@lru_cache
def _adapter(kind: type[T]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def made(kind: type[T], told: Any) -> T:
    """Of an answer. What a newer service says besides is left out."""
    try:
        return _adapter(kind).validate_python(told)
    except ValueError:
        raise ServiceError(f"the service's answer is no {kind.__name__.lower()}: it is of another version") from None
