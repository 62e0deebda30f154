"""What an operator may add to a request, and what would make it dearer than its bound."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.core.errors import ModelError
from orchestrator.lm.parameters import PARAMETERS, checked

FINE: dict[str, Any] = {
    "temperature": 0.2,
    "stop": ["END"],
    "seed": 7,
    "reasoning_effort": "low",
    "thinking": {"type": "disabled"},
    "chat_template_kwargs": {"enable_thinking": False},
}
DEARER = ["service_tier", "n", "best_of", "max_tokens", "max_completion_tokens", "tools", "functions", "prediction"]
DEARER += ["web_search_options", "modalities", "audio", "response_format", "logprobs", "top_logprobs", "metadata"]
DEARER += ["store", "user", "stream", "stream_options", "model", "models", "messages", "provider", "extra_body", ""]


def test_what_may_be_added():
    assert checked(FINE) == FINE
    assert checked({}) == {}


@pytest.mark.parametrize("name", DEARER)
def test_what_may_not(name: str):
    with pytest.raises(ModelError) as refused:
        checked({"temperature": 0, name: 1})
    said = str(refused.value)
    assert repr(name) in said
    assert said.endswith(", ".join(PARAMETERS))
    assert "\n" not in said


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), [math.nan], {1, 2}])
def test_what_json_cannot_say(value: Any):
    with pytest.raises(ModelError, match=r"temperature is .* JSON"):
        checked({"temperature": value})


@pytest.mark.parametrize("value", [True, "x", {"documents": ["x"]}, {"a": {"b": 1}}, {"persona": "x" * 17}])
def test_what_would_lengthen_the_prompt(value: Any):
    with pytest.raises(ModelError, match="chat_template_kwargs takes"):
        checked({"chat_template_kwargs": value})
