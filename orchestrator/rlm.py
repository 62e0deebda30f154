"""`RLM` and `AsyncRLM`: a query as an ordinary call. Async first; the sync class is one thin layer over it.

Two calling styles, one class. Ours names a model and a sandbox backend; the reference library's (`rlms`) names an LM
backend with `backend_kwargs` and an `environment`, and puts the context first: `completion(prompt, root_prompt=...)`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from orchestrator import rlms
from orchestrator.console import PlainView
from orchestrator.core import limits
from orchestrator.core.errors import RequestError
from orchestrator.core.units import NANO, price_pair, usd

if TYPE_CHECKING:
    from orchestrator.core.events import Event
    from orchestrator.loop.order import Closed
    from orchestrator.wiring import Platform, Watch

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

    @property
    def total_cost(self) -> float:
        """USD."""
        return sum(summary.total_cost for summary in self.model_usage_summaries.values())

    @property
    def total_input_tokens(self) -> int:
        return sum(summary.total_input_tokens for summary in self.model_usage_summaries.values())

    @property
    def total_output_tokens(self) -> int:
        return sum(summary.total_output_tokens for summary in self.model_usage_summaries.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_cost": self.total_cost}


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished query. status: `answered`, or `limit` with the best partial answer (or None) and the reason.

    cost_usd is exact, as text. execution_time in seconds. journal_head is the hash that commits the query's whole
    journal. checkpoint is the signed head of the tenant's log with this query in it: keep it, and `airlock audit verify
    --checkpoint` tells later whether anything up to it was cut or rewritten. root_model, prompt, metadata and error are
    there for users of `rlms`.
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
    checkpoint: str = field(repr=False)
    root_model: str
    prompt: Any = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usage_summary": self.usage_summary.to_dict()}


class AsyncRLM:
    """Asks questions of contexts. An async context manager; without one, the first `completion` opens it.

    model, sub_model: names as on the command line; several sub-models are by depth, the last one for all further down.
    prices: model -> (input, output) in USD per million tokens. backend: a sandbox backend or `auto`. policy: a name or
    a file. home: the data folder. max_budget in USD, max_timeout in seconds; the policy's own limits hold where they
    are stricter. max_depth: 0 switches sub-calls off, 1 has plain ones, from 2 on there are child queries.
    max_concurrent_subcalls: LM calls at the same time. answer_schema: a JSON Schema. pool: sandboxes to keep ready for
    coming queries, while it is open; else as many as `airlock.toml` says. verbose: progress lines on standard error.

    environment, backend_kwargs, other_backends, other_backend_kwargs and on_subcall_*: as in `rlms`. Further keywords
    of rlms are refused with a word on what to use instead, unless their value asks for nothing.

    Raises RequestError for values that make no sense; PolicyError, one of these, when it is opened.
    """

    def __init__(
        self,
        backend: str = "auto",
        backend_kwargs: Mapping[str, Any] | None = None,
        environment: str | None = None,
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        sub_model: str | Sequence[str] | None = None,
        prices: Mapping[str, Price] | None = None,
        policy: str | Path = "default",
        home: Path | str | None = None,
        other_backends: Sequence[str] | None = None,
        other_backend_kwargs: Sequence[Mapping[str, Any]] | None = None,
        max_depth: int | None = None,
        max_iterations: int | None = None,
        max_budget: float | str | Decimal | None = None,
        max_timeout: float | None = None,
        max_concurrent_subcalls: int | None = None,
        answer_schema: Mapping[str, Any] | None = None,
        pool: int | None = None,
        verbose: bool = False,
        on_subcall_start: Callable[[int, str, str], object] | None = None,
        on_subcall_complete: Callable[[int, str, float, str | None], object] | None = None,
        **others: Any,
    ) -> None:
        rlms.refuse_what_is_not_here(others)
        self._as_rlms = rlms.is_style(backend, backend_kwargs, environment)
        said = {"model": model, "base_url": base_url, "api_key": api_key, "api_key_env": None}
        if self._as_rlms:
            theirs = rlms.server(backend, backend_kwargs or {})
            said = {name: said[name] or theirs[name] for name in said}
            sub_model = sub_model or rlms.sub_model(other_backends, other_backend_kwargs, said)
            backend = rlms.sandbox(environment)
        elif other_backends or other_backend_kwargs:
            raise RequestError("other_backends goes with backend_kwargs, as in rlms; say sub_model=... instead")
        sub_models = [sub_model] if isinstance(sub_model, str) else list(sub_model or ())
        texts = {**said, "backend": backend, "policy": str(policy) if policy else policy}
        for name, text in [*texts.items(), *(("sub_model", name or 0) for name in sub_models)]:
            if not (isinstance(text, str) or (text is None and name not in ("backend", "policy"))):
                raise RequestError(f"{name} has to be a str, and is a {type(text).__name__}")
        self._home = Path(home) if home is not None else None
        self._choices: dict[str, Any] = {
            **texts,
            "sub_models": sub_models,
            "prices": {
                name: _checked(f"prices[{name!r}]", price_pair, price) for name, price in (prices or {}).items()
            },
            "budget": _checked("max_budget", limits.budget, max_budget),
            "timeout_ms": _checked("max_timeout", limits.timeout, max_timeout),
            "depth": _checked("max_depth", limits.count, max_depth, 0),
            "iterations": _checked("max_iterations", limits.count, max_iterations, 1),
            "in_flight": _checked("max_concurrent_subcalls", limits.count, max_concurrent_subcalls, 1),
            "answer_schema": answer_schema,
            "pool": _checked("pool", limits.count, pool, 0),
        }
        self._verbose = verbose
        self._callbacks = on_subcall_start, on_subcall_complete
        self._stack: contextlib.AsyncExitStack | None = None
        self._platform: Platform | None = None

    async def __aenter__(self) -> Self:
        from orchestrator.choices import Choices, check_schema
        from orchestrator.wiring import open_platform

        if self._stack is None:
            choices = Choices(**self._choices)
            if choices.answer_schema is not None:
                check_schema("answer_schema", choices.answer_schema)
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
        self, *given: Any, query: Any = None, context: Any = None, prompt: Any = None, root_prompt: str | None = None
    ) -> Completion:
        """`completion(query, context)`: answer the query over a str, a list, a dict, or a Path to a file or folder.

        As in `rlms`: `completion(prompt, root_prompt=...)`. The prompt is the context, root_prompt the question; an RLM
        made in the style of rlms takes the two by position in this order, and a prompt alone as a request of its own.
        Raises RequestError, LimitError (refused before it began), MachineError or ProviderError. A limit that strikes
        under way is not an error: the completion then has status `limit`.
        """
        import anyio.to_thread

        named = {"query": query, "context": context, "prompt": prompt, "root_prompt": root_prompt}
        question, source = _question_and_context(given, named, as_rlms=self._as_rlms)
        await self.__aenter__()
        assert self._platform is not None
        self._platform.require(question)
        store = self._platform.contexts
        ingest = store.ingest if isinstance(source, Path) else store.ingest_value
        stored = await anyio.to_thread.run_sync(ingest, source)
        closed = await self._platform.run(question, stored, watch=self._watch())
        if closed.error is not None:
            raise closed.error
        return _completion(closed, self._platform.model, source)

    def _watch(self) -> Watch:
        from orchestrator.wiring import Watch

        callbacks = rlms.SubcallCallbacks(*self._callbacks)
        if not self._verbose:
            return Watch(event=callbacks.event)
        view = PlainView()

        def event(event: Event) -> None:
            view.event(event)
            callbacks.event(event)

        return Watch(event=event, account=view.account)


class RLM:
    """`AsyncRLM` for code that is not async, with the same arguments. A context manager; `close` ends it."""

    def __init__(self, *given: Any, **choices: Any) -> None:
        self._rlm = AsyncRLM(*given, **choices)
        self._stack = contextlib.ExitStack()
        self._portal: Any = None

    def completion(
        self, *given: Any, query: Any = None, context: Any = None, prompt: Any = None, root_prompt: str | None = None
    ) -> Completion:
        """See `AsyncRLM.completion`."""
        from anyio.from_thread import start_blocking_portal

        if self._portal is None:
            self._portal = self._stack.enter_context(start_blocking_portal(backend_options={"use_uvloop": True}))
        ended = threading.Event()

        async def complete() -> Completion:
            try:
                return await self._rlm.completion(
                    *given, query=query, context=context, prompt=prompt, root_prompt=root_prompt
                )
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


def _question_and_context(given: tuple[Any, ...], named: dict[str, Any], *, as_rlms: bool) -> tuple[str, Any]:
    """The question, and the source of the context, out of one of the two ways to call. Raises RequestError."""
    order = ("prompt", "root_prompt") if as_rlms else ("query", "context")
    if len(given) == 1 and named["root_prompt"] is not None:
        order = ("prompt",)
    if len(given) > len(order) or any(named[name] is not None for name in order[: len(given)]):
        raise RequestError(f"completion({', '.join(order)}) was given too much")
    named = {**named, **dict(zip(order, given, strict=False))}
    ours, theirs = (named["query"], named["context"]), (named["root_prompt"], named["prompt"])
    if any(part is not None for part in ours) and any(part is not None for part in theirs):
        raise RequestError("give either completion(query, context) or completion(prompt, root_prompt=...)")
    question, source = ours if any(part is not None for part in ours) else theirs
    if question is None and source is not None and as_rlms:
        from orchestrator.loop.prompts import PROMPT_ALONE

        question = PROMPT_ALONE
    if question is None or source is None:
        raise RequestError("completion needs a query and a context (or, as in rlms, a prompt and a root_prompt)")
    if not isinstance(question, str):
        raise RequestError(f"the question has to be a str, and is a {type(question).__name__}")
    return question, source


def _checked(name: str, check: Callable[..., Any], value: object, *more: object) -> Any:
    """The value in our units. None is nothing said."""
    if value is None:
        return None
    try:
        return check(value, *more)
    except ValueError as error:
        raise RequestError(f"{name}: {error}") from None


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
        checkpoint=closed.checkpoint,
        root_model=model,
        prompt=prompt,
        error=closed.outcome.reason or None,
    )
