"""The journal over HTTP, for whoever audits a tenant: records, verdicts, proofs, exports, and queries run again.

All that is here is of the tenant's own queries and its own log. What takes long is bounded in number, in the order of
`Turns`, and ends when nobody waits for it any more.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import PlainTextResponse, Response

from orchestrator import auditing
from orchestrator.audit.verdicts import Report
from orchestrator.core.errors import StoreError
from orchestrator.core.turns import Turns
from orchestrator.loop.order import require_isolation
from orchestrator.replays import replay_in
from orchestrator.server.access import allowed
from orchestrator.server.audit_shapes import CHECKPOINT, GROWTH, KEY, PROOF, RecordPage, ReplayView, VerdictsView, text
from orchestrator.server.inline import in_turn
from orchestrator.server.problems import Problem, come_again, documented, not_found
from orchestrator.server.routes.queries import QueryId, The, looked, own
from orchestrator.server.service import Principal, Service
from orchestrator.server.streaming import FileStream, while_there
from orchestrator.server.structure import JsonRoute
from orchestrator.store import journal

T = TypeVar("T")
CHECKS, MOST_WAITING = 2, 8  # verifications and exports at once, of all tenants; that wait, of one
EXPORTS = 4  # of one tenant that are not sent yet: each is a file, which no quota counts
REPLAYS = 2  # at once, of all tenants; one of one
MOST_NUMBER = 2**31 - 1  # what the database's column holds

router = APIRouter(prefix="/v1/audit", tags=["audit"], route_class=JsonRoute)
# The command line's words, and those for who has no command line: the service is not the one to ask that.
_HELD = ("pass one with --checkpoint", "keep one, and have /v1/audit/consistency go on from it")
_checks = Turns(CHECKS)
_signing = Turns(4)  # proofs and checkpoints at once, of all tenants: each is a transaction
_exporting = Counter[str]()  # tenant -> exports that wait, are written or are sent
_replaying: set[str] = set()  # tenants

Audits = Annotated[Principal, Depends(allowed("audit"))]
_TAR = {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}


def _plain(said: str, example: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer is a text that others have a form for."""
    return {200: {"description": said, **text(example)}, **documented(*statuses)}


@router.get("/queries/{query}/records", response_model=RecordPage, responses=documented(403, 404, 422, 429, 503))
async def get_records(
    service: The,
    principal: Audits,
    query: QueryId,
    after: Annotated[int, Query(ge=-1, le=MOST_NUMBER, description="the number of the last record before")] = -1,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> dict[str, Any]:
    """The records of a query, in order; payloads by their commitments alone."""

    def read(tx: journal.Connection) -> dict[str, Any]:
        own(tx, service, principal, query)
        links = journal.links_after(tx, query, after, limit + 1)
        shown = [(_record(record), digest) for record, digest in links[:limit]]
        more = len(links) > limit
        return {
            "records": [{"record": record, "hash": digest} for record, digest in shown],
            "next": shown[-1][0]["seq"] if more else None,
        }

    return await looked(service, principal, read)


def _record(stored: bytes) -> Any:
    try:
        return json.loads(stored)
    except ValueError:
        raise StoreError("a record cannot be read; see `airlock audit verify`") from None


@router.get("/queries/{query}/verify", response_model=VerdictsView, responses=documented(403, 404, 422, 429, 503))
async def verify_query(request: Request, service: The, principal: Audits, query: QueryId) -> dict[str, Any]:
    """Is what the journal has of it whole? Five verdicts; of a query that goes on, completeness cannot hold yet."""
    await _require_own(service, principal, query)
    return _verdicts(await _checked(request, service, principal, partial(auditing.verify_query, service.books, query)))


def _verdicts(report: Report) -> dict[str, Any]:
    shown = [
        {
            "name": name,
            "holds": verdict.holds,
            "detail": verdict.note.replace(*_HELD) if verdict.holds else _faults(verdict.faults[0], verdict.count - 1),
            "faults": verdict.faults,
        }
        for name, verdict in report.items()
    ]
    return {"whole": all(verdict.holds for verdict in report.values()), "verdicts": shown}


def _faults(first: str, more: int) -> str:
    return f"{first}; and {more:,} more" if more else first


@router.get(
    "/queries/{query}/proof/{seq}",
    response_class=PlainTextResponse,
    responses=_plain("a C2SP tlog-proof, with the record", PROOF, 403, 404, 422, 429, 503),
)
async def get_proof(
    service: The,
    principal: Audits,
    query: QueryId,
    seq: Annotated[int, Path(ge=0, le=MOST_NUMBER, description="the record's number", examples=[0])],
) -> PlainTextResponse:
    """That a record is in the tenant's log."""
    await _require_own(service, principal, query)

    def prove() -> str:
        if service.platform.db.look(partial(journal.leaf_of, query=query, seq=seq)) is None:
            raise not_found("record")
        return auditing.prove(service.books, query, seq)

    return PlainTextResponse(await in_turn(_signing, principal.tenant, prove))


@router.get(
    "/queries/{query}/export",
    response_class=Response,
    responses={
        200: {"description": "a tar that says itself how it is checked", **_TAR},
        **documented(403, 404, 422, 429, 503),
    },
)
async def export_query(request: Request, service: The, principal: Audits, query: QueryId) -> Response:
    """All that the journal has of a query, its payloads included, for others to check."""
    await _require_own(service, principal, query)
    tenant = principal.tenant
    if _exporting[tenant] >= EXPORTS:
        raise come_again(429, "exports-at-once", f"{EXPORTS} exports of this tenant are under way already")
    _exporting[tenant] += 1
    try:
        file, size = await _checked(request, service, principal, partial(_written, service, query))
    except BaseException:  # cancelled, too
        _exported(tenant)
        raise
    named = {"Content-Disposition": f'attachment; filename="airlock-{query}.tar"'}
    return FileStream(file, size, "application/x-tar", named, partial(_exported, tenant))


def _exported(tenant: str) -> None:
    _exporting[tenant] -= 1
    if not _exporting[tenant]:
        del _exporting[tenant]


class _Draft(io.BufferedRandom):
    """Written in a thread of anyio's; a write after whoever waits for it was cancelled ends that thread's work."""

    def write(self, buffer: Any, /) -> int:
        anyio.from_thread.check_cancelled()
        return super().write(buffer)


def _written(service: Service, query: str) -> tuple[_Draft, int]:
    """The export, and its size. The file has no name: it is gone with whoever holds it."""
    try:
        file = _Draft(tempfile.TemporaryFile(dir=service.home, buffering=0))  # noqa: SIM115  the answer closes it
        try:
            auditing.write_export(service.books, query, file)
            size = file.tell()
            file.seek(0)
        except BaseException:  # cancelled, too
            file.close()
            raise
    except OSError as error:
        raise StoreError(f"cannot write an export: {error.strerror}") from None
    return file, size


@router.post(
    "/queries/{query}/replay",
    response_model=ReplayView,
    responses=documented(403, 404, 409, 422, 429, 503),
)
async def replay_query(request: Request, service: The, principal: Audits, query: QueryId) -> dict[str, Any]:
    """Run its cells again, with what they asked for answered from the journal, and say what is different.

    No model is asked and nothing is paid; nothing is added to the journal. It ends with the time that the query had.
    """
    status = (await _require_own(service, principal, query)).status
    if status in ("open", journal.QUEUED):
        raise Problem(409, "still-running", "the query has not ended: it can be run again when it has")
    if service.under_way.draining:
        raise _stopping()
    tenant, platform = principal.tenant, service.platform
    if tenant in _replaying or len(_replaying) >= REPLAYS:
        raise come_again(429, "replays-at-once", "a replay of this tenant, or as many as there may be, are under way")
    _replaying.add(tenant)
    try:
        past = await anyio.to_thread.run_sync(auditing.past_in, service.books, query)
        past.require()
        require_isolation(platform.backend, past.rules)
        most_s = min(past.rules.time.query, (await service.desk.policy_of(tenant)).time.query) / 1000
        notes = [] if past.backend == platform.backend.name else [f"it ran in {past.backend}"]
        run = partial(replay_in, past, platform.backend, platform.pool, platform.contexts, notes, most_s=most_s)
        done = (await _while_there(request, service, partial(platform.sheltered, run))).report()
        return {"id": done.pop("query_id"), **done}
    finally:
        _replaying.remove(tenant)


@router.get(
    "/checkpoint",
    response_class=PlainTextResponse,
    responses=_plain("a signed note, as C2SP tlog-checkpoint has it", CHECKPOINT, 403, 429, 503),
)
async def get_checkpoint(service: The, principal: Audits) -> PlainTextResponse:
    """The head of the tenant's log as it is now. Whoever keeps it can tell later whether the log went on from it."""
    return PlainTextResponse(await in_turn(_signing, principal.tenant, partial(service.books.sign, principal.tenant)))


@router.get(
    "/consistency/{old}",
    response_class=PlainTextResponse,
    responses=_plain("the body that C2SP tlog-witness has for add-checkpoint", GROWTH, 403, 404, 422, 429, 503),
)
async def get_consistency(
    service: The,
    principal: Audits,
    old: Annotated[int, Path(ge=1, le=MOST_NUMBER, description="entries of the checkpoint you hold", examples=[1])],
) -> PlainTextResponse:
    """That the tenant's log, as it is now, goes on from a checkpoint that you hold."""
    prove = partial(auditing.prove_growth, service.books, principal.tenant, old)
    found = await in_turn(_signing, principal.tenant, prove)
    if found is None:
        raise not_found("checkpoint")
    return PlainTextResponse(found)


@router.get(
    "/key",
    response_class=PlainTextResponse,
    responses=_plain("a verifier's key, as C2SP signed-note has it", KEY, 403, 429, 503),
)
async def get_key(service: The, principal: Audits) -> PlainTextResponse:
    """Whose signatures checkpoints, proofs and exports have. Hold it against what the operator gave you another way."""
    del principal
    return PlainTextResponse(f"{service.platform.notary.verifier}\n")


def _stopping() -> Problem:
    return come_again(503, "stopping", "the service is stopping: ask again in a moment")


async def _require_own(service: Service, principal: Principal, query: str) -> Any:
    look = partial(own, service=service, principal=principal, query=query)
    return await anyio.to_thread.run_sync(service.platform.db.look, look)


async def _checked(request: Request, service: Service, principal: Principal, work: Callable[[], T]) -> T:
    """What `work` brings, in a thread, when the tenant has its turn. Raises Problem where too many of it wait."""
    tenant = principal.tenant
    if _checks.waiting.get(tenant, 0) >= MOST_WAITING:
        raise come_again(429, "checks-at-once", f"{MOST_WAITING} checks and exports of this tenant wait already")

    async def in_turn() -> T:
        async with _checks.turn(tenant, 1, most=1):
            return await anyio.to_thread.run_sync(work)

    return await _while_there(request, service, in_turn)


async def _while_there(request: Request, service: Service, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` brings; it is cancelled when the client has gone, or the service stops."""

    done: list[T] = []
    async with while_there(request.receive, service.feed.over):
        done.append(await work())
    if not done:
        raise _stopping()
    return done[0]
