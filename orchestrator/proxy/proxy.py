"""The host side of every LM call: authorise, bound, reserve and record, send, settle and record.

Nothing reaches a provider without a committed reservation and a committed `call.intent`; both are one transaction. How
a request ends decides what it costs:

    answered, usage reported        the price of the usage, never more than the bound
    answered, no usage reported     the bound
    refused, busy, unreachable      nothing
    time-out, cut off, cancelled    the bound: it may have been billed
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import tenacity

from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    BudgetInFlight,
    CountExceeded,
    NotPermitted,
    OutcomeUnknown,
    ProviderBusy,
    TimeExceeded,
)
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.units import usd
from orchestrator.lm.base import LM, Message, Reply, Request
from orchestrator.proxy.prices import Prices
from orchestrator.store import journal, ledger
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.writer import Writer

Role = Literal["root", "sub"]
Recorded = Callable[[Event], None]

MESSAGE_TOKENS = 16  # what a chat template adds to a message, at most
REQUEST_TOKENS = 64  # and to a request
LONGEST_WAIT_S = 30.0
RECORDED_REFUSALS = 100  # of a query, one by one: a refusal costs a guest nothing, and must not fill the disk


@dataclass(slots=True)
class ModelUsage:
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0


@dataclass(slots=True)
class Account:
    """Who is asking: made by the host when a query opens, bound to its sandbox's channel, never told by a guest.

    deadline: on the clock of time.monotonic. scopes: every purse the query's money comes out of, its own first.
    sub_models: what a cell may name; without a name it gets the first. held: reservation -> nano-USD. sent: what was
    asked for real, and is to be paid whatever happens to its record. turns: how far the root's loop has come.
    """

    key: QueryKey
    node: str
    policy: Policy
    scopes: Sequence[Scope]
    deadline: float
    sub_models: Sequence[str]
    in_flight: anyio.Semaphore
    writer: Writer
    recorded: Recorded
    held: dict[str, int] = field(default_factory=dict[str, int])
    sent: set[str] = field(default_factory=set[str])
    turns: int = 0
    sub_calls: int = 0
    calls: int = 0
    running: int = 0
    refused: int = 0
    usage: dict[str, ModelUsage] = field(default_factory=dict[str, ModelUsage])
    conversation: Sequence[Message] = ()

    @property
    def spent(self) -> int:
        """nano-USD settled so far."""
        return sum(usage.cost for usage in self.usage.values())

    def remaining_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True)
class _Plan:
    """One call, authorised and bounded. name: the model as users name it. input_tokens: an upper bound."""

    call: str
    role: Role
    name: str
    lm: LM
    provider_model: str
    messages: Sequence[Message]
    input_tokens: int


class Proxy:
    """models: finds the LM for a model's name, and the provider's name for it; raises ModelError."""

    def __init__(self, prices: Prices, models: Callable[[str], tuple[LM, str]]) -> None:
        self._prices = prices
        self._models = models

    def bound(self, model: str, input_bytes: int, output_tokens: int) -> int:
        """The most, in nano-USD, that a request of one message can cost. Raises PriceUnknown."""
        return self._prices.bound(model, input_bytes + MESSAGE_TOKENS + REQUEST_TOKENS, output_tokens)

    async def sub_call(self, account: Account, prompt: str, model: str | None) -> str:
        """A cell's `llm_query`. Raises LimitError, RequestError or ProviderError; records refusals."""
        name = model or account.sub_models[0]
        try:
            # A name from a guest only ever selects among names from the host: it must not reach a path or a key.
            if name not in account.sub_models:
                names = ", ".join(account.sub_models)
                raise NotPermitted(f"sub-calls can ask {names}; not {name[:200]!r}", limit=names, asked=name[:200])
            most = account.policy.counts.sub_calls
            if account.sub_calls >= most:
                text = f"the query's {most} sub-calls are used up"
                raise CountExceeded(text, limit=str(most), asked="1", left="0")
            account.sub_calls += 1
            message: Message = {"role": "user", "content": prompt}
            async with account.in_flight:
                return (await self.ask(account, "sub", name, [message], account.policy.models.output_tokens)).text
        except AirlockError as error:
            self.refuse(account, error, name)
            raise

    def refuse(self, account: Account, error: AirlockError, model: str) -> None:
        """Record that a sub-call was refused. After RECORDED_REFUSALS they are only counted, for `query.closed`."""
        account.refused += 1
        if account.refused <= RECORDED_REFUSALS:
            event = Event("call.refused", account.node, _refusal(error, "sub", model))
            account.writer.post(lambda tx: journal.append(tx, account.key, event))
            account.recorded(event)

    async def ask(
        self,
        account: Account,
        role: Role,
        model: str,
        messages: Sequence[Message],
        output_tokens: int,
        release: str | None = None,
    ) -> Reply:
        """Ask `model`, with retries; each attempt is a reservation of its own.

        release: a reservation that is given up in the transaction that makes the first attempt's (the last word's).
        Raises LimitError, RequestError or ProviderError.
        """
        plan = self._authorise(account, role, model, messages)
        attempts = 0
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ProviderBusy),
            stop=_stop(account),
            wait=_wait,
            sleep=anyio.sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                attempts += 1
                return await self._attempt(account, plan, output_tokens, attempts, release if attempts == 1 else None)
        raise AssertionError("tenacity ends with a result or an exception")

    def _authorise(self, account: Account, role: Role, model: str, messages: Sequence[Message]) -> _Plan:
        if not account.policy.models.permits(role, model):
            raise NotPermitted(f"the policy does not permit model {model!r} for {role} calls", asked=model)
        lm, provider_model = self._models(model)
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
        most = account.policy.models.prompt
        if size > most:
            text = f"the prompt has {size:,} bytes, the policy permits {most:,}: send less text, or in pieces"
            raise CountExceeded(text, limit=f"{most} bytes", asked=f"{size} bytes", left=f"{most} bytes")
        account.calls += 1
        # A token is at least one byte of UTF-8 in every tokenizer that providers use.
        tokens = size + MESSAGE_TOKENS * len(messages) + REQUEST_TOKENS
        call = f"{account.node}.c{account.calls}"
        return _Plan(call, role, model, lm, provider_model, messages, tokens)

    async def _attempt(
        self, account: Account, plan: _Plan, output_tokens: int, number: int, release: str | None
    ) -> Reply:
        if account.remaining_s() <= 0:
            raise TimeExceeded("the query's time is over", limit=f"{account.policy.time.query} ms", left="0 ms")
        reservation = f"{account.key.id}:{plan.call}:{number}"
        bound, output_tokens = await self._reserve(account, plan, output_tokens, reservation, number, release)
        idle_s = account.policy.time.idle / 1000
        request = Request(plan.provider_model, plan.messages, output_tokens, min(idle_s, account.remaining_s()))
        reply: Reply | None = None
        outcome, detail = "unknown", "cancelled"
        account.running += 1
        account.sent.add(reservation)
        try:
            reply = await plan.lm.ask(request)
            outcome, detail = "answered", reply.finish_reason
            return reply
        except OutcomeUnknown as error:
            detail = str(error)
            raise
        except AirlockError as error:
            outcome, detail = "void", str(error)
            raise
        finally:
            account.running -= 1
            self._settle(account, plan, reservation, bound, outcome, detail, reply)

    async def _reserve(
        self, account: Account, plan: _Plan, output_tokens: int, reservation: str, number: int, release: str | None
    ) -> tuple[int, int]:
        """Hold the bound and record the intent. A call that is too dear is tried once more with a lower output cap."""
        try:
            bound = await self._hold(account, plan, output_tokens, reservation, number, release)
        except ledger.NotEnough as short:
            lower = self._affordable(plan, output_tokens, account.policy.models.output_floor, short.free)
            if not lower:
                raise short.error from None
            output_tokens = lower
            try:
                bound = await self._hold(account, plan, output_tokens, reservation, number, release)
            except ledger.NotEnough as again:
                raise again.error from None
        return bound, output_tokens

    async def _hold(
        self, account: Account, plan: _Plan, output_tokens: int, reservation: str, number: int, release: str | None
    ) -> int:
        bound = self._prices.bound(plan.name, plan.input_tokens, output_tokens)
        shared = _shared(account.conversation, plan.messages) if plan.role == "root" else 0
        body = {
            "call": plan.call,
            "attempt": number,
            "role": plan.role,
            "model": plan.name,
            "bound_usd": usd(bound),
            "output_tokens": output_tokens,
            "messages": len(plan.messages),
            "shared": shared,  # how many leading messages are those of the last root call
        }
        prompt = json.dumps(list(plan.messages[shared:]), ensure_ascii=False)
        event = Event("call.intent", account.node, body, {"prompt": prompt})

        def work(tx: journal.Connection) -> None:
            if release:
                ledger.void(tx, release)
            ledger.reserve(tx, reservation, account.key.id, account.node, bound, account.scopes)
            journal.append(tx, account.key, event)

        await account.writer.write(work)
        account.held[reservation] = bound
        if release:
            account.held.pop(release, None)
        if plan.role == "root":
            account.conversation = list(plan.messages)
        account.recorded(event)
        return bound

    def _affordable(self, plan: _Plan, output_tokens: int, floor: int, free: int) -> int:
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

    def _settle(
        self,
        account: Account,
        plan: _Plan,
        reservation: str,
        bound: int,
        outcome: str,
        detail: str,
        reply: Reply | None,
    ) -> None:
        usage = reply.usage if reply else None
        price = self._prices.cost(plan.name, usage) if usage else bound
        cost = 0 if outcome == "void" else min(price, bound)
        body: dict[str, Any] = {"call": plan.call, "outcome": outcome, "detail": detail[:500], "cost_usd": usd(cost)}
        body["usage"] = None
        if usage:
            body["usage"] = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        if price > bound:
            body["reported_usd"] = usd(price)
        event = Event("call.result", account.node, body, {"completion": reply.text} if reply else {})

        def work(tx: journal.Connection) -> None:
            if outcome == "void":
                ledger.void(tx, reservation)
            else:
                ledger.settle(tx, reservation, cost)
            journal.append(tx, account.key, event)

        account.writer.post(work)
        del account.held[reservation]
        total = account.usage.setdefault(plan.name, ModelUsage())
        total.calls += 1
        total.cost += cost
        total.input_tokens += usage.input_tokens if usage else 0
        total.output_tokens += usage.output_tokens if usage else 0
        account.recorded(event)

    def budget(self, account: Account) -> dict[str, object]:
        """What a cell's `budget()` shows: advisory, for this query alone."""
        spent, held = account.spent, sum(account.held.values())
        limit = account.scopes[0].most("limit")
        return {
            "usd_left": usd(max(0, limit - spent - held)),
            "usd_limit": usd(limit),
            "usd_spent": usd(spent),
            "sub_calls_left": account.policy.counts.sub_calls - account.sub_calls,
            "seconds_left": str(int(account.remaining_s())),
        }


def _shared(before: Sequence[Message], after: Sequence[Message]) -> int:
    count = 0
    for mine, theirs in zip(before, after, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _refusal(error: AirlockError, role: str, model: str) -> Mapping[str, str]:
    limit = error if isinstance(error, (BudgetExhausted, BudgetInFlight, CountExceeded, NotPermitted)) else None
    fields = {"role": role, "model": model[:200], "kind": error.kind, "detail": str(error)[:500]}
    return fields | ({"limit": limit.limit, "asked": limit.asked[:200], "left": limit.left} if limit else {})


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the provider asked for, else exponential with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ProviderBusy) else None
    if asked is not None:
        return asked
    return tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT_S)(state)


def _stop(account: Account) -> Callable[[tenacity.RetryCallState], bool]:
    """Stop after the policy's retries, or when the wait would outlast the query, or is too long to hold a sandbox."""

    def stop(state: tenacity.RetryCallState) -> bool:
        wait = _wait(state)
        return (
            state.attempt_number > account.policy.counts.retries
            or wait > account.remaining_s()
            or wait > 4 * LONGEST_WAIT_S
        )

    return stop
