"""One query from opening to closing: its purse, the node at its root, and a journal that says how it ended.

Whatever happens in between (answer, limit, error, cancellation), the sandboxes are gone, every hold is settled and the
chain is closed when `run_query` returns or raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio

from orchestrator.core.asked import digest
from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    CountExceeded,
    Interrupted,
    LimitError,
    NotPermitted,
    RequestError,
    StoreError,
)
from orchestrator.core.events import Event
from orchestrator.core.units import usd
from orchestrator.loop import prompts
from orchestrator.loop.engine import Outcome, Status, limit_hit, schema_check
from orchestrator.loop.machine import Work
from orchestrator.loop.node import NodeRun
from orchestrator.loop.order import (
    Closed,
    Machinery,
    Order,
    key_of,
    may_ask,
    narrowed_event,
    new_id,
    opened_event,
    require_isolation,
    shared_purses,
)
from orchestrator.loop.past import Past
from orchestrator.loop.recovery import ROOT, leave, settle_open
from orchestrator.proxy.account import Account, Answered, Node
from orchestrator.store import journal, ledger
from orchestrator.store.db import now
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.signing import Signed
from orchestrator.store.writer import Writer

SIGN_S = 10.0  # a cell that begins so long after the last signature has its tenant's log signed first


async def run_query(order: Order, machinery: Machinery) -> Closed:
    """Run it. Raises only StoreError, when the end cannot be recorded; every other end is in the result.

    One that waited waits on, and CountExceeded is raised, where as many of its tenant run already; RequestError where
    it does not wait any more.

    One that goes on is not touched, and an error is raised, where it cannot be taken: RequestError when it is not
    interrupted any more, LimitError when the tenant has no room or no money for it. As long as nothing new has come of
    it, a provider or a sandbox that is not to be had, and a cancellation, interrupt it again; they do not close it.

    When it is cancelled, it closes the query as `cancelled`, tells `on_closed`, and lets the cancellation go on.
    """
    key = await key_of(order, machinery, order.past.query if order.past else order.id or new_id())
    return await machinery.shelter.run(_Query(order, machinery, key).run)


class _Query:
    def __init__(self, order: Order, machinery: Machinery, key: QueryKey) -> None:
        self._order = order
        self._m = machinery
        self._key = key
        policy, query_id, past, now = order.policy, key.id, order.past, datetime.now(UTC)
        self._scopes = [
            Scope(f"query:{query_id}", policy.money.query, children=policy.counts.children),
            *shared_purses(order.tenant, policy, order.platform_month, now),
        ]
        self._started = time.monotonic() - (past.ran_s if past else 0)
        self._signed = time.monotonic()
        self._writer = Writer(machinery.db)
        self._account = Account(
            key=self._key,
            policy=policy,
            writer=self._writer,
            recorded=order.observe,
            in_flight=anyio.Semaphore(policy.counts.in_flight),
            sign=self._sign,
        )
        root = Node(
            account=self._account,
            name=ROOT,
            depth=0,
            scopes=self._scopes,
            deadline=self._started + policy.time.query / 1000,
            sub_models=may_ask(order),
        )
        models = [order.model if order.code is None else "", *order.sub_models]
        accept = schema_check(order.schema, policy.content.answer_chars)
        work = Work(order.question, order.context, models, accept, order.code, order.on_output)
        if past:
            _go_on(self._account, root, past)
        self._root = NodeRun(machinery.nodes, root, work, past.root if past else None)

    async def run(self) -> Closed:
        opened = self._resumed(self._order.past) if self._order.past else opened_event(self._order, self._m)
        self._m.unclosed.discard(self._key.id)  # it goes on: nobody may take it for left
        late = frozenset(self._m.unclosed)
        running = await self._writer.write(lambda tx: self._open(tx, opened, late))
        self._m.unclosed.difference_update(late)  # a new one may have come since
        error: AirlockError | None = None
        try:
            self._order.observe(opened)
            if self._order.narrowed:
                self._order.observe(narrowed_event(self._order))
            self._order.on_account(self._account)
            self._admit(running)
            outcome = await self._root.run()
        except AirlockError as caught:
            error = caught.cause if isinstance(caught, Interrupted) else caught
            status: Status = "refused" if isinstance(error, LimitError) else "failed"
            if isinstance(error, LimitError):
                self._record(Event("limit.hit", ROOT, limit_hit(error)))
            if error is not caught and self._account.nothing_new:
                status = "interrupted"
            outcome = self._root.stopped(status, f"{error.kind}: {error.told}")
        except BaseException as stopped:  # cancelled, or a fault of our own: the chain is closed all the same
            cancelled = isinstance(stopped, anyio.get_cancelled_exc_class())
            how: Status = "cancelled" if cancelled else "failed"
            if cancelled and (self._account.nothing_new or self._writer.frozen):
                how = "interrupted"
            why = self._account.why if cancelled else f"internal: {type(stopped).__name__}"
            await self._close(Outcome(how, None, why), None)
            raise
        return await self._close(outcome, error)

    def _record(self, event: Event) -> None:
        self._writer.post(lambda tx: journal.append(tx, self._key, event))
        self._order.observe(event)

    def _sign(self, tx: journal.Connection) -> Callable[[], None] | None:
        """Sign the tenant's log, if that was not done of late; then what to do once that is committed."""
        if time.monotonic() < self._signed + SIGN_S:
            return None
        self._signed = time.monotonic()
        return partial(self._m.notary.remember, self._m.notary.sign(tx, self._order.tenant))

    # Opening

    def _resumed(self, past: Past) -> Event:
        backend = self._m.nodes.backend
        cells = sum(cell.result is not None for node in past.under_way for cell in node.cells)
        body = {"backend": backend.name, "isolation": backend.isolation.name, "cells": cells, "calls": past.answered}
        return Event("query.resumed", ROOT, body)

    def _open(self, tx: journal.Connection, opened: Event, late: Collection[str]) -> int:
        """Returns how many queries of the tenant are open now, this one included. late: to be interrupted first."""
        leave(tx, self._m.db.owner, late, self._m.notary)
        self._m.notary.require_whole(tx, self._order.tenant)
        ledger.open_scopes(tx, self._scopes)
        if self._order.id and not journal.begin_query(tx, self._key, self._m.db.owner):
            raise RequestError(f"query {self._key.id} does not wait any more")
        if not self._order.past:
            if self._order.id:  # it can go on waiting
                self._admit_one_more(running := journal.open_queries(tx, self._order.tenant))
                self._narrow(tx)
                return running
            journal.open_query(tx, self._key, self._m.db.owner, opened)
            return journal.open_queries(tx, self._order.tenant)
        before = replace(self._key, policy=self._order.past.rules.sha256())
        taken = journal.resume_query(tx, before, self._m.db.owner, opened)
        # Another process may have gone on with it since its past was read, and may have been interrupted as well.
        if not taken or journal.length(tx, self._key.id) != self._order.past.records + 1:
            raise RequestError(f"query {self._key.id} is not interrupted any more: another process goes on with it")
        running = journal.open_queries(tx, self._order.tenant)
        self._admit_one_more(running)
        if (left := ledger.left(tx, self._scopes)) < self._last_words(self._order.past):  # it can wait for money
            text = f"{usd(left)} USD are left, which do not pay for the last words: resume it later"
            raise BudgetExhausted(text, left=f"{usd(left)} USD", rule="money.query")
        self._narrow(tx)
        return running

    def _narrow(self, tx: journal.Connection) -> None:
        """What was on record before was true of the time before; the records from here on name the policy of now."""
        if self._order.narrowed:
            journal.narrow_query(tx, self._key, narrowed_event(self._order))

    def _last_words(self, past: Past) -> int:
        """nano-USD that is set aside by all nodes that go on."""
        bound = partial(
            self._m.nodes.proxy.bound, input_bytes=prompts.LAST_WORD_BYTES, output_tokens=prompts.LAST_WORD_TOKENS
        )
        return self._root.last_word + sum(bound(node.model) for node in past.under_way if node is not past.root)

    def _admit(self, running: int) -> None:
        """Refuse what cannot come to a good end, before anything is started. Raises LimitError, RequestError."""
        if self._order.past and not self._order.narrowed:
            return
        order, policy = self._order, self._order.policy
        if len(order.question) > policy.content.question_chars:
            most = policy.content.question_chars
            text = f"the question has {len(order.question):,} characters; {most:,} are permitted"
            raise CountExceeded(text, limit=str(most), rule="content.question_chars")
        self._admit_one_more(running)
        require_isolation(self._m.nodes.backend, policy)
        if order.code is None and not policy.models.permits("root", order.model):
            raise NotPermitted(f"the policy does not permit model {order.model!r} for root calls", rule="models.root")
        for name in order.sub_models:
            if not policy.models.permits("sub", name):
                raise NotPermitted(f"the policy does not permit model {name!r} for sub calls", rule="models.sub")

    def _admit_one_more(self, running: int) -> None:
        most = self._order.policy.tenant.queries_at_once
        if running > most:
            text = f"{most} queries of this tenant are running already; wait for one to end"
            raise CountExceeded(text, limit=str(most), rule="tenant.queries_at_once")

    # Closing

    async def _close(self, outcome: Outcome, error: AirlockError | None) -> Closed:
        with anyio.CancelScope(shield=True):
            try:
                end = self._interrupt if outcome.status == "interrupted" else self._settle_and_close
                closed = await end(outcome)
            except BaseException:
                self._m.unclosed.add(self._key.id)
                raise
            closed.error = error
            self._order.on_closed(closed)
            return closed
        raise AssertionError("a shielded scope is not cancelled")

    async def _interrupt(self, outcome: Outcome) -> Closed:
        """As it was before it was resumed, or when its records were frozen, but for what that has cost."""

        def work(tx: journal.Connection) -> tuple[str, int, Event, Signed]:
            settle_open(tx, self._key, outcome.reason[:500], self._account.sent.__contains__)
            if lost := self._writer.lost():
                raise StoreError(f"a record was lost: {lost}")
            event = Event("query.interrupted", ROOT, {"why": outcome.reason, "until": now()})
            spent, _held = ledger.balance(tx, self._scopes[0].id)
            head = journal.interrupt_query(tx, self._key, event).hash
            return head, spent, event, self._m.notary.sign(tx, self._order.tenant)

        write = self._m.db.write if self._writer.frozen else self._writer.write
        return self._ended(outcome, *await write(work))

    async def _settle_and_close(self, outcome: Outcome) -> Closed:
        self._account.news()
        await self._root.verify()
        duration = time.monotonic() - self._started
        body = {
            "status": outcome.status,
            "reason": outcome.reason,
            "sub_calls": self._account.sub_calls,
            "refused": self._account.refused,
            "children": self._account.children,
            "turns": self._root.turns,
            "duration_ms": int(duration * 1000),
        }
        answer = {} if outcome.answer is None else {"answer": outcome.answer}

        def work(tx: journal.Connection) -> tuple[str, int, Event, Signed]:
            settle_open(tx, self._key, "the result was lost", self._account.sent.__contains__)
            how: dict[str, Any] = body
            if lost := self._writer.lost():
                how = {**body, "status": "failed", "reason": f"a record was lost: {lost}"}
            # The ledger's word, not the account's: it also has what a call cost that was cancelled in between.
            spent, _held = ledger.balance(tx, self._scopes[0].id)
            event = Event("query.closed", ROOT, {**how, "cost_usd": usd(spent)}, answer)
            head = journal.close_query(tx, self._key, how["status"], event).hash
            return head, spent, event, self._m.notary.sign(tx, self._order.tenant)

        return self._ended(outcome, *await self._writer.write(work))

    def _ended(self, outcome: Outcome, head: str, spent: int, event: Event, signed: Signed) -> Closed:
        self._m.notary.remember(signed)
        self._order.observe(event)
        return Closed(
            query_id=self._key.id,
            outcome=outcome,
            cost=spent,
            usage=self._account.usage,
            turns=self._root.turns,
            sub_calls=self._account.sub_calls,
            duration_s=time.monotonic() - self._started,
            journal_head=head,
            checkpoint=signed.note,
            cell=self._root.cell,
        )


def _go_on(account: Account, root: Node, past: Past) -> None:
    """Count on from where it was, so that no name is used twice and every limit holds across the interruption."""
    account.sub_calls, account.children = past.sub_calls, past.children
    account.refused, account.told = past.refused, past.told
    account.nothing_new = True
    account.usage.update(past.usage)
    root.spent, root.calls, root.children = past.root.spent, past.root.calls, past.root.children
    for model, prompt, call, text in past.answers:
        answered = account.answers[model, digest(prompt)] = Answered(call, text=text)
        answered.done.set()
