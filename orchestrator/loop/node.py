"""One node of a query's tree: its last word set aside, its sandbox, its loop, and the child queries of its cells.

The root and every child query run through here; `query` opens and closes the whole.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import anyio
import anyio.to_thread

from orchestrator.core.context import Context
from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    ChildStopped,
    CountExceeded,
    LimitError,
    NotPermitted,
    NotRebuilt,
    StoreError,
)
from orchestrator.core.events import Event, EventType
from orchestrator.core.policy import Policy
from orchestrator.core.turns import Turns
from orchestrator.core.units import usd
from orchestrator.guest.context import form
from orchestrator.lm.base import Message, Reply
from orchestrator.loop import prompts
from orchestrator.loop.cells import Cells
from orchestrator.loop.engine import Loop, Outcome, Status, schema_check
from orchestrator.loop.handed import Handed, asked_by
from orchestrator.loop.past import PastNode, child_stopped
from orchestrator.loop.prompts import RootLimits
from orchestrator.proxy.account import Aside, Node
from orchestrator.proxy.booking import put_aside
from orchestrator.proxy.proxy import Proxy
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Call, CellResult, Sandbox
from orchestrator.store import journal, ledger
from orchestrator.store.ledger import Scope

ContextForm = Literal["text", "jsonl"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What nodes run on. places: for sandboxes, one gate a level: who waits for a child has a place of its own.

    keep_context: stores a context that was made in a REPL; blocks, and raises ContextError, StoreError. open_context:
    finds one again by its id, and raises the same. limits: what the LM behind a model's name can take under a policy.
    """

    proxy: Proxy
    backend: Backend
    open_sandbox: Callable[[Callable[[Slot], SandboxSpec]], AbstractAsyncContextManager[Sandbox]]
    verify: Callable[[Context], bool]
    keep_context: Callable[[ContextForm, Sequence[str]], Context]
    open_context: Callable[[str], Context]
    limits: Callable[[str, Policy], RootLimits]
    places: Callable[[int], Turns]


@dataclass(frozen=True, slots=True)
class Work:
    """What one node is to do. code: run as one cell instead of an LM's loop (`airlock exec`); model is empty then.

    models: what is asked at each depth, the last one at all further down; the first is this node's own. inherited: the
    context is that of the parent, who looks after it.
    """

    question: str
    context: Context
    models: Sequence[str]
    accept: Callable[[str], Awaitable[str | None]]
    code: str | None = None
    on_output: Callable[[str, str], None] | None = None
    inherited: bool = False

    @property
    def model(self) -> str:
        return self.models[0]


class NodeRun:
    """Runs `work` as `node`. past: what the journal has of it, when it goes on. cell: the one cell of `exec`."""

    def __init__(self, machine: Machine, node: Node, work: Work, past: PastNode | None = None) -> None:
        self._m = machine
        self._node = node
        self._work = work
        self._account = node.account
        self._policy: Policy = node.account.policy
        self._limits = machine.limits(work.model, self._policy)
        self._aside: Aside | None = None
        self._loop: Loop | None = None
        self._past = past
        self._handed = Handed(self._policy.content.child_context)
        self._cells = Cells(node, self._handed, past.cells if past else (), self._on_call, self._resume_child)
        self._children = anyio.Semaphore(self._policy.counts.children_in_flight)
        self.cell: CellResult | None = None

    @property
    def turns(self) -> int:
        return self._loop.turns if self._loop else 0

    async def run(self) -> Outcome:
        """To the end of the work, or of its time. Raises what is no limit of the loop's own."""
        messages = self._messages()
        if self._work.code is None:
            await self._set_aside(messages)
        with anyio.move_on_after(self._node.remaining_s()):
            return await self._in_sandbox(messages)
        text = f"time-exceeded: the query's {self._policy.time.query / 1000:g} s are over"
        body = {"kind": "time-exceeded", "detail": text, "limit": f"{self._policy.time.query} ms"}
        self._record("limit.hit", body)
        return self.stopped("limit", text)

    @property
    def last_word(self) -> int:
        """nano-USD that is set aside for it; nothing of a cell alone."""
        if self._work.code is not None:
            return 0
        return self._m.proxy.bound(self._work.model, prompts.LAST_WORD_BYTES, prompts.LAST_WORD_TOKENS)

    def stopped(self, status: Status, reason: str) -> Outcome:
        """The end before the end, with the best answer so far."""
        return self._loop.stopped(status, reason) if self._loop else Outcome(status, None, reason)

    # Before the sandbox

    def _messages(self) -> list[Message]:
        context, policy, node = self._work.context, self._policy, self._node
        lazy = ""
        if form(context.kind, context.bytes, context.chars, context.items, policy.sandbox.memory) == "lazy":
            lazy = "text" if context.items is None else "list"
        levels = policy.counts.depth - node.depth
        return prompts.opening(
            self._work.question,
            context.shape,
            lazy,
            self._limits,
            iterations=policy.counts.iterations,
            sub_calls=policy.counts.sub_calls if levels > 0 else 0,
            children=policy.counts.children if levels > 1 else 0,
            in_flight=policy.counts.in_flight,
            sub_prompt_bytes=policy.models.prompt,
        )

    async def _set_aside(self, messages: Sequence[Message]) -> None:
        """Hold the price of the last word. Raises BudgetExhausted when the money does not also pay for a turn."""
        node, proxy, model = self._node, self._m.proxy, self._work.model
        words = self.last_word
        size = sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in messages)
        least = words + proxy.bound(model, size, self._policy.models.output_floor)
        if least > node.limit:
            raise _too_little(model, least, node.limit, child=node.parent is not None)
        query = self._account.key.id

        def work(tx: journal.Connection) -> Aside:
            tries = ledger.times_set_aside(tx, query, node.name)  # by those before it, in a query that goes on
            aside = Aside(ledger.set_aside(query, node.name, tries), words, tries=tries)
            put_aside(tx, node, aside.reservation, words)
            return aside

        try:
            self._aside = await self._account.writer.write(work)
        except ledger.NotEnough as short:
            raise short.error from None
        node.count(held=words)

    # In the sandbox

    async def _in_sandbox(self, messages: list[Message]) -> Outcome:
        key, tenant, places = self._account.key, self._policy.tenant, self._m.places(self._node.depth)
        async with (
            places.turn(key.tenant, tenant.share, places.most_of_one),
            self._m.open_sandbox(partial(SandboxSpec.under, self._policy)) as sandbox,
        ):
            try:
                self._record("sandbox.started", self._started_body(sandbox))
                sandbox.attach(self._work.context)
                if self._work.code is not None:
                    return await self._one_cell(sandbox, self._work.code)
                return await self._with_loop(sandbox, messages)
            finally:
                with anyio.CancelScope(shield=True):
                    await sandbox.close()
                    await self._sandbox_ended(sandbox)

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

    async def _sandbox_ended(self, sandbox: Sandbox) -> None:
        used = await sandbox.usage()
        cpu = None if used.cpu_s is None else int(used.cpu_s * 1000)
        body = {"cpu_ms": cpu, "peak_memory_bytes": used.peak_memory_bytes, "oom": used.oom}
        self._record("sandbox.ended", body)

    async def _one_cell(self, sandbox: Sandbox, code: str) -> Outcome:
        self.cell = await self._run_cell(sandbox, code)
        if self.cell.status == "timeout":
            return Outcome("limit", self.cell.answer, f"time-exceeded: {self.cell.detail}")
        return Outcome("answered", self.cell.answer, self.cell.detail)

    async def _with_loop(self, sandbox: Sandbox, messages: list[Message]) -> Outcome:
        async def run_cell(code: str) -> CellResult:
            return await self._run_cell(sandbox, code)

        self._loop = Loop(
            question=self._work.question,
            limits=self._limits,
            iterations=self._policy.counts.iterations,
            ask=self._ask,
            run_cell=run_cell,
            record=self._limit_hit,
            accept=self._work.accept,
            most_chars=self._policy.content.answer_chars,
        )
        return await self._loop.run(messages)

    async def _ask(self, messages: list[Message], output_tokens: int, *, last: bool) -> Reply:
        if self._node.parent is None:
            self._account.turns = self.turns
        if self._past and (reply := self._past.reply(last=last)):
            return reply
        if self._past and self._past.limit and not last:  # which was before the last word that is to come
            raise self._past.limit
        aside = self._aside if last else None
        return await self._m.proxy.ask(self._node, "root", self._work.model, messages, output_tokens, aside)

    def _limit_hit(self, kind: EventType, body: Mapping[str, str]) -> None:
        if not (self._past and self._past.limit):  # else it is on record
            self._record(kind, body)

    async def _run_cell(self, sandbox: Sandbox, code: str) -> CellResult:
        return await self._cells.run(sandbox, code, self._work.on_output)

    # What cells ask for

    async def _on_call(self, call: Call) -> str | dict[str, Any]:
        if call.op == "budget":
            return self._m.proxy.budget(self._node)
        if call.op == "llm_query" and self._levels >= 1:
            return await self._m.proxy.sub_call(self._node, call.prompt, call.model)
        asked = asked_by(call, self._handed.peek(call.context)) if call.op == "rlm_query" else ""
        try:
            if self._levels < 1:
                raise self._not_permitted("llm_query" if call.op == "llm_query" else "rlm_query")
            if call.op == "rlm_query" and self._levels > 1:
                return await self._rlm_query(call, asked)
            if call.op != "rlm_query":
                return {"context": self._handed.take(call.op, call.prompt, call.context)}
            prompt = self._handed.give(call.context).as_prompt(call.prompt)
        except ChildStopped:  # on record as the end of its node
            raise
        except AirlockError as error:
            self._m.proxy.refuse(self._node, error, call.model or "", lambda: asked or asked_by(call, None))
            raise
        return await self._m.proxy.sub_call(self._node, prompt, call.model)  # there is no level for a child

    @property
    def _levels(self) -> int:
        """How many levels of calls there are below this node."""
        return self._policy.counts.depth - self._node.depth if self._node.sub_models else 0

    def _not_permitted(self, op: str) -> NotPermitted:
        depth = self._policy.counts.depth
        text = f"{op} is not permitted by policy"
        if not self._node.sub_models:
            text = "there is no model for sub-calls: name one with --model or --sub-model"
        return NotPermitted(text, limit=f"depth {depth}", asked=op)

    async def _rlm_query(self, call: Call, asked: str) -> str:
        """A child query's answer. asked: its fingerprint."""
        handed = self._handed.give(call.context)
        counts, account = self._policy.counts, self._account
        if call.model and call.model not in self._node.sub_models:
            names = ", ".join(self._node.sub_models)
            raise NotPermitted(f"child queries can ask {names}; not {call.model[:200]!r}", limit=names)
        if account.children >= counts.children:
            text = f"the query's {counts.children} child queries are used up"
            raise CountExceeded(text, limit=str(counts.children), asked="1", left="0")
        most = self._policy.content.question_chars
        if handed.form is None and len(call.prompt) > most:
            # A question with its material, as the reference library's users write them: its text is the context.
            handed = self._handed.give(self._handed.take("context_text", call.prompt, None))
            question = prompts.PROMPT_ALONE
        else:
            question = call.prompt
        if len(question) > most:
            raise CountExceeded(f"the question has {len(question):,} characters; {most:,} are permitted")
        models = self._models_of_child(call)
        account.children += 1  # before anything is stored for it: calls come at the same time
        await self._require_money_for(models[0])
        context = self._work.context
        if handed.form:
            context = await anyio.to_thread.run_sync(self._m.keep_context, handed.form, handed.pieces)
        del handed  # the store has it: the child may run for long, and others wait for their turn
        self._node.children += 1
        name = f"{self._node.name}.{self._node.children}"
        async with self._children:
            mine = await self._open_child(name, asked, question, context, models[0])
            return await self._child(Work(question, context, models, self._any), name, mine)

    def _models_of_child(self, call: Call) -> Sequence[str]:
        below = self._work.models[1:] or self._work.models
        return [call.model, *below[1:]] if call.model else below

    async def _resume_child(self, call: Call, past: PastNode) -> str:
        """The answer of a child query that was under way when the query was interrupted."""
        context = self._work.context
        if past.context["id"] != context.id:
            context = await anyio.to_thread.run_sync(self._m.open_context, past.context["id"])
        mine = Scope(f"node:{self._account.key.id}:{past.name}", past.most)
        work = Work(past.question, context, self._models_of_child(call), self._any)
        async with self._children:
            return await self._child(work, past.name, mine, past)

    def _share(self, tx: journal.Connection) -> int:
        """nano-USD that a child may have now."""
        return ledger.left(tx, self._node.scopes) * self._policy.money.child_share // 100

    async def _require_money_for(self, model: str) -> None:
        """Before its context is stored: a child that cannot even have a last word begins in vain. Raises LimitError."""
        share = await self._account.writer.write(self._share)
        words = self._m.proxy.bound(model, prompts.LAST_WORD_BYTES, prompts.LAST_WORD_TOKENS)
        if words > share:
            raise _too_little(model, words, share, child=True)

    async def _open_child(self, name: str, asked: str, question: str, context: Context, model: str) -> Scope:
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

    async def _child(self, work: Work, name: str, mine: Scope, past: PastNode | None = None) -> str:
        """Run it, and its answer. Raises ChildStopped with its best answer, StoreError, NotRebuilt."""
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
        run = NodeRun(self._m, node, replace(work, inherited=work.context is self._work.context), past)
        outcome, started = Outcome("cancelled", None, "cancelled"), time.monotonic()
        try:
            outcome = await run.run()
        except (StoreError, NotRebuilt):
            raise
        except AirlockError as error:
            status: Status = "refused" if isinstance(error, LimitError) else "failed"
            outcome = run.stopped(status, f"{error.kind}: {error}")
        finally:
            await run.close(outcome, started)
        if outcome.status == "answered" and outcome.answer is not None:
            return outcome.answer
        raise child_stopped(name, outcome.reason, outcome.answer)

    @property
    def _any(self) -> Callable[[str], Awaitable[str | None]]:
        """What a child query's answer is held to."""
        return schema_check(None, self._policy.content.answer_chars)

    async def close(self, outcome: Outcome, started: float) -> None:
        """Give back what the node still holds, check its context, and record its end."""
        node, account = self._node, self._account
        aside = self._aside if self._aside and not self._aside.taken else None
        node.count(held=-aside.nano if aside else 0)
        body = {
            "status": outcome.status,
            "reason": outcome.reason[:1000],
            "turns": self.turns,
            "calls": node.calls,
            "duration_ms": int((time.monotonic() - started) * 1000),
            "cost_usd": usd(node.spent),
        }
        answer = {} if outcome.answer is None else {"answer": outcome.answer}
        event = Event("node.closed", node.name, body, answer)

        def work(tx: journal.Connection) -> None:
            if aside:
                ledger.void(tx, aside.reservation)
            journal.append(tx, account.key, event)

        with anyio.CancelScope(shield=True):
            if not self._work.inherited:
                await self.verify()
            account.writer.post(work)
            account.recorded(event)

    async def verify(self) -> None:
        """Whether the context is still what it was, on record, if the policy asks for that."""
        if self._policy.audit.verify_context:
            whole = await anyio.to_thread.run_sync(self._m.verify, self._work.context)
            self._record("context.verified", {"sha256": self._work.context.sha256, "unchanged": whole})

    def _record(self, kind: EventType, body: Mapping[str, Any], payloads: dict[str, str] | None = None) -> None:
        event = Event(kind, self._node.name, body, payloads or {})
        self._account.writer.post(lambda tx: journal.append(tx, self._account.key, event))
        self._account.recorded(event)


def _too_little(model: str, least: int, most: int, *, child: bool) -> BudgetExhausted:
    """most: nano-USD that a node may spend, `least` being what it takes to get anywhere."""
    whose, remedy, what = "budget", "raise --budget, or take a cheaper model", "one turn and a last word"
    if child:
        whose, remedy, what = "child query's share", "ask llm_query, or less at once", "what a child query takes"
    return BudgetExhausted(
        f"the {whose} of {usd(most)} USD is smaller than {what} of {model} can cost ({usd(least)} USD): {remedy}",
        limit=f"{usd(most)} USD",
        asked=f"{usd(least)} USD",
        left=f"{usd(most)} USD",
    )
