"""Records of queries as they are written, for those who watch: the journal is read when there is something new."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager
from functools import partial

import anyio
import anyio.to_thread

from orchestrator.auditing import AT_ONCE, Books
from orchestrator.core.events import Recorded, read_record
from orchestrator.server.problems import come_again
from orchestrator.store import journal
from orchestrator.store.db import LINGER_S
from orchestrator.store.vault import Keeper

SOON_S = LINGER_S * 1.5  # what has just happened is committed by then
HERE_S, ELSEWHERE_S = 2.0, 0.25  # between two looks at what nobody tells of


class Feed:
    """books: the journal. most: streams of a tenant at once. here: whether a query runs in this process."""

    def __init__(self, books: Books, most: int, here: Callable[[str], bool]) -> None:
        self._books, self._most, self._here = books, most, here
        self._waiting: dict[str, set[anyio.Event]] = {}
        self._streams: dict[str, int] = {}
        self.over = anyio.Event()  # the service stops, and all that ran was seen to: there is nothing to wait for

    @property
    def streams(self) -> int:
        return sum(self._streams.values())

    def require_room(self, tenant: str) -> None:
        """For one more stream. Raises Problem."""
        if self._streams.get(tenant, 0) >= self._most:
            raise come_again(429, "too-many-streams", f"{self._most} event streams are open already: close one")

    @contextmanager
    def stream(self, tenant: str) -> Generator[None]:
        """Count one of the tenant's streams."""
        self._streams[tenant] = self._streams.get(tenant, 0) + 1
        try:
            yield
        finally:
            self._streams[tenant] -= 1
            if not self._streams[tenant]:
                del self._streams[tenant]

    def wake(self, query: str) -> None:
        """Something has happened in this query."""
        for event in self._waiting.get(query, ()):
            event.set()

    def stop(self) -> None:
        """Streams end, for their clients to go on where another service answers."""
        self.over.set()
        for query in list(self._waiting):
            self.wake(query)

    async def follow(self, tenant: str, query: str, after: int = -1) -> AsyncGenerator[Recorded]:
        """The query's records after number `after`, as they are written, to the one that closes it. Raises StoreError.

        It ends without that one when the service stops, or `after` is that one or none that there is. tenant: whose the
        query is, looked at by the caller.
        """
        keeper = await anyio.to_thread.run_sync(self._books.vault.opener, tenant, query)
        while True:
            with self._listening(query) as woken:
                read = partial(_read, query=query, after=after, keeper=keeper)
                rows, over = await anyio.to_thread.run_sync(self._books.db.look, read)
                kind = ""
                for record, texts in rows:
                    recorded = read_record(record, texts)
                    after, kind = recorded.seq, recorded.type
                    yield recorded
                if over or kind == "query.closed":
                    return
                if len(rows) == AT_ONCE:
                    continue
                if self.over.is_set():
                    return
                with anyio.move_on_after(HERE_S if self._here(query) else ELSEWHERE_S):
                    await woken.wait()
                    await anyio.sleep(SOON_S)

    @contextmanager
    def _listening(self, query: str) -> Generator[anyio.Event]:
        woken = anyio.Event()
        waiting = self._waiting.setdefault(query, set())
        waiting.add(woken)
        try:
            yield woken
        finally:
            waiting.discard(woken)
            if not waiting:
                self._waiting.pop(query, None)


def _read(
    tx: journal.Connection, query: str, after: int, keeper: Keeper | None
) -> tuple[list[tuple[bytes, dict[str, str]]], bool]:
    """The next records, and whether there is none and will be none: who names one far ahead waits for no other."""
    rows = journal.after(tx, query, after, AT_ONCE, keeper)
    return rows, not rows and journal.is_closed(tx, query)
