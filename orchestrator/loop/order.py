"""What is asked of a query, how it ended, and the record that opens it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread

from orchestrator.core.context import Context
from orchestrator.core.errors import AirlockError, NotPermitted
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.units import usd
from orchestrator.loop.engine import Outcome
from orchestrator.loop.machine import Machine
from orchestrator.loop.past import Past
from orchestrator.loop.recovery import ROOT
from orchestrator.loop.shelter import Shelter
from orchestrator.proxy.account import Account, ModelUsage
from orchestrator.sandbox.base import Backend, Isolation
from orchestrator.sandbox.sandbox import CellResult
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked. code: run as one cell instead of a root LM's loop (`airlock exec`). policy: the effective one.
    past: of an interrupted query, which this one goes on with; all that the journal has of its order is from there.

    id: of one that was enqueued: its opening is on record. narrowed: its policy is not the one on record any more.
    servers: where each model is, as a hash; None for one of this machine.
    schema: a JSON Schema, for the answer. sub_models: the first is asked at depth 1, the next at depth 2, and so on,
    the last one at all further down; empty when there is nobody to ask. platform_month: what all tenants together may
    spend in a month, in nano-USD.
    """

    tenant: str
    question: str
    context: Context
    model: str
    sub_models: Sequence[str]
    policy: Policy
    schema: Mapping[str, Any] | None = None
    servers: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    platform_month: int | None = None
    code: str | None = None
    past: Past | None = None
    id: str = ""
    narrowed: bool = False
    observe: Callable[[Event], None] = lambda _event: None
    on_output: Callable[[str, str], None] | None = None
    on_account: Callable[[Account], None] = lambda _account: None
    on_closed: Callable[[Closed], None] = lambda _closed: None


@dataclass(slots=True)
class Closed:
    """How a query ended, for whoever asked. cost in nano-USD; cell is the one cell of `exec`.

    journal_head: hash of the record that closed it. checkpoint: the signed head of its tenant's log, with that record
    in it: who holds it can tell later whether the log was cut or rewritten.
    """

    query_id: str
    outcome: Outcome
    error: AirlockError | None = None
    cost: int = 0
    usage: dict[str, ModelUsage] = field(default_factory=dict[str, ModelUsage])
    turns: int = 0
    sub_calls: int = 0
    duration_s: float = 0.0
    journal_head: str = ""
    checkpoint: str = ""
    cell: CellResult | None = None


@dataclass(frozen=True, slots=True)
class Machinery:
    """What queries run on; the parts that `wiring` chose. unclosed: ids of queries whose end could not be recorded."""

    db: Database
    vault: Vault
    notary: Notary
    nodes: Machine
    shelter: Shelter = field(default_factory=Shelter)
    unclosed: set[str] = field(default_factory=set[str])


async def key_of(order: Order, machinery: Machinery, query_id: str) -> QueryKey:
    keeper = await anyio.to_thread.run_sync(machinery.vault.keeper, order.tenant, query_id, _kept(order.policy))
    return QueryKey(query_id, order.tenant, order.policy.sha256(), keeper)


def new_id() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(5)


def _kept(policy: Policy) -> frozenset[str]:
    """Names of payloads. With prompts, the hashes of what cells asked for; with both streams, how they were mixed."""
    names = set(policy.audit.payloads)
    more = {"asked": {"prompt"}, "order": {"stdout", "stderr"}}
    return frozenset(names | {name for name, of in more.items() if of <= names})


def may_ask(order: Order) -> list[str]:
    """The models that its cells may name, the first of them without naming it."""
    named = order.past.may_ask if order.past else dict.fromkeys((*order.sub_models, order.model))
    return [name for name in named if name and order.policy.models.permits("sub", name)]


def under(order: Order, policy: Policy) -> Order:
    """The order, under a policy as well that came to be while it waited."""
    stricter = order.policy.narrowed(policy)
    return order if stricter == order.policy else replace(order, policy=stricter, narrowed=True)


def narrowed_event(order: Order) -> Event:
    policy = order.policy.model_dump(mode="json")
    body = {"limit_usd": usd(order.policy.money.query), "payloads": policy["audit"]["payloads"]}
    return Event("query.narrowed", ROOT, body, {"policy": json.dumps(policy)})


def require_isolation(backend: Backend, policy: Policy) -> None:
    """Raises NotPermitted where the policy asks for more than the backend gives."""
    least, given = policy.sandbox.least_isolation, backend.isolation
    if given < Isolation[least]:
        text = f"the query's policy asks for isolation of at least {least!r}, and backend {backend.name} gives"
        raise NotPermitted(f"{text} {given.name!r}", limit=least, asked=given.name, rule="sandbox.least_isolation")


def opened_event(order: Order, machinery: Machinery) -> Event:
    policy, backend = order.policy.model_dump(mode="json"), machinery.nodes.backend
    body = {
        "model": order.model if order.code is None else None,
        "sub_models": list(order.sub_models),
        "may_ask": may_ask(order),
        "servers": dict(order.servers),
        "backend": backend.name,
        "isolation": backend.isolation.name,
        "context": order.context.facts(),
        "limit_usd": usd(order.policy.money.query),
        "payloads": policy["audit"]["payloads"],
    }
    payloads = {"question": order.question, "policy": json.dumps(policy)}
    if order.schema is not None:
        payloads["schema"] = json.dumps(order.schema)
    if order.code is not None:
        payloads["code"] = order.code
    return Event("query.opened", ROOT, body, payloads)


def shared_purses(tenant: str, policy: Policy, platform_month: int | None, now: datetime) -> list[Scope]:
    """What a query of the tenant spends from, besides its own purse: the tenant's day and month, and the platform's."""
    return [
        Scope(f"tenant-day:{tenant}:{now:%Y-%m-%d}", policy.money.tenant_day),
        Scope(f"tenant-month:{tenant}:{now:%Y-%m}", policy.money.tenant_month, in_flight=policy.tenant.in_flight),
        Scope(f"platform:{now:%Y-%m}", platform_month),
    ]
