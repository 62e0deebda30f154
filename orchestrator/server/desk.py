"""Admission: what is taken on, in which order it runs, and what becomes of it when the service stops.

A query is on record from the moment it is taken on. It waits for its tenant's turn and runs in a task of this process;
the database says whose it is. A query whose process died is interrupted, and the next process goes on with it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

import anyio
import anyio.abc
import anyio.to_thread

from orchestrator.choices import narrowed
from orchestrator.core.context import Context
from orchestrator.core.errors import (
    AirlockError,
    ContextGone,
    CountExceeded,
    LimitError,
    ModelError,
    NotPermitted,
    ProviderError,
    SandboxUnusable,
    StoreError,
)
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.turns import Turns
from orchestrator.core.units import usd
from orchestrator.loop import prompts
from orchestrator.loop.order import Order, shared_purses
from orchestrator.proxy.account import Account
from orchestrator.server.problems import Problem, come_again, not_found
from orchestrator.server.service import Principal
from orchestrator.settings import ServerSettings
from orchestrator.store import holdings, journal, ledger, requests
from orchestrator.store.registry import Registry
from orchestrator.wiring import Platform, Watch

ADMISSIONS = 4  # queries that are being taken on at once: others who ask for anything do not wait for a crowd
LOOK_S = 1.0  # between two looks for what other processes want
AGAIN_S, MOST_AGAIN_S = 2.0, 60.0  # until a query that could not be resumed is tried again
PATIENCE_S = 900.0  # how long that goes on
SUSPENDED = "suspended: the tenant was suspended while it ran"
STOPPED = "service-stopped: the service stopped while it ran"

_log = logging.getLogger("airlock.desk")


@dataclass(frozen=True, slots=True)
class Ask:
    """One query as a tenant wants it; None where nothing was said. budget in nano-USD.

    idempotency: the tenant's own name for this request. fingerprint: of all that was asked, to tell another one by.
    """

    question: str
    context: Context
    model: str | None = None
    sub_models: Sequence[str] | None = None
    budget: int | None = None
    timeout_ms: int | None = None
    depth: int | None = None
    iterations: int | None = None
    answer_schema: Mapping[str, Any] | None = None
    idempotency: str | None = None
    fingerprint: bytes = b""


@dataclass(frozen=True, slots=True)
class Asked:
    """replayed: it was asked before, under the same Idempotency-Key."""

    id: str
    replayed: bool = False


@dataclass(slots=True)
class _Here:
    """A query that this process answers for. account: once it runs. why: it is cancelled, when it is."""

    tenant: str
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    done: anyio.Event = field(default_factory=anyio.Event)
    account: Account | None = None
    why: str = "cancelled"


class _AskedBefore(Exception):
    def __init__(self, query: str, fingerprint: str) -> None:
        super().__init__(query)
        self.query, self.fingerprint = query, fingerprint


class Desk:
    """An async context manager; what was interrupted is gone on with from its beginning on.

    observe: told what happens in queries. ended: told the id and the tenant of each query that came to an end here.
    """

    def __init__(
        self,
        platform: Platform,
        registry: Registry,
        settings: ServerSettings,
        observe: Callable[[str, Event], None] = lambda _query, _event: None,
        ended: Callable[[str, str], None] = lambda _query, _tenant: None,
    ) -> None:
        self._platform, self._registry, self._settings = platform, registry, settings
        self._observe, self._ended = observe, ended
        self._turns = Turns(settings.queries)
        self._admissions = Turns(ADMISSIONS)
        self._here: dict[str, _Here] = {}
        self._coming: dict[str, int] = {}  # tenant -> queries that are being put on record
        self._tasks: anyio.abc.TaskGroup | None = None
        self.draining = False
        self._patience = anyio.CancelScope()
        self.lost = anyio.Event()  # the database is lost to this process: another one can go on

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._look)
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
        return len(self._here) - self._turns.running + sum(self._coming.values())

    def is_here(self, query: str) -> bool:
        return query in self._here

    def account(self, query: str) -> Account | None:
        """Of a query that runs in this process."""
        here = self._here.get(query)
        return here.account if here else None

    def of(self, tenant: str) -> tuple[int, int]:
        """How many queries of the tenant run here, and how many wait."""
        mine = [here for here in self._here.values() if here.tenant == tenant]
        running = sum(here.account is not None for here in mine)
        return running, len(mine) - running + self._coming.get(tenant, 0)

    async def policy_of(self, tenant: str) -> Policy:
        """What the tenant may do. Raises StoreError, Problem where there is no such tenant any more."""
        row = await anyio.to_thread.run_sync(self._registry.tenant, tenant)
        if row is None or row.suspended_at:
            raise Problem(403, "suspended", "this tenant is suspended")
        return self._platform.policy if row.policy is None else self._platform.policy.narrowed(row.policy)

    def models_for(self, policy: Policy) -> list[str]:
        """What can be asked under this policy. A name from outside only ever selects among those of the operator."""
        return [name for name in self._platform.models.named if policy.models.permits("root", name)]

    async def ask(self, principal: Principal, ask: Ask) -> Asked:
        """Take a query on. Raises Problem, AirlockError; nothing is left of one that is not taken on."""
        key = ask.idempotency and hashlib.sha256(ask.idempotency.encode("utf-8", "replace")).hexdigest()
        fingerprint = hashlib.sha256(ask.fingerprint).hexdigest()
        if key and (before := await self.asked_before(principal.tenant, key)):
            return _the_same(before, fingerprint)
        async with self._admissions.turn(principal.tenant, 1):
            return await self._admit(principal, ask, key, fingerprint)

    async def _admit(self, principal: Principal, ask: Ask, key: str | None, fingerprint: str) -> Asked:
        if self.draining:
            raise come_again(503, "stopping", "the service is stopping: ask again in a moment")
        tenant = principal.tenant
        order = self._order(tenant, ask, await self.policy_of(tenant))
        await anyio.to_thread.run_sync(self._require_money, order)
        self._require_room(tenant)
        self._coming[tenant] = self._coming.get(tenant, 0) + 1
        try:
            order = await self._platform.enqueue(order, partial(_remember, principal, ask.context.id, key, fingerprint))
        except _AskedBefore as before:
            return _the_same((before.query, before.fingerprint), fingerprint)
        finally:
            self._coming[tenant] -= 1
            if not self._coming[tenant]:
                del self._coming[tenant]
        self._begin(order.id, tenant, partial(self._platform.run_order, order), order.policy)
        return Asked(order.id)

    async def asked_before(self, tenant: str, key: str) -> tuple[str, str] | None:
        """(query, fingerprint). key: hex SHA-256 of the Idempotency-Key. Raises StoreError."""
        read = partial(requests.asked_before, tenant=tenant, idempotency=key)
        return await anyio.to_thread.run_sync(self._platform.db.look, read)

    async def cancel(self, tenant: str, query: str) -> None:
        """End a query of the tenant's, wherever it runs. Nothing happens to one that has ended. Raises StoreError."""
        await self._platform.db.write(partial(requests.cancel, query=query))
        if not self._end(query, "cancelled"):  # it is another process's, which looks for it; or nobody's
            await self._withdraw(query, tenant, "cancelled")

    def _end(self, query: str, why: str) -> bool:
        """Whether it is here to be ended."""
        if here := self._here.get(query):
            here.why = why
            if here.account:
                here.account.why = why
            here.scope.cancel()
        return here is not None

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
                await anyio.sleep(LOOK_S / 4)
        return False

    def _is_open(self, query: str) -> bool:
        status, _tenant = self._platform.db.read(partial(journal.status_of, query=query))
        return status in ("open", journal.QUEUED, journal.INTERRUPTED)

    def hurry(self) -> None:
        """While it drains: wait no longer for what runs."""
        self._patience.cancel()

    async def drain(self) -> None:
        """Take nothing more on; let what runs end in its time, and leave the rest to be resumed."""
        self.draining = True
        self._patience.deadline = anyio.current_time() + self._settings.drain_s
        with self._patience:
            for here in list(self._here.values()):
                if here.account:
                    await here.done.wait()
        for here in list(self._here.values()):
            here.why = STOPPED
            if here.account:
                here.account.leave(STOPPED)
            here.scope.cancel()
        for here in list(self._here.values()):
            await here.done.wait()

    # Admission

    def _order(self, tenant: str, ask: Ask, policy: Policy) -> Order:
        """Raises RequestError, LimitError: all that can be told before anything is on record."""
        policy = narrowed(
            policy,
            name="this tenant's policy",
            budget=ask.budget,
            timeout_ms=ask.timeout_ms,
            depth=ask.depth,
            iterations=ask.iterations,
        )
        named = self._platform.models.named
        for name in (ask.model, *(ask.sub_models or ())):
            if name is not None and name not in named:
                raise ModelError(f"there is no model {name[:200]!r}: see GET /v1/models")
        order = self._platform.order(
            ask.question,
            ask.context,
            tenant=tenant,
            model=ask.model,
            sub_models=ask.sub_models,
            policy=policy,
            schema=ask.answer_schema,
        )
        if len(ask.question) > policy.content.question_chars:
            most = policy.content.question_chars
            text = f"the question has {len(ask.question):,} characters; {most:,} are permitted"
            raise CountExceeded(text, limit=str(most), rule="content.question_chars")
        if not policy.models.permits("root", order.model):
            text = f"the policy does not permit model {order.model!r} for root calls"
            raise NotPermitted(text, rule="models.root")
        for name in order.sub_models:
            if not policy.models.permits("sub", name):
                raise NotPermitted(f"the policy does not permit model {name!r} for sub calls", rule="models.sub")
        return order

    def _require_money(self, order: Order) -> None:
        """That the tenant can pay for a turn and a last word. Raises Problem: 402 for what is spent, 429 for what is
        held and may come free.
        """
        policy, bound = order.policy, self._platform.bound
        asked = len(order.question.encode("utf-8", "replace"))
        least = bound(order.model, prompts.LAST_WORD_BYTES, prompts.LAST_WORD_TOKENS)
        least += bound(order.model, asked, policy.models.output_floor)
        if least > policy.money.query:
            text = f"one turn of {order.model} and a last word can cost {usd(least)} USD, and the query may spend"
            raise Problem(402, "budget-exhausted", f"{text} {usd(policy.money.query)} USD", rule="money.query")
        purses = shared_purses(order.tenant, policy, self._platform.month, datetime.now(UTC))
        books = self._platform.db.look(lambda tx: [ledger.balance(tx, purse.id) for purse in purses])
        for purse, (spent, held) in zip(purses, books, strict=True):
            free = purse.most("limit") - spent
            rule = purse.rule("limit")
            if free < least:
                text = f"{purse.owner} money is spent: {usd(max(0, free))} USD are left of {usd(purse.most('limit'))}"
                raise Problem(402, "budget-exhausted", text, rule=rule)
            if free - held < least:
                text = f"{usd(held)} USD of {purse.owner} money are held by calls in flight: ask again when they ended"
                raise come_again(429, "budget-in-flight", text, rule=rule)

    def _require_room(self, tenant: str) -> None:
        """Raises Problem."""
        most = self._settings.queue_tenant
        if self.of(tenant)[1] >= most:
            raise come_again(429, "queue-full", f"{most} queries of this tenant wait already: ask again later")
        if self.waiting >= self._settings.queue:
            raise come_again(503, "queue-full", "too many queries wait: ask again later")

    # Queries under way

    def _begin(self, query: str, tenant: str, start: Callable[..., Any], policy: Policy) -> None:
        assert self._tasks
        here = self._here[query] = _Here(tenant)
        self._tasks.start_soon(self._see_through, query, here, start, policy)

    async def _see_through(self, query: str, here: _Here, start: Callable[..., Any], policy: Policy) -> None:
        """From its turn to its end. Whatever goes wrong with one query is no affair of the others."""
        try:
            with here.scope:
                await self._run(query, here, start, policy)
            if here.account is None and here.why != STOPPED:  # it has not had its turn
                await self._withdraw(query, here.tenant, here.why)
        except StoreError as error:
            _log.error("a query could not be seen through", extra={"query": query, "error": error.kind})
        except Exception as error:  # a fault of ours: its own records say so, where it got that far
            _log.exception("a query failed", extra={"query": query, "error": type(error).__name__})
        finally:
            del self._here[query]
            here.done.set()
            self._ended(query, here.tenant)

    async def _run(self, query: str, here: _Here, start: Callable[..., Any], policy: Policy) -> None:
        most = min(policy.tenant.queries_at_once, self._turns.most_of_one)
        async with self._turns.turn(here.tenant, policy.tenant.share, most):
            await start(watch=Watch(event=partial(self._observe, query), account=partial(_began, here)))

    async def _withdraw(self, query: str, tenant: str, why: str) -> None:
        """Close one that does not run. Nothing is done where it runs, or has ended. Raises StoreError."""
        if await self._platform.withdraw(query, tenant, why):
            self._observe(query, Event("query.closed", "root", {"status": "cancelled", "reason": why}))

    async def _look(self) -> None:
        """Go on with what was interrupted, end what others want ended, and notice that the database was lost."""
        trying, db = set[str](), self._platform.db
        while not db.lost:
            try:
                await db.write(lambda _tx: None)
                for query in await anyio.to_thread.run_sync(db.look, partial(requests.to_cancel, owner=db.owner)):
                    self._end(query, "cancelled")
                suspended = await anyio.to_thread.run_sync(self._registry.suspended)
                for query in [query for query, here in self._here.items() if here.tenant in suspended]:
                    self._end(query, SUSPENDED)
                for query, tenant, cancelled in await anyio.to_thread.run_sync(db.look, requests.to_resume):
                    if cancelled:
                        await self._withdraw(query, tenant, "cancelled")
                    elif query not in trying and query not in self._here and not self.draining:
                        trying.add(query)
                        assert self._tasks
                        self._tasks.start_soon(self._resume, query, tenant, trying)
            except StoreError as error:
                _log.error("the database cannot be used", extra={"error": error.kind})
            await anyio.sleep(LOOK_S)
        self.lost.set()

    async def _resume(self, query: str, tenant: str, trying: set[str]) -> None:
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
            trying.discard(query)

    async def _resumed(self, query: str, tenant: str, *, last: bool) -> str | None:
        """None when there is nothing more to do for it; else why it could not be gone on with."""
        here = self._here[query] = _Here(tenant)
        try:
            policy = await self.policy_of(tenant)
            with here.scope:
                await self._run(query, here, partial(self._platform.resume, query, tenant=tenant), policy)
            why = "interrupted again"
            if not await anyio.to_thread.run_sync(self._is_interrupted, query):
                return None
            if here.scope.cancelled_caught:
                if here.why != STOPPED:
                    await self._withdraw(query, tenant, here.why)
                return None
        except StoreError as error:
            _log.error("a query could not be resumed", extra={"query": query, "error": error.kind})
            return error.kind
        except (Problem, AirlockError) as error:
            why, passes = str(error), isinstance(error, ContextGone | LimitError | SandboxUnusable | ProviderError)
            last = last or not passes
        finally:
            del self._here[query]
            here.done.set()
            self._ended(query, tenant)
        if last:
            await self._withdraw(query, tenant, f"not resumed: {why}"[:1000])
            return None
        return why

    def _is_interrupted(self, query: str) -> bool:
        status, _tenant = self._platform.db.read(partial(journal.status_of, query=query))
        return status == journal.INTERRUPTED


def _began(here: _Here, account: Account) -> None:
    here.account = account


def _remember(
    principal: Principal, context: str, key: str | None, fingerprint: str, tx: journal.Connection, query: str
) -> None:
    if not holdings.holds(tx, principal.tenant, context):  # it was deleted meanwhile
        raise not_found("context")
    if key and (before := requests.asked_before(tx, principal.tenant, key)):
        raise _AskedBefore(*before)
    requests.add(tx, query, principal.tenant, principal.asker, key, fingerprint)


def _the_same(before: tuple[str, str], fingerprint: str) -> Asked:
    query, asked = before
    if asked != fingerprint:
        text = "this Idempotency-Key was used for another request: take a new one"
        raise Problem(422, "idempotency-key-reused", text)
    return Asked(query, replayed=True)
