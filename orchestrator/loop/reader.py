"""Reads a query's past out of its records, in one pass and in their order. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from orchestrator.core.asked import fingerprint
from orchestrator.core.errors import KINDS, AirlockError, ChildStopped, LimitError, NotKept, RateLimited
from orchestrator.core.events import Recorded
from orchestrator.core.policy import Policy
from orchestrator.core.units import nano
from orchestrator.lm.base import Reply
from orchestrator.loop.past import BUDGET, Asked, Past, PastCell, PastNode, child_stopped
from orchestrator.loop.recovery import ROOT
from orchestrator.proxy.account import ModelUsage
from orchestrator.proxy.proxy import RECORDED
from orchestrator.sandbox.sandbox import CellResult


def read_past(history: Sequence[Recorded]) -> Past:
    """Of a query's records in order, a whole chain. Raises NotKept where they are of another version."""
    try:
        reader = _Reader(history[0])
        for record in history:
            reader.take(record)
        reader.past.records = len(history)
    except (LookupError, TypeError, ValueError) as error:
        raise NotKept(
            f"query {history[0].query}: its records are not as this version of Airlock writes them ({error!r})"
        ) from None
    return reader.past


class _Reader:
    def __init__(self, opened: Recorded) -> None:
        body = opened.body
        self.past = Past(
            opened.query,
            body["backend"],
            body["model"],
            body["sub_models"],
            body["may_ask"],
            body["payloads"] != "hash",
            body.get("servers", {}),  # not in a journal that is older
        )
        self._models: dict[str, str] = {}  # call -> model
        self._roles: dict[str, str] = {}  # call -> root, last or sub
        self._prompts: dict[str, str] = {}  # of sub-calls, by call
        self._texts: dict[str, list[tuple[Recorded, str]]] = {}  # call -> where its prompt and its completion are
        self._first = {ROOT: next(iter(body["may_ask"]), "")}  # node -> the model that its cells ask without a name
        self._levels = [body["model"] or "", *body["sub_models"]]
        self._numbers: dict[str, int] = {}
        self._sub_calls: dict[int, Asked] = {}
        self._asked: dict[int, str] = {}  # the model that a sub-call asked for; a fallback may have answered
        self._answers: dict[str, str] = {}
        self._begun: dict[str, Asked] = {}  # child queries, by node
        self._since = opened.at
        self._takes = {
            "query.opened": self._opened,
            "query.narrowed": self._narrowed,
            "query.interrupted": self._interrupted,
            "query.resumed": self._resumed,
            "node.opened": self._node_opened,
            "node.closed": self._node_closed,
            "call.intent": self._intent,
            "call.result": self._result,
            "call.refused": self._refused,
            "call.repeated": self._repeated,
            "budget.told": self._told,
            "cell.started": self._cell_started,
            "cell.ended": self._cell_ended,
            "limit.hit": self._limit,
        }

    def take(self, record: Recorded) -> None:
        if record.seq == 1:  # before that it may have waited for its turn
            self._since = record.at
        if record.type in self._takes:
            self._takes[record.type](record, record.body)

    # Payloads

    def _text(self, record: Recorded, name: str, node: str = "") -> str:
        """A payload that a replay takes; empty where it is missing, which is noted. node: that takes it."""
        where = node or record.node, f"record {record.seq}, {name}"
        if record.committed[name].get("redacted"):
            self.past.redacted.append(where)
        if name not in record.payloads:
            self.past.missing.append(where)
        return record.payloads.get(name, "")

    @staticmethod
    def _is_whole(record: Recorded, name: str) -> bool:
        """Whether a payload is kept, and nothing was taken out of it."""
        return name in record.payloads and not record.committed[name].get("redacted")

    def _if_any(self, record: Recorded, name: str) -> str:
        return self._text(record, name) if name in record.committed else ""

    # The query

    def _opened(self, record: Recorded, body: Mapping[str, Any]) -> None:
        past = self.past
        past.nodes[ROOT] = PastNode(ROOT, self._text(record, "question"), body["context"], _money(body["limit_usd"]))
        self._policy(record)
        if "schema" in record.committed:
            past.schema = json.loads(self._text(record, "schema") or "null")
        if "code" in record.committed:
            past.code = self._text(record, "code")

    def _narrowed(self, record: Recorded, body: Mapping[str, Any]) -> None:
        self.past.root.most = _money(body["limit_usd"])
        self.past.keeps_payloads = body["payloads"] != "hash"
        self._policy(record)

    def _policy(self, record: Recorded) -> None:
        try:
            self.past.policy = Policy.model_validate_json(self._text(record, "policy"), strict=False)
        except ValidationError:
            self.past.policy = None

    def _interrupted(self, _record: Recorded, body: Mapping[str, Any]) -> None:
        self.past.ran_s += max(0.0, (_time(body["until"]) - _time(self._since)).total_seconds())
        for node in self.past.under_way:
            if cell := node.open_cell:
                cell.forget_what_was_in_flight()

    def _resumed(self, record: Recorded, _body: Mapping[str, Any]) -> None:
        self._since = record.at

    def _limit(self, record: Recorded, body: Mapping[str, Any]) -> None:
        node = self._node(record)
        error = _error(body)
        if node.limit is None and isinstance(error, LimitError):
            node.limit = error

    # Nodes

    def _node(self, record: Recorded) -> PastNode:
        return self.past.nodes[record.node]

    def _node_opened(self, record: Recorded, body: Mapping[str, Any]) -> None:
        parent = self.past.nodes[body["parent"]]
        most = _money(body["limit_usd"])
        node = PastNode(record.node, self._text(record, "question"), body["context"], most, body["model"])
        self.past.nodes[record.node] = node
        self.past.children += 1
        parent.children = max(parent.children, int(record.node.rpartition(".")[2]))
        below = self._levels[body["depth"] + 1 :]
        self._first[record.node] = below[0] if below else body["model"]
        self._begun[record.node] = self._ask(parent, self._text(record, "asked", parent.name), node)

    def _node_closed(self, record: Recorded, body: Mapping[str, Any]) -> None:
        self._node(record).closed = True
        asked, status = self._begun[record.node], body["status"]
        parent = record.node.rpartition(".")[0]
        answer = self._text(record, "answer", parent) if "answer" in record.committed else None
        if status == "cancelled":  # with the cell that asked
            asked.outcome = None
        elif status == "answered" and answer is not None:
            asked.outcome = answer
        else:
            asked.outcome = child_stopped(record.node, body["reason"], answer)

    # Calls

    def _ask(self, node: PastNode, key: str, outcome: Any = None, number: int = 0) -> Asked:
        """number: of a sub-call. One that had to wait may be on record after others that were asked later."""
        asked = Asked(outcome, number)
        if cell := node.open_cell:
            waiting = cell.asked[key]
            place = len(waiting)
            while number and place and waiting[place - 1].number > number:
                place -= 1
            waiting.insert(place, asked)
        return asked

    def _intent(self, record: Recorded, body: Mapping[str, Any]) -> None:
        node, call = self._node(record), body["call"]
        node.calls = max(node.calls, int(call.rpartition(".c")[2]))
        self._models[call] = body["model"]
        if body["role"] == "root":
            self._roles[call] = "last" if body["last"] else "root"
            return
        self._roles[call] = "sub"
        number = self._numbers[call] = body["sub_call"]
        if call not in self._prompts:  # else it is a further attempt
            text = self._text(record, "prompt")
            self._prompts[call] = json.loads(text)[-1]["content"] if text else ""
            self._texts[call] = [(record, "prompt")]
        if number not in self._sub_calls:  # else a fallback is asked
            key = fingerprint("llm_query", self._prompts[call], body["asked"])
            self._asked[number] = body["asked"] or self._first[node.name]
            self._sub_calls[number] = self._ask(node, key, number=number)
            self.past.sub_calls = max(self.past.sub_calls, number)

    def _result(self, record: Recorded, body: Mapping[str, Any]) -> None:
        node, call, cost = self._node(record), body["call"], _money(body["cost_usd"])
        total = self.past.usage.setdefault(self._models[call], ModelUsage())
        total.calls += 1
        total.cost += cost
        if body["usage"]:
            total.input_tokens += body["usage"]["input_tokens"]
            total.output_tokens += body["usage"]["output_tokens"]
        for name in _above(node.name):
            self.past.nodes[name].spent += cost
        if body["outcome"] != "answered":
            return
        self.past.answered += 1
        text = self._text(record, "completion")
        if self._roles[call] == "sub":
            number = self._numbers[call]
            self._sub_calls[number].outcome = self._answers[call] = text
            self._texts[call].append((record, "completion"))
            if all(self._is_whole(*where) for where in self._texts[call]):
                self.past.answers.append((self._asked[number], self._prompts[call], call, text))
            return
        replies = node.last_words if self._roles[call] == "last" else node.replies
        replies.append(Reply(text, body["finish"], None))

    def _refused(self, record: Recorded, body: Mapping[str, Any]) -> None:
        self.past.refused += 1
        self._count(record, self.past.refused)
        number = body["sub_call"]
        self.past.sub_calls = max(self.past.sub_calls, number or 0)
        asked = self._sub_calls.get(number) or self._ask(
            self._node(record), self._text(record, "asked"), number=number or 0
        )
        asked.outcome = _error(body)

    def _repeated(self, record: Recorded, body: Mapping[str, Any]) -> None:
        self.past.sub_calls = max(self.past.sub_calls, body["sub_call"])
        for where, name in self._texts[body["of"]]:  # perhaps of a node that is not run again; this one may be
            self._text(where, name, record.node)
        key = fingerprint("llm_query", self._prompts[body["of"]], body["asked"])
        self._ask(self._node(record), key, self._answers[body["of"]], body["sub_call"])

    def _told(self, record: Recorded, body: Mapping[str, Any]) -> None:
        self.past.told += 1
        self._count(record, self.past.told)
        self._ask(self._node(record), BUDGET, body)

    def _count(self, record: Recorded, count: int) -> None:
        if count >= RECORDED and (cell := self._node(record).open_cell):
            cell.cut = True

    # Cells

    def _cell_started(self, record: Recorded, body: Mapping[str, Any]) -> None:
        self._node(record).cells.append(PastCell(body["cell"], self._text(record, "code")))

    def _cell_ended(self, record: Recorded, body: Mapping[str, Any]) -> None:
        texts = {"out": self._if_any(record, "stdout"), "err": self._if_any(record, "stderr")}
        cell = self._node(record).cells[-1]
        cell.result = CellResult(
            status=body["status"],
            detail=body["detail"],
            output=_mixed(texts, self._if_any(record, "order")),
            answer=self._text(record, "answer") if body["answered"] else None,
            names=tuple(body["names"]),
            dropped=body["dropped_bytes"],
            duration_s=body["duration_ms"] / 1000,
        )


def _mixed(texts: Mapping[str, str], order: str) -> list[tuple[str, str]]:
    """The output as it came. order: [stream, characters] pairs."""
    if not order:
        return [(stream, text) for stream, text in texts.items() if text]
    taken, output = {"out": 0, "err": 0}, list[tuple[str, str]]()
    for stream, count in json.loads(order):
        output.append((stream, texts[stream][taken[stream] : taken[stream] + count]))
        taken[stream] += count
    return output


def _error(body: Mapping[str, Any]) -> AirlockError:
    """The error of a record that has its kind, in words that were cut at most."""
    kind = KINDS.get(body["kind"], AirlockError)
    fields = {name: body.get(name, "") for name in ("limit", "asked", "left")}
    if issubclass(kind, RateLimited):
        return kind(body["detail"], retry_after=body.get("retry_after_ms", 0) / 1000, **fields)
    if issubclass(kind, ChildStopped):
        return kind(body["detail"], partial=None)
    return kind(body["detail"], **fields) if issubclass(kind, LimitError) else kind(body["detail"])


def _above(node: str) -> Iterator[str]:
    """The node, and those it is below of."""
    while node:
        yield node
        node = node.rpartition(".")[0]


def _money(text: str) -> int:
    return nano(Decimal(text))


def _time(at: str) -> datetime:
    return datetime.fromisoformat(at)
