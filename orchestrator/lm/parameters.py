"""What an operator may add to every request of a model: `extra` under [models.NAME] in airlock.toml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from orchestrator.core.errors import ModelError

# How a text is chosen, and how much is thought before it, all within the cap on output. Nothing else: a request must
# not become dearer than its bound (service_tier, n, tools, web_search_options, prediction, other models to fall back
# on), nor read more than it was bounded by (response_format, documents), nor come back in another form (modalities,
# logprobs), nor be kept or told elsewhere (store, metadata, user). What is not known is one of these.
PARAMETERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "repeat_penalty",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    "thinking",
    "chat_template_kwargs",
)
_SWITCHES = ("thinking", "chat_template_kwargs")  # objects; what they hold may be written into the prompt
_SWITCH_CHARS = 16


def checked(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The same, to be sent. Raises ModelError."""
    for name, value in extra.items():
        if name not in PARAMETERS:
            raise ModelError(f"extra: {name!r} may not be added to a request; what may: {', '.join(PARAMETERS)}")
        if name in _SWITCHES and not _is_switches(value):
            raise ModelError(f"extra: {name} takes true, false, numbers and words by name, such as {{a = false}}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ModelError(f"extra: {name} is {value!r}, which JSON has no form for") from None
    return dict(extra)


def _is_switches(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(
        isinstance(inner, bool | int | float) or (isinstance(inner, str) and len(inner) <= _SWITCH_CHARS)
        for inner in cast("dict[str, object]", value).values()
    )
