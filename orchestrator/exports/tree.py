"""A query as the tree that it was: nodes, their turns, the cells of a turn, and what a cell asked for.

The records are a flat list, in the order in which things happened. What belongs together is told by the node's name,
the call's name, and what of the node was under way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.core.events import Recorded
from orchestrator.exports.records import number, shown, text

MOST_ASKED = 4  # calls of one turn: a reply that was cut at its limit is continued three times, not oftener

Message = dict[str, str]
Body = Mapping[str, Any]
_NOTHING: Body = {}


@dataclass(slots=True)
class Attempt:
    """One request. result: None when none is on record."""

    intent: Recorded
    result: Recorded | None = None

    @property
    def ending(self) -> Body:
        return self.result.body if self.result else _NOTHING

    @property
    def answer(self) -> Recorded | None:
        """The result, if it brought a reply."""
        return self.result if text(self.ending, "outcome") == "answered" else None

    @property
    def finish(self) -> str:
        """Why the reply ended: `stop`, `length` ... Older records have it as the detail."""
        return text(self.ending, "finish") or text(self.ending, "detail")


@dataclass(slots=True)
class Call:
    name: str
    attempts: list[Attempt]

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]


@dataclass(slots=True)
class Cell:
    """asked: calls, child queries, and records of what was refused or repeated. began: what is first known of it."""

    began: Recorded
    ended: Recorded | None = None
    asked: list[Call | Node | Recorded] = field(default_factory=list["Call | Node | Recorded"])

    @property
    def ending(self) -> Body:
        return self.ended.body if self.ended else _NOTHING

    @property
    def code(self) -> str:
        return shown(self.began, "code")


@dataclass(slots=True)
class Turn:
    """One reply of the node's LM, and the cells that it wrote. Without calls: code that no LM wrote.

    over: what comes is of another one.
    """

    number: int
    began: Recorded
    calls: list[Call] = field(default_factory=list[Call])
    cells: list[Cell] = field(default_factory=list[Cell])
    over: bool = False

    @property
    def answers(self) -> list[Attempt]:
        return [call.last for call in self.calls if call.last.answer]

    @property
    def reply(self) -> str | None:
        """The whole of it, also where it came in pieces; None if there is none, or not all of it is kept."""
        pieces = [attempt.answer.payloads.get("completion") for attempt in self.answers if attempt.answer]
        return "".join(cast("list[str]", pieces)) if pieces and None not in pieces else None

    def takes(self, record: Recorded) -> bool:
        """Whether a call of the node's own LM that begins now is of this turn: the reply is not there, or was cut."""
        if self.over or self.cells:
            return False
        answers = self.answers
        if not answers or self.calls[-1].last is not answers[-1]:
            return True
        return answers[-1].finish == "length" and len(answers) < MOST_ASKED


@dataclass(slots=True)
class Node:
    """within: the cell that asked for it. notes: of its sandbox, its context, its limits. intents: of its own LM."""

    name: str
    began: Recorded
    within: Cell | None = None
    ended: Recorded | None = None
    turns: list[Turn] = field(default_factory=list[Turn])
    notes: list[Recorded] = field(default_factory=list[Recorded])
    intents: list[Recorded] = field(default_factory=list[Recorded])
    running: Cell | None = None

    @property
    def ending(self) -> Body:
        return self.ended.body if self.ended else _NOTHING

    @property
    def status(self) -> str:
        return text(self.ending, "status") if self.ended else "open"

    @property
    def model(self) -> str:
        return text(self.began.body, "model")

    @property
    def question(self) -> str:
        return shown(self.began, "question")


@dataclass(slots=True)
class Query:
    """nodes: by name, in the order in which they began. last: the last record of all."""

    id: str
    nodes: dict[str, Node]
    last: Recorded

    @property
    def root(self) -> Node | None:
        return self.nodes.get("root")


def grow(history: Iterable[Recorded]) -> Query | None:
    """The tree of a query's records; None of none. Records that it has no place for are left out."""
    grower = _Grower()
    for record in history:
        grower.take(record)
    return Query(grower.last.query, grower.nodes, grower.last) if grower.last else None


class _Grower:
    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.last: Recorded | None = None
        self._calls: dict[str, Call] = {}

    def take(self, record: Recorded) -> None:
        self.last = record
        match record.type:
            case "query.opened" | "node.opened":
                self._node(record)
            case "query.closed" | "node.closed":
                self._node(record).ended = record
            case "call.intent":
                self._intent(record)
            case "call.result":
                if call := self._calls.get(text(record.body, "call")):
                    call.last.result = record
            case "call.refused" | "call.repeated":
                self._cell(record).asked.append(record)
            case "cell.started":
                node = self._node(record)
                node.running = Cell(record)
                self._turn(node, record).cells.append(node.running)
            case "cell.ended":
                node = self._node(record)
                if node.running:
                    node.running.ended, node.running = record, None
            case "limit.hit" | "sandbox.started" | "sandbox.ended" | "context.verified":
                self._note(record)
            case _:
                pass

    def _node(self, record: Recorded) -> Node:
        found = self.nodes.get(record.node)
        if not found:
            parent = self.nodes.get(record.node.rpartition(".")[0])
            found = self.nodes[record.node] = Node(record.node, record)
            if parent:
                found.within = self._running(parent, record)
                found.within.asked.append(found)
        return found

    def _note(self, record: Recorded) -> None:
        node = self._node(record)
        node.notes.append(record)
        if record.type == "limit.hit" and node.turns:
            node.turns[-1].over = True  # what comes now is its last word

    def _turn(self, node: Node, record: Recorded) -> Turn:
        if not node.turns:
            node.turns.append(Turn(1, record))
        return node.turns[-1]

    def _cell(self, record: Recorded) -> Cell:
        return self._running(self._node(record), record)

    def _running(self, node: Node, record: Recorded) -> Cell:
        """The node's cell that runs, or ran last. What asks without a cell has one made up for it."""
        if node.running:
            return node.running
        cells = self._turn(node, record).cells
        if not cells:
            cells.append(Cell(record))
        return cells[-1]

    def _intent(self, record: Recorded) -> None:
        node, name = self._node(record), text(record.body, "call")
        own = text(record.body, "role") == "root"
        if own:
            node.intents.append(record)
        if call := self._calls.get(name):
            call.attempts.append(Attempt(record))
            return
        call = self._calls[name] = Call(name, [Attempt(record)])
        if not own:
            self._running(node, record).asked.append(call)
            return
        if not node.turns or not node.turns[-1].takes(record):
            node.turns.append(Turn(len(node.turns) + 1, record))
        node.turns[-1].calls.append(call)


def prompts(node: Node) -> Iterator[tuple[Recorded, list[Message | None]]]:
    """Each request to the node's own LM with its whole conversation; None stands for messages that are not kept.

    The record leaves out what a request has in common with the one before it.
    """
    conversation: list[Message | None] = []
    for intent in node.intents:
        shared = max(0, number(intent.body, "shared"))
        lost: list[Message | None] = [None] if shared > len(conversation) else []
        added = messages(intent)
        conversation = [*conversation[:shared], *lost, *([None] if added is None else added)]
        yield intent, conversation


def messages(intent: Recorded) -> list[Message | None] | None:
    """The messages that a request has on record, or None when they are not kept."""
    kept = intent.payloads.get("prompt")
    try:
        found: Any = json.loads(kept) if kept is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list):
        return None
    return [_message(item) for item in cast("list[Any]", found)]


def _message(item: Any) -> Message | None:
    if not isinstance(item, dict):
        return None
    fields = cast("dict[str, Any]", item)
    role, content = fields.get("role"), fields.get("content")
    return {"role": role, "content": content} if isinstance(role, str) and isinstance(content, str) else None
