"""One query from opening to closing: its purse, its sandbox, its loop, and a journal that says how it ended.

Whatever happens in between (answer, limit, error, cancellation), the sandbox is gone, every hold is settled and the
chain is closed when `run_query` returns or raises.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from orchestrator.core.context import Context
from orchestrator.core.errors import AirlockError, BudgetExhausted, CountExceeded, LimitError, NotPermitted, StoreError
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.units import usd
from orchestrator.guest.context import form
from orchestrator.lm.base import Message, Reply
from orchestrator.loop import prompts
from orchestrator.loop.engine import Loop, Outcome, Status
from orchestrator.loop.prompts import RootLimits
from orchestrator.loop.recovery import ROOT, close_abandoned, pay
from orchestrator.loop.shelter import Shelter
from orchestrator.proxy.proxy import Account, ModelUsage, Proxy
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Call, CellResult, Sandbox
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.writer import Writer


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked. code: run as one cell instead of a root LM's loop (`airlock exec`). policy: the effective one.

    model is empty when there is no root LM; sub_models is empty when there is nobody to ask.
    """

    tenant: str
    question: str
    context: Context
    model: str
    sub_models: Sequence[str]
    limits: RootLimits
    policy: Policy
    accept: Callable[[str], Awaitable[str | None]]
    code: str | None = None
    observe: Callable[[Event], None] = lambda _event: None
    on_output: Callable[[str, str], None] | None = None
    on_account: Callable[[Account], None] = lambda _account: None
    on_closed: Callable[[Closed], None] = lambda _closed: None


@dataclass(slots=True)
class Closed:
    """How a query ended, for whoever asked. cost in nano-USD; cell is the one cell of `exec`."""

    query_id: str
    outcome: Outcome
    error: AirlockError | None = None
    cost: int = 0
    usage: dict[str, ModelUsage] = field(default_factory=dict[str, ModelUsage])
    turns: int = 0
    sub_calls: int = 0
    duration_s: float = 0.0
    journal_head: str = ""
    cell: CellResult | None = None


@dataclass(frozen=True, slots=True)
class Machinery:
    """What a query runs on; the parts that `wiring` chose. unclosed: queries whose end could not be recorded."""

    db: Database
    proxy: Proxy
    backend: Backend
    open_sandbox: Callable[[Callable[[Slot], SandboxSpec]], AbstractAsyncContextManager[Sandbox]]
    verify: Callable[[Context], bool]
    shelter: Shelter = field(default_factory=Shelter)
    unclosed: list[QueryKey] = field(default_factory=list[QueryKey])


async def run_query(order: Order, machinery: Machinery) -> Closed:
    """Run it. Raises only StoreError, when the end cannot be recorded; every other end is in the result.

    When it is cancelled, it closes the query as `cancelled`, tells `on_closed`, and lets the cancellation go on.
    """
    return await machinery.shelter.run(_Query(order, machinery).run)


class _Query:
    def __init__(self, order: Order, machinery: Machinery) -> None:
        self._order = order
        self._m = machinery
        policy = order.policy
        now = datetime.now(UTC)
        query_id = now.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(5)
        self._key = QueryKey(query_id, order.tenant, policy.sha256(), keep=policy.audit.payloads == "keep")
        self._scopes = [
            Scope(f"query:{query_id}", policy.money.query),
            Scope(f"tenant-day:{order.tenant}:{now:%Y-%m-%d}", policy.money.tenant_day),
            Scope(f"tenant-month:{order.tenant}:{now:%Y-%m}", policy.money.tenant_month),
        ]
        self._started = time.monotonic()
        self._writer = Writer(machinery.db)
        self._account = Account(
            key=self._key,
            node=ROOT,
            policy=policy,
            scopes=self._scopes,
            deadline=self._started + policy.time.query / 1000,
            sub_models=order.sub_models,
            in_flight=anyio.Semaphore(policy.counts.in_flight),
            writer=self._writer,
            recorded=order.observe,
        )
        self._reserve: str | None = ledger.set_aside(query_id)
        self._loop: Loop | None = None
        self._cells = 0
        self._cell: CellResult | None = None

    async def run(self) -> Closed:
        opened = self._opened()
        late = list(self._m.unclosed)
        running = await self._writer.write(lambda tx: self._open(tx, opened, late))
        del self._m.unclosed[: len(late)]
        error: AirlockError | None = None
        try:
            self._order.observe(opened)
            self._order.on_account(self._account)
            self._admit(running)
            outcome = await self._bounded()
        except AirlockError as caught:
            error = caught
            status: Status = "refused" if isinstance(caught, LimitError) else "failed"
            outcome = self._stopped(status, f"{caught.kind}: {caught}")
        except BaseException as stopped:  # cancelled, or a fault of our own: the chain is closed all the same
            cancelled = isinstance(stopped, anyio.get_cancelled_exc_class())
            how: Status = "cancelled" if cancelled else "failed"
            await self._close(Outcome(how, None, how if cancelled else f"internal: {type(stopped).__name__}"), None)
            raise
        return await self._close(outcome, error)

    # Opening

    def _opened(self) -> Event:
        order, context = self._order, self._order.context
        body = {
            "model": order.model or None,
            "sub_models": list(order.sub_models),
            "backend": self._m.backend.name,
            "isolation": self._m.backend.isolation.name,
            "context": {
                "id": context.id,
                "sha256": context.sha256,
                "kind": context.kind,
                "bytes": context.bytes,
                "chars": context.chars,
            },
            "limit_usd": usd(order.policy.money.query),
            "policy": order.policy.model_dump(mode="json"),
        }
        return Event("query.opened", ROOT, body, {"question": order.question})

    def _open(self, tx: journal.Connection, opened: Event, late: Sequence[QueryKey]) -> int:
        """Returns how many queries of the tenant are open now, this one included. late: to be closed first."""
        for key in late:
            close_abandoned(tx, key, "the end of this query could not be recorded when it came")
        ledger.open_scopes(tx, self._scopes)
        journal.open_query(tx, self._key, self._m.db.owner, opened)
        return journal.open_queries(tx, self._order.tenant)

    def _admit(self, running: int) -> None:
        """Refuse what cannot come to a good end, before anything is started. Raises LimitError, RequestError."""
        order, policy = self._order, self._order.policy
        if len(order.question) > policy.content.question_chars:
            most = policy.content.question_chars
            raise CountExceeded(f"the question has {len(order.question):,} characters; {most:,} are permitted")
        most = policy.tenant.queries_at_once
        if running > most:
            raise CountExceeded(
                f"{most} queries of this tenant are running already; wait for one to end", limit=str(most)
            )
        for role, names in (("root", [order.model] if order.model else []), ("sub", list(order.sub_models))):
            for name in names:
                if not policy.models.permits(role, name):  # pyright: ignore[reportArgumentType]
                    raise NotPermitted(f"the policy does not permit model {name!r} for {role} calls")

    async def _set_aside(self, messages: Sequence[Message]) -> None:
        """Hold the price of the last word. Raises BudgetExhausted when the budget does not also pay for a turn."""
        order, proxy = self._order, self._m.proxy
        words = proxy.bound(order.model, prompts.LAST_WORD_BYTES, prompts.LAST_WORD_TOKENS)
        size = sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in messages)
        least = words + proxy.bound(order.model, size, order.policy.models.output_floor)
        limit = order.policy.money.query
        if least > limit:
            raise BudgetExhausted(
                f"the budget of {usd(limit)} USD is smaller than one turn and a last word of {order.model} can cost "
                f"({usd(least)} USD): raise --budget, or take a cheaper model",
                limit=f"{usd(limit)} USD",
                asked=f"{usd(least)} USD",
                left=f"{usd(limit)} USD",
            )

        def work(tx: journal.Connection) -> None:
            ledger.reserve(tx, str(self._reserve), self._key.id, ROOT, words, self._scopes)

        try:
            await self._writer.write(work)
        except ledger.NotEnough as short:
            self._reserve = None
            raise short.error from None
        self._account.held[str(self._reserve)] = words

    # Running

    async def _bounded(self) -> Outcome:
        messages = self._messages()
        if self._order.code is None:
            await self._set_aside(messages)
        else:
            self._reserve = None
        with anyio.move_on_after(self._account.remaining_s()):
            return await self._in_sandbox(messages)
        text = f"time-exceeded: the query's {self._order.policy.time.query / 1000:g} s are over"
        body = {"kind": "time-exceeded", "detail": text, "limit": f"{self._order.policy.time.query} ms"}
        self._record(Event("limit.hit", ROOT, body))
        return self._stopped("limit", text)

    def _stopped(self, status: Status, reason: str) -> Outcome:
        return self._loop.stopped(status, reason) if self._loop else Outcome(status, None, reason)

    def _messages(self) -> list[Message]:
        order, policy = self._order, self._order.policy
        context = order.context
        lazy = ""
        if form(context.kind, context.bytes, context.chars, context.items, policy.sandbox.memory) == "lazy":
            lazy = "text" if context.items is None else "list"
        return prompts.opening(
            order.question,
            context.shape,
            lazy,
            order.limits,
            iterations=policy.counts.iterations,
            sub_calls=policy.counts.sub_calls if policy.counts.depth else 0,
            in_flight=policy.counts.in_flight,
            sub_prompt_bytes=policy.models.prompt,
        )

    async def _in_sandbox(self, messages: list[Message]) -> Outcome:
        async with self._m.open_sandbox(partial(SandboxSpec.under, self._order.policy)) as sandbox:
            try:
                self._record(Event("sandbox.started", ROOT, self._started_body(sandbox)))
                sandbox.attach(self._order.context)
                if self._order.code is not None:
                    return await self._one_cell(sandbox, self._order.code)
                return await self._with_root(sandbox, messages)
            finally:
                with anyio.CancelScope(shield=True):
                    await sandbox.close()
                    await self._ended(sandbox)

    def _started_body(self, sandbox: Sandbox) -> dict[str, Any]:
        backend = self._m.backend
        start = {"start": "cold", "because": sandbox.cold_because} if sandbox.cold_because else {"start": "warm"}
        body = {
            "backend": backend.name,
            "isolation": backend.isolation.name,
            "python": sandbox.python,
            "image": sandbox.image,
        }
        return {**body, **start}

    async def _ended(self, sandbox: Sandbox) -> None:
        used = await sandbox.usage()
        cpu = None if used.cpu_s is None else int(used.cpu_s * 1000)
        body = {"cpu_ms": cpu, "peak_memory_bytes": used.peak_memory_bytes, "oom": used.oom}
        self._record(Event("sandbox.ended", ROOT, body))

    async def _one_cell(self, sandbox: Sandbox, code: str) -> Outcome:
        self._cell = await self._run_cell(sandbox, code)
        if self._cell.status == "timeout":
            return Outcome("limit", self._cell.answer, f"time-exceeded: {self._cell.detail}")
        return Outcome("answered", self._cell.answer, self._cell.detail)

    async def _with_root(self, sandbox: Sandbox, messages: list[Message]) -> Outcome:
        async def run_cell(code: str) -> CellResult:
            return await self._run_cell(sandbox, code)

        self._loop = Loop(
            question=self._order.question,
            limits=self._order.limits,
            iterations=self._order.policy.counts.iterations,
            ask=self._ask,
            run_cell=run_cell,
            record=self._record,
            accept=self._order.accept,
            most_chars=self._order.policy.content.answer_chars,
        )
        return await self._loop.run(messages)

    async def _ask(self, messages: list[Message], output_tokens: int, *, last: bool) -> Reply:
        release = None
        self._account.turns = self._loop.turns if self._loop else 0
        if last:
            release, self._reserve = self._reserve, None
        return await self._m.proxy.ask(self._account, "root", self._order.model, messages, output_tokens, release)

    async def _run_cell(self, sandbox: Sandbox, code: str) -> CellResult:
        self._cells += 1
        started = Event("cell.started", ROOT, {"cell": self._cells}, {"code": code})
        await self._writer.write(lambda tx: journal.append(tx, self._key, started))  # before it runs
        self._order.observe(started)
        timeout = min(self._order.policy.time.cell / 1000, self._account.remaining_s())
        result = await sandbox.run(code, timeout, self._on_call, self._order.on_output)
        body = {
            "cell": self._cells,
            "status": result.status,
            "detail": result.detail[:500],
            "names": list(result.names),
            "dropped_bytes": result.dropped,
            "duration_ms": int(result.duration_s * 1000),
            "answered": result.answer is not None,
        }
        shown = {"stdout": result.text("out"), "stderr": result.text("err")}
        self._record(Event("cell.ended", ROOT, body, {name: text for name, text in shown.items() if text}))
        return result

    async def _on_call(self, call: Call) -> str | dict[str, Any]:
        if call.op == "budget":
            return self._m.proxy.budget(self._account)
        permitted = self._order.policy.counts.depth >= 1 and bool(self._order.sub_models)
        if call.op == "llm_query" and permitted:
            return await self._m.proxy.sub_call(self._account, call.prompt, call.model)
        text = f"{call.op} is not permitted by policy"
        if call.op == "llm_query" and not self._order.sub_models:
            text = "there is no model for sub-calls: name one with --model or --sub-model"
        error = NotPermitted(text, limit=f"depth {self._order.policy.counts.depth}", asked=call.op)
        self._m.proxy.refuse(self._account, error, call.model or "")
        raise error

    def _record(self, event: Event) -> None:
        self._writer.post(lambda tx: journal.append(tx, self._key, event))
        self._order.observe(event)

    # Closing

    async def _close(self, outcome: Outcome, error: AirlockError | None) -> Closed:
        with anyio.CancelScope(shield=True):
            try:
                closed = await self._settle_and_close(outcome)
            except StoreError:
                self._m.unclosed.append(self._key)
                raise
            closed.error = error
            self._order.on_closed(closed)
            return closed
        raise AssertionError("a shielded scope is not cancelled")

    async def _settle_and_close(self, outcome: Outcome) -> Closed:
        if self._order.policy.audit.verify_context:
            whole = await anyio.to_thread.run_sync(self._m.verify, self._order.context)
            self._record(Event("context.verified", ROOT, {"sha256": self._order.context.sha256, "unchanged": whole}))
        duration = time.monotonic() - self._started
        turns = self._loop.turns if self._loop else 0
        body = {
            "status": outcome.status,
            "reason": outcome.reason[:1000],
            "sub_calls": self._account.sub_calls,
            "refused": self._account.refused,
            "turns": turns,
            "duration_ms": int(duration * 1000),
        }
        answer = {} if outcome.answer is None else {"answer": outcome.answer}

        def work(tx: journal.Connection) -> tuple[str, int, Event]:
            for reservation, node, amount in ledger.open_reservations(tx, self._key.id):
                if reservation in self._account.sent:  # its result could not be recorded
                    pay(tx, self._key, reservation, node, amount, "the result was lost")
                else:  # the last word's, or one that was cancelled before it went out
                    ledger.void(tx, reservation)
            how: dict[str, Any] = body
            if lost := self._writer.lost():
                how = {**body, "status": "failed", "reason": f"a record was lost: {lost}"}
            # The ledger's word, not the account's: it also has what a call cost that was cancelled in between.
            spent, _held = ledger.balance(tx, self._scopes[0].id)
            event = Event("query.closed", ROOT, {**how, "cost_usd": usd(spent)}, answer)
            return journal.close_query(tx, self._key, how["status"], event).hash, spent, event

        head, spent, event = await self._writer.write(work)
        self._order.observe(event)
        return Closed(
            query_id=self._key.id,
            outcome=outcome,
            cost=spent,
            usage=self._account.usage,
            turns=turns,
            sub_calls=self._account.sub_calls,
            duration_s=duration,
            journal_head=head,
            cell=self._cell,
        )
