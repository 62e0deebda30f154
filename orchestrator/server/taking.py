"""How a body becomes a context: into a file, in threads, and from there into the store; memory stays as it is."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from orchestrator.core.errors import ContextError
from orchestrator.core.turns import Turns
from orchestrator.server.context_shapes import ContextView
from orchestrator.server.inline import in_turn
from orchestrator.server.problems import Problem, not_found
from orchestrator.server.service import Principal, Service
from orchestrator.store import holdings
from orchestrator.store.holdings import Held
from orchestrator.store.uploads import Busy, Incoming, Upload, Uploads

T = TypeVar("T")
PIECE = 1 << 20  # bytes that are written at once
_finishing = Turns(4)  # at once, which takes long: apart from contexts within requests, which does not


def uploads_of(service: Service) -> Uploads:
    return Uploads(service.platform.db, service.home, service.settings, anyio.from_thread.check_cancelled)


@asynccontextmanager
async def in_threads(manager: AbstractContextManager[T]) -> AsyncGenerator[T]:
    """One that blocks. It is left in any case, whoever was cancelled."""
    entered = await anyio.to_thread.run_sync(manager.__enter__)
    try:
        yield entered
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(manager.__exit__, type(error), error, error.__traceback__)
        raise
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(manager.__exit__, None, None, None)


@asynccontextmanager
async def resumed(uploads: Uploads, upload: Upload) -> AsyncGenerator[Incoming]:
    """Raises Problem. What can never become a context is given up."""
    try:
        async with in_threads(uploads.resumed(upload)) as incoming:
            yield incoming
    except Busy:
        raise busy() from None
    except _Unfit:
        with suppress(Busy):
            await anyio.to_thread.run_sync(uploads.drop, upload)
        raise


class _Unfit(Problem):
    """The bytes are not what they were said to be."""


async def take(request: Request, incoming: Incoming) -> None:
    """The request's body. What has come when it is cut short is kept. Raises Problem, CountExceeded, StoreError."""
    come = bytearray()
    try:
        async for piece in request.stream():
            come += piece
            if len(come) >= PIECE:
                full, come = bytes(come), bytearray()
                await anyio.to_thread.run_sync(incoming.write, full)
    except ClientDisconnect:
        raise Problem(400, "cut-short", "the body ended early") from None
    finally:
        with anyio.CancelScope(shield=True):
            if come:
                await anyio.to_thread.run_sync(incoming.write, bytes(come))


async def finish(principal: Principal, incoming: Incoming) -> tuple[Held, int, bool]:
    """How the tenant has the context, its characters, and whether it is new. Raises Problem, CountExceeded."""
    try:
        made, held, new = await in_turn(_finishing, principal.tenant, incoming.finish)
    except ContextError as error:
        text = str(error).replace("use --encoding ", "use encoding=").replace("or --encoding ", "or encoding=")
        raise _Unfit(422, error.kind, text.replace("or rename it .txt", "or send it as kind=text")) from None
    return held, made.chars, new


async def find_upload(uploads: Uploads, principal: Principal, upload_id: str) -> Upload:
    if not re.fullmatch("[0-9a-f]{32}", upload_id):
        raise not_found("upload")
    found = await anyio.to_thread.run_sync(uploads.find, principal.tenant, upload_id)
    if found is None:
        raise not_found("upload")
    return found


def look(service: Service, tenant: str, context_id: str) -> ContextView | None:
    if not re.fullmatch("[0-9a-f]{64}", context_id):
        return None
    held = service.platform.db.look(lambda tx: holdings.find(tx, tenant, context_id))
    return held and view_of(held, service.platform.contexts.open(held.id).chars)


def view_of(held: Held, characters: int | None = None) -> ContextView:
    fields = {"id": held.id, "kind": held.kind, "bytes": held.bytes, "name": held.name, "created_at": held.at}
    return ContextView.model_validate({**fields, "characters": characters})


def busy() -> Problem:
    return Problem(423, "upload-busy", "another request has this upload; wait for it to end")
