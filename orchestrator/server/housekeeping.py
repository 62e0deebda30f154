"""What nobody wants any more goes: contexts without an owner, old uploads, files that a killed process left."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import anyio
import anyio.to_thread

from orchestrator.core.errors import StoreError
from orchestrator.server.service import Service
from orchestrator.store import holdings
from orchestrator.store.uploads import Uploads

SWEEP_S = 600.0
_REMOVALS = anyio.CapacityLimiter(1)  # they wait for whoever stores something, and must not take all threads meanwhile

_log = logging.getLogger("airlock.housekeeping")


async def keep_swept(service: Service) -> None:
    """At once, and every SWEEP_S seconds; until it is cancelled."""
    while True:
        await _quietly(service, None)
        await anyio.sleep(SWEEP_S)


async def collect(service: Service, *contexts: str) -> None:
    """Remove the files of those that nobody has and no query needs. Nobody waits for it: how long it takes tells
    whether others have them.
    """
    await _quietly(service, contexts)


async def _quietly(service: Service, contexts: Iterable[str] | None) -> None:
    try:
        await anyio.to_thread.run_sync(_remove, service, contexts, limiter=_REMOVALS)
    except StoreError as error:  # the next sweep finds what this one left
        _log.warning("what nobody wants could not be removed", extra={"error": str(error)})


def _remove(service: Service, contexts: Iterable[str] | None) -> None:
    platform = service.platform
    if contexts is None:
        Uploads(platform.db, service.home, service.settings).sweep()
        contexts = platform.contexts.removable()
    platform.contexts.remove(contexts, lambda: platform.db.look(holdings.wanted))
