"""The composition root: where the parts are chosen and put together. What it builds, `AsyncRLM` and the CLI use."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread

from orchestrator import settings
from orchestrator.choices import Choices, effective_policy
from orchestrator.core.context import Context
from orchestrator.core.errors import (
    ContextError,
    ContextGone,
    ModelError,
    NotKept,
    RequestError,
    StoreError,
)
from orchestrator.core.events import Event
from orchestrator.core.policy import MOST_DEPTH, Policy
from orchestrator.core.tenants import is_tenant
from orchestrator.core.turns import Turns
from orchestrator.core.units import nano
from orchestrator.data_folder import load_config, open_database, open_keys
from orchestrator.loop.machine import Machine
from orchestrator.loop.order import Closed, Machinery, Order, require_isolation, under
from orchestrator.loop.past import Past
from orchestrator.loop.query import run_query
from orchestrator.loop.reader import read_past
from orchestrator.loop.recovery import leave, recover, sweep
from orchestrator.loop.waiting import Also, enqueue, withdraw
from orchestrator.models import NO_MODEL, Models
from orchestrator.proxy.account import Account
from orchestrator.proxy.prices import Prices
from orchestrator.proxy.proxy import Proxy
from orchestrator.sandbox.base import Backend, SandboxSpec
from orchestrator.sandbox.pool import Pool, machine_memory
from orchestrator.sandbox.registry import make_backend, pool_size
from orchestrator.sandbox.slots import Slots
from orchestrator.store import journal
from orchestrator.store.contexts import ContextStore
from orchestrator.store.signing import Notary

T = TypeVar("T")
TENANT = "default"


@dataclass(slots=True)
class Watch:
    """Who follows a query while it runs."""

    event: Callable[[Event], None] = lambda _event: None
    output: Callable[[str, str], None] | None = None
    account: Callable[[Account], None] = lambda _account: None
    closed: Callable[[Closed], None] = lambda _closed: None


class Platform:
    """Store, ledger, models and sandboxes of one data folder, for one process. Use `open_platform`."""

    def __init__(self, home: Path, choices: Choices) -> None:
        self.home = home
        self.choices = choices
        self.config = load_config(home)
        self.policy = effective_policy(choices)
        limits = self.policy.sandbox
        self.backend: Backend = make_backend(
            choices.backend, least=limits.least_isolation, image=limits.image, home=home
        )
        self.models = Models(home, self.config, choices)
        password = settings.database_password(self.config)
        with contextlib.ExitStack() as undone:
            self.db = open_database(home)
            undone.callback(self.db.close)
            self.vault = open_keys(self.db, home, [*self.models.secrets(), *filter(None, [password])])
            self.notary = Notary(self.vault.signer(), home / "heads", self.vault.stamp)
            self.interrupted: list[str] = []  # ids of queries whose process had died when this one started
            recover(self.db, self.notary, self.interrupted.append)
            undone.pop_all()
        self.slots = Slots(home)
        self.slots.clear_dead()
        self.pool = Pool(self.slots, int(self.config.pool.memory_share * machine_memory()))
        self.contexts = ContextStore(home / "contexts", check=_check_cancelled)
        shared = self.config.platform
        places = [Turns(shared.sandboxes) for _level in range(MOST_DEPTH + 1)]
        self._proxy = Proxy(
            Prices(self.models.prices), self.models.find, Turns(shared.in_flight), partial(sweep, self.db, self.notary)
        )
        machine = Machine(
            proxy=self._proxy,
            backend=self.backend,
            open_sandbox=partial(self.pool.open, self.backend),
            verify=self.contexts.verify,
            keep_context=self.contexts.ingest_pieces,
            open_context=self.contexts.open,
            limits=self.models.limits,
            places=places.__getitem__,
        )
        self._machinery = Machinery(self.db, self.vault, self.notary, machine)

    @property
    def model(self) -> str:
        """What is asked where a query names none; empty where nothing is configured."""
        return self.models.default

    @property
    def sub_models(self) -> Sequence[str]:
        """Likewise, by depth."""
        return self.models.sub

    def order(
        self,
        question: str,
        context: Context,
        *,
        code: str | None = None,
        tenant: str = TENANT,
        model: str | None = None,
        sub_models: Sequence[str] | None = None,
        policy: Policy | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Order:
        """A query as it can be run: what is not said of it is as it was chosen for all. Raises RequestError."""
        require_name(tenant)
        policy = policy or self.policy
        model = self.model if model is None else model
        if sub_models is None:  # whoever names a model means it for all levels, unless others were chosen for them
            sub_models = self.sub_models if model == self.model or self.sub_models != [self.model] else [model]
        names = self._require(question if code is None else None, model, sub_models, policy)
        require_isolation(self.backend, policy)
        return Order(
            tenant=tenant,
            question=question,
            context=context,
            model=model,
            sub_models=sub_models,
            policy=policy,
            schema=self.choices.answer_schema if schema is None else schema,
            servers={name: self.models.server(name) for name in names},
            code=code,
        )

    async def run(
        self,
        question: str,
        context: Context,
        *,
        code: str | None = None,
        watch: Watch | None = None,
        tenant: str = TENANT,
    ) -> Closed:
        """One query, or with `code` one cell. Raises RequestError before anything is opened, StoreError at its end."""
        return await self.run_order(self.order(question, context, code=code, tenant=tenant), watch)

    async def enqueue(self, order: Order, also: Also) -> Order:
        """Put a query on record that waits for its turn: `run_order` with what is returned begins it.

        also: more for the same transaction, given the query's id. Raises StoreError, and what `also` raises.
        """
        return await enqueue(order, self._machinery, also)

    async def withdraw(self, query_id: str, tenant: str, why: str) -> bool:
        """Close a query that was interrupted, or waits here, as cancelled. False where it is neither.

        Raises StoreError.
        """
        return await withdraw(query_id, tenant, why, self._machinery)

    async def recover(self) -> None:
        """Interrupt what runs or waits in processes that have died, so that it can be resumed. Raises StoreError."""

        def work() -> None:
            if recover(self.db, self.notary):
                self.slots.clear_dead()

        await anyio.to_thread.run_sync(work)

    async def leave(self, left: Iterable[str] = ()) -> None:
        """Interrupt what runs or waits here and nobody is at, so that it can be resumed. Raises StoreError.

        left: more than those whose end could not be recorded.
        """
        unclosed = self._machinery.unclosed
        if late := frozenset({*unclosed, *left}):
            await self.db.write(partial(leave, owner=self.db.owner, left=late, notary=self.notary))
            unclosed.difference_update(late)

    async def resume(
        self, query_id: str, *, watch: Watch | None = None, tenant: str = TENANT, policy: Policy | None = None
    ) -> Closed:
        """Go on with a query that was interrupted: its REPL is rebuilt, and no call that had a result is asked again.

        All that was asked for comes from the journal. policy: its tenant's of now, which holds as well for one that has
        not begun. Raises RequestError where it is not there to be resumed, NotKept where the journal or the store has
        not all that it takes, LimitError, SandboxUnusable, and as `run` does.
        """
        require_name(tenant)
        past = await anyio.to_thread.run_sync(self._interrupted, query_id, tenant)
        past.require_to_resume()
        now, policy = policy, past.rules
        require_isolation(self.backend, policy)
        self._require_servers(past)
        names = dict.fromkeys((past.model or "", *past.may_ask, *policy.models.fallbacks))
        names.pop("", None)
        self.models.require(names)
        if past.model is not None:
            self._require_prices(names)
        context = await anyio.to_thread.run_sync(self._stored, past, abandon_on_cancel=True)
        order = Order(
            tenant=tenant,
            question=past.root.question,
            context=context,
            model=past.model or "",
            sub_models=past.sub_models,
            policy=policy,
            schema=past.schema,
            code=past.code,
            past=past,
        )
        return await self.run_order(under(order, now) if now and not past.begun else order, watch)

    @property
    def month(self) -> int | None:
        """nano-USD that all tenants together may spend in a month; None is no limit."""
        month = self.config.platform.month_usd
        return None if month is None else nano(month)

    def bound(self, model: str, input_bytes: int, output_tokens: int) -> int:
        """The most, in nano-USD, that a request can cost. Raises PriceUnknown."""
        return self._proxy.bound(model, input_bytes, output_tokens)

    async def run_order(self, order: Order, watch: Watch | None = None, policy: Policy | None = None) -> Closed:
        """policy: its tenant's of now, where it waited.

        Raises StoreError at its end, RequestError where it does not wait any more.
        """
        watch = watch or Watch()
        complete = replace(
            under(order, policy) if policy else order,
            platform_month=self.month,
            observe=watch.event,
            on_output=watch.output,
            on_account=watch.account,
            on_closed=watch.closed,
        )
        return await run_query(complete, self._machinery)

    async def sheltered(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work`, which holds a sandbox: whatever cancels the caller, and `aclose`, lets it end in order."""
        return await self._machinery.shelter.run(work)

    def _interrupted(self, query_id: str, tenant: str) -> Past:
        """What there is of it. Raises RequestError, NotKept, StoreError where its records are not whole."""
        if self.db.read(partial(standing, query=query_id, tenant=tenant)) == "open":
            recover(self.db, self.notary)  # its process may have died since
        if self.db.read(partial(standing, query=query_id, tenant=tenant)) == "open":
            dead = self.db.read(partial(journal.abandoned, owners=self.db.dead_owners()))
            if query_id in {key.id for key in dead}:
                raise StoreError(f"query {query_id} or its tenant's log is damaged; see `airlock audit verify`")
            raise RequestError(f"query {query_id} is running: the process that runs it lives")
        if fault := journal.fault(self.db.read(partial(journal.chain, query=query_id))):
            raise StoreError(f"query {query_id} is not whole: {fault}; see `airlock audit verify`")
        keeper = self.vault.opener(tenant, query_id)
        return read_past(self.db.read(partial(journal.history, query=query_id, keeper=keeper)))

    def _require_servers(self, past: Past) -> None:
        """That everything goes to the server that it went to. Raises RequestError."""
        for name, server in past.servers.items():
            if self.models.server(name) != server:
                raise RequestError(f"query {past.query} ran with another --base-url for {name}: give it again")

    def _stored(self, past: Past) -> Context:
        """Its context. Raises NotKept."""
        try:
            context = self.contexts.open(past.root.context["id"])
        except ContextError as error:
            raise ContextGone(f"the context of query {past.query} is gone: {error}") from None
        if past.rules.audit.verify_context and not self.contexts.verify(context):
            raise NotKept(f"the context of query {past.query} is not what it was: its hash is another one")
        return context

    def require(self, question: str | None) -> None:
        """What can be told before a context is read and a query is opened. question: None for a cell alone.

        Raises RequestError without a question, ModelError without a model to ask and for one that is not there,
        PriceUnknown.
        """
        self._require(question, self.model, self.sub_models, self.policy)

    def require_models(self) -> None:
        """That whatever a tenant may name can be asked, at a known price. Raises ModelError, PriceUnknown."""
        if not self.models.named:
            raise ModelError(NO_MODEL)
        for name in self.models.named:
            self.models.require([name])
        self._require_prices(self.models.named)

    def _require(self, question: str | None, model: str, sub_models: Sequence[str], policy: Policy) -> list[str]:
        """The names of all models that the query may ask."""
        if question is not None:
            if not question.strip():
                raise RequestError("the question is empty: say what you want to know of the context")
            if not model:
                raise ModelError(NO_MODEL)
        named = (model, *sub_models, *policy.models.fallbacks)
        names = [name for name in dict.fromkeys(named) if name]
        self.models.require(names)
        if question is not None:
            self._require_prices(names)
        return names

    def _require_prices(self, names: Iterable[str]) -> None:
        for name in names:
            self._proxy.bound(name, 0, 0)

    def fill_pool(self) -> None:
        """Begin to keep sandboxes ready, if that was asked for. Raises RequestError."""
        size = self.choices.pool
        if size is None:
            size = pool_size(self.config.pool.size, self.backend)
        if size:
            self.pool.keep(self.backend, partial(SandboxSpec.under, self.policy), size)

    async def aclose(self) -> None:
        await self._machinery.shelter.aclose()
        await self.pool.aclose()
        await self.models.aclose()
        self.backend.close()
        self.db.close()


@asynccontextmanager
async def open_platform(choices: Choices, home: Path | None = None) -> AsyncGenerator[Platform]:
    """Raises RequestError (policy, configuration), LimitError (isolation), StoreError."""
    platform = Platform(home or settings.home(), choices)
    # What is loaded by now stays. Looking through it takes each full garbage collection 60 ms and more of a wide batch.
    gc.freeze()
    try:
        platform.fill_pool()
        yield platform
    finally:
        gc.unfreeze()
        with anyio.CancelScope(shield=True):
            await platform.aclose()


def _check_cancelled() -> None:
    with contextlib.suppress(RuntimeError):  # called outside of anyio's threads, where nobody can cancel it
        anyio.from_thread.check_cancelled()


def standing(tx: journal.Connection, query: str, tenant: str) -> str:
    """open or interrupted. Raises RequestError when it is closed; of another tenant's, there is nothing to know."""
    status, owner = journal.status_of(tx, query) if query in journal.find_query(tx, query) else ("", "")
    if owner != tenant:
        raise RequestError(f"there is no query {query!r} in the journal")
    if status not in ("open", journal.INTERRUPTED):
        raise RequestError(f"query {query} is closed ({status}): there is nothing to resume")
    return status


def require_name(tenant: str) -> None:
    """Raises RequestError."""
    if not is_tenant(tenant):
        rule = "1 to 64 letters, digits, `.`, `_` and `-`, the first of them a letter or a digit"
        raise RequestError(f"{tenant[:80]!r} is no name for a tenant: take {rule}")
