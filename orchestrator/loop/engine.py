"""The loop: ask the root LM, run its cells, show it what came out, until there is an answer or a limit.

Read top to bottom. Everything that touches the world (LM, sandbox, journal) is handed in as a callable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import anyio

from orchestrator.core.errors import (
    BudgetExhausted,
    BudgetInFlight,
    CountExceeded,
    LimitError,
    ProviderError,
    RateLimited,
)
from orchestrator.core.events import EventType
from orchestrator.lm.base import Message, Reply
from orchestrator.loop import prompts
from orchestrator.loop.parse import parse
from orchestrator.loop.prompts import RootLimits
from orchestrator.sandbox.sandbox import CellResult

MAX_CONTINUATIONS = 3
SCHEMA_S = 10.0  # for checking one answer, or one schema
MAX_CELLS = 8  # of one reply; a model that writes more has stopped looking at what comes out

Status = Literal["answered", "limit", "refused", "failed", "cancelled", "interrupted"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a query ended. answer: the text, or None. reason: empty when answered, else one exact line."""

    status: Status
    answer: str | None
    reason: str


class Ask(Protocol):
    async def __call__(self, messages: list[Message], output_tokens: int, *, last: bool) -> Reply: ...


@dataclass(slots=True)
class Loop:
    """One query's loop.

    ask           asks the root LM; last=True may use the money set aside for the last word
    run_cell      runs code in the sandbox; raises SandboxDied when there is none any more
    record        journals an event
    accept        what is wrong with an answer (schema, size), or None
    most_chars    of an answer that nobody accepted, but that is the best there is
    """

    question: str
    limits: RootLimits
    iterations: int
    ask: Ask
    run_cell: Callable[[str], Awaitable[CellResult]]
    record: Callable[[EventType, dict[str, str]], None]
    accept: Callable[[str], Awaitable[str | None]]
    most_chars: int
    cells: int = 0
    turns: int = 0
    partial: str | None = None  # the best there is so far, should a limit strike
    fault: str = ""  # why that is no answer

    async def run(self, messages: list[Message]) -> Outcome:
        """From the opening messages to the end. Raises what `ask` and `run_cell` raise, but for limits."""
        try:
            while self.turns < self.iterations:
                self.turns += 1
                answer = await self._turn(messages)
                if answer is not None:
                    return Outcome("answered", answer, "")
            text, most = f"all {self.iterations} turns are used", str(self.iterations)
            limit: LimitError = CountExceeded(text, limit=most, rule="counts.iterations")
        except LimitError as error:
            limit = error
        self.record("limit.hit", limit_hit(limit))
        return await self._last_word(messages, limit)

    async def _turn(self, messages: list[Message]) -> str | None:
        """One reply and what follows from it; the accepted answer, if it brought one."""
        text = await self._reply(messages)
        messages.append({"role": "assistant", "content": text})
        step = parse(text)
        said: list[str] = []
        answer, failed, silent = None, False, bool(step.cells)
        for code in step.cells[:MAX_CELLS]:
            result = await self.run_cell(code)
            self.cells += 1
            said.append(self._report(result))
            failed = result.status != "ok"
            silent = silent and not failed and not result.output
            answer = result.answer if result.answer is not None else answer
            if failed or result.answer is not None:
                break
        if len(step.cells) > MAX_CELLS:
            said.append(f"[only the first {MAX_CELLS} blocks were run]")
        if answer is None and step.final is not None:
            if step.cells:
                said.append(prompts.too_early())
            else:
                answer = step.final
        if answer is None and step.final_var is not None and not failed:
            answer = await self._variable(step.final_var, said)
        if answer is not None:
            fault = await self.accept(answer)
            if fault is None:
                return answer
            said.append(prompts.not_accepted(fault))
            self._keep(answer, fault)
        style = self.limits.style
        told = prompts.observation(said, style, self.question, silent=silent) if said else prompts.no_code(style)
        messages.append({"role": "user", "content": told})
        return None

    async def _reply(self, messages: list[Message]) -> str:
        """The root LM's whole reply: one that was cut at the output limit is continued, not mis-read."""
        text = ""
        for _ in range(1 + MAX_CONTINUATIONS):
            going_on: list[Message] = []
            if text:
                going_on = [{"role": "assistant", "content": text}, {"role": "user", "content": prompts.go_on()}]
            asked = prompts.fit([*messages, *going_on], self.limits.prompt_bytes)
            reply = await self.ask(asked, self.limits.output_tokens, last=False)
            text += reply.text
            if reply.finish_reason != "length":
                break
        return text

    async def _variable(self, name: str, said: list[str]) -> str | None:
        result = await self.run_cell(f"FINAL_VAR({name!r})")
        self.cells += 1
        if result.answer is None:
            said.append(self._report(result))
        return result.answer

    def _report(self, result: CellResult) -> str:
        output = "".join(text for _, text in result.output)
        return prompts.cell_report(
            None if self.limits.style == "small" else self.cells,
            output,
            result.status,
            result.detail,
            () if self.limits.style == "small" else result.names,
            result.dropped,
            self.limits.shown_chars,
        )

    async def _last_word(self, messages: list[Message], limit: LimitError) -> Outcome:
        """Ask once more, out of the reserve; failing that, whatever partial answer there is."""
        reason = f"{limit.kind}: {limit}"
        if not isinstance(limit, (CountExceeded, BudgetExhausted, BudgetInFlight, RateLimited)):
            return self.stopped("limit", reason)
        asked = prompts.last_word(messages, str(limit), min(prompts.LAST_WORD_BYTES, self.limits.prompt_bytes))
        try:
            reply = await self.ask(asked, prompts.LAST_WORD_TOKENS, last=True)
        except LimitError:
            return self.stopped("limit", reason)
        except ProviderError as error:  # what stopped the query is still the limit
            return self.stopped("limit", f"{reason}; no last word came: {error.told}")
        step = parse(reply.text)
        answer = step.final
        if answer is None and step.final_var is not None:
            answer = await self._variable(step.final_var, [])
        if answer is None and not step.cells and step.final_var is None:
            answer = reply.text.strip() or None
        if answer:
            self._keep(answer, "it could not be checked in time")
            fault = await self.accept(answer)
            if fault is None:
                return Outcome("limit", self.partial, reason)
            self._keep(answer, fault)
        return self.stopped("limit", reason)

    def _keep(self, answer: str, fault: str) -> None:
        if answer:
            self.partial, self.fault = answer[: self.most_chars], fault

    def stopped(self, status: Status, reason: str) -> Outcome:
        """The end without an answer that was accepted: the best there is, and with the reason what is wrong with it."""
        note = "" if self.partial is None else f"; the partial answer was not accepted: {self.fault}"
        return Outcome(status, self.partial, reason + note)


def limit_hit(limit: LimitError) -> dict[str, str]:
    """Body of the record."""
    return {"kind": limit.kind, "detail": str(limit), "limit": limit.limit[:500], "rule": limit.rule}


def schema_check(schema: Mapping[str, object] | None, most: int) -> Callable[[str], Awaitable[str | None]]:
    """What `Loop.accept` asks: is the answer at most `most` characters and, given a JSON Schema, JSON that fits it?"""

    async def accept(answer: str) -> str | None:
        if len(answer) > most:
            return f"it has {len(answer):,} characters, and {most:,} are permitted"
        return None if schema is None else await _fault(schema, answer)

    return accept


async def _fault(schema: Mapping[str, object], answer: str) -> str | None:
    return await _apart({"schema": schema, "answer": answer}, "it could not be checked against the schema")


async def schema_fault(schema: Mapping[str, object]) -> str | None:
    """Why it is not a JSON Schema; None where it is one."""
    return await _apart({"schema": schema}, "it could not be checked")


async def _apart(asked: Mapping[str, object], unknown: str) -> str | None:
    """What `fits` finds. unknown: what is said where it comes to no end."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("fits.py"))]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    given = json.dumps(asked).encode()
    try:
        with anyio.fail_after(SCHEMA_S):
            done = await anyio.run_process(command, input=given, env=environment, stderr=subprocess.DEVNULL)
        return json.loads(done.stdout)
    except TimeoutError:
        return f"{unknown} within {SCHEMA_S:g} s: make it simpler"
    except (subprocess.CalledProcessError, ValueError):
        return f"{unknown}: make it simpler"
