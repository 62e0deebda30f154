"""Contexts of a tenant: sent whole, or in pieces that can be gone on with (tus 1.0), listed, looked at, given up.

An upload goes to a file and from there into the store; memory does not grow with it. What is here answers alike for
what is not there and for what is another tenant's, and never waits for what depends on what others have.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from email.utils import format_datetime
from typing import Annotated, Any, Literal, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from orchestrator.core.errors import ContextError
from orchestrator.core.turns import Turns
from orchestrator.server.access import allowed
from orchestrator.server.housekeeping import remove_later
from orchestrator.server.inline import in_turn
from orchestrator.server.openapi import Moment
from orchestrator.server.paging import Cursor, Limit, Next, cut, read_cursor
from orchestrator.server.problems import Problem, documented, not_found
from orchestrator.server.service import Principal, Service, the_service
from orchestrator.server.structure import JsonRoute
from orchestrator.store import holdings
from orchestrator.store.holdings import Held
from orchestrator.store.readers import Encoding
from orchestrator.store.uploads import Busy, Incoming, Kind, Upload, Uploads

T = TypeVar("T")
TUS = "1.0.0"
OFFSET_TYPE = "application/offset+octet-stream"
PIECE = 1 << 20  # bytes that are written at once
_finishing = Turns(4)  # at once, which takes long: apart from contexts within requests, which does not
_EXAMPLE = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"
_UPLOAD = "7d1a4bd8f0c94c25a7e3f51f0c66a0de"

router = APIRouter(prefix="/v1/contexts", tags=["contexts"], route_class=JsonRoute)
Gives = Annotated[Principal, Depends(allowed("query"))]
Reads = Annotated[Principal, Depends(allowed("read"))]


def _named(name: str, what: str, pattern: str, example: str) -> Any:
    """An id in the path. What is no id is as unknown as one of nobody's: the form is told, and refuses nothing."""
    return Path(alias=name, description=what, examples=[example], json_schema_extra={"pattern": pattern})


ContextId = Annotated[str, _named("context", "a context's id", "^[0-9a-f]{64}$", _EXAMPLE)]
UploadId = Annotated[str, _named("upload", "an upload's id", "^[0-9a-f]{32}$", _UPLOAD)]


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

    id: Annotated[str, Field(examples=[_UPLOAD])]
    offset: Annotated[int, Field(examples=[0])]
    length: Annotated[int, Field(examples=[1048576])]
    context: ContextView | None


_ENDS = (403, 422, 429, 503)  # of every route here


def _told(*names: str) -> dict[str, Any]:
    """Headers of an answer, for the document."""
    return {"headers": {name: {"schema": {"type": "string"}} for name in names}}


def _body(media_type: str) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary"}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


# Whole


@router.put(
    "",
    status_code=201,
    response_model=ContextView,
    responses={
        200: {"model": ContextView, "description": "this tenant has it already", **_told("Location")},
        201: {"description": "it is kept", **_told("Location")},
        **documented(400, 408, 413, 415, *_ENDS),
    },
    openapi_extra=_body("application/octet-stream"),
)
async def put_context(
    request: Request, response: Response, principal: Gives, about: Annotated[About, Query()]
) -> ContextView:
    """Keep the body as a context. The same content is the same context, whatever it is called."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "unsupported-encoding", "send the body without a Content-Encoding")
    length = request.headers.get("content-length")
    whole = _uploads(the_service(request)).whole(
        principal.tenant, about.kind, about.encoding, about.name, None if length is None else int(length)
    )
    async with _in_threads(whole) as incoming:
        await _take(request, incoming)
        held, characters, new = await _finish(principal, incoming)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/contexts/{held.id}"
    return _view(held, characters)


# In pieces: tus 1.0.0 with creation, termination and expiration


async def _resumable(
    response: Response, version: Annotated[str, Header(alias="Tus-Resumable", json_schema_extra={"enum": [TUS]})]
) -> None:
    if version != TUS:
        raise Problem(412, "tus-version", f"send Tus-Resumable: {TUS}", headers={"Tus-Version": TUS})
    response.headers["Tus-Resumable"] = TUS


_TUS = [Depends(_resumable)]


def _options() -> Response:
    headers = {"Tus-Resumable": TUS, "Tus-Version": TUS, "Tus-Extension": "creation,termination,expiration"}
    return Response(status_code=204, headers=headers)


@router.options("", status_code=204, response_class=Response)
async def get_context_options(request: Request) -> Response:
    """What of tus there is, and how large an upload may be."""
    response = _options()
    response.headers["Tus-Max-Size"] = str(the_service(request).settings.upload_bytes)
    return response


@router.post(
    "",
    status_code=201,
    response_model=UploadView,
    dependencies=_TUS,
    responses={
        201: {"description": "send the pieces to Location", **_told("Location", "Upload-Expires", "Tus-Resumable")},
        **documented(400, 412, 413, *_ENDS),
    },
)
async def begin_upload(
    request: Request,
    response: Response,
    principal: Gives,
    length: Annotated[int, Header(alias="Upload-Length", ge=1, le=1 << 50, examples=[1048576])],
    metadata: Annotated[
        str, Header(alias="Upload-Metadata", max_length=4096, examples=["kind anNvbmw=,name bWludXRlcw=="])
    ] = "",
) -> UploadView:
    """Begin an upload in pieces. Metadata: kind, name (or filename) and encoding, each value in base64."""
    about = _about(metadata)
    uploads = _uploads(the_service(request))
    upload = await anyio.to_thread.run_sync(
        uploads.begin, principal.tenant, about.kind, about.encoding, about.name, length
    )
    response.headers["Location"] = f"/v1/contexts/uploads/{upload.id}"
    response.headers["Upload-Expires"] = _expires(upload)
    return UploadView(id=upload.id, offset=0, length=length, context=None)


@router.options("/uploads/{upload}", status_code=204, response_class=Response)
async def get_upload_options(upload_id: Annotated[str, Path(alias="upload", examples=[_UPLOAD])]) -> Response:
    """What of tus there is."""
    del upload_id  # of any, alike, whatever its form
    return _options()


@router.head(
    "/uploads/{upload}",
    dependencies=_TUS,
    response_class=Response,
    responses={
        200: {"description": "how far it is", **_told("Upload-Offset", "Upload-Length", "Upload-Expires")},
        **documented(404, 412, *_ENDS),
    },
)
async def get_upload_offset(request: Request, response: Response, principal: Gives, upload_id: UploadId) -> Response:
    """How far an upload is."""
    uploads = _uploads(the_service(request))
    upload = await _find(uploads, principal, upload_id)
    offset = await anyio.to_thread.run_sync(uploads.offset, upload)
    told = {"Upload-Offset": str(offset), "Upload-Length": str(upload.length), "Upload-Expires": _expires(upload)}
    return Response(headers={**told, "Tus-Resumable": TUS})


@router.patch(
    "/uploads/{upload}",
    status_code=204,
    dependencies=_TUS,
    response_class=Response,
    responses={
        204: {"description": "the piece is kept", **_told("Upload-Offset", "Tus-Resumable")},
        **documented(400, 404, 408, 409, 412, 413, 415, 423, *_ENDS),
    },
    openapi_extra=_body(OFFSET_TYPE),
)
async def append_upload(
    request: Request,
    principal: Gives,
    upload_id: UploadId,
    offset: Annotated[int, Header(alias="Upload-Offset", ge=0, le=1 << 50, examples=[0])],
) -> Response:
    """Send the next piece. With the last one the context is made; see GET for what became of it."""
    if request.headers.get("content-type") != OFFSET_TYPE:
        raise Problem(415, "unsupported-media-type", f"send the piece as {OFFSET_TYPE}")
    uploads = _uploads(the_service(request))
    upload = await _find(uploads, principal, upload_id)
    if upload.context is not None:
        raise _elsewhere(upload.length)
    async with _resumed(uploads, upload) as incoming:
        if incoming.offset != offset:
            raise _elsewhere(incoming.offset)
        await _take(request, incoming)
        if incoming.is_complete:
            await _finish(principal, incoming)
        else:
            await anyio.to_thread.run_sync(incoming.sync)
        reached = incoming.offset
    return Response(status_code=204, headers={"Upload-Offset": str(reached), "Tus-Resumable": TUS})


@router.get(
    "/uploads/{upload}",
    response_model=UploadView,
    responses=documented(404, 413, 423, *_ENDS),
)
async def get_upload(request: Request, principal: Gives, upload_id: UploadId) -> UploadView:
    """How far an upload is, and what became of it."""
    service = the_service(request)
    uploads = _uploads(service)
    found = await _find(uploads, principal, upload_id)
    offset = await anyio.to_thread.run_sync(uploads.offset, found)
    if found.context is None and offset == found.length:  # the service ended before it had made the context
        async with _resumed(uploads, found) as incoming:
            await _finish(principal, incoming)
        found = await _find(uploads, principal, upload_id)
    context = await anyio.to_thread.run_sync(_look, service, principal.tenant, found.context or "")
    return UploadView(id=found.id, offset=offset, length=found.length, context=context)


@router.delete(
    "/uploads/{upload}",
    status_code=204,
    dependencies=_TUS,
    response_class=Response,
    responses=documented(404, 412, 423, *_ENDS),
)
async def delete_upload(request: Request, principal: Gives, upload_id: UploadId) -> Response:
    """Give an upload up. The context that became of it stays."""
    uploads = _uploads(the_service(request))
    found = await _find(uploads, principal, upload_id)
    try:
        await anyio.to_thread.run_sync(uploads.drop, found)
    except Busy:
        raise _busy() from None
    return Response(status_code=204, headers={"Tus-Resumable": TUS})


# What there is


@router.get("", response_model=ContextPage, responses=documented(*_ENDS))
async def list_contexts(request: Request, principal: Reads, limit: Limit = 50, cursor: Cursor = None) -> ContextPage:
    """The tenant's contexts, the newest first."""
    after = None if cursor is None else read_cursor("contexts", cursor)
    db = the_service(request).platform.db
    found = await anyio.to_thread.run_sync(
        lambda: db.look(lambda tx: holdings.listed(tx, principal.tenant, limit + 1, after))
    )
    shown, following = cut("contexts", found, limit, lambda held: (held.at, held.id))
    return ContextPage(contexts=[_view(held) for held in shown], next=following)


@router.get("/{context}", response_model=ContextView, responses=documented(404, *_ENDS))
async def get_context(request: Request, principal: Reads, context_id: ContextId) -> ContextView:
    """One of the tenant's contexts. What it holds is not given out again."""
    found = await anyio.to_thread.run_sync(_look, the_service(request), principal.tenant, context_id)
    if found is None:
        raise not_found("context")
    return found


@router.delete("/{context}", status_code=204, response_class=Response, responses=documented(404, *_ENDS))
async def delete_context(request: Request, principal: Gives, context_id: ContextId) -> Response:
    """Have it no more. A query that began with it goes on; one that has ended cannot be replayed any more."""
    service = the_service(request)
    if not re.fullmatch("[0-9a-f]{64}", context_id):
        raise not_found("context")
    if not await service.platform.db.write(lambda tx: holdings.give_up(tx, principal.tenant, context_id)):
        raise not_found("context")
    remove_later(service, context_id)
    return Response(status_code=204)


# Parts of these


def _uploads(service: Service) -> Uploads:
    return Uploads(service.platform.db, service.home, service.settings, anyio.from_thread.check_cancelled)


@asynccontextmanager
async def _in_threads(manager: AbstractContextManager[T]) -> AsyncGenerator[T]:
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
async def _resumed(uploads: Uploads, upload: Upload) -> AsyncGenerator[Incoming]:
    """Raises Problem. What can never become a context is given up."""
    try:
        async with _in_threads(uploads.resumed(upload)) as incoming:
            yield incoming
    except Busy:
        raise _busy() from None
    except _Unfit:
        with suppress(Busy):
            await anyio.to_thread.run_sync(uploads.drop, upload)
        raise


class _Unfit(Problem):
    """The bytes are not what they were said to be."""


async def _take(request: Request, incoming: Incoming) -> None:
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


async def _finish(principal: Principal, incoming: Incoming) -> tuple[Held, int, bool]:
    """How the tenant has the context, its characters, and whether it is new. Raises Problem, CountExceeded."""
    try:
        made, held, new = await in_turn(_finishing, principal.tenant, incoming.finish)
    except ContextError as error:
        text = str(error).replace("use --encoding ", "use encoding=").replace("or --encoding ", "or encoding=")
        raise _Unfit(422, error.kind, text.replace("or rename it .txt", "or send it as kind=text")) from None
    return held, made.chars, new


async def _find(uploads: Uploads, principal: Principal, upload_id: str) -> Upload:
    if not re.fullmatch("[0-9a-f]{32}", upload_id):
        raise not_found("upload")
    found = await anyio.to_thread.run_sync(uploads.find, principal.tenant, upload_id)
    if found is None:
        raise not_found("upload")
    return found


def _look(service: Service, tenant: str, context_id: str) -> ContextView | None:
    if not re.fullmatch("[0-9a-f]{64}", context_id):
        return None
    held = service.platform.db.look(lambda tx: holdings.find(tx, tenant, context_id))
    return held and _view(held, service.platform.contexts.open(held.id).chars)


def _view(held: Held, characters: int | None = None) -> ContextView:
    fields = {"id": held.id, "kind": held.kind, "bytes": held.bytes, "name": held.name, "created_at": held.at}
    return ContextView.model_validate({**fields, "characters": characters})


def _about(metadata: str) -> About:
    """Raises Problem. What other clients send besides is left out."""
    try:
        pairs = [pair.strip().partition(" ")[::2] for pair in metadata.split(",") if pair.strip()]
        told = {key: base64.b64decode(value, validate=True).decode() for key, value in pairs}
        told.setdefault("name", told.get("filename", ""))
        return About.model_validate({key: told[key] for key in told.keys() & About.model_fields.keys()})
    except (binascii.Error, UnicodeError):
        raise Problem(400, "bad-request", "Upload-Metadata is not `key base64, key base64`") from None
    except ValidationError as error:
        fault = error.errors()[0]
        raise Problem(422, "bad-request", f"Upload-Metadata: {fault['loc'][0]}: {fault['msg']}") from None


def _elsewhere(offset: int) -> Problem:
    text = f"the upload is at offset {offset}: send what comes there"
    return Problem(409, "other-offset", text, headers={"Upload-Offset": str(offset), "Tus-Resumable": TUS})


def _busy() -> Problem:
    return Problem(423, "upload-busy", "another request has this upload; wait for it to end")


def _expires(upload: Upload) -> str:
    return format_datetime(upload.expires, usegmt=True)
