"""Queries: ask, look, watch, cancel; and what they cost."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.events import Recorded
from orchestrator.core.units import NANO
from orchestrator.server import inline, queries_view, schemas
from orchestrator.server.access import allowed
from orchestrator.server.desk import Ask
from orchestrator.server.few import Few
from orchestrator.server.lasting import while_let_in
from orchestrator.server.openapi import Moment
from orchestrator.server.paging import NEXT, Cursor, Limit, make_cursor
from orchestrator.server.problems import documented
from orchestrator.server.service import Principal, Service, of_request
from orchestrator.server.streaming import EventStream, event
from orchestrator.server.structure import JsonRoute

router = APIRouter(prefix="/v1", tags=["queries"], route_class=JsonRoute)
MOST_WAIT_S = 300  # that a request waits for a query's end
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?([0-9]{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)  # RFC 7240

Status = Literal["queued", "running", "answered", "limit", "refused", "failed", "cancelled", "interrupted"]
# What is no id is as unknown as one of nobody's: the form is told, and nothing is refused by it.
QueryId = Annotated[
    str,
    Path(
        description="a query's id",
        examples=["20261126-010203-0123456789"],
        json_schema_extra={"pattern": "^[0-9]{8}-[0-9]{6}-[0-9a-f]{10}$"},
    ),
]
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
    """A query in a list. question is cut there; it is null where the policy keeps none. Money is exact, as text."""

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
    next: str | None = Field(description=NEXT)


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
_STREAM: dict[str, Any] = {
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
}
_ASKED: dict[str, Any] = {
    "headers": {
        "Location": {"schema": {"type": "string"}, "description": "where the query is"},
        "Idempotency-Replayed": {"schema": {"const": "true"}, "description": "it was asked before, under this key"},
        "Preference-Applied": {"schema": {"type": "string"}, "description": "what of Prefer was heeded"},
    }
}
Asks = Annotated[Principal, Depends(allowed("query"))]
Reads = Annotated[Principal, Depends(allowed("read"))]
The = Annotated[Service, Depends(of_request)]


@router.post(
    "/queries",
    status_code=202,
    response_model=QueryView,
    responses={
        200: {
            "model": QueryView,
            "description": "it has ended: within the time to wait, or when it was asked before",
            **_ASKED,
        },
        202: {"description": "it is taken on", **_ASKED},
        **documented(400, 402, 403, 404, 409, 413, 422, 429, 503),
    },
)
async def ask_query(
    request: Request,
    response: Response,
    service: The,
    principal: Asks,
    new: NewQuery,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="repeat it to get the query of before, not another one"),
    ] = None,
    prefer: Annotated[
        str | None,
        Header(
            max_length=255,
            description=f"`wait=30`: answer when it has ended, or after so many seconds, {MOST_WAIT_S} at most",
        ),
    ] = None,
) -> dict[str, Any]:
    """Ask a question. It runs on whether or not anybody waits; Location says where it is.

    Of the body at most 256 KiB may lie outside of its strings, and of `answer_schema` 64 KiB as JSON. A `json` context
    with more structure, or very many documents, can be given by its id: see PUT /v1/contexts, kinds json and jsonl.
    """
    if new.answer_schema is not None:
        await schemas.checked(principal, "answer_schema", new.answer_schema)
    context = await inline.stored(service, principal, new.context)
    asked = await service.desk.ask(
        principal,
        Ask(
            question=new.question,
            context=context,
            model=new.model,
            sub_models=new.sub_models,
            budget=None if new.budget_usd is None else int(Decimal(new.budget_usd) * NANO),
            timeout_ms=None if new.timeout_s is None else max(1, int(new.timeout_s * 1000)),
            depth=new.depth,
            iterations=new.iterations,
            answer_schema=new.answer_schema,
            idempotency=idempotency_key,
            fingerprint=await request.body(),
        ),
    )
    response.headers["Location"] = f"/v1/queries/{asked.id}"
    if asked.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    if wait := _WAIT.search(prefer or ""):
        seconds = min(int(wait[1]), MOST_WAIT_S)
        response.headers["Preference-Applied"] = f"wait={seconds}"
        async with while_let_in(request):
            await service.under_way.ended(asked.id, seconds)
    shown = await _view(service, principal, asked.id)
    if (wait or asked.replayed) and shown["status"] not in ("queued", "running", "interrupted"):
        response.status_code = 200
    return shown


@router.get("/queries", response_model=QueryPage, responses=documented(403, 422, 429, 503))
async def list_queries(
    service: The,
    principal: Reads,
    limit: Limit = 50,
    cursor: Cursor = None,
    status: Status | None = None,
) -> dict[str, Any]:
    """The tenant's queries, the newest first."""

    def read(tx: queries_view.Connection) -> dict[str, Any]:
        listed, after = queries_view.page(tx, principal.tenant, limit, cursor, status)
        return {"queries": [queries_view.summary(tx, service.books, query) for query in listed], "next": after}

    return await anyio.to_thread.run_sync(service.platform.db.look, read)


@router.get("/queries/{query}", response_model=QueryView, responses=documented(403, 404, 422, 429, 503))
async def get_query(service: The, principal: Reads, query: QueryId) -> dict[str, Any]:
    """How far it is, or how it ended."""
    return await _view(service, principal, query)


async def _view(service: Service, principal: Principal, query: str) -> dict[str, Any]:
    def read(tx: queries_view.Connection) -> dict[str, Any]:
        found = own(tx, service, principal, query)
        return queries_view.view(tx, service.books, found, service.under_way.account(query))

    return await anyio.to_thread.run_sync(service.platform.db.look, read)


def own(tx: queries_view.Connection, service: Service, principal: Principal, query: str) -> queries_view.Listed:
    """The tenant's query. Raises Problem, alike for one that is not there and for another tenant's."""
    found = queries_view.find(tx, query)
    service.require_own(principal, found.tenant if found else None)
    assert found
    return found


@router.post(
    "/queries/{query}/cancel", status_code=202, response_model=QueryView, responses=documented(403, 404, 422, 429, 503)
)
async def cancel_query(service: The, principal: Asks, query: QueryId) -> dict[str, Any]:
    """End it, wherever it is. One that has ended stays as it is."""
    await anyio.to_thread.run_sync(
        service.platform.db.look, partial(own, service=service, principal=principal, query=query)
    )
    await service.desk.cancel(principal.tenant, query)
    return await _view(service, principal, query)


@router.get("/queries/{query}/spend", response_model=Spend, responses=documented(403, 404, 422, 429, 503))
async def get_spend(service: The, principal: Reads, query: QueryId) -> dict[str, Any]:
    """What it has cost so far, and what it may."""

    def read(tx: queries_view.Connection) -> dict[str, Any]:
        return queries_view.spend(tx, own(tx, service, principal, query))

    return await anyio.to_thread.run_sync(service.platform.db.look, read)


@router.get(
    "/queries/{query}/events",
    response_class=Response,
    responses={
        200: {
            "description": "records of the journal, as they are written",
            "content": {"text/event-stream": _STREAM},
        },
        204: {"description": "it has ended, and there is nothing after that record"},
        **documented(403, 404, 422, 429, 503),
    },
)
async def stream_events(
    service: The,
    principal: Reads,
    query: QueryId,
    after: Annotated[
        int, Query(ge=-1, le=2**53 - 1, description="the number of the last record that is not wanted")
    ] = -1,
    last_event_id: Annotated[
        int | None, Header(ge=-1, le=2**53 - 1, description="likewise, as browsers send it")
    ] = None,
) -> Response:
    """Watch it: each record of its journal as a server-sent event, to the one that closes it."""
    after = after if last_event_id is None else last_event_id
    ended = await anyio.to_thread.run_sync(service.platform.db.look, partial(_last, service, principal, query))
    if ended is not None and after >= ended:
        return Response(status_code=204)
    service.feed.require_room(principal.tenant)
    return EventStream(_events(service, principal.tenant, query, after))


def _last(service: Service, principal: Principal, query: str, tx: queries_view.Connection) -> int | None:
    """The number of the record that closed it."""
    found = own(tx, service, principal, query)
    return queries_view.last_number(tx, found)


async def _events(service: Service, tenant: str, query: str, after: int) -> AsyncGenerator[bytes]:
    with service.feed.stream(tenant):
        yield b"retry: 1000\n\n"
        async for record in service.feed.follow(tenant, query, after):
            yield event(record.type, shown(record), record.seq)


def shown(record: Recorded) -> dict[str, Any]:
    """`RecordView`: a record as the service gives it to those whose it is."""
    return {
        "seq": record.seq,
        "at": record.at,
        "type": record.type,
        "node": record.node,
        "body": record.body,
        "payloads": record.payloads,
    }


@router.get("/budgets", response_model=Budgets, responses=documented(403, 429, 503))
async def get_budgets(service: The, principal: Reads) -> dict[str, Any]:
    """What the tenant may spend, has spent and holds."""
    policy = await service.desk.policy_of(principal.tenant)
    read = partial(queries_view.budgets, tenant=principal.tenant, policy=policy, at=datetime.now(UTC))
    found = await anyio.to_thread.run_sync(service.platform.db.look, read)
    running, queued = service.desk.of(principal.tenant)
    now = {"running": running, "queued": queued, "limit": policy.tenant.queries_at_once}
    return {**found, "queries": {**now, "queue_limit": service.settings.queue_tenant}}
