"""What is sent and shown of queries, as the OpenAPI document has it. Money is exact, as text."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.server import inline
from orchestrator.server.few import Few
from orchestrator.server.openapi import Moment
from orchestrator.server.paging import Next, make_cursor

Status = Literal["queued", "running", "answered", "limit", "refused", "failed", "cancelled", "interrupted"]

_EXAMPLE: dict[str, Any] = {
    "question": "When did the bell ring?",
    "context": {"text": "The bell rang at nine."},
    "budget_usd": "0.50",
    "timeout_s": 120,
}


class _Given(Few):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewQuery(_Given):
    """One question over one context. What is said here narrows what the tenant may, and never widens it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    question: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    context: inline.Given
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    sub_models: Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], Field(max_length=8)] | None = None
    budget_usd: Annotated[str, Field(pattern=r"^[0-9]{1,7}(\.[0-9]{1,9})?$", examples=["0.50"])] | None = None
    timeout_s: Annotated[float, Field(strict=False, gt=0, le=31_622_400, allow_inf_nan=False)] | None = None
    depth: Annotated[int, Field(ge=0, le=8)] | None = None
    iterations: Annotated[int, Field(ge=1, le=10_000)] | None = None
    answer_schema: Annotated[dict[str, Any], Field(description="a JSON Schema that the answer has to fit")] | None = (
        None
    )


_SUMMARY: dict[str, Any] = {
    "id": "20261126-010203-0123456789",
    "status": "answered",
    "created_at": "2026-11-26T01:02:03.004Z",
    "ended_at": "2026-11-26T01:02:15.006Z",
    "question": "When did the bell ring?",
    "model": "gpt-5-mini",
    "sub_models": ["gpt-5-nano"],
    "backend": "gvisor",
    "isolation": "gvisor",
    "context": {"id": "5e" * 32, "kind": "text", "bytes": 22, "characters": 22},
    "cost_usd": "0.001234",
    "held_usd": "0.00",
    "limit_usd": "0.50",
    "time_limit_s": 120.0,
    "duration_s": 11.9,
    "reason": "",
    "iterations": 2,
    "sub_calls": 1,
    "journal_head": "9a" * 32,
}
_RECORD: dict[str, Any] = {
    "seq": 3,
    "at": "2026-11-26T01:02:04.005Z",
    "type": "cell.started",
    "node": "root",
    "body": {"turn": 1},
    "payloads": {"code": "print(context[:200])"},
}
_SPEND: dict[str, Any] = {
    "limit_usd": "0.50",
    "spent_usd": "0.001234",
    "held_usd": "0.00",
    "models": {"gpt-5-mini": {"calls": 2, "input_tokens": 2100, "output_tokens": 180, "cost_usd": "0.001234"}},
    "nodes": {"root": {"spent_usd": "0.001234", "held_usd": "0.00", "limit_usd": "0.50"}},
}
_PURSE = {"limit_usd": "20.00", "spent_usd": "0.75", "held_usd": "0.00", "left_usd": "19.25"}
_BUDGETS: dict[str, Any] = {
    "query": {"limit_usd": "1.00"},
    "day": {**_PURSE, "resets_at": "2026-11-27T00:00:00Z"},
    "month": {**_PURSE, "limit_usd": "200.00", "left_usd": "199.25", "resets_at": "2026-12-01T00:00:00Z"},
    "minute": {"requests": {"limit": 6000, "used": 12}, "tokens": {"limit": 100_000_000, "used": 24_000}},
    "calls_in_flight": {"limit": 128, "used": 3},
    "queries": {"running": 1, "queued": 0, "limit": 8, "queue_limit": 100},
}


def _shown_as(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class ContextFacts(BaseModel):
    model_config = _shown_as(_SUMMARY["context"])

    id: str
    kind: str
    bytes: int
    characters: int


class QuerySummary(BaseModel):
    """A query in a list. question is cut there; it is null where the policy keeps none. ended_at is null until it is
    closed, which one that was interrupted is not. Money is exact, as text.
    """

    model_config = _shown_as(_SUMMARY)

    id: str
    status: Status
    created_at: Moment
    ended_at: Moment | None
    question: str | None
    model: str | None
    sub_models: list[str]
    backend: str
    isolation: str
    context: ContextFacts
    cost_usd: str
    held_usd: str
    limit_usd: str
    time_limit_s: float | None
    duration_s: float | None
    reason: str
    iterations: int | None
    sub_calls: int | None
    journal_head: str | None


class QueryView(QuerySummary):
    """A query. answer: null where there is none, or none is kept."""

    model_config = _shown_as({**_SUMMARY, "answer": "At nine."})

    answer: str | None


class QueryPage(BaseModel):
    model_config = _shown_as(
        {"queries": [_SUMMARY], "next": make_cursor("queries", _SUMMARY["created_at"], _SUMMARY["id"])}
    )

    queries: list[QuerySummary]
    next: Next


class ModelSpend(BaseModel):
    calls: int
    input_tokens: int
    output_tokens: int
    cost_usd: str


class NodeSpend(BaseModel):
    spent_usd: str
    held_usd: str
    limit_usd: str | None


class Spend(BaseModel):
    model_config = _shown_as(_SPEND)

    limit_usd: str
    spent_usd: str
    held_usd: str
    models: dict[str, ModelSpend]
    nodes: dict[str, NodeSpend]


class Purse(BaseModel):
    limit_usd: str
    spent_usd: str
    held_usd: str
    left_usd: str
    resets_at: Moment


class QueryLimit(BaseModel):
    limit_usd: str


class Used(BaseModel):
    limit: int
    used: int


class Minute(BaseModel):
    requests: Used
    tokens: Used


class QueriesNow(BaseModel):
    running: int
    queued: int
    limit: int
    queue_limit: int


class Budgets(BaseModel):
    model_config = _shown_as(_BUDGETS)

    query: QueryLimit
    day: Purse
    month: Purse
    minute: Minute
    calls_in_flight: Used
    queries: QueriesNow


class RecordView(BaseModel):
    """A record of the query's journal. payloads: those that are kept, as text."""

    model_config = _shown_as(_RECORD)

    seq: int
    at: Moment
    type: str
    node: str
    body: dict[str, Any]
    payloads: dict[str, str]


# One of these is an event; JSON Schema says so of text by what it holds.
RECORDS: dict[str, Any] = {
    "itemSchema": {
        "type": "object",
        "description": "id: the record's number; event: its type; data: the record",
        "properties": {
            "id": {"type": "string"},
            "event": {"type": "string"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": RecordView.model_json_schema(),
            },
        },
        "required": ["data"],
    },
    "example": f"id: {_RECORD['seq']}\nevent: {_RECORD['type']}\ndata: {json.dumps(_RECORD)}\n\n",
}
