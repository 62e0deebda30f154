"""A query as OpenTelemetry spans, by the semantic conventions for generative AI.

    invoke_workflow airlock             the query: one trace, whose id is made of the query's
      invoke_agent root                 a node; what happened to its sandbox, and its limits, as events
        turn                            one reply of its LM and the cells in it
          chat MODEL                    a request; several for one call have a span `call` around them
          execute_tool repl             a cell; refused and repeated sub-calls as events
            chat MODEL                  a sub-call
            invoke_agent child          a child query

Texts of prompts, replies, cells and answers are in it only where that is asked for; then they are JSON in a text, which
the conventions permit: few backends show nested attributes, and they take ten times as long to encode. What the
conventions have no name for is called `airlock.*`. Errors are the span's status, and `error.type`, of which there are
few.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from orchestrator.core.events import Recorded
from orchestrator.exports.records import VERSION, clean, milliseconds, number, part, provider, text
from orchestrator.exports.tree import Attempt, Call, Cell, Message, Node, Query, Turn, grow, messages, prompts

_RESOURCE = Resource({"service.name": "airlock", "service.version": VERSION})
_SCOPE = InstrumentationScope("airlock", VERSION)
_KIND = re.compile("([a-z-]+): ")  # how the reason of a failure begins
_MOST_NS = 2**63 - 1


def spans(history: Sequence[Recorded], *, content: bool = False) -> list[ReadableSpan]:
    """content: with the texts. The same records make the same spans, ids included."""
    query = grow(history)
    if not query or not query.nodes:
        return []
    return _Maker(query, content=content).spans


class _Maker:
    def __init__(self, query: Query, *, content: bool) -> None:
        self.spans: list[ReadableSpan] = []
        self._query = query
        self._content = content
        self._trace = int.from_bytes(hashlib.sha256(query.id.encode("utf-8", "replace")).digest()[:16])
        self._cells: dict[int, SpanContext] = {}  # by the place of the record that began it
        top = self._workflow(next(iter(query.nodes.values())))
        for node in query.nodes.values():  # parents come before their children
            self._node(node, self._cells[node.within.began.seq] if node.within else top)

    def _add(
        self,
        what: str,
        name: str,
        parent: SpanContext | None,
        began: Recorded,
        ended: Recorded | None,
        attributes: Mapping[str, Any],
        *,
        error: tuple[str, str] | None = None,
        events: Iterable[Recorded] = (),
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> SpanContext:
        """error: its type and a line on it. ended: None when it never did, as far as is known."""
        if not ended:
            error = ("unfinished", "its end is not on record")
        fields = {**attributes, "error.type": error[0]} if error else attributes
        seed = f"{self._query.id} {what} {began.seq}".encode("utf-8", "replace")
        context = self._context(int.from_bytes(hashlib.sha256(seed).digest()[:8]))
        start = _nanoseconds(began)
        self.spans.append(
            ReadableSpan(
                clean(name),
                context,
                parent,
                _RESOURCE,
                {key: _fit(value) for key, value in fields.items() if value not in (None, "")},
                [_event(record) for record in events],
                kind=kind,
                status=Status(StatusCode.ERROR, clean(error[1])) if error else Status(),
                start_time=start,
                end_time=max(start, _nanoseconds(ended or self._query.last)),  # clocks can be set back
                instrumentation_scope=_SCOPE,
            )
        )
        return context

    def _context(self, span: int) -> SpanContext:
        return SpanContext(self._trace, span, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    def _workflow(self, root: Node) -> SpanContext:
        body = root.began.body
        attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.workflow.name": "airlock",
            "airlock.query": self._query.id,
            "airlock.tenant": root.began.tenant,
            "airlock.backend": text(body, "backend"),
            "airlock.isolation": text(body, "isolation"),
            **self._ending(root),
        }
        return self._add(
            "query", "invoke_workflow airlock", None, root.began, root.ended, attributes, error=_fate(root)
        )

    def _node(self, node: Node, parent: SpanContext) -> None:
        name = "child" if node.within else "root"
        attributes = {
            **self._agent(node),
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": provider(node.model),
            "gen_ai.agent.name": name,
            "gen_ai.request.model": node.model,
            "airlock.node": node.name,
            **self._ending(node),
        }
        title = f"invoke_agent {name}"
        error, notes = _fate(node), node.notes
        mine = self._add("node", title, parent, node.began, node.ended, attributes, error=error, events=notes)
        asked = {intent.seq: found for intent, found in prompts(node)} if self._content else {}
        for turn in node.turns:
            self._turn(node, turn, mine, asked)

    def _turn(self, node: Node, turn: Turn, parent: SpanContext, asked: Mapping[int, Sequence[Message | None]]) -> None:
        ends = [cell.ended for cell in turn.cells[-1:]] or [call.last.result for call in turn.calls[-1:]]
        mine = self._add("turn", "turn", parent, turn.began, ends[0] if ends else None, {"airlock.turn": turn.number})
        for call in turn.calls:
            self._call(call, mine, self._agent(node), asked)
        for cell in turn.cells:
            self._cell(cell, mine)

    def _cell(self, cell: Cell, parent: SpanContext) -> None:
        began, ended = cell.began, cell.ended
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": "repl",
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": f"{began.node} cell {number(began.body, 'cell')}",
        }
        if self._content and "code" in began.payloads:
            attributes["gen_ai.tool.call.arguments"] = _json({"code": began.payloads["code"]})
        if self._content and ended and ended.payloads:
            attributes["gen_ai.tool.call.result"] = _json(dict(ended.payloads))
        status = text(cell.ending, "status")
        error = (status or "unknown", text(cell.ending, "detail")) if status != "ok" else None
        events = [item for item in cell.asked if isinstance(item, Recorded)]
        mine = self._add("cell", "execute_tool repl", parent, began, ended, attributes, error=error, events=events)
        self._cells[began.seq] = mine
        for item in cell.asked:
            if isinstance(item, Call):
                self._call(item, mine, {}, {})

    def _call(
        self,
        call: Call,
        parent: SpanContext,
        attributes: Mapping[str, Any],
        asked: Mapping[int, Sequence[Message | None]],
    ) -> None:
        first, last = call.attempts[0], call.last
        if first is not last:
            about = {"airlock.call": call.name, "airlock.attempts": len(call.attempts)}
            parent = self._add("call", "call", parent, first.intent, last.result, about, error=_failure(last))
        for attempt in call.attempts:
            found = asked.get(attempt.intent.seq) or (messages(attempt.intent) if self._content else None)
            self._attempt(attempt, parent, attributes, found)

    def _attempt(
        self,
        attempt: Attempt,
        parent: SpanContext,
        attributes: Mapping[str, Any],
        asked: Sequence[Message | None] | None,
    ) -> None:
        intent, result, answer = attempt.intent, attempt.result, attempt.answer
        body, model = intent.body, text(intent.body, "model")
        usage = part(attempt.ending, "usage")
        fields: dict[str, Any] = {
            **attributes,
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider(model),
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": number(body, "output_tokens") or None,
            "gen_ai.response.finish_reasons": [clean(attempt.finish)] if answer else None,
            "gen_ai.usage.input_tokens": number(usage, "input_tokens") if usage else None,
            "gen_ai.usage.output_tokens": number(usage, "output_tokens") if usage else None,
            "airlock.call": text(body, "call"),
            "airlock.attempt": number(body, "attempt"),
            "airlock.bound_usd": text(body, "bound_usd"),
            "airlock.cost_usd": text(attempt.ending, "cost_usd"),
        }
        if self._content and asked and (told := [message for message in asked if message]) and None not in asked:
            fields["gen_ai.input.messages"] = _json([_said(message["role"], message["content"]) for message in told])
        if self._content and answer and "completion" in answer.payloads:
            fields["gen_ai.output.messages"] = _json([_reply(answer.payloads["completion"], attempt.finish)])
        error = _failure(attempt)
        kind = SpanKind.CLIENT
        self._add("attempt", f"chat {model}".rstrip(), parent, intent, result, fields, error=error, kind=kind)

    def _agent(self, node: Node) -> dict[str, str]:
        """A node is a conversation of its own."""
        name = f"{self._query.id}:{node.name}"
        return {"gen_ai.agent.id": name, "gen_ai.conversation.id": name}

    def _ending(self, node: Node) -> dict[str, Any]:
        """How it ended, and with content what it was asked and answered."""
        ended = node.ended
        fields: dict[str, Any] = {"airlock.status": node.status, "airlock.cost_usd": text(node.ending, "cost_usd")}
        if self._content and "question" in node.began.payloads:
            fields["gen_ai.input.messages"] = _json([_said("user", node.began.payloads["question"])])
        if self._content and ended and "answer" in ended.payloads:
            fields["gen_ai.output.messages"] = _json([_reply(ended.payloads["answer"], "stop")])
        return fields


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _said(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": words}]}


def _reply(words: str, finish: str) -> dict[str, Any]:
    return {**_said("assistant", words), "finish_reason": finish}


def _fate(node: Node) -> tuple[str, str] | None:
    if node.status == "answered":
        return None
    reason = text(node.ending, "reason")
    kind = _KIND.match(reason)
    return (kind[1] if kind else node.status or "unknown", reason)


def _failure(attempt: Attempt) -> tuple[str, str] | None:
    if attempt.answer:
        return None
    return text(attempt.ending, "outcome") or "unknown", text(attempt.ending, "detail")


def _event(record: Recorded) -> Event:
    """All that is plain in the record."""
    plain = {
        clean(f"airlock.{name}"): _fit(value) for name, value in record.body.items() if isinstance(value, str | int)
    }
    return Event(clean(f"airlock.{record.type}"), plain, _nanoseconds(record))


def _fit(value: Any) -> Any:
    return clean(value) if isinstance(value, str) else value


def _nanoseconds(record: Recorded) -> int:
    """As much of a time as protocol buffers hold."""
    return min(max(0, milliseconds(record) * 10**6), _MOST_NS)
