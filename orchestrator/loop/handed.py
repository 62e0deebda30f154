"""Contexts that a cell makes for child queries, while they come in pieces. All of it is hostile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from orchestrator.core.asked import fingerprint
from orchestrator.core.errors import CountExceeded, NotPermitted
from orchestrator.sandbox.sandbox import Call

LEAST = 4096  # bytes that a piece counts for: else a cell could send empty ones without end
_FORMS: dict[str, Literal["text", "jsonl"]] = {"context_text": "text", "context_list": "jsonl"}


@dataclass(slots=True)
class Given:
    """A context in pieces. form: a text, or a list as JSON lines; None for that of the parent."""

    form: Literal["text", "jsonl"] | None
    pieces: list[str] = field(default_factory=list[str])

    def as_prompt(self, question: str) -> str:
        """Question and context as one prompt, where there is no REPL to put the context in."""
        return "\n\n".join((question, "".join(self.pieces))) if self.form else question


class Handed:
    """most: bytes of UTF-8 that those which are under way may have together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._newest = 0
        self._given: dict[int, Given] = {}

    def take(self, op: str, piece: str, number: int | None) -> int:
        """The number of the context that `piece` begins or goes on with. Raises CountExceeded, NotPermitted."""
        size = _size(piece)
        if self._size + size > self._most:
            text = f"a context for child queries can have {self._most:,} bytes: give less at once"
            if number in self._given:
                self._drop(number)
            asked = f"{self._size + size} bytes"
            raise CountExceeded(text, limit=f"{self._most} bytes", asked=asked, rule="content.child_context")
        if op in _FORMS:
            self._newest = number = self._newest + 1
            self._given[number] = Given(_FORMS[op])
        elif number is None or number not in self._given:
            raise NotPermitted("this context was not begun, or has been used")
        self._size += size
        self._given[number].pieces.append(piece)
        return number

    def peek(self, number: int | None) -> Given | None:
        """What `give` would; None for what it refuses."""
        return Given(None) if number is None else self._given.get(number)

    def give(self, number: int | None) -> Given:
        """The context, once; the parent's for None. Raises NotPermitted."""
        if number is None:
            return Given(None)
        if number not in self._given:
            raise NotPermitted("this context was not begun, or has been used")
        given = self._given[number]
        self._drop(number)
        return given

    def clear(self) -> None:
        """What a cell began and did not use ends with it."""
        self._given.clear()
        self._size = 0

    def _drop(self, number: int) -> None:
        pieces = self._given.pop(number).pieces
        self._size -= sum(map(_size, pieces))


def asked_by(call: Call, given: Given | None) -> str:
    """The fingerprint of a cell's call. given: the context of a child query, if it is one with a context to be had."""
    if call.op == "rlm_query" and given is None:
        return fingerprint(call.op, call.prompt, call.model, [f"number {call.context}"])
    pieces = [given.form, *given.pieces] if given and given.form else []
    return fingerprint(call.op, call.prompt, call.model, pieces)


def _size(piece: str) -> int:
    return max(LEAST, len(piece.encode("utf-8", "replace")))
