"""Contexts of a tenant: sent whole, listed, looked at, given up. In pieces they come through `uploads`.

What is here answers alike for what is not there and for what is another tenant's, and never waits for what depends on
what others have.
"""

from __future__ import annotations

import re
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Response
from starlette.requests import Request

from orchestrator.server.access import allowed
from orchestrator.server.context_shapes import ENDS, About, ContextId, ContextPage, ContextView, body, told
from orchestrator.server.housekeeping import remove_later
from orchestrator.server.paging import Cursor, Limit, cut, read_cursor
from orchestrator.server.problems import documented, not_found
from orchestrator.server.service import Principal, the_service
from orchestrator.server.structure import JsonRoute
from orchestrator.server.taking import finish, in_threads, look, take, uploads_of, view_of
from orchestrator.store import holdings

router = APIRouter(prefix="/v1/contexts", tags=["contexts"], route_class=JsonRoute)
Gives = Annotated[Principal, Depends(allowed("query"))]
Reads = Annotated[Principal, Depends(allowed("read"))]


@router.put(
    "",
    status_code=201,
    response_model=ContextView,
    responses={
        200: {"model": ContextView, "description": "this tenant has it already", **told("Location")},
        201: {"description": "it is kept", **told("Location")},
        **documented(400, 408, 413, 415, *ENDS),
    },
    openapi_extra=body("application/octet-stream"),
)
async def put_context(
    request: Request, response: Response, principal: Gives, about: Annotated[About, Query()]
) -> ContextView:
    """Keep the body as a context. The same content is the same context, whatever it is called."""
    length = request.headers.get("content-length")
    whole = uploads_of(the_service(request)).whole(
        principal.tenant, about.kind, about.encoding, about.name, None if length is None else int(length)
    )
    async with in_threads(whole) as incoming:
        await take(request, incoming)
        held, characters, new = await finish(principal, incoming)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/contexts/{held.id}"
    return view_of(held, characters)


@router.get("", response_model=ContextPage, responses=documented(*ENDS))
async def list_contexts(request: Request, principal: Reads, limit: Limit = 50, cursor: Cursor = None) -> ContextPage:
    """The tenant's contexts, the newest first."""
    after = None if cursor is None else read_cursor("contexts", cursor)
    db = the_service(request).platform.db
    found = await anyio.to_thread.run_sync(
        lambda: db.look(lambda tx: holdings.listed(tx, principal.tenant, limit + 1, after))
    )
    shown, following = cut("contexts", found, limit, lambda held: (held.at, held.id))
    return ContextPage(contexts=[view_of(held) for held in shown], next=following)


@router.get("/{context}", response_model=ContextView, responses=documented(404, *ENDS))
async def get_context(request: Request, principal: Reads, context_id: ContextId) -> ContextView:
    """One of the tenant's contexts. What it holds is not given out again."""
    found = await anyio.to_thread.run_sync(look, the_service(request), principal.tenant, context_id)
    if found is None:
        raise not_found("context")
    return found


@router.delete("/{context}", status_code=204, response_class=Response, responses=documented(404, *ENDS))
async def delete_context(request: Request, principal: Gives, context_id: ContextId) -> Response:
    """Have it no more. A query that began with it goes on; one that has ended cannot be replayed any more."""
    service = the_service(request)
    if not re.fullmatch("[0-9a-f]{64}", context_id):
        raise not_found("context")
    if not await service.platform.db.write(lambda tx: holdings.give_up(tx, principal.tenant, context_id)):
        raise not_found("context")
    remove_later(service, context_id)
    return Response(status_code=204)
