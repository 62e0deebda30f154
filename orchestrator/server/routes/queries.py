"""Queries: ask, look, watch, cancel; and what they cost."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response

from orchestrator.core.events import Recorded
from orchestrator.core.turns import Turns
from orchestrator.core.units import NANO
from orchestrator.server import inline, queries_view, schemas
from orchestrator.server.access import allowed
from orchestrator.server.desk import Ask, Asked
from orchestrator.server.lasting import while_let_in
from orchestrator.server.paging import Cursor, Limit
from orchestrator.server.problems import documented
from orchestrator.server.query_shapes import RECORDS, Budgets, NewQuery, QueryPage, QueryView, Spend, Status
from orchestrator.server.service import Principal, Service, of_request
from orchestrator.server.streaming import EventStream, event, while_there
from orchestrator.server.structure import JsonRoute

T = TypeVar("T")
router = APIRouter(prefix="/v1", tags=["queries"], route_class=JsonRoute)
MOST_WAIT_S = 300  # that a request waits for a query's end
_reads = Turns(8)  # at once, of all tenants
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?([0-9]{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)  # RFC 7240

# What is no id is as unknown as one of nobody's: the form is told, and nothing is refused by it.
QueryId = Annotated[
    str,
    Path(
        description="a query's id",
        examples=["20261126-010203-0123456789"],
        json_schema_extra={"pattern": "^[0-9]{8}-[0-9]{6}-[0-9a-f]{10}$"},
    ),
]
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
        Header(
            min_length=1,
            max_length=255,
            description="repeat it to get the query of before, not another one",
            examples=["minutes-of-march-1"],
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        Header(
            max_length=255,
            description=f"`wait=30`: answer when it has ended, or after so many seconds, {MOST_WAIT_S} at most",
            examples=["wait=30"],
        ),
    ] = None,
) -> dict[str, Any]:
    """Ask a question. It runs on whether or not anybody waits; Location says where it is.

    Of the body at most 256 KiB may lie outside of its strings, and of `answer_schema` 64 KiB as JSON. A `json` context
    with more structure, or very many documents, can be given by its id: see PUT /v1/contexts, kinds json and jsonl.
    """
    if new.answer_schema is not None:
        await schemas.checked(principal, "answer_schema", new.answer_schema)
    body = await request.body()
    # First of all: its context may have been deleted since.
    asked = await service.desk.before(principal, idempotency_key, body)
    if asked is None:
        asked = await _asked(service, principal, new, idempotency_key, body)
    response.headers["Location"] = f"/v1/queries/{asked.id}"
    if asked.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    if wait := _WAIT.search(prefer or ""):
        seconds = min(int(wait[1]), MOST_WAIT_S)
        response.headers["Preference-Applied"] = f"wait={seconds}"
        async with while_there(request.receive), while_let_in(request):  # the query goes on without its client
            await service.under_way.ended(asked.id, seconds)
    shown = await _view(service, principal, asked.id)
    if (wait or asked.replayed) and shown["status"] not in ("queued", "running", "interrupted"):
        response.status_code = 200
    return shown


async def _asked(service: Service, principal: Principal, new: NewQuery, key: str | None, body: bytes) -> Asked:
    context = await inline.stored(service, principal, new.context)
    return await service.desk.ask(
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
            idempotency=key,
            fingerprint=body,
        ),
    )


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
        return {"queries": queries_view.summaries(tx, service.books, listed), "next": after}

    return await looked(service, principal, read)


@router.get("/queries/{query}", response_model=QueryView, responses=documented(403, 404, 422, 429, 503))
async def get_query(service: The, principal: Reads, query: QueryId) -> dict[str, Any]:
    """How far it is, or how it ended."""
    return await _view(service, principal, query)


async def _view(service: Service, principal: Principal, query: str) -> dict[str, Any]:
    def read(tx: queries_view.Connection) -> dict[str, Any]:
        found = own(tx, service, principal, query)
        return queries_view.view(tx, service.books, found, service.under_way.account(query))

    return await looked(service, principal, read)


async def looked(service: Service, principal: Principal, read: Callable[[queries_view.Connection], T]) -> T:
    """What `read` finds, when the tenant has its turn: everybody is let in by the threads that it would have all of."""
    return await inline.in_turn(_reads, principal.tenant, partial(service.platform.db.look, read))


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

    return await looked(service, principal, read)


@router.get(
    "/queries/{query}/events",
    response_class=Response,
    responses={
        200: {
            "description": "records of the journal, as they are written",
            "content": {"text/event-stream": RECORDS},
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
        int | None, Header(ge=-1, le=2**53 - 1, description="likewise, as browsers send it", examples=[7])
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
    found = await looked(service, principal, read)
    running, queued = service.desk.of(principal.tenant)
    now = {"running": running, "queued": queued, "limit": policy.tenant.queries_at_once}
    return {**found, "queries": {**now, "queue_limit": service.settings.queue_tenant}}
