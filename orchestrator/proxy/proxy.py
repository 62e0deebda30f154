"""The host side of every LM call: authorise, bound, wait for a turn, reserve and record, send, settle and record.

Nothing reaches a provider without a committed reservation and a committed `call.intent`; both are one transaction
(`booking`). `settlement` says what a request costs by how it ended.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import tenacity

from orchestrator.core.asked import digest, fingerprint
from orchestrator.core.errors import (
    AirlockError,
    CountExceeded,
    LimitError,
    NotPermitted,
    OutcomeUnknown,
    ProviderBusy,
    RateLimited,
    TimeExceeded,
)
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.turns import Turns
from orchestrator.core.units import usd
from orchestrator.lm.base import LM, Message, Reply, Request
from orchestrator.proxy.account import Account, Answered, Aside, Node
from orchestrator.proxy.booking import Booking, Hold, Plan, Role, SubCall
from orchestrator.proxy.circuit import Circuit
from orchestrator.proxy.prices import Prices
from orchestrator.store import journal

MESSAGE_TOKENS = 16  # what a chat template adds to a message, at most
REQUEST_TOKENS = 64  # and to a request
LONGEST_WAIT_S = 30.0
MOST_PATIENCE_S = 2.0
SLOW_S = 30.0  # an answer that has not come by then is the provider's fault
RECORDED = 100  # refusals of a query, and budgets told: they cost a guest nothing, and must not fill the disk
SAME_S = 0.05  # times that are over this close together are one and the same
AT_ONCE = 256  # LM requests of one process, of all its tenants


async def nothing_to_sweep() -> int:
    """Where nobody else uses the ledger."""
    return 0


class Proxy:
    """models: finds the LM for a model's name, and the provider's name for it; raises ModelError.

    turns: at the providers, for the requests of all tenants. sweep: frees what dead processes hold, if it is of any.
    """

    def __init__(
        self,
        prices: Prices,
        models: Callable[[str], tuple[LM, str]],
        turns: Turns | None = None,
        sweep: Callable[[], Awaitable[int]] = nothing_to_sweep,
    ) -> None:
        self._prices = prices
        self._models = models
        self._turns = turns or Turns(AT_ONCE)
        self._booking = Booking(prices, sweep)
        self._circuit = Circuit()

    def bound(self, model: str, input_bytes: int, output_tokens: int) -> int:
        """The most, in nano-USD, that a request of one message can cost. Raises PriceUnknown."""
        return self._prices.bound(model, input_bytes + MESSAGE_TOKENS + REQUEST_TOKENS, output_tokens)

    async def sub_call(self, node: Node, prompt: str, model: str | None) -> str:
        """A cell's `llm_query`. Raises LimitError, RequestError or ProviderError; records refusals."""
        account = node.account
        name = model or node.sub_models[0]
        asked: SubCall | None = None
        try:
            # A name from a guest only ever selects among names from the host: it must not reach a path or a key.
            if name not in node.sub_models:
                names = ", ".join(node.sub_models)
                text = f"sub-calls can ask {names}; not {name[:200]!r}"
                raise NotPermitted(text, limit=names, asked=name[:200], rule="models.sub")
            most = account.policy.counts.sub_calls
            if account.sub_calls >= most:
                text = f"the query's {most} sub-calls are used up"
                raise CountExceeded(text, limit=str(most), asked="1", left="0", rule="counts.sub_calls")
            account.sub_calls += 1
            asked = SubCall(account.sub_calls, model)
            if account.policy.models.dedupe:
                return await self._ask_once(node, name, prompt, asked)
            return await self._ask_sub(node, name, prompt, asked)
        except AirlockError as error:
            self.refuse(node, error, name, lambda: fingerprint("llm_query", prompt, model), asked)
            raise

    async def _ask_sub(
        self, node: Node, name: str, prompt: str, asked: SubCall, answered: Answered | None = None
    ) -> str:
        message: Message = {"role": "user", "content": prompt}
        _size(node.account.policy, [message])  # before it waits: what is too large is not held
        most = node.account.policy.models.output_tokens
        return (await self.ask(node, "sub", name, [message], most, answered=answered, sub_call=asked)).text

    async def _ask_once(self, node: Node, name: str, prompt: str, asked: SubCall) -> str:
        """The answer to the same words in this query, if there is one or is going to be; else ask."""
        account = node.account
        key = name, digest(prompt)
        while answered := account.answers.get(key):
            await answered.done.wait()
            if answered.text is not None:
                body = {"of": answered.call, "model": name[:200], "sub_call": asked.number, "asked": asked.model}
                self._record(account, Event("call.repeated", node.name, body))
                return answered.text
        mine = account.answers[key] = Answered()
        try:
            mine.text = await self._ask_sub(node, name, prompt, asked, mine)
            return mine.text
        finally:
            if mine.text is None:
                del account.answers[key]
            mine.done.set()

    def refuse(
        self, node: Node, error: AirlockError, model: str, asked: Callable[[], str], sub_call: SubCall | None = None
    ) -> None:
        """Record that a sub-call was refused. After RECORDED of them they are only counted, for `query.closed`.

        asked: the fingerprint of what the cell asked for, by which a replay finds the refusal. sub_call: its number, if
        it came so far.
        """
        account = node.account
        account.refused += 1
        if account.refused <= RECORDED:
            body = refusal_of(error, "sub", model) | {"sub_call": sub_call.number if sub_call else None}
            self._record(account, Event("call.refused", node.name, body, {"asked": asked()}))

    @staticmethod
    def _record(account: Account, event: Event) -> None:
        account.writer.post(lambda tx: journal.append(tx, account.key, event))
        account.recorded(event)

    async def ask(
        self,
        node: Node,
        role: Role,
        model: str,
        messages: Sequence[Message],
        output_tokens: int,
        aside: Aside | None = None,
        answered: Answered | None = None,
        sub_call: SubCall | None = None,
    ) -> Reply:
        """Ask `model` or, where its provider fails, the policy's fallbacks in their order; one of the calls in flight.

        role: `root` for the loop of any node. aside: held for this very request, the node's last word: each attempt
        takes its money in one transaction, and one that cost nothing puts it back in the same way. answered: is told
        which call it was that brought the answer.
        Raises LimitError, RequestError or ProviderError.
        """
        failed: ProviderBusy | None = None
        others = [name for name in node.account.policy.models.fallbacks if self._permits(node, role, name)]
        candidates = list(dict.fromkeys((model, *others)))
        async with node.account.in_flight:
            for name in candidates:
                last = name == candidates[-1]
                if self._circuit.is_open(_circuit_of(node, name)) and not last:
                    continue
                plan = self._authorise(node, role, name, messages, sub_call)
                try:
                    reply = await self._ask_one(node, plan, output_tokens, aside, last=last)
                    if answered:
                        answered.call = plan.call
                    return reply
                except ProviderBusy as error:
                    failed = failed or error
        raise failed or AssertionError("the last one is always asked")

    async def _ask_one(self, node: Node, plan: Plan, output_tokens: int, aside: Aside | None, *, last: bool) -> Reply:
        """With retries; each attempt is a reservation of its own. last: nobody else could be asked instead."""

        waits: dict[int, float] = {}

        def wait_of(state: tenacity.RetryCallState) -> float:
            """Drawn once: what is slept is what was judged."""
            return waits.setdefault(state.attempt_number, _wait(state))

        def stop(state: tenacity.RetryCallState) -> bool:
            """After the policy's retries; when the wait would outlast the query, or is too long to hold a sandbox."""
            wait = wait_of(state)
            return (
                state.attempt_number > node.account.policy.counts.retries
                or wait > node.remaining_s()
                or wait > 4 * LONGEST_WAIT_S
                or (self._circuit.is_open(_circuit_of(node, plan.name)) and not last)
            )

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ProviderBusy),
            stop=stop,
            wait=wait_of,
            sleep=anyio.sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await self._attempt(node, plan, output_tokens, attempt.retry_state.attempt_number, aside)
        raise AssertionError("tenacity ends with a result or an exception")

    @staticmethod
    def _permits(node: Node, role: Role, model: str) -> bool:
        """A child query's own loop asks a model as its parent's sub-calls do."""
        return node.account.policy.models.permits(role if node.depth == 0 else "sub", model)

    def _authorise(
        self, node: Node, role: Role, model: str, messages: Sequence[Message], sub_call: SubCall | None
    ) -> Plan:
        policy = node.account.policy
        if not self._permits(node, role, model):
            text = f"the policy does not permit model {model!r} for {role} calls"
            raise NotPermitted(text, asked=model, rule=f"models.{role}")
        lm, provider_model = self._models(model)
        size = _size(policy, messages)
        node.calls += 1
        # A token is at least one byte of UTF-8 in every tokenizer that providers use.
        tokens = size + MESSAGE_TOKENS * len(messages) + REQUEST_TOKENS
        return Plan(f"{node.name}.c{node.calls}", role, model, lm, provider_model, messages, tokens, sub_call)

    async def _attempt(self, node: Node, plan: Plan, output_tokens: int, number: int, aside: Aside | None) -> Reply:
        for patience in itertools.count():
            try:
                return await self._in_turn(node, plan, output_tokens, number, aside)
            except RateLimited as limited:
                # Of other processes, nobody tells when they are done: they are asked less and less often.
                wait = max(limited.retry_after, min(MOST_PATIENCE_S, 0.1 * 1.5**patience))
                if wait >= node.remaining_s():
                    raise
            await anyio.sleep(wait)  # in nobody's way
        raise AssertionError("counting never ends")

    async def _in_turn(self, node: Node, plan: Plan, output_tokens: int, number: int, aside: Aside | None) -> Reply:
        account, tenant = node.account, node.account.policy.tenant
        if node.remaining_s() > 0:
            with anyio.move_on_after(node.remaining_s()) as waiting:
                most = min(tenant.in_flight, self._turns.most_of_one)
                async with self._turns.turn(account.key.tenant, tenant.share, most):
                    waiting.deadline = math.inf  # from here on the request has a time-out of its own
                    with self._circuit.attempt(_circuit_of(node, plan.name)):
                        hold = await self._booking.reserve(node, plan, output_tokens, number, aside)
                        return await self._send(node, plan, hold, aside)
        raise _time_over(account)

    async def _send(self, node: Node, plan: Plan, hold: Hold, aside: Aside | None) -> Reply:
        account = node.account
        timeout_s = min(account.policy.time.idle / 1000, node.remaining_s())
        request = Request(plan.provider_model, plan.messages, hold.output_tokens, timeout_s)
        reply, ended, detail = None, None, "cancelled"
        account.running += 1
        account.sent.add(hold.reservation)
        started = time.monotonic()
        try:
            reply = await plan.lm.ask(request)
            detail = reply.finish_reason
            self._circuit.succeeded(_circuit_of(node, plan.name))
            return reply
        except AirlockError as error:
            ended, detail = error, error.told
            if _is_providers_fault(error, time.monotonic() - started):
                self._circuit.failed(_circuit_of(node, plan.name))
            if isinstance(error, OutcomeUnknown) and node.remaining_s() < SAME_S:
                raise _time_over(account) from None  # which of the two times is over first is chance
            raise
        finally:
            account.running -= 1
            self._booking.settle(node, plan, hold, reply, ended, detail, aside)

    def budget(self, node: Node) -> dict[str, object]:
        """What a cell's `budget()` shows: advisory, for its node and what is below it. Recorded as refusals are."""
        account, counts = node.account, node.account.policy.counts
        shown: dict[str, object] = {
            "usd_left": usd(max(0, node.limit - node.spent - node.held)),
            "usd_limit": usd(node.limit),
            "usd_spent": usd(node.spent),
            "sub_calls_left": counts.sub_calls - node.account.sub_calls,
            "children_left": counts.children - node.account.children if node.depth + 1 < counts.depth else 0,
            "depth_left": counts.depth - node.depth,
            "seconds_left": str(int(node.remaining_s())),
        }
        account.told += 1
        if account.told <= RECORDED:
            self._record(account, Event("budget.told", node.name, shown))
        return dict(sorted(shown.items()))  # as in the record, so that a replay prints it in the same order


def _time_over(account: Account) -> TimeExceeded:
    limit = f"{account.policy.time.query} ms"
    return TimeExceeded("the query's time is over", limit=limit, left="0 ms", rule="time.query")


def _size(policy: Policy, messages: Sequence[Message]) -> int:
    """Bytes of UTF-8. Raises CountExceeded."""
    size = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    most = policy.models.prompt
    if size > most:
        text = f"the prompt has {size:,} bytes, the policy permits {most:,}: send less text, or in pieces"
        fields = {"limit": f"{most} bytes", "asked": f"{size} bytes", "left": f"{most} bytes"}
        raise CountExceeded(text, **fields, rule="models.prompt")
    return size


def refusal_of(error: AirlockError, role: str, model: str) -> dict[str, Any]:
    """Body of `call.refused`, but for the number of the sub-call."""
    fields: dict[str, Any] = {"role": role, "model": model[:200], "kind": error.kind, "detail": error.told}
    if isinstance(error, LimitError):
        fields |= {"limit": error.limit[:500], "asked": error.asked[:200], "left": error.left, "rule": error.rule}
    if isinstance(error, RateLimited):
        fields["retry_after_ms"] = int(error.retry_after * 1000)
    return fields


def _circuit_of(node: Node, model: str) -> tuple[str, str]:
    """A model has one provider. Each tenant has circuits of its own: what it asks may be what makes that fail."""
    return node.account.key.tenant, model


def _is_providers_fault(error: AirlockError, waited_s: float) -> bool:
    """Whether it cannot serve now. A time-out that a tenant has made short says nothing of the provider."""
    if isinstance(error, ProviderBusy):
        return error.retry_after != 0
    return isinstance(error, OutcomeUnknown) and waited_s >= SLOW_S


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the provider asked for, else exponential with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ProviderBusy) else None
    if asked is not None:
        return asked
    return tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT_S)(state)
