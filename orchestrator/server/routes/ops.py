"""For whoever runs the service: whether it lives, whether it can take queries on, and its metrics."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, cast

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field
from starlette.requests import Request

from orchestrator.core.errors import AirlockError, StoreError
from orchestrator.sandbox.base import SandboxSpec
from orchestrator.sandbox.sandbox import open_sandbox
from orchestrator.server.access import allowed
from orchestrator.server.problems import MEDIA_TYPE, come_again, documented
from orchestrator.server.service import Principal, Service, the_service
from orchestrator.server.structure import JsonRoute
from orchestrator.store.db import try_out

router = APIRouter(tags=["operations"], route_class=JsonRoute)

PATIENCE_S = 10.0  # for one thing that is looked at
TRIED_S = 60.0  # between two sandboxes that are started to see whether that works
ROOM = 1 << 20  # bytes that the data folder has to have left
FRESH_S = 1.0  # for so long what was found is told again

_log = logging.getLogger("airlock.ops")

Check = Callable[[], Awaitable[None]]


class Alive(BaseModel):
    status: Literal["alive"] = Field(examples=["alive"])


class Ready(BaseModel):
    status: Literal["ready"] = Field(examples=["ready"])


class Readiness:
    """What the service needs to take queries on. checks: by what each looks at; one that raises finds it away.

    Anybody may ask: of many who do at once one looks, and what it found is told again for a while.
    """

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._looking = anyio.Lock()
        self._away: list[str] = []
        self._until = 0.0

    async def away(self) -> list[str]:
        """Names of what is not there, in order."""
        async with self._looking:
            if time.monotonic() >= self._until:
                found: dict[str, str] = {}
                async with anyio.create_task_group() as tasks:
                    for name, check in self._checks.items():
                        tasks.start_soon(_look, name, check, found)
                for name in found.keys() - set(self._away):  # the log is told where it was, once
                    _log.warning("not ready: %s: %s", name, found[name])
                self._away = [name for name in self._checks if name in found]
                self._until = time.monotonic() + FRESH_S
            return self._away


async def _look(name: str, check: Check, away: dict[str, str]) -> None:
    away[name] = f"nothing was heard of it within {PATIENCE_S:.0f} s"
    with anyio.move_on_after(PATIENCE_S):
        try:
            await check()
        except Exception as error:  # whatever is wrong with it: it is away
            away[name] = str(error) if isinstance(error, AirlockError) else type(error).__name__
        else:
            del away[name]


def checks(service: Service) -> Mapping[str, Check]:
    """Of one service. What blocks gets threads of its own: one that hangs must not keep requests from theirs."""
    platform = service.platform
    threads = anyio.CapacityLimiter(8)
    tried = -TRIED_S

    def blocking(look: Callable[[], Any]) -> Check:
        return partial(anyio.to_thread.run_sync, look, abandon_on_cancel=True, limiter=threads)

    async def taking_on() -> None:
        if service.under_way.draining:
            raise StoreError("it is stopping")

    def database() -> None:
        if platform.db.lost:
            raise StoreError("the connection to the database broke")
        written = threading.Event()
        job = platform.db.post(try_out, written)
        written.wait()
        job.outcome()

    def folder() -> None:
        """That a query's context has room there; on SQLite, what it puts on record has, too."""
        try:
            with tempfile.TemporaryFile(dir=service.home) as file:
                os.posix_fallocate(file.fileno(), 0, ROOM)
        except OSError as error:
            raise StoreError(f"it takes nothing: {error.strerror}") from None

    def keys() -> None:
        if platform.vault.existing_signer() is None:
            raise StoreError("the signer's key is gone from the database")

    async def backend() -> None:
        """That a sandbox starts and runs a cell, now and then; in between a quick look."""
        nonlocal tried
        await blocking(platform.backend.require_usable)()
        if time.monotonic() >= tried + TRIED_S:
            spec = partial(SandboxSpec.under, platform.policy)
            async with open_sandbox(platform.backend, platform.slots, spec) as sandbox:
                await sandbox.try_out()
            tried = time.monotonic()

    return {
        "service": taking_on,
        "database": blocking(database),
        "data folder": blocking(folder),
        "journal keys": blocking(keys),
        "backend": backend,
    }


def _readiness(request: Request) -> Readiness:
    """Of this service; made when it is first asked for."""
    state = request.app.state
    if not hasattr(state, "readiness"):
        state.readiness = Readiness(checks(the_service(request)))
    return cast("Readiness", state.readiness)


@router.get("/healthz", summary="Whether the process lives.", response_model=Alive)
async def get_health() -> Alive:
    """Needs nothing else to live: one that fails is to be started again."""
    return Alive(status="alive")


@router.get(
    "/readyz",
    summary="Whether queries are taken on.",
    response_model=Ready,
    responses={
        503: {
            "description": "What is away, by name; come again after Retry-After.",
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}},
        }
    },
)
async def get_readiness(request: Request) -> Ready:
    """For whoever spreads requests over services: one that is not ready is sent none."""
    if away := await _readiness(request).away():
        raise come_again(503, "not-ready", f"not ready: {', '.join(away)}", away=away)
    return Ready(status="ready")


@router.get(
    "/metrics",
    summary="Metrics, for Prometheus.",
    response_class=Response,
    responses={
        200: {
            "description": "In Prometheus' text format.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": "airlock_queries_running 3.0\n"}},
        },
        **documented(403, 429),
    },
)
async def get_metrics(request: Request, _principal: Annotated[Principal, Depends(allowed("metrics"))]) -> Response:
    """Of the service as a whole, so for a key with the scope `metrics`."""
    text, kind = await anyio.to_thread.run_sync(the_service(request).metrics.text)
    return Response(text, media_type=kind)
