"""Queries under way in this process: each in a task of its own, from its turn to its end, whatever becomes of it.

The database says whose a query is. One whose process died is interrupted, and whichever process looks first goes on
with it; what is left when this one stops is left to be gone on with.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import anyio
import anyio.abc
import anyio.to_thread

from orchestrator.core.errors import AirlockError, ContextGone, CountExceeded, NotKept, StoreError
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.turns import Turns
from orchestrator.proxy.account import Account
from orchestrator.server.problems import Problem
from orchestrator.store import journal, requests
from orchestrator.store.db import try_out
from orchestrator.store.registry import Registry
from orchestrator.wiring import Platform, Watch

LOOK_S = 1.0  # between two looks for what other processes want
AGAIN_S, MOST_AGAIN_S = 2.0, 60.0  # until a query that could not be gone on with is tried again
PATIENCE_S = 900.0  # how long that goes on
CANCELLED = "cancelled"
SUSPENDED = "suspended: the tenant was suspended while it ran"
STOPPED = "service-stopped: the service stopped while it ran"

_log = logging.getLogger("airlock.queries")

Start = Callable[..., Awaitable[Any]]  # of a query: given `watch`


@dataclass(slots=True)
class _Here:
    """A query that this process answers for. account: once it runs. why: it is cancelled, when it is."""

    tenant: str
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    done: anyio.Event = field(default_factory=anyio.Event)
    account: Account | None = None
    why: str = "cancelled"


class _NotYet(Exception):
    """A query could not begin; it still waits."""


class UnderWay:
    """An async context manager; what was interrupted is gone on with from its beginning on.

    most: queries that run at once. drain_s: what they have to end when the service stops. observe: told what happens in
    queries; ended: the id and the tenant of each that came to an end here.
    """

    def __init__(
        self,
        platform: Platform,
        registry: Registry,
        most: int,
        drain_s: float,
        observe: Callable[[str, Event], None],
        ended: Callable[[str, str], None],
    ) -> None:
        self._platform, self._registry, self._drain_s = platform, registry, drain_s
        self._observe, self._ended = observe, ended
        self._turns = Turns(most)
        self._here: dict[str, _Here] = {}
        self._trying: set[str] = set()  # to be resumed
        self._left: set[str] = set()  # what they ended with could not be recorded
        self._tasks: anyio.abc.TaskGroup | None = None
        self._patience = anyio.CancelScope()
        self.draining = False
        self.lost = anyio.Event()  # the database is lost to this process: another one can go on

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._keep_looking)
        return self

    async def __aexit__(self, *raised: Any) -> None:
        assert self._tasks
        if not self.draining:  # something else than a signal ends it: the database was lost
            await self.drain()
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(*raised)

    # What others ask

    @property
    def running(self) -> int:
        return self._turns.running

    @property
    def waiting(self) -> int:
        return len(self._here) - self._turns.running

    def is_here(self, query: str) -> bool:
        return query in self._here

    def account(self, query: str) -> Account | None:
        """Of a query that runs here."""
        here = self._here.get(query)
        return here.account if here else None

    def of(self, tenant: str) -> tuple[int, int]:
        """How many queries of the tenant run here, and how many wait."""
        mine = [here for here in self._here.values() if here.tenant == tenant]
        running = sum(here.account is not None for here in mine)
        return running, len(mine) - running

    async def policy_of(self, tenant: str) -> Policy:
        """What the tenant may do. Raises StoreError, Problem where there is no such tenant any more."""
        row = await anyio.to_thread.run_sync(self._registry.tenant, tenant)
        if row is None or row.suspended_at:
            raise Problem(403, "suspended", "this tenant is suspended")
        return self._platform.policy if row.policy is None else self._platform.policy.narrowed(row.policy)

    def end(self, query: str, why: str) -> bool:
        """Whether it is here to be ended."""
        if here := self._here.get(query):
            here.why = why
            if here.account:
                here.account.why = why
            here.scope.cancel()
        return here is not None

    async def withdraw(self, query: str, tenant: str, why: str) -> None:
        """Close one that was interrupted, or waits here. Nothing is done where it is neither. Raises StoreError."""
        if await self._platform.withdraw(query, tenant, why):
            self._observe(query, Event("query.closed", "root", {"status": "cancelled", "reason": why}))

    async def ended(self, query: str, seconds: float | None = None) -> bool:
        """Wait for its end, at most this long; whether it has come."""
        with anyio.move_on_after(seconds):
            if here := self._here.get(query):
                await here.done.wait()
            while True:
                if not await anyio.to_thread.run_sync(self._is_open, query):
                    return True
                if self.draining and query not in self._here:
                    return False  # it goes on elsewhere
                await anyio.sleep(LOOK_S)
        return False

    def _is_open(self, query: str) -> bool:
        return self._status(query) in ("open", journal.QUEUED, journal.INTERRUPTED)

    def _status(self, query: str) -> str:
        return self._platform.db.read(partial(journal.status_of, query=query))[0]

    # Its end

    def hurry(self) -> None:
        """While it drains: wait no longer for what runs."""
        self._patience.cancel()

    async def drain(self) -> None:
        """Begin nothing more; let what runs end in its time, and leave the rest to be gone on with."""
        self.draining = True
        self._patience.deadline = anyio.current_time() + self._drain_s
        with self._patience:
            for here in list(self._here.values()):
                if here.account:
                    await here.done.wait()
        running = sum(here.account is not None for here in self._here.values())
        text = "%d queries that run and %d that wait are left to be gone on with"
        _log.info(text, running, len(self._here) - running)
        for here in list(self._here.values()):
            here.why = STOPPED
            if here.account:
                here.account.leave(STOPPED)
            here.scope.cancel()
        for here in list(self._here.values()):
            await here.done.wait()

    # One query

    def begin(self, query: str, tenant: str, start: Start, policy: Policy) -> None:
        """See a query through that waits for its turn, and is this process's."""
        assert self._tasks
        here = self._here[query] = _Here(tenant)
        self._tasks.start_soon(self._see_through, query, here, start, policy)

    async def _see_through(self, query: str, here: _Here, start: Start, policy: Policy) -> None:
        """From its turn to its end. Whatever goes wrong with one query is no affair of the others."""
        try:
            await self._in_turn(query, here, partial(self._begun, query, here, start), policy)
            if here.scope.cancelled_caught and here.account is None and here.why != STOPPED:  # it has not had its turn
                await self.withdraw(query, here.tenant, here.why)
        except StoreError as error:
            self._left.add(query)
            _log.error("a query could not be seen through", extra={"query": query, "error": error.kind})
        except Exception as error:  # a fault of ours: its own records say so, where it got that far
            self._left.add(query)
            _log.exception("a query failed", extra={"query": query, "error": type(error).__name__})
        finally:
            self._gone(query, here)

    async def _begun(self, query: str, here: _Here, start: Start, watch: Watch) -> None:
        """Raises _NotYet where the store takes nothing, and so not its beginning: it waits on, as it is on record."""
        try:
            await start(watch=watch)
        except StoreError as error:
            if here.account or await self._works():  # it is this query's own fault, or just passed
                raise
            _log.error("a query cannot begin yet", extra={"query": query, "error": error.kind})
            await anyio.sleep(LOOK_S)  # with its turn: others could not begin either
            raise _NotYet from None

    async def _works(self) -> bool:
        """Whether the store takes anything."""
        try:
            await self._platform.db.write(try_out)
        except StoreError:
            return False
        return True

    async def _in_turn(self, query: str, here: _Here, start: Start, policy: Policy) -> None:
        most = min(policy.tenant.queries_at_once, self._turns.most_of_one)
        watch = Watch(event=partial(self._observe, query), account=partial(_began, here))
        with here.scope:
            while True:
                async with self._turns.turn(here.tenant, policy.tenant.share, most):
                    if self.draining:  # it is left as it waits
                        return
                    try:
                        await start(watch=watch)
                        return
                    except _NotYet:
                        continue
                    except CountExceeded as error:  # as many of the tenant's run already, in other processes
                        if error.rule != "tenant.queries_at_once":
                            raise
                await anyio.sleep(AGAIN_S)

    def _gone(self, query: str, here: _Here) -> None:
        del self._here[query]
        here.done.set()
        self._ended(query, here.tenant)

    # What others left, and what others want

    async def _keep_looking(self) -> None:
        while not self._platform.db.lost:
            try:
                await self._look()
            except StoreError as error:
                _log.error("the database cannot be used", extra={"error": error.kind})
            except Exception as error:  # whatever it is, the service goes on, and looks again
                _log.exception("a look at the queries failed", extra={"error": type(error).__name__})
            await anyio.sleep(LOOK_S)
        self.lost.set()

    async def _look(self) -> None:
        """End what others want ended, go on with what was interrupted, and notice when the database is lost."""
        db = self._platform.db
        await db.write(lambda _tx: None)
        left = self._left - self._here.keys() - self._trying
        await self._platform.leave(left)
        self._left -= left
        await self._platform.recover()  # of processes beside this one, which nobody may start again
        for query in await anyio.to_thread.run_sync(db.look, partial(requests.to_cancel, owner=db.owner)):
            self.end(query, CANCELLED)
        suspended = await anyio.to_thread.run_sync(self._registry.suspended)
        for query in [query for query, here in self._here.items() if here.tenant in suspended]:
            self.end(query, SUSPENDED)
        for query, tenant, cancelled in await anyio.to_thread.run_sync(db.look, requests.to_resume):
            if cancelled:
                await self.withdraw(query, tenant, CANCELLED)
            elif query not in self._trying and query not in self._here and not self.draining:
                self._trying.add(query)
                self._left.discard(query)
                assert self._tasks
                self._tasks.start_soon(self._resume, query, tenant)

    async def _resume(self, query: str, tenant: str) -> None:
        """Go on with an interrupted query; where that cannot be, close it, and say why."""
        pause, until = AGAIN_S, anyio.current_time() + PATIENCE_S
        try:
            while not self.draining:
                why = await self._resumed(query, tenant, last=anyio.current_time() > until)
                if why is None:
                    return
                await anyio.sleep(pause)
                pause = min(2 * pause, MOST_AGAIN_S)
        finally:
            self._trying.discard(query)

    async def _resumed(self, query: str, tenant: str, *, last: bool) -> str | None:
        """None when there is nothing more to do for it; else why it could not be gone on with."""
        here = self._here[query] = _Here(tenant)
        why = "interrupted again"
        try:
            start = partial(self._go_on, query, tenant)
            await self._in_turn(query, here, start, await self.policy_of(tenant))
        except StoreError as error:
            _log.error("a query could not be resumed", extra={"query": query, "error": error.kind})
            return error.kind
        except (Problem, AirlockError) as error:
            why, last = str(error), last or not _may_pass(error)
        except Exception as error:  # a fault of ours, or damage: no affair of the others, and it may be put right
            _log.exception("a query could not be resumed", extra={"query": query, "error": type(error).__name__})
            why = f"internal: {type(error).__name__}"
        finally:
            self._gone(query, here)
        if await anyio.to_thread.run_sync(self._status, query) != journal.INTERRUPTED or here.why == STOPPED:
            return None
        if last or here.scope.cancelled_caught:
            how = here.why if here.scope.cancelled_caught else f"not resumed: {why}"
            await self.withdraw(query, tenant, how[:1000])
            return None
        return why

    async def _go_on(self, query: str, tenant: str, watch: Watch) -> None:
        await self._platform.resume(query, tenant=tenant, watch=watch, policy=await self.policy_of(tenant))


def _may_pass(error: Exception) -> bool:
    """Whether it can be gone on with later, perhaps by another process, or under another configuration."""
    return not isinstance(error, Problem | NotKept) or isinstance(error, ContextGone)


def _began(here: _Here, account: Account) -> None:
    here.account = account
