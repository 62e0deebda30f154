"""What a server of OpenAI's protocol sent, whole or as a stream of events, as a `Reply`. Pure: no I/O, nothing trusted.

A stream has an end of ours, whatever the server thinks of the cap it was given. Two things are certain. A token of
every tokenizer that is known has at most 128 bytes, so what has more than BYTES_A_TOKEN for each token of the cap is
over it. And most servers send an event a token, some several tokens in one, a few spell a token out in several: none
needs EVENTS_A_TOKEN for each token of a whole reply, so what sends more is over it, too, with text or without.
"""

from __future__ import annotations

import json
from typing import Any, cast

from orchestrator.core.errors import OutcomeUnknown
from orchestrator.lm.base import Reply, Usage

BYTES_A_TOKEN = 256
EVENTS_A_TOKEN = 16
REPLY_BYTES = 16 << 20  # of any reply, with all that is around the text of it
EVENT_BYTES = 1 << 10  # and more for what surrounds each token of a stream
SPARE_EVENTS = 10_000  # comments that keep a connection alive, openings and endings
MOST_TOKENS = 10**12  # that a report can say and be believed
_NO_COMPLETION = "the provider sent something that is not a chat completion"


def whole(body: bytes, cap: int) -> Reply:
    """Of a JSON body, cut to what `cap` tokens can be. Raises OutcomeUnknown."""
    completion = _parsed(body)
    choices = _get(completion, "choices")
    if not isinstance(choices, list) or not choices:
        raise OutcomeUnknown("the provider sent a completion without a choice")
    choice: Any = cast("list[Any]", choices)[0]
    message = _get(choice, "message")
    if message is None:
        raise OutcomeUnknown("the provider sent a choice without a message")
    text = clean(_text(message, "content"))
    chars = len(text) + _thought(message)
    if chars > cap * BYTES_A_TOKEN:
        return Reply(text[: cap * BYTES_A_TOKEN], "length", None)
    return Reply(text, _reason(_get(choice, "finish_reason")), usage(_get(completion, "usage"), chars))


class Stream:
    """Server-sent events as they come in, up to what `cap` tokens can be.

    over: it is longer than it can be, and the rest is not wanted. done: the server said that this was all. error: why
    it stopped, in its words. ended: no more text will come, though the usage may.
    """

    def __init__(self, cap: int) -> None:
        self.over = self.done = False
        self.error = ""
        self._most_chars = cap * BYTES_A_TOKEN
        self._most_events = cap * EVENTS_A_TOKEN + SPARE_EVENTS
        self._most_bytes = cap * EVENT_BYTES + REPLY_BYTES
        self._rest: list[bytes] = []  # of a line that has not ended yet
        self._data: list[bytes] = []  # of an event that has not ended yet
        self._events = self._chars = self._bytes = 0
        self._text: list[str] = []
        self._finish: Any = None
        self._usage: Any = None

    @property
    def ended(self) -> bool:
        return self.done or bool(self._finish)

    def feed(self, piece: bytes) -> None:
        """piece: bytes as they were cut. Raises OutcomeUnknown at what is no event of a chat completion."""
        self._bytes += len(piece)
        if self._bytes > self._most_bytes:
            self.over = True
            return
        if b"\n" not in piece:
            self._rest.append(piece)
            return
        *lines, rest = b"".join((*self._rest, piece)).split(b"\n")
        self._rest = [rest]
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif line.strip():
                self._count()  # a comment, or a field of no use here
            elif self._data:
                data, self._data = b"\n".join(self._data), []
                self._take(data)
            if self.over or self.done:
                return

    def reply(self) -> Reply:
        """Raises OutcomeUnknown when the server had not come to an end, nor we for it."""
        text = clean("".join(self._text))
        if self.over:
            if not self._chars:
                raise OutcomeUnknown("the provider sent events without end, and no text in them")
            return Reply(text[: self._most_chars], "length", None)
        if not (self._finish or (self.done and self._chars)):
            raise OutcomeUnknown("the provider's stream broke before the answer was whole")
        return Reply(text, _reason(self._finish), usage(self._usage, self._chars))

    def _count(self) -> None:
        self._events += 1
        self.over = self._events > self._most_events

    def _take(self, data: bytes) -> None:
        self._count()
        if data.strip() == b"[DONE]":
            self.done = True
            return
        event = _parsed(data)
        if not isinstance(event, dict):
            raise OutcomeUnknown(_NO_COMPLETION)
        event = cast("dict[str, Any]", event)
        if error := event.get("error"):
            self.error, self.done = str(_get(error, "message") or error), True
            return
        reported = event.get("usage")
        if reported is not None:
            self._usage = reported  # of several the last one: some servers report as they go
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices:
            return
        choice: Any = cast("list[Any]", choices)[0]
        delta = _get(choice, "delta")
        text = _text(delta, "content")
        if text:
            self._text.append(text)
        self._chars += len(text) + _thought(delta)
        self._finish = _get(choice, "finish_reason") or self._finish
        self.over = self.over or self._chars > self._most_chars


def usage(reported: Any, chars: int) -> Usage | None:
    """What was reported, or None for what cannot be: the call is charged at its bound then. chars: of the output.

    No prompt of ours is empty, so that nothing was read is no report; nor is less written than such a text has to be.
    More than the bound is one: that the provider counts otherwise than we do has to be seen.
    """
    tokens = [_get(reported, name) for name in ("prompt_tokens", "completion_tokens")]
    least = (1, -(-chars // BYTES_A_TOKEN))
    if not all(type(count) is int and low <= count < MOST_TOKENS for count, low in zip(tokens, least, strict=True)):
        return None
    return Usage(*tokens)


def reason(body: str) -> str:
    """What an error says: its message where it has the protocol's form, else all of it."""
    try:
        error = _get(_parsed(body), "error")
    except OutcomeUnknown:
        return body
    message = _get(error, "message") or error
    return message if isinstance(message, str) else body


def clean(text: str) -> str:
    """Half of a surrogate pair is valid in JSON, and is no text. Halves that meet, sent one by one, are a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.encode("utf-8", "replace").decode()
    return text


def _reason(finish: Any) -> str:
    return clean(str(finish or "stop"))[:100]


def _parsed(body: bytes | str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # nested without end is no JSON of theirs, either
        raise OutcomeUnknown(_NO_COMPLETION) from None


def _text(message: Any, name: str) -> str:
    text = _get(message, name)
    if text is not None and not isinstance(text, str):
        raise OutcomeUnknown(f"the provider sent a completion whose {name} is not text")
    return text or ""


def _thought(message: Any) -> int:
    """Characters of reasoning, under either of its names: written, paid for, and no part of the answer."""
    text = _get(message, "reasoning_content") or _get(message, "reasoning")
    return len(text) if isinstance(text, str) else 0


def _get(value: Any, name: str) -> Any:
    return cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else None
