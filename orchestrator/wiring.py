"""The composition root: the only file that names concrete classes. What it builds, `AsyncRLM` and the CLI use."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.from_thread

from orchestrator import settings
from orchestrator.core.context import Context
from orchestrator.core.errors import ModelError, PolicyError, RequestError
from orchestrator.core.events import Event
from orchestrator.core.policy import MOST_DEPTH, Policy
from orchestrator.core.turns import Turns
from orchestrator.core.units import nano
from orchestrator.files import read_text
from orchestrator.lm.base import LM
from orchestrator.loop.engine import schema_check
from orchestrator.loop.node import Machine
from orchestrator.loop.prompts import RootLimits
from orchestrator.loop.query import Closed, Machinery, Order, run_query
from orchestrator.loop.recovery import recover, sweep
from orchestrator.named_policy import load_policy
from orchestrator.proxy.account import Account
from orchestrator.proxy.prices import Prices
from orchestrator.proxy.proxy import Proxy
from orchestrator.sandbox.base import Backend, SandboxSpec
from orchestrator.sandbox.pool import Pool, machine_memory
from orchestrator.sandbox.registry import make_backend, pool_size
from orchestrator.sandbox.slots import Slots
from orchestrator.store import journal
from orchestrator.store.contexts import ContextStore
from orchestrator.store.db import Database

TENANT = "default"
NO_KEY = "none"  # the SDK insists on one; servers that need none ignore it
LOCAL_PROMPT_BYTES = 14 * 1024  # of a window of 8,192 tokens, at 2.5 bytes a token, less the output
LOCAL_OUTPUT_TOKENS = 512
LOCAL_SHOWN_CHARS = 1500


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user chose, on the command line or in `RLM(...)`; None where nothing was said. Narrows the policy only.

    sub_models: by depth, the last one for all further down. pool: how many sandboxes are kept ready; None for what
    `airlock.toml` says.
    """

    model: str | None = None
    sub_models: Sequence[str] = ()
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str | None = None
    prices: Mapping[str, tuple[Decimal, Decimal]] = field(default_factory=dict[str, tuple[Decimal, Decimal]])
    backend: str = "auto"
    policy: str = "default"
    budget: int | None = None
    timeout_ms: int | None = None
    depth: int | None = None
    iterations: int | None = None
    in_flight: int | None = None
    answer_schema: Mapping[str, Any] | None = None
    pool: int | None = None


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
        self.config = _config(home)
        self.policy = effective_policy(choices)
        limits = self.policy.sandbox
        self.backend: Backend = make_backend(
            choices.backend, least=limits.least_isolation, image=limits.image, home=home
        )
        self.model = choices.model or self.config.model or ""
        self.sub_models = list(choices.sub_models) or _listed(self.config.sub_model) or _listed(self.model or None)
        self.db = open_database(home)
        recover(self.db)
        self.slots = Slots(home)
        self.slots.clear_dead()
        self.pool = Pool(self.slots, int(self.config.pool.memory_share * machine_memory()))
        self.contexts = ContextStore(home / "contexts", check=_check_cancelled)
        self._lms: dict[str, LM] = {}
        prices = {**self.config.prices, **choices.prices}
        shared = self.config.platform
        places = [Turns(shared.sandboxes) for _level in range(MOST_DEPTH + 1)]
        self._proxy = Proxy(Prices(prices), self.find_model, Turns(shared.in_flight), partial(sweep, self.db))
        machine = Machine(
            proxy=self._proxy,
            backend=self.backend,
            open_sandbox=partial(self.pool.open, self.backend),
            verify=self.contexts.verify,
            keep_context=self.contexts.ingest_pieces,
            limits=self._root_limits,
            places=places.__getitem__,
        )
        self._machinery = Machinery(self.db, machine)

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
        watch = watch or Watch()
        self.require(question if code is None else None)
        month = self.config.platform.month_usd
        order = Order(
            tenant=tenant,
            question=question,
            context=context,
            model=self.model,
            sub_models=self.sub_models,
            policy=self.policy,
            platform_month=None if month is None else nano(month),
            accept=schema_check(self.choices.answer_schema, self.policy.content.answer_chars),
            code=code,
            observe=watch.event,
            on_output=watch.output,
            on_account=watch.account,
            on_closed=watch.closed,
        )
        return await run_query(order, self._machinery)

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
        for name in {self.model, *self.sub_models, *self.policy.models.fallbacks} - {""}:
            if not name.isprintable():
                raise ModelError(f"{name!r} is not the name of a model")
            self.find_model(name)
            if question is not None:
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
        # What is said with the query goes before what the file says: a key given for one server is for that one.
        base_url = self.choices.base_url or own.base_url or self.config.base_url
        variable = self.choices.api_key_env or own.api_key_env or self.config.api_key_env
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ModelError(f"the server of {name} has to be an address with http:// or https://, not {base_url!r}")
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

    def _root_limits(self, model: str) -> RootLimits:
        own = self.config.models.get(model, settings.ModelSettings())
        policy = self.policy
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


def _config(home: Path) -> settings.Config:
    try:
        return settings.load_config(home)
    except ValueError as error:
        raise RequestError(str(error)) from None


def open_database(home: Path) -> Database:
    """Ledger and journal, where the configuration says that they are. Raises RequestError, StoreError."""
    return Database(home, _address(home))


def _address(home: Path) -> str | None:
    try:
        return settings.database(_config(home))
    except ValueError as error:
        raise RequestError(str(error)) from None


def effective_policy(choices: Choices) -> Policy:
    """The policy as narrowed by the request."""
    policy = load_policy(choices.policy)
    money, time, counts = policy.money, policy.time, policy.counts
    if choices.depth is not None and choices.depth > counts.depth:
        raise PolicyError(f"a depth of {choices.depth}: policy {choices.policy} permits a depth of {counts.depth}")
    narrower = policy.model_copy(
        update={
            "money": money.model_copy(update=_said(query=choices.budget)),
            "time": time.model_copy(update=_said(query=choices.timeout_ms)),
            "counts": counts.model_copy(
                update=_said(depth=choices.depth, iterations=choices.iterations, in_flight=choices.in_flight)
            ),
        }
    )
    return policy.narrowed(narrower)


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


def _said(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def load_schema(path: Path) -> Mapping[str, Any]:
    """A JSON Schema from a file. Raises RequestError."""
    try:
        schema: Any = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"cannot read the answer schema {path}: {error}") from None
    return check_schema(str(path), schema)


def check_schema(name: str, schema: Any) -> Mapping[str, Any]:
    """The schema, if it is one and JSON. Raises RequestError."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        if not isinstance(schema, dict):
            raise ValueError("it is not a JSON object")
        json.dumps(schema, allow_nan=False)
        cast("Any", validator_for)(schema).check_schema(schema)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{name} is not a JSON Schema: {error}") from None
    except SchemaError as error:
        raise RequestError(f"{name} is not a JSON Schema: {error.message}") from None
    return cast("Mapping[str, Any]", schema)


@dataclass(frozen=True, slots=True)
class Run:
    """A query as the journal has it. payloads: (seq, name) -> text. fault: what is wrong with the chain, or None."""

    chain: list[tuple[bytes, str]]
    payloads: Mapping[tuple[int, str], str]
    fault: str | None


def read_run(home: Path, text: str) -> Run:
    """The query whose id begins with `text`, or the newest for `last`. Raises RequestError, StoreError."""
    if not _address(home) and not os.path.lexists(home / "airlock.db"):  # nor where we may not look
        raise RequestError(f"there is no journal in {home}: nothing has been run with this data folder")
    db = open_database(home)
    try:
        found = db.read(lambda tx: journal.find_query(tx, text))
        if len(found) != 1:
            several = f"several queries begin with {text!r}, the newest of them: {', '.join(found[:3])}"
            raise RequestError(several if found else f"there is no query {text!r} in the journal")
        kept = db.read(lambda tx: list(journal.kept_payloads(tx, found[0])))
        chain = db.read(lambda tx: journal.chain(tx, found[0]))
        payloads = {(seq, name): data.decode("utf-8", "replace") for seq, name, _salt, data in kept}
        closed = db.read(lambda tx: journal.is_closed(tx, found[0]))
        return Run(chain, payloads, journal.fault(chain, kept, closed=closed))
    finally:
        db.close()


NO_MODEL = """no model is configured. The choices are:
  --model local:qwen2.5-coder-1.5b     on this machine, free; fetch it first with `airlock models pull`
  --model NAME [--base-url URL]        any OpenAI-compatible server; its key in OPENAI_API_KEY or --api-key-env NAME"""
