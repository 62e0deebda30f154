"""What people see of a query: plain lines (on a terminal, see `live.py`), and a run read back from the journal.

Code, output and answers are hostile text. On a terminal every control character, and every character that reorders
text, is shown as an escape instead of being obeyed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from orchestrator.core.events import Event, Recorded, read_record
from orchestrator.core.units import usd

if TYPE_CHECKING:
    from orchestrator.core.policy import Policy
    from orchestrator.proxy.account import Account

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """`text` with what a terminal would obey made visible."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def safe_for(stream: TextIO, text: str) -> str:
    """`text` as it may go to `stream`: untouched into files and pipes, harmless on terminals."""
    return printable(text) if stream.isatty() else text


def counted(number: int, noun: str) -> str:
    """`1 line`, `2 lines`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _joined(line: str) -> str:
    """One line: a line break that a guest or a provider wrote must not begin a line of ours."""
    return re.sub(r"[\r\n\x0b\x0c\x85\u2028\u2029]+", " / ", line)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which query it is, and what it may: nano-USD, turns of its root, milliseconds; None where that is not known."""

    query: str
    limit: int
    iterations: int | None
    time_ms: int | None

    @classmethod
    def of(cls, query: str, policy: Policy) -> Bounds:
        return cls(query, policy.money.query, policy.counts.iterations, policy.time.query)


class Counts(Protocol):
    """How far a query is. An `Account` is one; money in nano-USD."""

    @property
    def turns(self) -> int: ...
    @property
    def sub_calls(self) -> int: ...
    @property
    def children(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def spent(self) -> int: ...


class PlainView:
    """One line for each thing that happens, to standard error."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr.flush()

    def account(self, account: Account) -> None:
        self.begin(Bounds.of(account.key.id, account.policy), account)

    def begin(self, bounds: Bounds, _counts: Counts) -> None:
        self._say(f"query {bounds.query}, budget {usd(bounds.limit)} USD")

    def event(self, event: Event) -> None:
        if line := one_line(event):
            self._say(line if event.node == "root" else f"{event.node}: {line}")

    def output(self, stream: str, text: str) -> None:
        """A cell's output is not repeated here; `airlock audit show` has it."""

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:7.2f} s] {printable(_joined(line))}", file=sys.stderr)


def one_line(event: Event) -> str:
    body: Mapping[str, Any] = event.body
    match event.type:
        case "sandbox.started":
            return f"sandbox ready: {body['backend']} ({body['isolation']}), Python {body['python']}"
        case "node.opened":
            return f"child query of {body['parent']}, {body['model']}, at most {body['limit_usd']} USD"
        case "node.closed":
            return f"child query {body['status']}: {counted(body['turns'], 'turn')}, {body['cost_usd']} USD"
        case "cell.started":
            code = event.payloads.get("code")  # from a journal that keeps none
            return f"cell {body['cell']}" + (f": {counted(code.count(chr(10)) + 1, 'line')}" if code else "")
        case "cell.ended":
            detail = f" ({body['detail']})" if body["detail"] else ""
            return f"cell {body['cell']} {body['status']} after {body['duration_ms']} ms{detail}"
        case "limit.hit":
            return f"limit: {body['detail']}"
        case "query.narrowed" | "query.resumed" | "cell.replayed":
            return _again(event.type, body)
        case "query.closed":
            if "turns" not in body:  # it has not had its turn
                return body["status"]
            turns, calls = counted(body["turns"], "turn"), counted(body["sub_calls"], "sub-call")
            return f"{body['status']}: {turns}, {calls}, {body['cost_usd']} USD"
        case _:
            return _line_of_call(event)


def _again(kind: str, body: Mapping[str, Any]) -> str:
    """Of a query that goes on after an interruption, or after it had waited."""
    if kind == "query.narrowed":
        return f"the policy was changed while it waited: {body['limit_usd']} USD at most"
    if kind == "cell.replayed":
        how = "as before" if body["same"] else f"with other {', '.join(body['differs'])} than before"
        return f"cell {body['cell']} was run again: {body['status']}, {how}"
    known = f"{counted(body['cells'], 'cell')} and {counted(body['calls'], 'answer')}"
    return f"resumed in {body['backend']} ({body['isolation']}): {known} are on record"


def _line_of_call(event: Event) -> str:
    body: Mapping[str, Any] = event.body
    match event.type:
        case "call.intent":
            if body["role"] == "sub":
                return ""
            return f"asking {body['model']} (may cost up to {body['bound_usd']} USD)"
        case "call.result":
            if body["outcome"] == "answered":
                return "" if ".c" in body["call"] and body["cost_usd"] == "0.00" else f"cost {body['cost_usd']} USD"
            return f"call {body['call']} {body['outcome']}: {body['detail']}"
        case "call.refused":
            return f"sub-call refused: {body['detail']}"
        case _:
            return ""


def show_run(
    chain: list[tuple[bytes, str]], payloads: Mapping[tuple[int, str], str], fault: str | None
) -> Iterator[str]:
    """A query's journal as a person would read it, line by line: code, output, sub-calls, cost."""
    texts: dict[int, dict[str, str]] = {}
    for (seq, name), text in payloads.items():
        texts.setdefault(seq, {})[name] = text
    for seq, (record, _digest) in enumerate(chain):
        yield from one_record(read_record(record, texts.get(seq, {})))
    head = chain[-1][1] if chain else "none"
    yield f"journal: {len(chain)} records, head {head}: " + (f"BROKEN: {fault}" if fault else "the chain is whole")


def one_record(record: Recorded) -> Iterator[str]:
    """What it says, line by line."""

    def payload(name: str) -> str:
        if name in record.payloads:
            return record.payloads[name]
        return f"(not kept: {record.committed[name]['bytes']:,} bytes)" if name in record.committed else ""

    for line in _show_record(record, record.body, payload):
        yield _joined(line)


def _show_record(record: Recorded, body: Mapping[str, Any], payload: Any) -> Iterator[str]:
    at, whose = record.at[11:23], _whose(record)
    match record.type:
        case "query.opened":
            yield from _show_opening(record, payload("question"))
        case "node.opened":
            yield f"{at} {whose}child query to {body['model']}, at most {body['limit_usd']} USD"
            yield from _indented(payload("question"), "? ")
        case "cell.started" | "cell.ended":
            yield from _show_cell(record, payload)
        case "limit.hit":
            yield f"{at} {whose}limit: {body['detail']}"
        case "sandbox.started":
            yield f"{at} {whose}sandbox started, Python {body['python']}"
        case "sandbox.ended":
            yield f"{at} {whose}sandbox ended: {_show_usage(body)}"
        case "context.verified":
            yield f"{at} {whose}context {'unchanged' if body['unchanged'] else 'CHANGED'}"
        case "query.interrupted":
            yield f"{at} interrupted: {body['why']}"
        case "query.narrowed" | "query.resumed" | "cell.replayed":
            yield f"{at} {whose}{_again(record.type, body)}"
        case "query.closed" | "node.closed":
            yield f"{at} {whose}closed: {body['status']} {body['reason']}".rstrip() + f"; cost {body['cost_usd']} USD"
            if "answer" in record.committed:
                yield f"{whose}answer:"
                yield from _indented(payload("answer"), "  ")
        case _:
            yield from _show_call(record, payload)


def _show_call(record: Recorded, payload: Any) -> Iterator[str]:
    at, body = record.at[11:23], record.body
    match record.type:
        case "call.intent":
            what = "turn" if body["role"] == "root" else "sub-call"
            yield f"{at} {what} {body['call']} to {body['model']}, at most {body['bound_usd']} USD"
            if body["role"] == "sub":
                yield from _indented(_prompt_text(payload("prompt")), "> ")
        case "call.result":
            usage = body["usage"]
            tokens = f", {usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out" if usage else ""
            yield f"{at} {body['call']} {body['outcome']} ({body['detail']}){tokens}, {body['cost_usd']} USD"
            yield from _indented(payload("completion"), "< ")
        case "call.repeated":
            yield f"{at} {_whose(record)}sub-call answered as {body['of']} was"
        case "budget.told":
            left = f"{body['usd_left']} USD, {counted(body['sub_calls_left'], 'sub-call')}, {body['seconds_left']} s"
            yield f"{at} {_whose(record)}budget told: {left} left"
        case "budget.held":
            yield f"{at} {_whose(record)}{body['usd']} USD set aside for the {body['for']}"
        case _:
            yield f"{at} {_whose(record)}sub-call refused: {body['detail']}"


def _show_cell(record: Recorded, payload: Any) -> Iterator[str]:
    at, body = record.at[11:23], record.body
    if record.type == "cell.started":
        yield f"{at} {_whose(record)}cell {body['cell']}"
        yield from _indented(payload("code"), "| ")
        return
    how = f"{body['status']} after {body['duration_ms']} ms {body['detail']}"
    yield f"{at} {_whose(record)}cell {body['cell']} {how}".rstrip()
    yield from _indented(payload("stdout"), "  ")
    yield from _indented(payload("stderr"), "! ")


def _whose(record: Recorded) -> str:
    """Which node it is of, unless it is the root's."""
    return "" if record.node == "root" else f"{record.node}: "


def _show_opening(record: Recorded, question: str) -> Iterator[str]:
    body, context = record.body, record.body["context"]
    yield f"query {record.query} of tenant {record.tenant}, opened {record.at}"
    if body["model"]:
        yield f"  question: {question}"
    yield f"  context:  {context['kind']}, {context['chars']:,} characters, sha256 {context['sha256']}"
    yield f"  model:    {body['model'] or 'none, a single cell'}; sub-calls: {', '.join(body['sub_models']) or 'none'}"
    yield f"  sandbox:  {body['backend']} ({body['isolation']}); budget {body['limit_usd']} USD"
    yield f"  policy:   {record.policy}"


def _show_usage(body: Mapping[str, Any]) -> str:
    cpu, peak = body["cpu_ms"], body["peak_memory_bytes"]
    return f"CPU {'unknown' if cpu is None else f'{cpu} ms'}, peak memory " + (
        "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
    )


def _prompt_text(text: str) -> str:
    try:
        return str(json.loads(text)[-1]["content"])
    except (ValueError, LookupError, TypeError):
        return text


def _indented(text: str, mark: str, most: int = 40) -> Iterator[str]:
    lines = text.splitlines()
    for line in lines[:most]:
        yield f"    {mark}{line[:500]}"
    if len(lines) > most:
        yield f"    {mark}... [{len(lines) - most:,} more lines]"
