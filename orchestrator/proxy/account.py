"""Who is asking: made by the host when a query or a child query begins, never told by a guest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio

from orchestrator.core.events import Event
from orchestrator.core.policy import PAYLOADS, Policy
from orchestrator.lm.base import Message
from orchestrator.store.journal import Connection, QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.writer import Writer


@dataclass(slots=True)
class ModelUsage:
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0


@dataclass(slots=True)
class Answered:
    """A sub-call that others of the same words wait for, or are answered from. text stays None when it fails."""

    call: str = ""
    done: anyio.Event = field(default_factory=anyio.Event)
    text: str | None = None


@dataclass(slots=True)
class Aside:
    """Money held for a node's last word until that is asked. reservation: its id. nano: how much of it.

    taken: the last word was asked. tries: that cost nothing, after which the money was put aside anew.
    """

    reservation: str
    nano: int
    taken: bool = False
    tries: int = 0


@dataclass(slots=True)
class Account:
    """What all nodes of a query's tree have in common.

    sign: signs the log now and then, inside a transaction; what it returns is called when that is committed.
    sent: what was asked for real, and is to be paid whatever happens to its record. running: requests under way.
    refused, told: how many refusals there were, and how often a cell was told its budget: some of each are recorded.
    nothing_new: it goes on after an interruption, and all that has come of it since was on record before: it can still
    be interrupted again. late: records of child queries that were cancelled meanwhile, written when that is over.
    why: it is cancelled, when it is. turns: how far the root's loop has come.
    answers: (model, SHA-256 of the prompt) -> where calls are answered once.
    """

    key: QueryKey
    policy: Policy
    writer: Writer
    recorded: Callable[[Event], None]
    in_flight: anyio.Semaphore
    sign: Callable[[Connection], Callable[[], None] | None] = lambda _tx: None
    sent: set[str] = field(default_factory=set[str])
    nothing_new: bool = False
    why: str = "cancelled"
    late: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    turns: int = 0
    sub_calls: int = 0
    children: int = 0
    running: int = 0
    refused: int = 0
    told: int = 0
    usage: dict[str, ModelUsage] = field(default_factory=dict[str, ModelUsage])
    answers: dict[tuple[str, bytes], Answered] = field(default_factory=dict[tuple[str, bytes], Answered])

    def news(self) -> None:
        """Something has come of it that an interruption would lose."""
        self.nothing_new = False
        while self.late:
            self.late.pop(0)()

    def leave(self, why: str) -> None:
        """It is about to be cancelled, to be gone on with later: it is interrupted where enough of it is kept."""
        self.why = why
        if self.policy.audit.payloads == PAYLOADS:
            self.writer.freeze()

    @property
    def spent(self) -> int:
        """nano-USD settled so far."""
        return sum(usage.cost for usage in self.usage.values())


@dataclass(slots=True)
class Node:
    """One loop of the tree, bound to its sandbox's channel.

    depth: 0 at the root. scopes: every purse that its money comes out of, its own first. deadline: on the clock of
    time.monotonic. sub_models: what its cells may name; without a name they get the first. spent, held: nano-USD of
    this node and of all below it. calls, children: made so far; their names count from 1.
    """

    account: Account
    name: str
    depth: int
    scopes: Sequence[Scope]
    deadline: float
    sub_models: Sequence[str]
    parent: Node | None = None
    spent: int = 0
    held: int = 0
    calls: int = 0
    children: int = 0
    conversation: Sequence[Message] = ()

    @property
    def limit(self) -> int:
        """nano-USD."""
        return self.scopes[0].most("limit")

    def remaining_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def count(self, *, held: int = 0, spent: int = 0) -> None:
        """Add to what this node and those above it hold and have spent."""
        node: Node | None = self
        while node:
            node.held += held
            node.spent += spent
            node = node.parent
