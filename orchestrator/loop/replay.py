"""A query's cells run again, each node's in a fresh sandbox: do they bring what they brought?

What they ask for is answered from the journal. Nothing is asked of a model, nothing is paid, nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from difflib import unified_diff
from functools import partial
from typing import Any, Literal

import anyio
import anyio.to_thread

from orchestrator.core.context import Context
from orchestrator.core.errors import ContextError, MachineError, NotKept, SandboxUnusable
from orchestrator.core.policy import Policy
from orchestrator.loop.cells import Answer, Recall, bounded, differences
from orchestrator.loop.handed import Handed
from orchestrator.loop.past import Past, PastCell, PastNode
from orchestrator.sandbox.base import SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Call, CellResult, Sandbox

DIFF_LINES = 200  # of each side, where the two begin to differ: what is compared is hostile, and may be large
LINE_CHARS = 500

Verdict = Literal["same", "different", "not compared"]


@dataclass(frozen=True, slots=True)
class Again:
    """One cell that was run again. why: in a line, unless it is the same. diff: lines of unified diffs."""

    node: str
    cell: int
    verdict: Verdict
    why: str = ""
    diff: Sequence[str] = ()


@dataclass(slots=True)
class Replayed:
    """A query that was run again. notes: what else there is to know, in a line each."""

    query_id: str
    backend: str
    isolation: str
    cells: list[Again] = field(default_factory=list[Again])
    notes: list[str] = field(default_factory=list[str])

    def count(self, verdict: Verdict) -> int:
        return sum(cell.verdict == verdict for cell in self.cells)

    @property
    def same(self) -> bool:
        return not self.count("different")

    def report(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


@dataclass(frozen=True, slots=True)
class Stage:
    """What a replay runs on. open_context, verify: see `Machine`."""

    open_sandbox: Callable[[Callable[[Slot], SandboxSpec]], AbstractAsyncContextManager[Sandbox]]
    open_context: Callable[[str], Context]
    verify: Callable[[Context], bool]


async def replay(past: Past, stage: Stage, tell: Callable[[Again], object]) -> None:
    """Run every cell, and tell of each. `past.require()` has to hold. Raises NotKept, SandboxUnusable."""
    contexts = {node.context["id"]: await context_of(node, stage) for node in past.nodes.values()}
    for node in past.nodes.values():
        if node.cells:
            await _replay_node(node, contexts[node.context["id"]], past.rules, stage, tell)


async def context_of(node: PastNode, stage: Stage) -> Context:
    """The node's context, checked against its hash. Raises NotKept."""
    try:
        context = await anyio.to_thread.run_sync(stage.open_context, node.context["id"])
    except ContextError as error:
        raise NotKept(f"the context of {node.name} is gone: {error}") from None
    if not await anyio.to_thread.run_sync(stage.verify, context):
        raise NotKept(f"the context of {node.name} is not what it was: its hash is another one")
    return context


async def _replay_node(
    node: PastNode, context: Context, policy: Policy, stage: Stage, tell: Callable[[Again], object]
) -> None:
    left = list(node.cells)
    lost = "the cells before it could not be run as they were"
    deadline = time.monotonic() + policy.time.query / 1000
    async with stage.open_sandbox(partial(SandboxSpec.under, policy)) as sandbox:
        sandbox.attach(context)
        while left and left[0].result is not None:
            timeout_s = min(policy.time.cell / 1000, deadline - time.monotonic())
            if timeout_s <= 0:
                lost = f"the {policy.time.query / 1000:g} s that a query may take were over"
                break
            again, alive = await _cell(sandbox, node, left.pop(0), policy, timeout_s)
            tell(again)
            if not alive:
                break
    for cell in left:
        why = lost if cell.result else "its end is not on record"
        tell(Again(node.name, cell.number, "not compared", why))


async def _cell(
    sandbox: Sandbox, node: PastNode, cell: PastCell, policy: Policy, timeout_s: float
) -> tuple[Again, bool]:
    """And whether the sandbox can run the next one."""
    assert cell.result, "only what had ended is run again"
    handed = Handed(policy.content.child_context)

    async def take(call: Call) -> Answer:
        return {"context": handed.take(call.op, call.prompt, call.context)}

    async def never(_call: Call, _child: PastNode) -> str:
        await anyio.sleep_forever()
        raise AssertionError("a sleep without end has ended")

    recall = partial(Recall(node.name, handed, take, never), cell)

    async def on_call(call: Call) -> Any:
        return await recall(call)

    try:
        result = bounded(await sandbox.run(cell.code, timeout_s, on_call))
    except SandboxUnusable:
        raise
    except MachineError as error:
        return Again(node.name, cell.number, "different", str(error)), False
    return _compared(node.name, cell, result, cell.result), True


def _compared(node: str, cell: PastCell, now: CellResult, then: CellResult) -> Again:
    if then.status in ("timeout", "killed"):  # how far it had come depends on the machine
        why = f"it ended with {then.status} ({then.detail})"
        if now.status != then.status:
            why += f", and with {now.status} now"
        return Again(node, cell.number, "not compared", why)
    differs = differences(now, then)
    if not differs:
        return Again(node, cell.number, "same")
    why = f"another {', '.join(differs)}"
    if "status" in differs:
        why += f": it was {then.status}, and is {now.status} ({now.detail}) now"
    return Again(node, cell.number, "different", why, tuple(_diffs(now, then)))


def _diffs(now: CellResult, then: CellResult) -> Iterator[str]:
    parts = {
        "stdout": (then.text("out"), now.text("out")),
        "stderr": (then.text("err"), now.text("err")),
        "answer": (then.answer or "", now.answer or ""),
        "names": ("\n".join(then.names), "\n".join(now.names)),
    }
    for name, (before, after) in parts.items():
        yield from diff(name, before, after)


def diff(name: str, before: str, after: str) -> Iterator[str]:
    """A unified diff of what lies between the first and the last line in which the two differ, cut to DIFF_LINES."""
    old, new = before.splitlines(), after.splitlines()
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    start = max(0, start - 3)  # lines of context
    then, now = ([line[:LINE_CHARS] for line in side[start : start + DIFF_LINES]] for side in (old, new))
    found = list(unified_diff(then, now, f"recorded {name}", f"replayed {name}", lineterm=""))
    for line in found:
        yield f"{line} after line {start}" if line.startswith("@@") and start else line
    rest = max(len(old), len(new)) - start - DIFF_LINES
    if before != after and not found:
        yield f"recorded {name}, replayed {name}: only ends of lines differ, or what is beyond {LINE_CHARS} characters"
    elif before != after and rest > 0:
        yield f"... [{rest:,} more lines]"
