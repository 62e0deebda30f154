"""The trace that the reference library `rlms` logs and its visualizer opens: of one query, as lines of JSON.

The first line says what ran, each other one is an iteration: a turn of the root, with its cells and what they asked.
A child query is a call that carries the trace of its own. What is not kept is said to be so, for the visualizer reads
texts wherever it expects them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from orchestrator.core.events import Recorded
from orchestrator.exports.records import line, milliseconds, number, part, policy_of, provider, shown, text, texts
from orchestrator.exports.tree import Call, Cell, Message, Node, Query, grow, messages, prompts

_LOST: Message = {"role": "user", "content": "(not kept)"}


def lines(history: Sequence[Recorded]) -> Iterator[str]:
    query = grow(history)
    if not query or not query.nodes:
        return
    trace = _Trace(query)
    root = query.root or next(iter(query.nodes.values()))
    yield line({"type": "metadata", "timestamp": root.began.at, **trace.setup(root)})
    for iteration in trace.iterations(root):
        yield line(iteration)


class _Trace:
    def __init__(self, query: Query) -> None:
        self._last = query.last
        began = next(iter(query.nodes.values())).began
        self._opened, self._policy = began.body, policy_of(began)

    def setup(self, node: Node) -> dict[str, Any]:
        counts = part(self._policy, "counts")
        others = texts(self._opened, "sub_models")
        return {
            "root_model": node.model,
            "max_depth": number(counts, "depth"),
            "max_iterations": number(counts, "iterations"),
            "backend": provider(node.model),
            "backend_kwargs": {"model_name": node.model},
            "environment_type": text(self._opened, "backend"),
            "environment_kwargs": {"isolation": text(self._opened, "isolation")},
            "other_backends": [provider(name) for name in others] or None,
        }

    def iterations(self, node: Node) -> Iterator[dict[str, Any]]:
        asked = {intent.seq: found for intent, found in prompts(node)}
        for turn in node.turns:
            last = turn is node.turns[-1]
            ended = turn.cells[-1].ended if turn.cells else turn.calls[-1].last.result if turn.calls else None
            yield {
                "type": "iteration",
                "iteration": turn.number,
                "timestamp": turn.began.at,
                "prompt": [message or _LOST for message in asked.get(turn.began.seq, [])],
                "response": "".join(shown(answer.answer, "completion") for answer in turn.answers if answer.answer),
                "code_blocks": [self._block(cell, node) for cell in turn.cells],
                "final_answer": _answer(node) if last else None,
                "iteration_time": self._seconds(turn.began, ended),
            }

    def _block(self, cell: Cell, node: Node) -> dict[str, Any]:
        body = cell.ending
        output = {name: shown(cell.ended, name) if cell.ended else "" for name in ("stdout", "stderr")}
        if text(body, "status") != "ok":  # the visualizer marks a cell by its standard error
            output["stderr"] += f"[{text(body, 'status') or 'no end on record'}] {text(body, 'detail')}"
        final = body.get("answered") is True and cell is _last_cell(node)
        return {
            "code": cell.code,
            "result": {
                **output,
                "locals": dict.fromkeys(texts(body, "names"), ""),  # their values stay in the sandbox
                "execution_time": number(body, "duration_ms") / 1000,
                "rlm_calls": [self._asked(item) for item in cell.asked],
                "final_answer": _answer(node) if final else None,
            },
        }

    def _asked(self, item: Call | Node | Recorded) -> dict[str, Any]:
        if isinstance(item, Call):
            return self._sub_call(item)
        if isinstance(item, Node):
            return self._child(item)
        if item.type == "call.repeated":
            same = f"(the same as of {text(item.body, 'of')})"
            return _completion(text(item.body, "model"), same, same, _usage([]), 0.0)
        detail = text(item.body, "detail")
        return {
            **_completion(text(item.body, "model"), "(not recorded)", f"Error: {detail}", _usage([]), 0.0),
            "error": detail,
        }

    def _sub_call(self, call: Call) -> dict[str, Any]:
        last = call.last
        result, answer = last.result, last.answer
        detail = text(last.ending, "detail") if result else "no result is on record"
        prompt = "\n\n".join((message or _LOST)["content"] for message in messages(last.intent) or [None])
        said = shown(answer, "completion") if answer else f"Error: {detail}"
        seconds = self._seconds(call.attempts[0].intent, result)
        fields = _completion(text(last.intent.body, "model"), prompt, said, _usage([call]), seconds)
        return fields if answer else {**fields, "error": detail}

    def _child(self, node: Node) -> dict[str, Any]:
        answer = _answer(node)
        reason = text(node.ending, "reason") if node.ended else "no end is on record"
        said = answer if answer is not None else f"Error: {reason}"
        seconds = self._seconds(node.began, node.ended)
        fields = _completion(node.model, node.question, said, _usage(_calls(node)), seconds)
        trace = {"run_metadata": self.setup(node), "iterations": list(self.iterations(node))}
        return {**fields, "metadata": trace, **({"error": reason} if node.status != "answered" else {})}

    def _seconds(self, began: Recorded, ended: Recorded | None) -> float:
        return max(0, milliseconds(ended or self._last) - milliseconds(began)) / 1000


def _completion(model: str, prompt: str, response: str, usage: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Its `RLMChatCompletion`, and the counts of tokens where the visualizer looks for them."""
    models = usage["model_usage_summaries"].values()
    return {
        "root_model": model,
        "prompt": prompt,
        "response": response,
        "usage_summary": usage,
        "execution_time": seconds,
        "prompt_tokens": sum(used["total_input_tokens"] for used in models),
        "completion_tokens": sum(used["total_output_tokens"] for used in models),
    }


def _usage(calls: list[Call]) -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = {}
    for attempt in (attempt for call in calls for attempt in call.attempts if attempt.result):
        counted = part(attempt.ending, "usage")
        used = models.setdefault(
            text(attempt.intent.body, "model"),
            {"total_calls": 0, "total_input_tokens": 0, "total_output_tokens": 0, "total_cost": 0.0},
        )
        used["total_calls"] += 1
        used["total_input_tokens"] += number(counted, "input_tokens")
        used["total_output_tokens"] += number(counted, "output_tokens")
        used["total_cost"] += _usd(text(attempt.ending, "cost_usd"))
    total = {"total_cost": sum(used["total_cost"] for used in models.values())} if models else {}
    return {"model_usage_summaries": models, **total}


def _usd(amount: str) -> float:
    try:
        cost = Decimal(amount or 0)
    except InvalidOperation:
        return 0.0
    return float(cost) if cost.is_finite() and cost < 10**12 else 0.0


def _calls(node: Node) -> list[Call]:
    """All of the node and of its children."""
    found: list[Call] = []
    for turn in node.turns:
        found += turn.calls
        for item in (item for cell in turn.cells for item in cell.asked):
            found += [item] if isinstance(item, Call) else _calls(item) if isinstance(item, Node) else []
    return found


def _answer(node: Node) -> str | None:
    """What it answered, be it a partial answer; None if nothing."""
    return shown(node.ended, "answer") if node.ended and "answer" in node.ended.committed else None


def _last_cell(node: Node) -> Cell | None:
    return next((turn.cells[-1] for turn in reversed(node.turns) if turn.cells), None)
