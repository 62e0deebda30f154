"""The composition root: the only file that names concrete classes. What it builds, `AsyncRLM` and the CLI use."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread

from orchestrator import settings
from orchestrator.choices import Choices, effective_policy
from orchestrator.core import address
from orchestrator.core.context import Context
from orchestrator.core.errors import (
    ContextError,
    ModelError,
    NotKept,
    NotPermitted,
    RequestError,
    StoreError,
)
from orchestrator.core.events import Event
from orchestrator.core.policy import MOST_DEPTH, Policy
from orchestrator.core.tenants import is_tenant
from orchestrator.core.turns import Turns
from orchestrator.core.units import nano
from orchestrator.lm.base import LM
from orchestrator.loop.machine import Machine
from orchestrator.loop.past import Past
from orchestrator.loop.prompts import RootLimits
from orchestrator.loop.query import Closed, Machinery, Order, run_query
from orchestrator.loop.reader import read_past
from orchestrator.loop.recovery import recover, sweep
from orchestrator.proxy.account import Account
from orchestrator.proxy.prices import Prices
from orchestrator.proxy.proxy import Proxy
from orchestrator.sandbox.base import Backend, Isolation, SandboxSpec
from orchestrator.sandbox.pool import Pool, machine_memory
from orchestrator.sandbox.registry import make_backend, pool_size
from orchestrator.sandbox.slots import Slots
from orchestrator.store import journal
from orchestrator.store.contexts import ContextStore
from orchestrator.store.db import Database
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault, open_vault

TENANT = "default"
MOST_NAMES = 3072  # bytes of JSON, of the names of a query's models: records hold them, and are bounded
MOST_MODELS = 32  # of a query, and so are their servers
NO_KEY = "none"  # what servers that need none are told
LOCAL_PROMPT_BYTES = 14 * 1024  # of a window of 8,192 tokens, at 2.5 bytes a token, less the output
LOCAL_OUTPUT_TOKENS = 512
LOCAL_SHOWN_CHARS = 1500


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
        self.model = choices.model or self.config.model or ""
        self.sub_models = list(choices.sub_models) or _listed(self.config.sub_model) or _listed(self.model or None)
        with contextlib.ExitStack() as undone:
            self.db = open_database(home)
            undone.callback(self.db.close)
            self.vault = open_keys(self.db, home, self._secrets())
            self.notary = Notary(self.vault.signer(), home / "heads", self.vault.stamp)
            self.interrupted: list[str] = []  # ids of queries whose process had died when this one started
            recover(self.db, self.notary, self.interrupted.append)
            undone.pop_all()
        self.slots = Slots(home)
        self.slots.clear_dead()
        self.pool = Pool(self.slots, int(self.config.pool.memory_share * machine_memory()))
        self.contexts = ContextStore(home / "contexts", check=_check_cancelled)
        self._lms: dict[str, LM] = {}
        prices = {**self.config.prices, **choices.prices}
        shared = self.config.platform
        places = [Turns(shared.sandboxes) for _level in range(MOST_DEPTH + 1)]
        self._proxy = Proxy(
            Prices(prices), self.find_model, Turns(shared.in_flight), partial(sweep, self.db, self.notary)
        )
        machine = Machine(
            proxy=self._proxy,
            backend=self.backend,
            open_sandbox=partial(self.pool.open, self.backend),
            verify=self.contexts.verify,
            keep_context=self.contexts.ingest_pieces,
            open_context=self.contexts.open,
            limits=self._root_limits,
            places=places.__getitem__,
        )
        self._machinery = Machinery(self.db, self.vault, self.notary, machine)

    def _secrets(self) -> list[str]:
        """What this process holds and nobody else may read."""
        variables = {self.config.api_key_env, self.choices.api_key_env, *self._key_variables()} - {None}
        found = [settings.api_key(name) for name in variables if name]
        given = [self.choices.api_key, settings.database_password(self.config)]
        own = [model.base_url for model in self.config.models.values()]
        servers = [self.choices.base_url, self.config.base_url, *own]
        given += [address.secret(server) for server in servers if server]
        return [*(secret.get_secret_value() for secret in found if secret), *filter(None, given)]

    def _key_variables(self) -> list[str | None]:
        return [model.api_key_env for model in self.config.models.values()]

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
        require_name(tenant)
        self.require(question if code is None else None)
        order = Order(
            tenant=tenant,
            question=question,
            context=context,
            model=self.model,
            sub_models=self.sub_models,
            policy=self.policy,
            schema=self.choices.answer_schema,
            servers={name: self._server(name) for name in self._names},
            code=code,
        )
        return await self._run(order, watch or Watch())

    async def resume(self, query_id: str, *, watch: Watch | None = None, tenant: str = TENANT) -> Closed:
        """Go on with a query that was interrupted: its REPL is rebuilt, and no call that had a result is asked again.

        All that was asked for comes from the journal. Raises RequestError where it is not there to be resumed, NotKept
        where the journal or the store has not all that it takes, LimitError, SandboxUnusable, and as `run` does.
        """
        require_name(tenant)
        past = await anyio.to_thread.run_sync(self._interrupted, query_id, tenant)
        past.require_to_resume()
        policy = past.rules
        require_isolation(self.backend, policy)
        self._require_servers(past)
        self._require_models({past.model or "", *past.may_ask, *policy.models.fallbacks}, priced=past.model is not None)
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
        return await self._run(order, watch or Watch())

    async def _run(self, order: Order, watch: Watch) -> Closed:
        month = self.config.platform.month_usd
        complete = replace(
            order,
            platform_month=None if month is None else nano(month),
            observe=watch.event,
            on_output=watch.output,
            on_account=watch.account,
            on_closed=watch.closed,
        )
        return await run_query(complete, self._machinery)

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
            if self._server(name) != server:
                raise RequestError(f"query {past.query} ran with another --base-url for {name}: give it again")

    def _stored(self, past: Past) -> Context:
        """Its context. Raises NotKept."""
        try:
            context = self.contexts.open(past.root.context["id"])
        except ContextError as error:
            raise NotKept(f"the context of query {past.query} is gone: {error}") from None
        if past.rules.audit.verify_context and not self.contexts.verify(context):
            raise NotKept(f"the context of query {past.query} is not what it was: its hash is another one")
        return context

    def require(self, question: str | None) -> None:
        """What can be told before a context is read and a query is opened. question: None for a cell alone.

        Raises RequestError without a question, ModelError without a model to ask and for one that is not there,
        PriceUnknown.
        """
        if question is not None:
            if not question.strip():
                raise RequestError("the question is empty: say what you want to know of the context")
            if not self.model:
                raise ModelError(NO_MODEL)
        names = self._names
        if len(names) > MOST_MODELS:
            raise ModelError(
                f"{len(names)} models are named, and a query has at most {MOST_MODELS}: name fewer of them"
            )
        if len(json.dumps(names)) > MOST_NAMES:
            raise ModelError(
                f"the names of the models have more than {MOST_NAMES:,} bytes together: name fewer of them"
            )
        self._require_models({*names}, priced=question is not None)

    @property
    def _names(self) -> list[str]:
        """All models that a query may ask."""
        named = (self.model, *self.sub_models, *self.policy.models.fallbacks)
        return [name for name in dict.fromkeys(named) if name]

    def _require_models(self, names: set[str], *, priced: bool) -> None:
        for name in names - {""}:
            if not name.isprintable():
                raise ModelError(f"{name!r} is not the name of a model")
            self.find_model(name)
            if priced:
                self._proxy.bound(name, 0, 0)

    def find_model(self, name: str) -> tuple[LM, str]:
        """The LM that a model's name stands for, and the provider's name for the model. Raises ModelError."""
        if name not in self._lms:
            self._lms[name] = self._make_lm(name)
        return self._lms[name], name

    def _make_lm(self, name: str) -> LM:
        kind, _, rest = name.partition(":")
        if kind == "scripted":
            from orchestrator.lm.scripted import ScriptedLM

            return ScriptedLM(Path(rest))
        if kind == "local":
            from orchestrator.lm.local import LocalLM, find

            return LocalLM(find(rest, self.home / "models"))
        from orchestrator.lm.openai import OpenAILM

        own = self.config.models.get(name, settings.ModelSettings())
        base_url = self._base_url(name)
        variable = self.choices.api_key_env or own.api_key_env or self.config.api_key_env
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ModelError(
                f"the server of {name} has to be an address with http:// or https://, not {address.shown(base_url)!r}"
            )
        key = self.choices.api_key
        if key is None:
            secret = settings.api_key(variable)
            # A server of one's own needs no key unless one is named.
            if secret is None and (base_url is None or self.choices.api_key_env or own.api_key_env):
                raise ModelError(
                    f"there is no API key for {name}: set {variable}, or name a variable with --api-key-env"
                )
            key = secret.get_secret_value() if secret else NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise ModelError(f"the API key for {name} has characters that no key has: look at {variable} again")
        return OpenAILM(base_url, key, own.extra)

    def _base_url(self, name: str) -> str | None:
        """None for OpenAI's own. What is said with the query goes before what the file says: a key given for one server
        is for that one.
        """
        own = self.config.models.get(name, settings.ModelSettings())
        return self.choices.base_url or own.base_url or self.config.base_url

    def _server(self, name: str) -> str | None:
        """Which server a model is at, as a hash; None for one of this process."""
        if name.startswith(("scripted:", "local:")):
            return None
        from orchestrator.lm.openai import OPENAI

        return address.digest(self._base_url(name) or OPENAI)

    def _root_limits(self, model: str, policy: Policy) -> RootLimits:
        own = self.config.models.get(model, settings.ModelSettings())
        local = model.startswith("local:")
        prompt = own.prompt_bytes or (LOCAL_PROMPT_BYTES if local else policy.models.prompt)
        output = own.output_tokens or (LOCAL_OUTPUT_TOKENS if local else policy.models.output_tokens)
        shown = LOCAL_SHOWN_CHARS if local else policy.sandbox.shown
        return RootLimits(
            prompt_bytes=min(prompt, policy.models.prompt),
            output_tokens=min(output, policy.models.output_tokens),
            shown_chars=min(shown, policy.sandbox.shown),
            style=own.style or ("small" if local else "standard"),
        )

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
        for lm in self._lms.values():
            await lm.aclose()
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


def load_config(home: Path) -> settings.Config:
    try:
        return settings.load_config(home)
    except ValueError as error:
        raise RequestError(str(error)) from None


def open_database(home: Path) -> Database:
    """Ledger and journal, where the configuration says that they are. Raises RequestError, StoreError."""
    return Database(home, database_address(home))


def open_keys(db: Database, home: Path, secrets: Iterable[str] = ()) -> Vault:
    """The keys of this database; secrets: what no payload may hold. Raises RequestError, StoreError."""
    given = settings.master_key()
    return open_vault(db, home, given.get_secret_value() if given else None, journal.key_created, secrets)


def database_address(home: Path) -> str | None:
    try:
        return settings.database(load_config(home))
    except ValueError as error:
        raise RequestError(str(error)) from None


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


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


def require_isolation(backend: Backend, policy: Policy) -> None:
    """Raises NotPermitted where the policy asks for more than the backend gives."""
    least = policy.sandbox.least_isolation
    if backend.isolation < Isolation[least]:
        text = f"the query's policy asks for isolation of at least {least!r}, and backend {backend.name} gives"
        raise NotPermitted(f"{text} {backend.isolation.name!r}", limit=least, asked=backend.isolation.name)


NO_MODEL = """no model is configured. The choices are:
  --model local:qwen2.5-coder-1.5b     on this machine, free; fetch it first with `airlock models pull`
  --model NAME [--base-url URL]        any OpenAI-compatible server; its key in OPENAI_API_KEY or --api-key-env NAME"""
