"""Money and records of one request: held and written down before it is sent, settled and written down after it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from orchestrator.core.errors import AirlockError, BudgetExhausted, BudgetInFlight, RateLimited
from orchestrator.core.events import Event
from orchestrator.core.units import usd
from orchestrator.lm.base import LM, Message, Reply
from orchestrator.proxy.account import Account, Aside, ModelUsage, Node
from orchestrator.proxy.prices import Prices
from orchestrator.proxy.settlement import charged, settlement
from orchestrator.store import journal, ledger
from orchestrator.store.ledger import Scope

Role = Literal["root", "sub"]


@dataclass(frozen=True, slots=True)
class SubCall:
    """What a cell asked for, which may take several calls. number: among its query's. model: as the cell named it."""

    number: int
    model: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One call, authorised and bounded. name: the model as users name it. input_tokens: an upper bound."""

    call: str
    role: Role
    name: str
    lm: LM
    provider_model: str
    messages: Sequence[Message]
    input_tokens: int
    sub_call: SubCall | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """A committed reservation, and what it allows. held: its money, for a last word all that was set aside."""

    reservation: str
    bound: int
    held: int
    output_tokens: int


class Booking:
    """sweep: frees what dead processes hold, if it is of any."""

    def __init__(self, prices: Prices, sweep: Callable[[], Awaitable[int]]) -> None:
        self._prices = prices
        self._sweep = sweep

    async def reserve(self, node: Node, plan: Plan, output_tokens: int, number: int, aside: Aside | None) -> Hold:
        """Hold the bound and record the intent. A call that is too dear is tried once more with a lower output cap."""
        while True:
            try:
                return await self._hold(node, plan, output_tokens, number, aside)
            except ledger.NotEnough as short:
                money = isinstance(short.error, BudgetExhausted | BudgetInFlight)
                floor = node.account.policy.models.output_floor
                # A lower cap is cheaper, and no help where requests or calls in flight are what there are too many of.
                if money and (lower := self._affordable(plan, output_tokens, floor, short.free)):
                    output_tokens = lower
                elif not (isinstance(short.error, BudgetInFlight | RateLimited) and await self._sweep()):
                    raise short.error from None

    async def _hold(self, node: Node, plan: Plan, output_tokens: int, number: int, aside: Aside | None) -> Hold:
        account = node.account
        reservation = f"{account.key.id}:{plan.call}:{number}"
        bound = self._prices.bound(plan.name, plan.input_tokens, output_tokens)
        shared = _shared(node.conversation, plan.messages) if plan.role == "root" else 0
        body: dict[str, Any] = {
            "call": plan.call,
            "attempt": number,
            "role": plan.role,
            "model": plan.name,
            "bound_usd": usd(bound),
            "output_tokens": output_tokens,
            "messages": len(plan.messages),
            "shared": shared,  # how many leading messages are those of the last root call
        }
        if plan.role == "root":
            body["last"] = aside is not None
        if plan.sub_call:
            body |= {"sub_call": plan.sub_call.number, "asked": plan.sub_call.model}
        prompt = json.dumps(list(plan.messages[shared:]), ensure_ascii=False)
        event = Event("call.intent", node.name, body, {"prompt": prompt})
        minute = _minute(account)
        # The last word must not have to wait for a minute to pass.
        scopes = node.scopes if aside else [*node.scopes, minute]
        tokens = plan.input_tokens + output_tokens
        # What a last word does not need stays held with the rest: it may have to be set aside again.
        held = max(bound, aside.nano) if aside else bound

        def work(tx: journal.Connection) -> None:
            if aside:
                ledger.void(tx, aside.reservation)
            else:
                ledger.open_scopes(tx, [minute])
            ledger.reserve(tx, reservation, account.key.id, node.name, held, scopes, tokens=tokens)
            journal.append(tx, account.key, event)

        await account.writer.write(work)
        node.count(held=held)
        if aside:
            aside.taken = True
            node.count(held=-aside.nano)
        if plan.role == "root":
            node.conversation = list(plan.messages)
        account.recorded(event)
        return Hold(reservation, bound, held, output_tokens)

    def _affordable(self, plan: Plan, output_tokens: int, floor: int, free: int) -> int:
        """The highest output cap from `floor` up that `free` can pay for, or 0."""
        low, high = floor, output_tokens - 1
        best = 0
        while low <= high:
            middle = (low + high) // 2
            if self._prices.bound(plan.name, plan.input_tokens, middle) <= free:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def settle(
        self,
        node: Node,
        plan: Plan,
        hold: Hold,
        reply: Reply | None,
        error: AirlockError | None,
        detail: str,
        aside: Aside | None,
    ) -> None:
        account, usage = node.account, reply.usage if reply else None
        if reply:
            account.news()
        settled = settlement(reply, error)
        price = self._prices.cost(plan.name, usage) if usage else None
        cost = charged(settled, hold.bound, price)
        body: dict[str, Any] = {
            "call": plan.call,
            "outcome": settled.outcome,
            "detail": detail,
            "cost_usd": usd(cost),
            "usage": None,
            "finish": reply.finish_reason[:64] if reply else None,
        }
        if usage:
            body["usage"] = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        if price is not None and price > hold.bound:
            body["reported_usd"] = usd(price)
        event = Event("call.result", node.name, body, {"completion": reply.text} if reply else {})
        tokens = plan.input_tokens + hold.output_tokens
        if usage:
            tokens = min(tokens, usage.input_tokens + usage.output_tokens)
        again = ledger.set_aside(account.key.id, node.name, aside.tries + 1) if aside else ""

        def work(tx: journal.Connection) -> None:
            if settled.outcome == "void":
                ledger.void(tx, hold.reservation)
                if aside:
                    put_aside(tx, node, again, aside.nano)
            else:
                ledger.settle(tx, hold.reservation, cost, tokens)
            journal.append(tx, account.key, event)

        account.writer.post(work)
        node.count(held=-hold.held, spent=cost)
        if aside and settled.outcome == "void":
            aside.reservation, aside.tries, aside.taken = again, aside.tries + 1, False
            node.count(held=aside.nano)
        total = account.usage.setdefault(plan.name, ModelUsage())
        total.calls += 1
        total.cost += cost
        total.input_tokens += usage.input_tokens if usage else 0
        total.output_tokens += usage.output_tokens if usage else 0
        account.recorded(event)


def put_aside(tx: journal.Connection, node: Node, reservation: str, nano: int) -> None:
    """Hold the money of a node's last word. Raises NotEnough."""
    ledger.reserve(tx, reservation, node.account.key.id, node.name, nano, node.scopes, calls=0)


def _minute(account: Account) -> Scope:
    """What the tenant may ask in the minute that runs now (UTC)."""
    tenant = account.policy.tenant
    return Scope(
        f"tenant-minute:{account.key.tenant}:{datetime.now(UTC):%Y-%m-%dT%H:%M}",
        limit=None,
        calls=tenant.requests_minute,
        tokens=tenant.tokens_minute,
    )


def _shared(before: Sequence[Message], after: Sequence[Message]) -> int:
    count = 0
    for mine, theirs in zip(before, after, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
