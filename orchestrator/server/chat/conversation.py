"""From a conversation to a query: what of it is the question, and what the context.

A chat client sends one list of messages; a query has a question and a context. This is how one becomes the other:

- The last user message is the question. Texts of several parts are joined by line breaks.
- Messages of system and developer are instructions: they stand before the question. So do the other messages, marked
  with who said them, as long as nothing below says otherwise.
- A file is the context, wherever in the conversation it is named; there can be one.
- Without a file, what is long is the context. Where the messages before the question have more than LONG characters
  together, these are it: a single one is a text, several are a list of {"role", "content"}. Instructions that are not
  long by themselves stay before the question.
- Where they are short and the question itself is long, its message is a request with its material: that is the
  context, and the question is to do what it asks.
- Where all is short, the context is the whole conversation, as a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.loop.prompts import PROMPT_ALONE, in_conversation
from orchestrator.server.chat.request import ChatMessage, FilePart, RefusalPart
from orchestrator.server.inline import GivenId, GivenJson, GivenText
from orchestrator.server.problems import Problem

LONG = 4000  # characters
_INSTRUCTING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a conversation asks, and of what."""

    question: str
    context: GivenText | GivenJson | GivenId


@dataclass(frozen=True, slots=True)
class _Said:
    role: str
    name: str | None
    text: str

    @property
    def who(self) -> str:
        return f"{self.role} ({self.name})" if self.name else self.role

    @property
    def item(self) -> dict[str, str]:
        """As a list that is a context has it."""
        return {"role": self.role, **({"name": self.name} if self.name else {}), "content": self.text}


def read(messages: Sequence[ChatMessage]) -> Reading:
    """Raises Problem (400), with the `param` that is at fault."""
    last = max((number for number, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None:
        raise _fault("messages", "there is no user message, whose text would be the question")
    if any(message.role == "assistant" for message in messages[last:]):
        raise _fault("messages", "the assistant's message at the end cannot be gone on with: end with a user message")
    said = [_Said(message.role, message.name, _text(message)) for message in messages]
    asked = said.pop(last)
    if not asked.text.strip():
        raise _fault(f"messages[{last}].content", "the last user message has no text, which would be the question")
    said = [each for each in said if each.text.strip()]
    if file := _file(messages):
        return Reading(_question(said, asked.text), file)
    return _of_texts(said, asked)


def _of_texts(said: list[_Said], asked: _Said) -> Reading:
    instructions = [each for each in said if each.role in _INSTRUCTING]
    material = said if _is_long(instructions) else [each for each in said if each not in instructions]
    if _is_long(material):
        kept = [each for each in said if each not in material]
        single = GivenText(text=material[0].text) if len(material) == 1 else _listed(material)
        return Reading(_question(kept, asked.text), single)
    if _is_long([asked]):
        return Reading(_question(said, PROMPT_ALONE), GivenText(text=asked.text))
    return Reading(_question(said, asked.text), _listed([*said, asked]))


def _is_long(said: Sequence[_Said]) -> bool:
    return sum(len(each.text) for each in said) > LONG


def _listed(said: Sequence[_Said]) -> GivenJson:
    return GivenJson.model_validate({"json": [each.item for each in said]})


def _question(before: Sequence[_Said], question: str) -> str:
    instructions = [each.text for each in before if each.role in _INSTRUCTING]
    return in_conversation(
        instructions, [(each.who, each.text) for each in before if each.role not in _INSTRUCTING], question
    )


def _text(message: ChatMessage) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or message.refusal or ""
    texts = (
        part.refusal if isinstance(part, RefusalPart) else part.text
        for part in message.content
        if not isinstance(part, FilePart)
    )
    return "\n".join(texts)


def _file(messages: Sequence[ChatMessage]) -> GivenId | None:
    """A client that sends its history again names the same file again."""
    found: str | None = None
    for number, message in enumerate(messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, FilePart):
                if found not in (None, part.file.file_id):
                    where = f"messages[{number}].content[{place}]"
                    raise _fault(where, "a query has one context, and this is another file: put them into one")
                found = part.file.file_id
    return GivenId(id=found) if found else None


def _fault(param: str, text: str) -> Problem:
    return Problem(400, "bad-request", f"{param}: {text}", param=param)
