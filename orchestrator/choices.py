"""What a user chose: what it narrows, and what of it can be checked before anything is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from orchestrator.core.errors import PolicyError, RequestError
from orchestrator.core.policy import Policy
from orchestrator.files import read_text
from orchestrator.loop.fits import no_schema
from orchestrator.named_policy import load_policy


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user chose, on the command line or in `RLM(...)`; None where nothing was said. Narrows the policy only.

    policy: a name, a file, or the very policy of an interrupted query. sub_models: by depth, the last one for all
    further down. pool: how many sandboxes are kept ready; None for what `airlock.toml` says.
    """

    model: str | None = None
    sub_models: Sequence[str] = ()
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str | None = None
    prices: Mapping[str, tuple[Decimal, Decimal]] = field(default_factory=dict[str, tuple[Decimal, Decimal]])
    backend: str = "auto"
    policy: str | Policy = "default"
    budget: int | None = None
    timeout_ms: int | None = None
    depth: int | None = None
    iterations: int | None = None
    in_flight: int | None = None
    answer_schema: Mapping[str, Any] | None = None
    pool: int | None = None


def effective_policy(choices: Choices) -> Policy:
    """The policy as narrowed by the request."""
    if isinstance(choices.policy, Policy):
        return choices.policy
    return narrowed(
        load_policy(choices.policy),
        name=f"policy {choices.policy}",
        budget=choices.budget,
        timeout_ms=choices.timeout_ms,
        depth=choices.depth,
        iterations=choices.iterations,
        in_flight=choices.in_flight,
    )


def narrowed(
    policy: Policy,
    *,
    name: str,
    budget: int | None = None,
    timeout_ms: int | None = None,
    depth: int | None = None,
    iterations: int | None = None,
    in_flight: int | None = None,
) -> Policy:
    """The policy with what a request wants less of. name: what errors call it. Raises PolicyError."""
    money, time, counts = policy.money, policy.time, policy.counts
    if depth is not None and depth > counts.depth:
        raise PolicyError(f"a depth of {depth}: {name} permits a depth of {counts.depth}")
    of_counts = _said(depth=depth, iterations=iterations, in_flight=in_flight)
    if budget is None and timeout_ms is None and not of_counts:
        return policy
    narrower = policy.model_copy(
        update={
            "money": money.model_copy(update=_said(query=budget)),
            "time": time.model_copy(update=_said(query=timeout_ms)),
            "counts": counts.model_copy(update=of_counts),
        }
    )
    return policy.narrowed(narrower)


def _said(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def load_schema(path: Path) -> Mapping[str, Any]:
    """A JSON Schema from a file. Raises RequestError."""
    try:
        schema: Any = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"cannot read the answer schema {path}: {error}") from None
    return check_schema(str(path), schema)


def check_schema(name: str, schema: Any) -> Mapping[str, Any]:
    """The schema, if it is one and JSON. Raises RequestError."""
    if fault := no_schema(schema):
        raise RequestError(f"{name} is not a JSON Schema: {fault}")
    return cast("Mapping[str, Any]", schema)
