"""What is shown of completions and models, in OpenAI's shapes, as the OpenAPI document has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

OWNER = "airlock"


class ModelView(BaseModel):
    id: str = Field(examples=["rlm/gpt-5-mini"])
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = OWNER


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


class Usage(BaseModel):
    """Of all calls of the query together."""

    prompt_tokens: int = Field(examples=[2100])
    completion_tokens: int = Field(examples=[180])
    total_tokens: int = Field(examples=[2280])


class Answered(BaseModel):
    """reasoning_content: null, for the steps are streamed as they happen or not at all."""

    role: Literal["assistant"] = "assistant"
    content: str = Field(examples=["At nine."])
    refusal: None = None
    reasoning_content: None = None


class Choice(BaseModel):
    """finish_reason: `length` where a limit stopped it, and this is the best answer that there was."""

    index: Literal[0] = 0
    message: Answered
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class QueryFacts(BaseModel):
    """The query behind it; GET /v1/queries/{query} has more. cost_usd is exact."""

    query_id: str = Field(examples=["20261126-010203-0123456789"])
    status: str = Field(examples=["answered"])
    reason: str = Field(examples=[""])
    cost_usd: str = Field(examples=["0.001234"])
    iterations: int | None = Field(examples=[2])
    sub_calls: int | None = Field(examples=[1])


class Completion(BaseModel):
    id: str = Field(examples=["chatcmpl-20261126-010203-0123456789"])
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(examples=[1795654923])
    model: str = Field(examples=["rlm/gpt-5-mini"])
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Usage
    airlock: QueryFacts


# `data` of each event but the last, which is [DONE]; where something goes wrong it is an `ErrorAnswer`.
_CHUNK: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "chat.completion.chunk"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "maxItems": 1},
        "usage": {"type": ["object", "null"]},
        "airlock": {"type": "object"},
    },
}
STREAM: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {
                "event": {"type": "string"},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": _CHUNK},
            },
            "required": ["data"],
        },
        "example": 'data: {"object":"chat.completion.chunk"}\n\n',
    }
}
