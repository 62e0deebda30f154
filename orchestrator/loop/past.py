"""What the journal has of a query, node by node: what a replay is held to, and what a query is resumed from. Pure.

A node's calls and child queries belong to the cell of it that was under way. What a cell asked for is found again by
its fingerprint, and in the order in which it was asked; what came of it is a text, an error, or a child query that had
not ended. Where nothing came of it before the cell ended, nothing comes of it in a replay.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from orchestrator.core.asked import fingerprint
from orchestrator.core.errors import AirlockError, ChildStopped, LimitError, NotKept
from orchestrator.core.policy import Policy
from orchestrator.lm.base import Reply
from orchestrator.loop.handed import Given, asked_by
from orchestrator.loop.recovery import ROOT
from orchestrator.proxy.account import ModelUsage
from orchestrator.proxy.proxy import RECORDED
from orchestrator.sandbox.sandbox import Call, CellResult

NO_POLICY = "the policy of query {} is none that this version of Airlock can read"
BUDGET = "budget"


@dataclass(slots=True)
class Asked:
    """Something that a cell asked for.

    outcome: None as long as nothing has come of it. number: of a sub-call; else 0.
    """

    outcome: str | Mapping[str, Any] | AirlockError | PastNode | None = None
    number: int = 0


@dataclass(slots=True)
class PastCell:
    """result: None for one that was under way when its process died. cut: of what it was refused, or told of its
    budget, the rest may not be on record."""

    number: int
    code: str
    asked: dict[str, deque[Asked]] = field(default_factory=lambda: defaultdict[str, deque[Asked]](deque))
    result: CellResult | None = None
    cut: bool = False

    def recall(self, call: Call, given: Given | None) -> Asked | None:
        """The next of what the cell asked for in these words; None where the journal has no more of it."""
        for key in _keys(call, given):
            if waiting := self.asked.get(key):
                return waiting.popleft()
        return None

    @property
    def children_left(self) -> Iterator[PastNode]:
        """The child queries under way that were not recalled, and those below them first."""
        for asked in chain.from_iterable(self.asked.values()):
            if isinstance(asked.outcome, PastNode):
                if cell := asked.outcome.open_cell:
                    yield from cell.children_left
                yield asked.outcome

    def forget_what_was_in_flight(self) -> None:
        for key, waiting in self.asked.items():
            self.asked[key] = deque(asked for asked in waiting if asked.outcome is not None)


@dataclass(slots=True)
class PastNode:
    """model: its own; empty at the root. replies, last_words: of the root LM, in order. limit: that the loop ran into,
    if it did. most: nano-USD it may spend; spent: of it and of all below it. calls, children: the highest number that a
    name of each has."""

    name: str
    question: str
    context: Mapping[str, Any]
    most: int = 0
    model: str = ""
    replies: deque[Reply] = field(default_factory=deque[Reply])
    last_words: deque[Reply] = field(default_factory=deque[Reply])
    cells: list[PastCell] = field(default_factory=list[PastCell])
    limit: LimitError | None = None
    calls: int = 0
    children: int = 0
    spent: int = 0
    closed: bool = False

    def reply(self, *, last: bool) -> Reply | None:
        replies = self.last_words if last else self.replies
        return replies.popleft() if replies else None

    @property
    def open_cell(self) -> PastCell | None:
        """The one that is under way."""
        return self.cells[-1] if self.cells and self.cells[-1].result is None else None


@dataclass(slots=True)
class Past:
    """One query. model: None for a cell alone, whose `code` it is then. may_ask: the models that cells may name.
    servers: model -> SHA-256 of its server's address; None for a model of this machine.

    sub_calls, children, refused, told, usage: as in an Account. answered: how many calls were. answers: (model that was
    asked for, prompt, call, text) of sub-calls whose texts are kept as they were. records: of the chain, all there are.
    ran_s: seconds that it is known to have run. missing: payloads that are not kept any more, of those that a replay
    takes; redacted: those of which something was taken out; both with the node that takes them.
    """

    query: str
    backend: str
    model: str | None
    sub_models: Sequence[str]
    may_ask: Sequence[str]
    keeps_payloads: bool
    servers: Mapping[str, str | None]
    policy: Policy | None = None
    schema: Mapping[str, Any] | None = None
    code: str | None = None
    nodes: dict[str, PastNode] = field(default_factory=dict[str, PastNode])
    sub_calls: int = 0
    children: int = 0
    refused: int = 0
    told: int = 0
    usage: dict[str, ModelUsage] = field(default_factory=dict[str, ModelUsage])
    answered: int = 0
    answers: list[tuple[str, str, str, str]] = field(default_factory=list[tuple[str, str, str, str]])
    records: int = 0
    ran_s: float = 0.0
    missing: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    redacted: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def root(self) -> PastNode:
        return self.nodes[ROOT]

    @property
    def under_way(self) -> Iterator[PastNode]:
        """What has to be rebuilt when it is resumed."""
        return (node for node in self.nodes.values() if not node.closed)

    @property
    def rules(self) -> Policy:
        assert self.policy, "looked at by `require`"
        return self.policy

    @property
    def begun(self) -> bool:
        """Whether anything was done for it: it has been asked of a model, or run a cell."""
        return self.root.calls > 0 or bool(self.root.cells)

    def require(self) -> None:
        """That all of it can be run again. Raises NotKept."""
        self._require(self.missing, "is not kept any more")
        if self.policy is None:
            raise NotKept(NO_POLICY.format(self.query))

    def require_to_resume(self) -> None:
        """That what is under way can be rebuilt. Raises NotKept."""
        names = {node.name for node in self.under_way}
        for found, what in ((self.missing, "is not kept any more"), (self.redacted, "had secrets taken out")):
            self._require([(node, where) for node, where in found if node in names], what)
        if self.policy is None:
            raise NotKept(NO_POLICY.format(self.query))
        for node in self.under_way:
            for cell in node.cells:
                if cell.cut and cell.result:
                    what = f"{RECORDED} refusals and {RECORDED} budgets told are all that is on record"
                    raise NotKept(f"cell {cell.number} of {node.name} cannot be run again as it was: {what} of a query")

    def _require(self, lacking: Sequence[tuple[str, str]], what: str) -> None:
        if not self.keeps_payloads:
            raise NotKept(f"the policy of query {self.query} keeps no payloads (audit.payloads: hash)")
        if lacking:
            more = f"; and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise NotKept(f"query {self.query} takes a payload that {what}: {lacking[0][1]}{more}")


def child_stopped(name: str, reason: str, answer: str | None) -> ChildStopped:
    """What the cell that asked for a child query gets when it had no answer. answer: the best that it had."""
    return ChildStopped(f"child query {name} ended without an answer: {reason or 'it gave none'}", partial=answer)


def _keys(call: Call, given: Given | None) -> Iterator[str]:
    if call.op == BUDGET:
        yield BUDGET
        return
    yield asked_by(call, given)
    if call.op == "rlm_query" and given is not None:  # on the last level it was asked as a plain call
        yield fingerprint("llm_query", given.as_prompt(call.prompt), call.model)
