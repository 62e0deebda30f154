"""The child queries of one node: what a cell's `rlm_query` comes to. Each is a node, run as its parent is."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

import anyio
import anyio.to_thread

from orchestrator.core.context import Context
from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    ContextError,
    CountExceeded,
    Interrupted,
    LimitError,
    NotPermitted,
    NotRebuilt,
    StoreError,
)
from orchestrator.core.events import Event
from orchestrator.core.units import usd
from orchestrator.loop import prompts
from orchestrator.loop.engine import Outcome, Status, schema_check
from orchestrator.loop.handed import Handed
from orchestrator.loop.machine import Machine, Work
from orchestrator.loop.past import PastNode, child_stopped
from orchestrator.proxy.account import Node
from orchestrator.sandbox.sandbox import Call
from orchestrator.store import journal, ledger
from orchestrator.store.ledger import Scope


class Run(Protocol):
    """One node under way: see `NodeRun`."""

    async def run(self) -> Outcome: ...
    def stopped(self, status: Status, reason: str) -> Outcome: ...
    async def close(self, outcome: Outcome, started: float) -> None: ...


class Children:
    """Of `node`, which does `work`. handed: the contexts that its cells make. begin: makes the run of a child."""

    def __init__(
        self,
        machine: Machine,
        node: Node,
        work: Work,
        handed: Handed,
        begin: Callable[[Node, Work, PastNode | None], Run],
    ) -> None:
        self._m, self._node, self._work, self._handed, self._begin = machine, node, work, handed, begin
        self._account, self._policy = node.account, node.account.policy
        self._places = anyio.Semaphore(self._policy.counts.children_in_flight)

    async def ask(self, call: Call, asked: str) -> str:
        """A child query's answer. asked: its fingerprint."""
        handed = self._handed.give(call.context)
        counts, account = self._policy.counts, self._account
        if call.model and call.model not in self._node.sub_models:
            names = ", ".join(self._node.sub_models)
            text = f"child queries can ask {names}; not {call.model[:200]!r}"
            raise NotPermitted(text, limit=names, rule="models.sub")
        if account.children >= counts.children:
            text = f"the query's {counts.children} child queries are used up"
            raise CountExceeded(text, limit=str(counts.children), asked="1", left="0", rule="counts.children")
        most = self._policy.content.question_chars
        if handed.form is None and len(call.prompt) > most:
            # A question with its material, as the reference library's users write them: its text is the context.
            handed = self._handed.give(self._handed.take("context_text", call.prompt, None))
            question = prompts.PROMPT_ALONE
        else:
            question = call.prompt
        if len(question) > most:
            text = f"the question has {len(question):,} characters; {most:,} are permitted"
            raise CountExceeded(text, limit=str(most), rule="content.question_chars")
        models = self._models(call)
        account.children += 1  # before anything is stored for it: calls come at the same time
        await self._require_money_for(models[0])
        context = self._work.context
        if handed.form:
            context = await anyio.to_thread.run_sync(self._m.keep_context, handed.form, handed.pieces)
        del handed  # the store has it: the child may run for long, and others wait for their turn
        self._node.children += 1
        name = f"{self._node.name}.{self._node.children}"
        async with self._places:
            mine = await self._open(name, asked, question, context, models[0])
            return await self._run(Work(question, context, models, self._any), name, mine)

    def _models(self, call: Call) -> Sequence[str]:
        below = self._work.models[1:] or self._work.models
        return [call.model, *below[1:]] if call.model else below

    async def go_on(self, call: Call, past: PastNode) -> str:
        """The answer of a child query that was under way when the query was interrupted."""
        context = self._work.context
        if past.context["id"] != context.id:
            try:
                context = await anyio.to_thread.run_sync(self._m.open_context, past.context["id"])
            except ContextError as error:
                raise NotRebuilt(f"the context of {past.name} is gone: {error}") from None
            checked = self._policy.audit.verify_context
            if checked and not await anyio.to_thread.run_sync(self._m.verify, context):
                raise NotRebuilt(f"the context of {past.name} is not what it was: its hash is another one")
        mine = Scope(f"node:{self._account.key.id}:{past.name}", past.most)
        work = Work(past.question, context, self._models(call), self._any)
        async with self._places:
            return await self._run(work, past.name, mine, past)

    def _share(self, tx: journal.Connection) -> int:
        """nano-USD that a child may have now."""
        return ledger.left(tx, self._node.scopes) * self._policy.money.child_share // 100

    async def _require_money_for(self, model: str) -> None:
        """Before its context is stored: a child that cannot even have a last word begins in vain. Raises LimitError."""
        share = await self._account.writer.write(self._share)
        words = self._m.proxy.bound(model, prompts.LAST_WORD_BYTES, prompts.LAST_WORD_TOKENS)
        if words > share:
            raise too_little(model, words, share, child=True)

    async def _open(self, name: str, asked: str, question: str, context: Context, model: str) -> Scope:
        """Its purse, and its first record. Raises LimitError, StoreError."""
        parent, account = self._node, self._account

        def open_(tx: journal.Connection) -> tuple[Scope, Event]:
            mine = Scope(f"node:{account.key.id}:{name}", self._share(tx))
            ledger.open_scopes(tx, [mine])
            child = f"{account.key.id}:{name}:child"
            ledger.reserve(tx, child, account.key.id, name, 0, [mine, *parent.scopes], calls=0, children=1)
            ledger.settle(tx, child, 0)
            body = {
                "parent": parent.name,
                "depth": parent.depth + 1,
                "model": model,
                "limit_usd": usd(mine.most("limit")),
                "context": context.facts(),
            }
            event = Event("node.opened", name, body, {"question": question, "asked": asked})
            journal.append(tx, account.key, event)
            return mine, event

        try:
            mine, event = await account.writer.write(open_)
        except ledger.NotEnough as short:
            raise short.error from None
        account.recorded(event)
        return mine

    async def _run(self, work: Work, name: str, mine: Scope, past: PastNode | None = None) -> str:
        """Run it, and its answer. Raises ChildStopped with its best answer, StoreError, NotRebuilt, Interrupted."""
        parent, models = self._node, work.models
        node = Node(
            account=self._account,
            name=name,
            depth=parent.depth + 1,
            scopes=[mine, *parent.scopes],
            deadline=parent.deadline,
            sub_models=list(dict.fromkeys((*(models[1:2] or models[:1]), *parent.sub_models))),
            parent=parent,
        )
        if past:
            node.spent, node.calls, node.children = past.spent, past.calls, past.children
        run = self._begin(node, replace(work, inherited=work.context is self._work.context), past)
        outcome, started = Outcome("cancelled", None, "cancelled"), time.monotonic()
        try:
            outcome = await run.run()
        except (StoreError, NotRebuilt, Interrupted):
            raise
        except AirlockError as error:
            status: Status = "refused" if isinstance(error, LimitError) else "failed"
            outcome = run.stopped(status, f"{error.kind}: {error.told}")
        finally:
            await run.close(outcome, started)
        if outcome.status == "answered" and outcome.answer is not None:
            return outcome.answer
        raise child_stopped(name, outcome.reason, outcome.answer)

    @property
    def _any(self) -> Callable[[str], Awaitable[str | None]]:
        """What a child query's answer is held to."""
        return schema_check(None, self._policy.content.answer_chars)


def too_little(model: str, least: int, most: int, *, child: bool) -> BudgetExhausted:
    """most: nano-USD that a node may spend, `least` being what it takes to get anywhere."""
    whose, remedy, what = "budget", "raise --budget, or take a cheaper model", "one turn and a last word"
    if child:
        whose, remedy, what = "child query's share", "ask llm_query, or less at once", "what a child query takes"
    return BudgetExhausted(
        f"the {whose} of {usd(most)} USD is smaller than {what} of {model} can cost ({usd(least)} USD): {remedy}",
        limit=f"{usd(most)} USD",
        asked=f"{usd(least)} USD",
        left=f"{usd(most)} USD",
        rule="money.child_share" if child else "money.query",
    )
