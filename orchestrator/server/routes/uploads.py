"""Contexts in pieces that can be gone on with: tus 1.0.0, with creation, termination and expiration.

As with contexts, what is another tenant's is as what never was.
"""

from __future__ import annotations

import base64
import binascii
from email.utils import format_datetime
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Path, Response
from pydantic import ValidationError
from starlette.requests import Request

from orchestrator.server.context_shapes import ENDS, UPLOAD, About, UploadId, UploadView, body, told
from orchestrator.server.problems import Problem, documented
from orchestrator.server.routes.contexts import Gives
from orchestrator.server.service import the_service
from orchestrator.server.structure import JsonRoute
from orchestrator.server.taking import busy, find_upload, finish, look, resumed, take, uploads_of
from orchestrator.store.uploads import Busy, Upload

TUS = "1.0.0"
OFFSET_TYPE = "application/offset+octet-stream"

router = APIRouter(prefix="/v1/contexts", tags=["contexts"], route_class=JsonRoute)


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
        201: {"description": "send the pieces to Location", **told("Location", "Upload-Expires", "Tus-Resumable")},
        **documented(400, 412, 413, *ENDS),
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
    uploads = uploads_of(the_service(request))
    upload = await anyio.to_thread.run_sync(
        uploads.begin, principal.tenant, about.kind, about.encoding, about.name, length
    )
    response.headers["Location"] = f"/v1/contexts/uploads/{upload.id}"
    response.headers["Upload-Expires"] = _expires(upload)
    return UploadView(id=upload.id, offset=0, length=length, context=None)


@router.options("/uploads/{upload}", status_code=204, response_class=Response)
async def get_upload_options(upload_id: Annotated[str, Path(alias="upload", examples=[UPLOAD])]) -> Response:
    """What of tus there is."""
    del upload_id  # of any, alike, whatever its form
    return _options()


@router.head(
    "/uploads/{upload}",
    dependencies=_TUS,
    response_class=Response,
    responses={
        200: {"description": "how far it is", **told("Upload-Offset", "Upload-Length", "Upload-Expires")},
        **documented(404, 412, *ENDS),
    },
)
async def get_upload_offset(request: Request, response: Response, principal: Gives, upload_id: UploadId) -> Response:
    """How far an upload is."""
    uploads = uploads_of(the_service(request))
    upload = await find_upload(uploads, principal, upload_id)
    offset = await anyio.to_thread.run_sync(uploads.offset, upload)
    told = {"Upload-Offset": str(offset), "Upload-Length": str(upload.length), "Upload-Expires": _expires(upload)}
    return Response(headers={**told, "Tus-Resumable": TUS})


@router.patch(
    "/uploads/{upload}",
    status_code=204,
    dependencies=_TUS,
    response_class=Response,
    responses={
        204: {"description": "the piece is kept", **told("Upload-Offset", "Tus-Resumable")},
        **documented(400, 404, 408, 409, 412, 413, 415, 423, *ENDS),
    },
    openapi_extra=body(OFFSET_TYPE),
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
    uploads = uploads_of(the_service(request))
    upload = await find_upload(uploads, principal, upload_id)
    if upload.context is not None:
        raise _elsewhere(upload.length)
    async with resumed(uploads, upload) as incoming:
        if incoming.offset != offset:
            raise _elsewhere(incoming.offset)
        await take(request, incoming)
        if incoming.is_complete:
            await finish(principal, incoming)
        else:
            await anyio.to_thread.run_sync(incoming.sync)
        reached = incoming.offset
    return Response(status_code=204, headers={"Upload-Offset": str(reached), "Tus-Resumable": TUS})


@router.get(
    "/uploads/{upload}",
    response_model=UploadView,
    responses=documented(404, 413, 423, *ENDS),
)
async def get_upload(request: Request, principal: Gives, upload_id: UploadId) -> UploadView:
    """How far an upload is, and what became of it."""
    service = the_service(request)
    uploads = uploads_of(service)
    found = await find_upload(uploads, principal, upload_id)
    offset = await anyio.to_thread.run_sync(uploads.offset, found)
    if found.context is None and offset == found.length:  # the service ended before it had made the context
        async with resumed(uploads, found) as incoming:
            await finish(principal, incoming)
        found = await find_upload(uploads, principal, upload_id)
    context = await anyio.to_thread.run_sync(look, service, principal.tenant, found.context or "")
    return UploadView(id=found.id, offset=offset, length=found.length, context=context)


@router.delete(
    "/uploads/{upload}",
    status_code=204,
    dependencies=_TUS,
    response_class=Response,
    responses=documented(404, 412, 423, *ENDS),
)
async def delete_upload(request: Request, principal: Gives, upload_id: UploadId) -> Response:
    """Give an upload up. The context that became of it stays."""
    uploads = uploads_of(the_service(request))
    found = await find_upload(uploads, principal, upload_id)
    try:
        await anyio.to_thread.run_sync(uploads.drop, found)
    except Busy:
        raise busy() from None
    return Response(status_code=204, headers={"Tus-Resumable": TUS})


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


def _expires(upload: Upload) -> str:
    return format_datetime(upload.expires, usegmt=True)
