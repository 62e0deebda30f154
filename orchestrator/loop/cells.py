"""A node's cells: on record before they run, and what came of them after.

In a query that goes on after an interruption, the cells of before are run again first: what they ask for is answered
from the journal, and what they bring is held to it. So the REPL has its variables again, and nothing is paid twice.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import anyio

from orchestrator.core.errors import AirlockError, NotPermitted, NotRebuilt, TimeExceeded
from orchestrator.core.events import Event, EventType
from orchestrator.core.redact import excerpt
from orchestrator.core.units import usd
from orchestrator.loop.handed import Handed
from orchestrator.loop.past import Asked, PastCell, PastNode
from orchestrator.proxy.account import Node
from orchestrator.sandbox.sandbox import Call, CellResult, Sandbox
from orchestrator.store import journal
from orchestrator.store.vault import Keeper

DETAIL_CHARS = journal.SAID["cell.ended"]["detail"]
NAMES_BYTES = 4096
PIECES = ("context_text", "context_list", "context_more")

Answer = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recall:
    """Answers what a cell asks for that is run again, in node `node`, from the journal.

    handed: the contexts that the cell makes for child queries. answer: asks for real. go_on: for a child query that had
    not ended.
    """

    node: str
    handed: Handed
    answer: Callable[[Call], Awaitable[Answer]]
    go_on: Callable[[Call, PastNode], Awaitable[str]]

    async def __call__(self, past: PastCell, call: Call) -> Answer:
        """Of a cell under way when its process died, what the journal has not is asked for real. Else NotRebuilt."""
        asked = past.recall(call, self.handed.peek(call.context))
        if asked is None:
            if past.result and past.result.status in ("timeout", "killed") and call.op not in PIECES:
                await anyio.sleep_forever()  # it may have waited for its turn when the cell was ended
            if past.result and call.op not in PIECES:  # these are not on record
                what = f"{call.op}({call.prompt[:100]!r})"
                raise NotRebuilt(f"cell {past.number} of {self.node} asks for what the journal has not: {what}")
            return await self.answer(call)
        if call.op == "rlm_query":
            with suppress(NotPermitted):  # as it was refused before
                self.handed.give(call.context)
        if isinstance(asked.outcome, PastNode):
            return await self.go_on(call, asked.outcome)
        return await outcome_of(asked)


class Cells:
    """Of one node. past: the cells that it has had, to be run again. handed, answer, go_on: see Recall."""

    def __init__(
        self,
        node: Node,
        handed: Handed,
        past: Sequence[PastCell],
        answer: Callable[[Call], Awaitable[Answer]],
        go_on: Callable[[Call, PastNode], Awaitable[str]],
    ) -> None:
        self._node, self._account = node, node.account
        self._handed = handed
        self._past = past
        self._answer = answer
        self._recall = Recall(node.name, handed, answer, go_on)
        self._count = 0

    async def run(self, sandbox: Sandbox, code: str, on_output: Callable[[str, str], None] | None) -> CellResult:
        """Raises NotRebuilt where the cells of before do not bring what they brought."""
        past = self._past[self._count] if self._count < len(self._past) else None
        self._count += 1
        if past and past.code != code:
            raise NotRebuilt(f"cell {self._count} of {self._node.name} has other code in the journal")
        if not past:
            started = Event("cell.started", self._node.name, {"cell": self._count}, {"code": code})
            await self._begin(started)

        async def on_call(call: Call) -> Any:
            return await (self._recall(past, call) if past else self._answer(call))

        timeout = min(self._account.policy.time.cell / 1000, self._node.remaining_s())
        try:
            result = bounded(await sandbox.run(code, timeout, on_call, on_output), self._account.key.keeper)
        finally:
            self._handed.clear()
        if past and past.result:
            self._compare(result, past.result)
            return past.result
        self._account.news()
        for lost in past.children_left if past else ():
            self._record("node.closed", never_asked_for(lost), node=lost.name)
        self._record("cell.ended", *ended(self._count, result))
        return result

    async def _begin(self, started: Event) -> None:
        """On record before it runs."""
        account = self._account

        def work(tx: journal.Connection) -> Callable[[], None] | None:
            journal.append(tx, account.key, started)
            return account.sign(tx)

        if remember := await account.writer.write(work):
            remember()
        account.recorded(started)

    def _compare(self, result: CellResult, before: CellResult) -> None:
        differs = differences(result, before)
        body = {"cell": self._count, "status": result.status, "same": not differs, "differs": differs}
        self._record("cell.replayed", body)
        if self._node.remaining_s() <= 0:
            limit = f"{self._account.policy.time.query} ms"
            text = "the query's time was over before it was rebuilt"
            raise TimeExceeded(text, limit=limit, left="0 ms", rule="time.query")
        if result.status != before.status:
            how = f"{result.status} ({result.detail})" if result.detail else result.status
            raise NotRebuilt(f"cell {self._count} of {self._node.name} was {before.status}, and is {how} now")

    def _record(
        self, kind: EventType, body: Mapping[str, Any], payloads: Mapping[str, str] | None = None, node: str = ""
    ) -> None:
        event = Event(kind, node or self._node.name, body, payloads or {})
        self._account.writer.post(lambda tx: journal.append(tx, self._account.key, event))
        self._account.recorded(event)


def bounded(result: CellResult, keeper: Keeper | None = None) -> CellResult:
    """What is looked at of a cell's end is what is recorded of it, so that it is the same in a replay."""
    result.detail = excerpt(result.detail, DETAIL_CHARS, keeper.redact if keeper else None)
    result.names = tuple(_some_of(result.names))
    return result


def ended(number: int, result: CellResult) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and payloads of `cell.ended`."""
    body = {
        "cell": number,
        "status": result.status,
        "detail": result.detail,
        "names": list(result.names),
        "dropped_bytes": result.dropped,
        "duration_ms": int(result.duration_s * 1000),
        "answered": result.answer is not None,
    }
    shown = {"stdout": result.text("out"), "stderr": result.text("err"), "order": order_of(result.output)}
    payloads = {name: text for name, text in shown.items() if text}
    if result.answer is not None:
        payloads["answer"] = result.answer
    return body, payloads


def differences(result: CellResult, before: CellResult) -> list[str]:
    """The parts of a cell's end that are other ones than before."""
    parts = {
        "status": (result.status, before.status),
        "stdout": (result.text("out"), before.text("out")),
        "stderr": (result.text("err"), before.text("err")),
        "answer": (result.answer, before.answer),
        "names": (result.names, before.names),
    }
    return [name for name, (now, then) in parts.items() if now != then]


async def outcome_of(asked: Asked) -> Answer:
    """Raises the error that came of it. Where nothing came of it before the cell ended, waits for that."""
    if asked.outcome is None:
        await anyio.sleep_forever()
    if isinstance(asked.outcome, AirlockError):
        raise asked.outcome
    assert isinstance(asked.outcome, str | Mapping), "a child query is run by its node"
    return asked.outcome


def order_of(output: Sequence[tuple[str, str]]) -> str:
    """How the two streams were mixed, as JSON of [stream, characters] pairs; empty where `err` came after `out`."""
    pieces = [(stream, sum(len(text) for _, text in texts)) for stream, texts in groupby(output, key=itemgetter(0))]
    in_order = [stream for stream, _ in pieces] in ([], ["out"], ["err"], ["out", "err"])
    return "" if in_order else json.dumps(pieces)


def never_asked_for(lost: PastNode) -> dict[str, Any]:
    """Body of the `node.closed` of a child query that its cell did not ask for again."""
    body = {"status": "cancelled", "reason": "its cell did not ask for it again", "turns": len(lost.replies)}
    return {**body, "calls": lost.calls, "duration_ms": 0, "cost_usd": usd(lost.spent)}


def _some_of(names: Sequence[str]) -> Iterator[str]:
    room = NAMES_BYTES
    for name in names:
        room -= len(json.dumps(name))
        if room < 0:
            return
        yield name
