"""Bodies with many faults: what is said of them is as small as they are cheap to send."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from orchestrator.server.chat.request import ChatRequest
from orchestrator.server.query_shapes import NewQuery

MANY = 5000
FIELDS = {f"field{number}": 0 for number in range(MANY)}
QUERY: dict[str, Any] = {"question": "q", "context": {"text": "a"}}
CHAT: dict[str, Any] = {"model": "rlm/m", "messages": [{"role": "user", "content": "q"}]}


CASES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (NewQuery, {**QUERY, "context": {"documents": [{}] * MANY}}),
    (NewQuery, {**QUERY, **FIELDS}),
    (NewQuery, {**QUERY, "context": {"text": "a", **FIELDS}}),
    (NewQuery, {**QUERY, "context": {"documents": [{"path": "a", "text": "b", **FIELDS}]}}),
    (NewQuery, {**QUERY, "sub_models": [1] * MANY}),
    (ChatRequest, {**CHAT, **FIELDS}),
    (ChatRequest, {**CHAT, "messages": [{}] * MANY}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [{}] * 900}] * 100}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": "q", **FIELDS}]}),
    (ChatRequest, {**CHAT, "modalities": ["audio"] * MANY}),
    (ChatRequest, {**CHAT, "logit_bias": dict.fromkeys(FIELDS, "much")}),
    (ChatRequest, {**CHAT, "tools": [1] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), CASES)
def test_a_body_that_is_wrong_in_many_places_is_told_of_few(model: type[BaseModel], body: dict[str, Any]):
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    assert raised.value.error_count() <= 20
