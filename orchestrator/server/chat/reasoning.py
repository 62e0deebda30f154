"""What a query does, as the text that a chat shows while it thinks: short, and legible as Markdown.

    I look at the beginning.

    ```python
    print(context[:100])
    ```
    ```text
    The bell rang at nine.
    ```
    - gpt-5-mini was asked 1,204 bytes and answered 88

Of the root's loop alone; a child query is a line where it begins and one where it ends. Code and output are hostile
text: a fence is longer than any that is in them, so that nothing of theirs is taken for Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.console import counted
from orchestrator.core.events import Recorded
from orchestrator.loop.prompts import cut
from orchestrator.loop.recovery import ROOT

MOST_WORDS, MOST_CODE, MOST_OUTPUT = 2000, 4000, 1000  # characters
MOST_CALLS = 20  # of a cell, that have a line of their own
_FENCED = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_FINAL = re.compile(r"^[ \t>*]*FINAL(_VAR)?\**[ \t]*\(.*", re.MULTILINE | re.DOTALL)


_GIVING = re.compile(r"\s*FINAL_VAR\(.\w+.\)\s*")  # a cell that gives the answer, which comes as such


class Reasoning:
    """Made of one query's records, from its first one on."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[str, int]] = {}  # sub-calls under way -> the model, and bytes of the prompt
        self._calls = 0  # of this cell

    def told(self, record: Recorded) -> str:
        """What there is to be said of the next record: Markdown that ends its last line, or nothing."""
        return "".join(self._lines(record, record.body))

    def _lines(self, record: Recorded, body: Mapping[str, Any]) -> Iterator[str]:
        match record.type:
            case "node.opened":
                yield _line(f"child query {record.node} to {body['model']}")
            case "node.closed":
                yield _line(f"child query {record.node} {body['status']}: {counted(body['turns'], 'turn')}")
            case _ if record.node != ROOT:
                return
            case "call.intent" if body["role"] == "sub":
                self._models[body["call"]] = body["model"], record.committed["prompt"]["bytes"]
            case "call.result":
                yield from self._result(record, body)
            case "call.refused":
                yield from self._call(f"a sub-call was refused: {body['detail']}")
            case "cell.started":
                self._calls = 0
                code = record.payloads.get("code", "")
                yield "" if _GIVING.fullmatch(code) else fenced(cut(code, MOST_CODE), "python")
            case "cell.ended":
                yield from self._ended(record, body)
            case "limit.hit":
                yield _line(f"limit: {body['detail']}")
            case "query.interrupted" | "query.resumed":
                yield _line(record.type.replace("query.", "the query was "))
            case _:
                return

    def _result(self, record: Recorded, body: Mapping[str, Any]) -> Iterator[str]:
        asked, answered = self._models.pop(body["call"], None), body["outcome"] == "answered"
        if asked and answered:
            size = record.committed["completion"]["bytes"]
            yield from self._call(f"{asked[0]} was asked {asked[1]:,} bytes and answered {size:,}")
        elif asked:
            yield from self._call(f"{asked[0]} was asked {asked[1]:,} bytes and did not answer: {body['detail']}")
        elif answered and (said := words(record.payloads.get("completion", ""))):
            yield f"{said}\n\n"

    def _call(self, text: str) -> Iterator[str]:
        self._calls += 1
        if self._calls <= MOST_CALLS:
            yield _line(text)

    def _ended(self, record: Recorded, body: Mapping[str, Any]) -> Iterator[str]:
        if self._calls > MOST_CALLS:
            yield _line(f"and {counted(self._calls - MOST_CALLS, 'more sub-call')}")
        for name in ("stdout", "stderr"):
            yield fenced(cut(record.payloads.get(name, ""), MOST_OUTPUT), "text")
        if body["status"] != "ok":
            yield _line(f"{body['status']}: {body['detail']}" if body["detail"] else body["status"])
        yield "\n"


def words(completion: str) -> str:
    """What the model said beside its code and its answer."""
    said = _FINAL.sub("", _FENCED.sub("", completion))
    return cut(re.sub(r"\n{3,}", "\n\n", said).strip(), MOST_WORDS)


def fenced(text: str, language: str) -> str:
    """A block that nothing within it ends."""
    if not text.strip():
        return ""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _line(text: str) -> str:
    return f"- {' '.join(text.split())}\n"
