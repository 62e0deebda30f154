"""The writes of one query, in the order in which they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.store.db import Database, Job

T = TypeVar("T")


class Writer:
    """What has to be on record before something happens is written; what has happened is posted.

    A post does not wait. It is committed before the next write is, or with it, and what it raises, that write raises.
    So nothing that was posted can be missing from a query whose closing was written.
    """

    def __init__(self, db: Database) -> None:
        self.frozen = False
        self._db = db
        self._posted: list[Job] = []

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """See `Database.write`."""
        if self.frozen:
            raise StoreError("the query is left as it is: nothing more of it is recorded")
        try:
            return await self._db.write(work)
        finally:
            done = [job for job in self._posted if job.done]
            self._posted = [job for job in self._posted if not job.done]
            for job in done:
                job.outcome()

    def lost(self) -> str:
        """What a post before has raised; empty when all is well. For the work of a write."""
        return next((str(job.error) for job in self._posted if job.error), "")

    def freeze(self) -> None:
        """Record nothing more: to whoever reads the journal, the process died at this instant."""
        self.frozen = True

    def post(self, work: Callable[[sa.Connection], object]) -> None:
        """Raises StoreError only when the database is closed."""
        if self.frozen:
            return
        self._posted.append(self._db.post(work))
