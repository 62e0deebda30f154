"""Conversations for supervised fine-tuning, as TRL and OpenAI read them: one line for each turn of each node.

A line is what the LM was sent and what it replied; the reply is the last message. The turns before it are there as they
were, with `"weight": 0`, for each of them is the last one of a line of its own. Two lines of it, shortened:

    {"messages":[{"role":"system",...},{"role":"user",...},{"role":"assistant",...}],"query":"...","node":"root",
     "turn":1,"model":"...","status":"answered","score":"0.85"}

`status` is how the node ended, `score` what the query was scored, or null. A line is whole or not there at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from orchestrator.core.events import Recorded
from orchestrator.exports.records import line, text
from orchestrator.exports.tree import Message, Turn, grow, prompts


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which turns. status: of nodes that ended like this. least: of queries with this score at least, from 0 to 1."""

    status: str | None = None
    least: Decimal | None = None


ALL = Wanted()


def lines(history: Sequence[Recorded], scores: Mapping[str, Decimal], wanted: Wanted = ALL) -> Iterator[str | None]:
    """None for a turn whose texts are not all kept. A turn without a reply is none. scores: by query."""
    query = grow(history)
    score = scores.get(query.id) if query else None
    if not query or (wanted.least is not None and (score is None or score < wanted.least)):
        return
    for node in query.nodes.values():
        if wanted.status is not None and node.status != wanted.status:
            continue
        asked = {intent.seq: found for intent, found in prompts(node)}
        for turn in node.turns:
            if not turn.answers:
                continue
            messages = _conversation(turn, asked)
            facts: dict[str, Any] = {
                "query": query.id,
                "node": node.name,
                "turn": turn.number,
                "model": text(turn.answers[0].intent.body, "model"),
                "status": node.status,
                "score": None if score is None else f"{score:f}",
            }
            yield line({"messages": messages, **facts}) if messages else None


def _conversation(turn: Turn, asked: Mapping[int, Sequence[Message | None]]) -> list[dict[str, Any]] | None:
    """The whole of it, with a reply that came in pieces put together; None if any of it is not kept."""
    prompt, reply = asked[turn.began.seq], turn.reply
    known = [message for message in prompt if message]
    if reply is None or not known or len(known) != len(prompt):
        return None
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in known]
    return [*before, {"role": "assistant", "content": reply}]
