"""The seam to a language model: one request, one reply, nothing retried, nothing metered.

The proxy above bounds, reserves, retries and settles; an `LM` only asks once and says truthfully what came of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counted them."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """model: the provider's name for it. max_output_tokens: hard cap. timeout_s: for the whole attempt, in seconds."""

    model: str
    messages: Sequence[Message]
    max_output_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """finish_reason: `stop`, `length` (cut at the cap) or the provider's own word. usage: None when not reported."""

    text: str
    finish_reason: str
    usage: Usage | None


class LM(ABC):
    """A language model endpoint. Safe for concurrent use by tasks of one event loop."""

    @abstractmethod
    async def ask(self, request: Request) -> Reply:
        """Ask once.

        Raises:
            ProviderRefused: the provider said no (wrong key, unknown model, bad request); asking again is useless.
            ProviderBusy: 429, 5xx or no connection; nothing was used, asking again may help (see `retry_after`).
            OutcomeUnknown: the request went out and what it used is not known (time-out, cut stream, garbage).
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release connections and memory. Idempotent."""
