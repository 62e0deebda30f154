"""`RLM` and `AsyncRLM`: a query as an ordinary call. Async first; the sync class is one thin layer over it.

Two calling styles, one class. Ours names a model and a sandbox backend; the reference library's (`rlms`) names an LM
backend with `backend_kwargs` and an `environment`, and puts the context first: `completion(prompt, root_prompt=...)`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from orchestrator.core.errors import RequestError
from orchestrator.core.units import NANO, nano, usd

if TYPE_CHECKING:
    from orchestrator.loop.query import Closed
    from orchestrator.wiring import Choices, Platform

Price = tuple[float | str | Decimal, float | str | Decimal]


@dataclass(frozen=True, slots=True)
class ModelUsageSummary:
    """total_cost in USD."""

    total_calls: int
    total_input_tokens: int
    total_output_tokens: int
    total_cost: float


@dataclass(frozen=True, slots=True)
class UsageSummary:
    model_usage_summaries: Mapping[str, ModelUsageSummary]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished query. status: `answered`, or `limit` with the best partial answer (or None) and the reason.

    cost_usd is exact, as text. execution_time in seconds. journal_head is the hash that commits the query's whole
    journal. root_model, prompt, metadata and error are there for users of `rlms`.
    """

    response: str | None
    status: str
    reason: str
    cost_usd: str
    usage_summary: UsageSummary
    execution_time: float
    query_id: str
    iterations: int
    sub_calls: int
    journal_head: str
    root_model: str
    prompt: Any = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: str | None = None


class AsyncRLM:
    """Asks questions of contexts. An async context manager; without one, the first `completion` opens it.

    model, sub_model: names as on the command line. prices: model -> (input, output) in USD per million tokens.
    backend: a sandbox backend or `auto`. policy: a name or a file. home: the data folder.
    environment, backend_kwargs, other_backends, other_backend_kwargs and max_*: as in `rlms`.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        sub_model: str | None = None,
        prices: Mapping[str, Price] | None = None,
        policy: str | Path = "default",
        home: Path | str | None = None,
        environment: str | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        other_backends: Sequence[str] | None = None,
        other_backend_kwargs: Sequence[Mapping[str, Any]] | None = None,
        max_depth: int | None = None,
        max_iterations: int | None = None,
        max_budget: float | str | Decimal | None = None,
        max_timeout: float | None = None,
        answer_schema: Mapping[str, Any] | None = None,
    ) -> None:
        kwargs = backend_kwargs or {}
        if backend_kwargs is not None or environment is not None:  # the style of rlms: `backend` names the LM's side
            backend = "auto" if environment in (None, "local") else environment
        others = list(other_backend_kwargs or ())
        if len(other_backends or ()) > 1 or len(others) > 1:
            raise RequestError("other_backends takes one entry: the model that sub-calls ask")
        self._home = Path(home) if home is not None else None
        self._choices: dict[str, Any] = {
            "model": model or kwargs.get("model_name"),
            "sub_model": sub_model or (others[0].get("model_name") if others else None),
            "base_url": base_url or kwargs.get("base_url"),
            "api_key": api_key or kwargs.get("api_key"),
            "prices": {name: _price(name, price) for name, price in (prices or {}).items()},
            "backend": backend,
            "policy": str(policy),
            "budget": None if max_budget is None else nano(Decimal(str(max_budget))),
            "timeout_ms": None if max_timeout is None else max(1, int(max_timeout * 1000)),
            "depth": max_depth,
            "iterations": max_iterations,
            "answer_schema": answer_schema,
        }
        self._stack: contextlib.AsyncExitStack | None = None
        self._platform: Platform | None = None

    async def __aenter__(self) -> Self:
        from orchestrator.wiring import Choices, open_platform

        if self._stack is None:
            choices: Choices = Choices(**self._choices)
            stack = contextlib.AsyncExitStack()
            self._platform = await stack.enter_async_context(open_platform(choices, self._home))
            self._stack = stack
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Release models and store. Idempotent."""
        stack, self._stack, self._platform = self._stack, None, None
        if stack is not None:
            await stack.aclose()

    async def completion(
        self, query: Any = None, context: Any = None, *, prompt: Any = None, root_prompt: str | None = None
    ) -> Completion:
        """Answer `query` over `context`: a str, a list, a dict, or a Path to a file or folder.

        In the style of `rlms` the first argument, or `prompt`, is the context and `root_prompt` the question.
        Raises RequestError, LimitError (refused before it began), MachineError or ProviderError. A limit that strikes
        under way is not an error: the completion then has status `limit`.
        """
        import anyio.to_thread

        question, source = _question_and_context(query, context, prompt, root_prompt)
        await self.__aenter__()
        assert self._platform is not None
        self._platform.require(question)
        store = self._platform.contexts
        ingest = store.ingest if isinstance(source, Path) else store.ingest_value
        stored = await anyio.to_thread.run_sync(ingest, source)
        closed = await self._platform.run(question, stored)
        if closed.error is not None:
            raise closed.error
        return _completion(closed, self._platform.model, source)


class RLM:
    """`AsyncRLM` for code that is not async, with the same arguments. A context manager; `close` ends it."""

    def __init__(self, backend: str = "auto", **choices: Any) -> None:
        self._rlm = AsyncRLM(backend, **choices)
        self._stack = contextlib.ExitStack()
        self._portal: Any = None

    def completion(
        self, query: Any = None, context: Any = None, *, prompt: Any = None, root_prompt: str | None = None
    ) -> Completion:
        """See `AsyncRLM.completion`."""
        from anyio.from_thread import start_blocking_portal

        if self._portal is None:
            self._portal = self._stack.enter_context(start_blocking_portal(backend_options={"use_uvloop": True}))
        ended = threading.Event()

        async def complete() -> Completion:
            try:
                return await self._rlm.completion(query, context, prompt=prompt, root_prompt=root_prompt)
            finally:
                ended.set()

        future = self._portal.start_task_soon(complete)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the query must not go on behind the caller's back
            future.cancel()
            ended.wait()
            raise

    def close(self) -> None:
        """Release models and store. Idempotent."""
        if self._portal is not None:
            self._portal.call(self._rlm.aclose)
            self._portal = None
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _question_and_context(query: Any, context: Any, prompt: Any, root_prompt: str | None) -> tuple[str, Any]:
    if context is not None:
        if prompt is not None or root_prompt is not None:
            raise RequestError("give either completion(query, context) or completion(prompt, root_prompt=...)")
        return str(query or ""), context
    source = prompt if prompt is not None else query
    if source is None:
        raise RequestError("there is no context: completion(query, context)")
    if root_prompt is None:
        raise RequestError("completion needs a query and a context (or, as in rlms, a prompt and a root_prompt)")
    return root_prompt, source


def _price(name: str, price: Price) -> tuple[Decimal, Decimal]:
    per_input, per_output = (Decimal(str(part)) for part in price)
    if not (per_input.is_finite() and per_output.is_finite()) or min(per_input, per_output) < 0:
        raise RequestError(f"the price of {name} is a pair of USD per million tokens, in and out")
    return per_input, per_output


def _completion(closed: Closed, model: str, prompt: Any) -> Completion:
    summaries = {
        name: ModelUsageSummary(usage.calls, usage.input_tokens, usage.output_tokens, usage.cost / NANO)
        for name, usage in closed.usage.items()
    }
    return Completion(
        response=closed.outcome.answer,
        status=closed.outcome.status,
        reason=closed.outcome.reason,
        cost_usd=usd(closed.cost),
        usage_summary=UsageSummary(summaries),
        execution_time=closed.duration_s,
        query_id=closed.query_id,
        iterations=closed.turns,
        sub_calls=closed.sub_calls,
        journal_head=closed.journal_head,
        root_model=model,
        prompt=prompt,
        error=closed.outcome.reason or None,
    )
