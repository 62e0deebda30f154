"""The keywords of the reference library `rlms`: what they mean here, and what to use for those that mean nothing.

No keyword is passed over that would have changed a result: it is taken, or refused by its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.core.errors import RequestError
from orchestrator.core.events import Event

# LM backends of rlms that are OpenAI-compatible servers: address (None: OpenAI's own) and variable with the key.
_SERVERS: dict[str, tuple[str | None, str | None]] = {
    "openai": (None, None),
    "vllm": (None, None),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "vercel": ("https://ai-gateway.vercel.sh/v1", "AI_GATEWAY_API_KEY"),
}
_FOREIGN = ("anthropic", "azure_openai", "gemini", "portkey")
_KWARGS = ("model_name", "base_url", "api_key")

# Keyword -> the values that ask for nothing, and what to use instead of all others.
_NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "environment_kwargs": ((None, {}), "a sandbox takes its limits from the policy (policy=...)"),
    "depth": ((0,), "a query begins at depth 0; max_depth bounds it"),
    "max_tokens": ((None,), "bound what a query uses with max_budget, or the policy's models.output_tokens"),
    "max_errors": ((None,), "bound how often a query tries with max_iterations"),
    "custom_system_prompt": ((None, ""), "say what you want in the question"),
    "user_prologue": ((None, ""), "say what you want in the question"),
    "orchestrator": ((True,), "the prompt is the same for all tasks"),
    "logger": ((None,), "every step is in the journal: airlock audit show QUERY; verbose=True prints progress"),
    "persistent": ((False, None), "a sandbox serves one query; put what the next one needs into its context"),
    "custom_tools": ((None, {}), "code of the host is out of a sandbox's reach; put data into the context"),
    "custom_sub_tools": ((None, {}), "code of the host is out of a sandbox's reach; put data into the context"),
    "compaction": ((False, None), "what no longer fits into a prompt is left out by itself, the oldest outputs first"),
    "on_iteration_start": ((None,), "verbose=True prints every turn"),
    "on_iteration_complete": ((None,), "verbose=True prints every turn"),
    "sampling_args": ((None, {}), "write them into airlock.toml: extra = {...} under [models.NAME]"),
    "sub_sampling_args": ((None, {}), "write them into airlock.toml: extra = {...} under [models.NAME]"),
}
_WITHOUT_EFFECT = ("compaction_threshold_pct",)  # in rlms, too, unless compaction is on


def refuse_what_is_not_here(keywords: Mapping[str, Any]) -> None:
    """Raises RequestError for a keyword of rlms that asks for what is not done here, TypeError for an unknown one."""
    for name, value in keywords.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _NOT_HERE:
            raise TypeError(f"RLM got an unexpected keyword argument {name!r}")
        harmless, instead = _NOT_HERE[name]
        if not any(value is nothing or (type(value) is type(nothing) and value == nothing) for nothing in harmless):
            raise RequestError(f"{name} of rlms is not there: {instead}")


def is_style(backend: str, backend_kwargs: object, environment: object) -> bool:
    """Whether an RLM is made in the style of rlms, where `backend` names the LM's side."""
    return backend_kwargs is not None or environment is not None or backend in _SERVERS or backend in _FOREIGN


def sandbox(environment: str | None) -> str:
    """The backend for an environment; `local` means on this machine, in a sandbox."""
    return "auto" if environment in (None, "local") else environment


def server(backend: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """model, base_url, api_key and api_key_env out of an LM backend and its `backend_kwargs`. Raises RequestError."""
    if backend not in ("auto", *_SERVERS):
        instead = f"name an OpenAI-compatible server: backend={'openai'!r}, backend_kwargs={{'base_url': ...}}"
        if backend not in _FOREIGN:
            instead += "; the sandbox is named by environment, next to backend_kwargs"
        raise RequestError(f"backend {backend!r} of rlms is not there: {instead}")
    for name in kwargs:
        if name == "sampling_args":
            refuse_what_is_not_here({name: kwargs[name]})
        elif name not in _KWARGS:
            raise RequestError(f"backend_kwargs[{name!r}] is not there: it takes {', '.join(_KWARGS)}")
    own_url, variable = _SERVERS.get(backend, (None, None))
    base_url = kwargs.get("base_url") or own_url
    if backend == "vllm" and not base_url:
        raise RequestError("backend 'vllm' needs the address of its server in backend_kwargs['base_url']")
    return {
        "model": kwargs.get("model_name"),
        "base_url": base_url,
        "api_key": kwargs.get("api_key"),
        "api_key_env": variable,  # one provider's key is not sent to another
    }


def sub_model(
    others: Sequence[str] | None, kwargs: Sequence[Mapping[str, Any]] | None, root: Mapping[str, Any]
) -> str | None:
    """The model of `other_backends`. Raises RequestError where there is more than one, or it is on another server."""
    if len(others or ()) > 1 or len(kwargs or ()) > 1:
        raise RequestError("other_backends takes one entry: the model that sub-calls ask")
    if not kwargs:
        if others:
            raise RequestError("other_backends needs other_backend_kwargs with the name of the model")
        return None
    other = server(others[0] if others else "openai", kwargs[0])
    for name in ("base_url", "api_key"):
        if other[name] is not None and other[name] != root[name]:
            raise RequestError(
                f"other_backend_kwargs has another {name} than the root: two servers are told apart in airlock.toml, "
                "with base_url and api_key_env under [models.NAME] of each"
            )
    return other["model"]


class SubcallCallbacks:
    """`on_subcall_start(depth, model, prompt_preview)` and `on_subcall_complete(depth, model, seconds, error or None)`.

    They are called on the event loop, for plain calls and for child queries; once an attempt: a sub-call that is tried
    again is reported again.
    """

    def __init__(self, start: Callable[..., object] | None, complete: Callable[..., object] | None) -> None:
        self._start, self._complete = start, complete
        self._running: dict[str, tuple[int, str, float]] = {}

    def event(self, event: Event) -> None:
        """What the journal records of a query."""
        body, depth = event.body, event.node.count(".")
        if event.type == "call.intent" and body["role"] == "sub":
            prompt = json.loads(event.payloads["prompt"])[-1]["content"]
            self._begin(body["call"], depth + 1, body["model"], prompt)
        elif event.type == "call.result":
            self._end(body["call"], None if body["outcome"] == "answered" else body["detail"])
        elif event.type == "node.opened":
            self._begin(event.node, depth, body["model"], event.payloads["question"])
        elif event.type == "node.closed":
            self._end(event.node, None if body["status"] == "answered" else body["reason"])

    def _begin(self, name: str, depth: int, model: str, prompt: str) -> None:
        self._running[name] = (depth, model, time.monotonic())
        if self._start:
            self._start(depth, model, prompt[:80])

    def _end(self, name: str, error: str | None) -> None:
        if name in self._running:
            depth, model, started = self._running.pop(name)
            if self._complete:
                self._complete(depth, model, time.monotonic() - started, error)
