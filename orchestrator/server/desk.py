"""Admission: what is taken on, and what is told to whom it is not.

A query is on record from the moment it is taken on; it waits for its tenant's turn then (`under_way`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from orchestrator.choices import narrowed
from orchestrator.core.context import Context
from orchestrator.core.errors import (
    CountExceeded,
    ModelError,
    NotPermitted,
)
from orchestrator.core.policy import Policy
from orchestrator.core.turns import Turns
from orchestrator.core.units import usd
from orchestrator.loop import prompts
from orchestrator.loop.order import Order, shared_purses
from orchestrator.server.problems import Problem, come_again, not_found
from orchestrator.server.service import Principal
from orchestrator.server.under_way import CANCELLED, SUSPENDED, UnderWay
from orchestrator.settings import ServerSettings
from orchestrator.store import holdings, journal, ledger, requests
from orchestrator.wiring import Platform, Watch

ADMISSIONS = 4  # queries that are being taken on at once: others who ask for anything do not wait for a crowd


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


class _AskedBefore(Exception):
    def __init__(self, query: str, fingerprint: str) -> None:
        super().__init__(query)
        self.query, self.fingerprint = query, fingerprint


class Desk:
    """Takes queries on for `under_way` to see through."""

    def __init__(self, platform: Platform, settings: ServerSettings, under_way: UnderWay) -> None:
        self._platform, self._settings, self._under_way = platform, settings, under_way
        self._admissions = Turns(ADMISSIONS)
        self._coming: dict[str, int] = {}  # tenant -> queries that are being put on record

    @property
    def waiting(self) -> int:
        """How many queries wait, of all tenants."""
        return self._under_way.waiting + sum(self._coming.values())

    def of(self, tenant: str) -> tuple[int, int]:
        """How many queries of the tenant run here, and how many wait."""
        running, waiting = self._under_way.of(tenant)
        return running, waiting + self._coming.get(tenant, 0)

    async def policy_of(self, tenant: str) -> Policy:
        """See `UnderWay.policy_of`."""
        return await self._under_way.policy_of(tenant)

    def models_for(self, policy: Policy) -> list[str]:
        """What can be asked under this policy. A name from outside only ever selects among those of the operator."""
        return [name for name in self._platform.models.named if policy.models.permits("root", name)]

    async def ask(self, principal: Principal, ask: Ask) -> Asked:
        """Take a query on. Raises Problem, AirlockError; nothing is left of one that is not taken on."""
        if before := await self.before(principal, ask.idempotency, ask.fingerprint):
            return before
        key, fingerprint = ask.idempotency and _hashed(ask.idempotency), await _digest(ask.fingerprint)
        async with self._admissions.turn(principal.tenant, 1):
            return await self._admit(principal, ask, key, fingerprint)

    async def before(self, principal: Principal, idempotency: str | None, fingerprint: bytes) -> Asked | None:
        """What was asked under this name, if anything. Raises StoreError, Problem where it is not the same."""
        if not idempotency or not (before := await self.asked_before(principal.tenant, _hashed(idempotency))):
            return None
        return _the_same(before, await _digest(fingerprint))

    async def _admit(self, principal: Principal, ask: Ask, key: str | None, fingerprint: str) -> Asked:
        if self._under_way.draining:
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
        self._under_way.begin(order.id, tenant, partial(self._run, order), order.policy)
        return Asked(order.id)

    async def _run(self, order: Order, watch: Watch) -> None:
        """In its turn, under what its tenant may do by then."""
        try:
            policy = await self.policy_of(order.tenant)
        except Problem:
            self._under_way.end(order.id, SUSPENDED)
            await anyio.lowlevel.checkpoint()  # it is cancelled here, and withdrawn
            raise
        await self._platform.run_order(order, watch, policy)

    async def asked_before(self, tenant: str, key: str) -> tuple[str, str] | None:
        """(query, fingerprint). key: hex SHA-256 of the Idempotency-Key. Raises StoreError."""
        read = partial(requests.asked_before, tenant=tenant, idempotency=key)
        return await anyio.to_thread.run_sync(self._platform.db.look, read)

    async def cancel(self, tenant: str, query: str) -> None:
        """End a query of the tenant's, wherever it runs. Nothing happens to one that has ended. Raises StoreError."""
        await self._platform.db.write(partial(requests.cancel, query=query))
        if not self._under_way.end(query, CANCELLED):  # it is another process's, which looks for it; or nobody's
            await self._under_way.withdraw(query, tenant, CANCELLED)

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
        if ask.model is None and not self._platform.models.default:
            raise ModelError("name a model, for there is none that is asked by default: see GET /v1/models")
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


def _remember(
    principal: Principal, context: str, key: str | None, fingerprint: str, tx: journal.Connection, query: str
) -> None:
    if not holdings.holds(tx, principal.tenant, context):  # it was deleted meanwhile
        raise not_found("context")
    if key and (before := requests.asked_before(tx, principal.tenant, key)):
        raise _AskedBefore(*before)
    requests.add(tx, query, principal.tenant, principal.asker, key, fingerprint)


def _hashed(idempotency: str) -> str:
    return hashlib.sha256(idempotency.encode("utf-8", "replace")).hexdigest()


async def _digest(fingerprint: bytes) -> str:
    """It can be a whole body: hashed in a thread, which lets others run meanwhile."""
    return (await anyio.to_thread.run_sync(hashlib.sha256, fingerprint)).hexdigest()


def _the_same(before: tuple[str, str], fingerprint: str) -> Asked:
    query, asked = before
    if asked != fingerprint:
        text = "this Idempotency-Key was used for another request: take a new one"
        raise Problem(422, "idempotency-key-reused", text)
    return Asked(query, replayed=True)
