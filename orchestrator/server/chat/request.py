"""A chat completion as OpenAI's clients ask for it: what is taken, what has no effect, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from orchestrator.server.few import Few, few

PREFIX = "rlm/"  # of a model's name
Amount = Annotated[str, Field(pattern=r"^[0-9]{1,7}(\.[0-9]{1,9})?$", examples=["0.50"])]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Word = Annotated[str, Field(max_length=1024)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class Given(Few):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Given):
    type: Literal["text"]
    text: str


class RefusalPart(Given):
    type: Literal["refusal"]
    refusal: str


class FileId(Given):
    """file_id: of a context that the tenant has."""

    file_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    filename: Word | None = None


class FilePart(Given):
    type: Literal["file"]
    file: FileId


_PARTS = {"text": TextPart, "refusal": RefusalPart, "file": FilePart}


def _part(given: Any) -> str | None:
    kind = cast("dict[str, Any]", given).get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"as {kind}" if isinstance(kind, str) and kind in _PARTS else None


Part = Annotated[
    Annotated[TextPart, Tag("as text")]
    | Annotated[RefusalPart, Tag("as refusal")]
    | Annotated[FilePart, Tag("as file")],
    Discriminator(
        _part,
        custom_error_type="part",
        custom_error_message="has to be of type text, or of type file with the file_id of a context",
    ),
]


def _content(given: Any) -> str | None:
    return "as words" if isinstance(given, str) else "as parts" if isinstance(given, list) else None


Content = Annotated[
    Annotated[str, Tag("as words")] | Annotated[list[Part], Field(max_length=1000, fail_fast=True), Tag("as parts")],
    Discriminator(
        _content, custom_error_type="content", custom_error_message="has to be a text, or a list of parts of it"
    ),
]
TAG = "as "  # what begins like this in the place of a fault is none of the names that were sent


class ChatMessage(Given):
    """An answer of ours may be sent back, with what OpenAI's clients add to it (`parsed`) and others call its steps."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    parsed: Any | None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None


class JsonSchema(Given):
    name: Word
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextFormat(Given):
    type: Literal["text"]


class JsonFormat(Given):
    type: Literal["json_object"]


class SchemaFormat(Given):
    type: Literal["json_schema"]
    json_schema: JsonSchema


_FORMATS = {"text": TextFormat, "json_object": JsonFormat, "json_schema": SchemaFormat}


def _format(given: Any) -> str | None:
    kind = cast("dict[str, Any]", given).get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"as {kind}" if isinstance(kind, str) and kind in _FORMATS else None


Format = Annotated[
    Annotated[TextFormat, Tag("as text")]
    | Annotated[JsonFormat, Tag("as json_object")]
    | Annotated[SchemaFormat, Tag("as json_schema")],
    Discriminator(
        _format,
        custom_error_type="format",
        custom_error_message="has to be of type text, json_object or json_schema",
    ),
]


class StreamOptions(Given):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Ours(Given):
    """What OpenAI's API has no word for. It narrows what the tenant may. The SDK sends it as `extra_body`."""

    budget_usd: Amount | None = None
    timeout_s: Annotated[float, Field(gt=0, le=31_622_400, allow_inf_nan=False)] | None = None
    depth: Annotated[int, Field(ge=0, le=8)] | None = None
    sub_models: Annotated[list[Name], Field(max_length=8)] | None = None


_EXAMPLE: dict[str, Any] = {
    "model": "rlm/gpt-5-mini",
    "messages": [
        {"role": "user", "content": "The minutes of March: (a text of any length)"},
        {"role": "user", "content": "When did the bell ring?"},
    ],
    "airlock": {"budget_usd": "0.50"},
}


class ChatRequest(Given):
    """A conversation, whose last user message is the question. Null is as good as not there."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    airlock: Ours | None = None

    # Taken, without effect
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(partial(few, most=1000))] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    top_logprobs: int | None = None
    reasoning_effort: Word | None = None
    verbosity: Word | None = None
    service_tier: Word | None = None
    store: bool | None = None
    user: Word | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Word | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None

    # Taken where they ask for nothing; see NOT_TAKEN
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    stop: Nothing | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None


NOT_TAKEN = {
    "n": "a query has one answer",
    "logprobs": "an answer has no log probabilities",
    "tools": "a query's code runs in its sandbox, and nowhere else",
    "tool_choice": "a query's code runs in its sandbox, and nowhere else",
    "tool_calls": "a query's code runs in its sandbox, and nowhere else",
    "functions": "a query's code runs in its sandbox, and nowhere else",
    "function_call": "a query's code runs in its sandbox, and nowhere else",
    "modalities": "an answer is text",
    "audio": "an answer is text",
    "stop": "an answer is given whole",
    "prediction": "an answer is not predicted",
    "moderation": "there is no moderation here",
    "web_search_options": "a sandbox has no network",
}
