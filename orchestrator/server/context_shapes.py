"""What is sent and shown of contexts and uploads, as the OpenAPI document has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.server.openapi import Moment
from orchestrator.server.paging import Next
from orchestrator.store.readers import Encoding
from orchestrator.store.uploads import Kind

_EXAMPLE = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"
UPLOAD = "7d1a4bd8f0c94c25a7e3f51f0c66a0de"


def _named(name: str, what: str, pattern: str, example: str) -> Any:
    """An id in the path. What is no id is as unknown as one of nobody's: the form is told, and refuses nothing."""
    return Path(alias=name, description=what, examples=[example], json_schema_extra={"pattern": pattern})


ContextId = Annotated[str, _named("context", "a context's id", "^[0-9a-f]{64}$", _EXAMPLE)]
UploadId = Annotated[str, _named("upload", "an upload's id", "^[0-9a-f]{32}$", UPLOAD)]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name has printable characters only")
    return name


class About(BaseModel):
    """What is sent. name: for display alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Annotated[Kind, Field(description="jsonl: one JSON value a line")] = "text"
    name: Annotated[str, Field(max_length=255, examples=["minutes of March"]), AfterValidator(_printable)] = ""
    encoding: Annotated[Encoding, Field(description="replace: UTF-8, what is none becomes U+FFFD")] = "utf-8"


class ContextView(BaseModel):
    """A context. bytes: of it as UTF-8. characters: null in a list."""

    id: Annotated[str, Field(examples=[_EXAMPLE])]
    kind: Literal["text", "documents", "json", "jsonl"]
    bytes: Annotated[int, Field(examples=[1048576])]
    characters: Annotated[int | None, Field(examples=[1048576])]
    name: Annotated[str, Field(examples=["minutes of March"])]
    created_at: Moment


class ContextPage(BaseModel):
    contexts: list[ContextView]
    next: Next


class UploadView(BaseModel):
    """offset: bytes that have come, of length. context: what became of it."""

    id: Annotated[str, Field(examples=[UPLOAD])]
    offset: Annotated[int, Field(examples=[0])]
    length: Annotated[int, Field(examples=[1048576])]
    context: ContextView | None


ENDS = (403, 422, 429, 503)  # of every route here


def told(*names: str) -> dict[str, Any]:
    """Headers of an answer, for the document."""
    return {"headers": {name: {"schema": {"type": "string"}} for name in names}}


def body(media_type: str) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary"}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
