"""One node of a query's tree: its last word set aside, its sandbox, its loop, and what its cells ask for.

The root and every child query run through here; `query` opens and closes the whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from orchestrator.core.errors import (
    AirlockError,
    ChildStopped,
    Interrupted,
    NotPermitted,
    ProviderError,
    SandboxUnusable,
)
from orchestrator.core.events import Event, EventType
from orchestrator.core.policy import Policy
from orchestrator.core.units import usd
from orchestrator.guest.context import form
from orchestrator.lm.base import Message, Reply
from orchestrator.loop import prompts
from orchestrator.loop.cells import Cells
from orchestrator.loop.children import Children, too_little
from orchestrator.loop.engine import Loop, Outcome, Status
from orchestrator.loop.handed import Handed, asked_by
from orchestrator.loop.machine import Machine, Work
from orchestrator.loop.past import PastNode
from orchestrator.proxy.account import Aside, Node
from orchestrator.proxy.booking import put_aside
from orchestrator.sandbox.base import SandboxSpec
from orchestrator.sandbox.sandbox import Call, CellResult, Sandbox
from orchestrator.store import journal, ledger


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
        self._children = Children(machine, node, work, self._handed, partial(NodeRun, machine))
        self._cells = Cells(node, self._handed, past.cells if past else (), self._on_call, self._children.go_on)
        self.cell: CellResult | None = None

    @property
    def turns(self) -> int:
        return self._loop.turns if self._loop else 0

    async def run(self) -> Outcome:
        """To the end of the work, or of its time. Raises what is no limit of the loop's own, and Interrupted."""
        messages = self._messages()
        if self._work.code is None:
            await self._set_aside(messages)
        with anyio.move_on_after(self._node.remaining_s()):
            try:
                return await self._in_sandbox(messages)
            except SandboxUnusable as error:
                raise self._passing(error) from error
        text = f"time-exceeded: the query's {self._policy.time.query / 1000:g} s are over"
        limit = f"{self._policy.time.query} ms"
        self._record("limit.hit", {"kind": "time-exceeded", "detail": text, "limit": limit, "rule": "time.query"})
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
            raise too_little(model, least, node.limit, child=node.parent is not None)
        query = self._account.key.id
        # Until the call that is the last one takes it, or the node ends.
        held = Event("budget.held", node.name, {"for": "last word", "usd": usd(words)})

        def work(tx: journal.Connection) -> Aside:
            tries = ledger.times_set_aside(tx, query, node.name)  # by those before it, in a query that goes on
            aside = Aside(ledger.set_aside(query, node.name, tries), words, tries=tries)
            put_aside(tx, node, aside.reservation, words)
            journal.append(tx, self._account.key, held)
            return aside

        try:
            self._aside = await self._account.writer.write(work)
        except ledger.NotEnough as short:
            raise short.error from None
        node.count(held=words)
        self._account.recorded(held)

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
        try:
            return await self._m.proxy.ask(self._node, "root", self._work.model, messages, output_tokens, aside)
        except ProviderError as error:
            raise self._passing(error) from error

    def _passing(self, error: AirlockError) -> AirlockError:
        """What a query that has just been resumed was stopped by is not its end: what was paid for would be lost."""
        return Interrupted(error) if self._account.nothing_new else error

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
                return await self._children.ask(call, asked)
            if call.op != "rlm_query":
                return {"context": self._handed.take(call.op, call.prompt, call.context)}
            prompt = self._handed.give(call.context).as_prompt(call.prompt)
        except (ChildStopped, Interrupted):  # on record as the end of its node; to be on record as that of the query
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
        return NotPermitted(text, limit=f"depth {depth}", asked=op, rule="counts.depth")

    async def close(self, outcome: Outcome, started: float) -> None:
        """Give back what the node still holds, check its context, and record its end."""
        node, account = self._node, self._account
        aside = self._aside if self._aside and not self._aside.taken else None
        node.count(held=-aside.nano if aside else 0)
        body = {
            "status": outcome.status,
            "reason": outcome.reason,
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

        def end() -> None:
            account.writer.post(work)
            account.recorded(event)

        with anyio.CancelScope(shield=True):
            if not self._work.inherited:
                await self.verify()
            if outcome.status == "cancelled" and account.nothing_new:
                account.late.append(end)  # if the whole query is what is cancelled, this node goes on with it later
            else:
                end()

    async def verify(self) -> None:
        """Whether the context is still what it was, on record, if the policy asks for that."""
        if self._policy.audit.verify_context:
            whole = await anyio.to_thread.run_sync(self._m.verify, self._work.context)
            self._record("context.verified", {"sha256": self._work.context.sha256, "unchanged": whole})

    def _record(self, kind: EventType, body: Mapping[str, Any], payloads: dict[str, str] | None = None) -> None:
        event = Event(kind, self._node.name, body, payloads or {})
        self._account.writer.post(lambda tx: journal.append(tx, self._account.key, event))
        self._account.recorded(event)
