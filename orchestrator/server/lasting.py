"""Who is answered for long, by a stream or after a wait, is looked at again meanwhile: what lets in can end."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from starlette.requests import HTTPConnection

from orchestrator.core.errors import AirlockError
from orchestrator.server.access import principal_of, the_gate, unauthorized
from orchestrator.server.problems import Problem

LOOK_AGAIN_S = 5.0  # between two looks, at most


@asynccontextmanager
async def while_let_in(connection: HTTPConnection) -> AsyncGenerator[None]:
    """Its body is cancelled once who asks is let in no more, or may do less than when `Door` let it in.

    Raises Problem (401, 403) then, or StoreError where that cannot be told.
    """
    raised: list[Exception] = []

    async def watch(scope: anyio.CancelScope) -> None:
        try:
            await _until_shut_out(connection)
        except (Problem, AirlockError) as error:
            raised.append(error)
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch, tasks.cancel_scope)
        try:
            yield
        except Exception as error:  # raised below: the task group would wrap it
            raised.insert(0, error)
        tasks.cancel_scope.cancel()
    if raised:
        raise raised[0]


async def _until_shut_out(connection: HTTPConnection) -> None:
    """Raises Problem, StoreError."""
    gate, before = the_gate(connection), principal_of(connection)
    while True:
        # Jittered: streams that began together, after a restart, do not look together for ever.
        await anyio.sleep(LOOK_AGAIN_S * (0.6 + 0.4 * secrets.randbelow(1000) / 1000))
        now = await gate.principal(connection)
        if now.tenant != before.tenant or not now.scopes >= before.scopes:
            raise unauthorized()
