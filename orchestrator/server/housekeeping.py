"""What nobody wants any more goes: contexts without an owner, old uploads, files that a killed process left."""

from __future__ import annotations

import logging
from functools import partial

import anyio
import anyio.to_thread

from orchestrator.core.errors import StoreError
from orchestrator.server.service import Service
from orchestrator.store import holdings
from orchestrator.store.uploads import Uploads

SWEEP_S = 600.0

_log = logging.getLogger("airlock.housekeeping")


async def keep_swept(service: Service) -> None:
    """At once, and every SWEEP_S seconds; until it is cancelled."""
    while True:
        try:
            await anyio.to_thread.run_sync(_sweep, service)
        except StoreError as error:  # the next one finds what this one left
            _log.warning("what nobody wants could not be removed", extra={"error": str(error)})
        await anyio.sleep(SWEEP_S)


def _sweep(service: Service) -> None:
    db, contexts = service.platform.db, service.platform.contexts
    Uploads(db, service.home, service.settings).sweep()
    without_owner = set(contexts.removable()) - db.look(holdings.owned)
    contexts.remove(without_owner, lambda sizes: db.look(partial(holdings.wanted, sizes=sizes)))


def remove_later(service: Service, context_id: str) -> None:
    """One that a tenant has given up, unless others have it or a query needs it. Nobody waits for that."""
    db = service.platform.db
    service.platform.contexts.remove_later(context_id, lambda sizes: db.look(partial(holdings.wanted, sizes=sizes)))
