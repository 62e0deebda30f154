"""The loop with a scripted LM and a scripted REPL: what ends it, what goes on, and what is left at a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    BudgetInFlight,
    CountExceeded,
    NotPermitted,
    ProviderBusy,
    ProviderRefused,
    SandboxDied,
    TimeExceeded,
)
from orchestrator.core.events import EventType
from orchestrator.lm.base import Message, Reply
from orchestrator.loop.engine import MAX_CELLS, MAX_CONTINUATIONS, Loop, Outcome
from orchestrator.loop.prompts import LAST_WORD_TOKENS, RootLimits
from orchestrator.sandbox.sandbox import CellResult
from tests.unit.helpers import cell, said

pytestmark = pytest.mark.anyio
CODE = "```repl\nprint(1)\n```"


class Stage:
    """Replies and cell results, one after the other; what was asked, run and recorded is kept."""

    def __init__(
        self, *replies: str | Reply | AirlockError, cells: list[CellResult | AirlockError] | None = None
    ) -> None:
        self.replies = list(replies)
        self.results = cells or []
        self.asked: list[list[Message]] = []
        self.tokens: list[int] = []
        self.last: list[bool] = []
        self.code: list[str] = []
        self.events: list[tuple[str, dict[str, str]]] = []
        self.messages: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]

    async def ask(self, messages: list[Message], output_tokens: int, *, last: bool) -> Reply:
        self.asked.append(list(messages))
        self.tokens.append(output_tokens)
        self.last.append(last)
        reply = self.replies.pop(0)
        if isinstance(reply, AirlockError):
            raise reply
        return said(reply) if isinstance(reply, str) else reply

    async def run_cell(self, code: str) -> CellResult:
        self.code.append(code)
        result = self.results.pop(0) if self.results else cell("1\n")
        if isinstance(result, AirlockError):
            raise result
        return result

    def record(self, kind: EventType, body: dict[str, str]) -> None:
        self.events.append((kind, body))

    def loop(
        self, iterations: int = 5, accept: Callable[[str], str | None] = lambda _answer: None, **limits: Any
    ) -> Loop:
        async def accepting(answer: str) -> str | None:
            return accept(answer)

        sizes = {"prompt_bytes": 100_000, "output_tokens": 77, "shown_chars": 100, "style": "standard"} | limits
        return Loop(
            limits=RootLimits(**sizes),
            iterations=iterations,
            question="q",
            ask=self.ask,
            run_cell=self.run_cell,
            record=self.record,
            accept=accepting,
            most_chars=1000,
        )

    async def run(self, **options: Any) -> Outcome:
        return await self.loop(**options).run(self.messages)

    def told(self) -> str:
        """What the LM was last told."""
        return self.asked[-1][-1]["content"]


def answered(answer: str) -> Outcome:
    return Outcome("answered", answer, "")


async def test_an_answer_in_one_turn():
    stage = Stage("FINAL(42)")
    assert await stage.run() == answered("42")
    assert (stage.tokens, stage.last, stage.code, stage.events) == ([77], [False], [], [])


async def test_an_answer_after_some_turns():
    stage = Stage(CODE, CODE, "FINAL(42)")
    assert await stage.run() == answered("42")
    assert [message["role"] for message in stage.asked[-1]] == ["system", "user", *["assistant", "user"] * 2]
    assert stage.told() == "Output of cell 2:\n1"


async def test_an_answer_beside_code_is_not_taken_before_the_output_was_seen():
    stage = Stage(f"{CODE}\nFINAL(guess)", "FINAL(42)")
    assert await stage.run() == answered("42")
    assert stage.code == ["print(1)"]
    assert "it was not taken" in stage.told()


async def test_a_variable_is_the_answer_however_large():
    stage = Stage("FINAL_VAR(x)", cells=[cell(answer="a" * 10**6)])
    assert await stage.run() == answered("a" * 10**6)
    assert stage.code == ["FINAL_VAR('x')"]


async def test_a_variable_that_the_cells_of_the_same_reply_made():
    stage = Stage(f"{CODE}\nFINAL_VAR(x)", cells=[cell(), cell(answer="42")])
    assert await stage.run() == answered("42")


async def test_a_variable_is_not_asked_for_when_its_cell_failed():
    stage = Stage(f"{CODE}\nFINAL_VAR(x)", "FINAL(42)", cells=[cell("Traceback", "error")])
    assert await stage.run() == answered("42")
    assert stage.code == ["print(1)"]


async def test_a_variable_that_is_not_there_is_told():
    stage = Stage("FINAL_VAR(x)", "FINAL(42)", cells=[cell("NameError: x\n", "error")])
    assert await stage.run() == answered("42")
    assert "NameError: x" in stage.told()


async def test_an_answer_that_a_cell_gives_ends_it_before_later_cells():
    stage = Stage(f"{CODE}\n{CODE}", cells=[cell("1", answer="42")])
    assert await stage.run() == answered("42")
    assert len(stage.code) == 1


@pytest.mark.parametrize("status", ["error", "timeout", "killed"])
async def test_a_cell_that_fails_stops_the_later_ones_of_its_reply(status: str):
    stage = Stage(f"{CODE}\n{CODE}", "FINAL(42)", cells=[cell("oh", status, detail="why")])
    assert await stage.run() == answered("42")
    assert len(stage.code) == 1


async def test_only_so_many_cells_of_one_reply_are_run():
    stage = Stage("\n".join([CODE] * (MAX_CELLS + 2)), "FINAL(42)")
    assert await stage.run() == answered("42")
    assert len(stage.code) == MAX_CELLS
    assert stage.told().endswith(f"[only the first {MAX_CELLS} blocks were run]")


async def test_neither_code_nor_answer_is_told():
    stage = Stage("I think so.", "FINAL(42)")
    assert await stage.run() == answered("42")
    assert "neither a ```repl block nor" in stage.told()


async def test_a_reply_that_was_cut_off_is_continued():
    stage = Stage(said("```repl\nprint(", "length"), said("1)\n```\n", "length"), "done", "FINAL(42)")
    assert await stage.run() == answered("42")
    assert stage.code == ["print(1)"]
    assert stage.asked[2][-2]["content"] == "```repl\nprint(1)\n```\n"
    assert [message["content"] for message in stage.asked[3][2:3]] == ["```repl\nprint(1)\n```\ndone"]


async def test_a_reply_without_end_is_continued_only_so_often():
    stage = Stage(*[said("a", "length")] * (1 + MAX_CONTINUATIONS), "FINAL(42)")
    assert await stage.run() == answered("42")
    assert stage.asked[-1][2]["content"] == "a" * (1 + MAX_CONTINUATIONS)


async def test_what_is_asked_fits_the_window():
    stage = Stage(CODE, CODE, CODE, "FINAL(42)", cells=[cell("€" * 5000)] * 3)
    await stage.run(prompt_bytes=2000, shown_chars=5000)
    assert all(sum(len(message["content"].encode()) for message in asked) <= 2000 for asked in stage.asked)


async def test_after_the_last_turn_comes_the_last_word():
    stage = Stage(CODE, CODE, "FINAL(42)")
    outcome = await stage.run(iterations=2)
    assert outcome == Outcome("limit", "42", "count-exceeded: all 2 turns are used")
    assert (stage.last, stage.tokens[-1]) == ([False, False, True], LAST_WORD_TOKENS)
    assert [body["kind"] for _kind, body in stage.events] == ["count-exceeded"]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("FINAL(42)", "42"), ("It is 42.", "It is 42."), ("FINAL_VAR(x)", "var"), (CODE, None), ("", None)],
)
async def test_the_last_word_when_money_is_spent(reply: str, answer: str | None):
    stage = Stage(BudgetExhausted("no money", limit="1 USD"), reply, cells=[cell(answer="var")])
    assert await stage.run() == Outcome("limit", answer, "budget-exhausted: no money")
    assert stage.last == [False, True]
    assert stage.events[0][1] == {"kind": "budget-exhausted", "detail": "no money", "limit": "1 USD", "rule": ""}


async def test_the_last_word_when_other_queries_hold_the_tenants_money():
    """Its own is set aside, so it can be paid all the same."""
    stage = Stage(CODE, BudgetInFlight("held"), "FINAL(42)")
    assert await stage.run() == Outcome("limit", "42", "budget-in-flight: held")
    assert stage.last == [False, False, True]


async def test_without_money_for_the_last_word_there_is_the_partial_answer():
    stage = Stage("FINAL(rejected)", BudgetExhausted("no money"), BudgetExhausted("none at all"))
    outcome = await stage.run(accept=lambda answer: "too short")
    assert outcome == Outcome(
        "limit", "rejected", "budget-exhausted: no money; the partial answer was not accepted: too short"
    )


async def test_a_provider_that_fails_at_the_last_word_does_not_hide_the_limit():
    stage = Stage("FINAL(first)", ProviderBusy("busy"))
    outcome = await stage.loop(1, lambda answer: f"{answer} is no number").run(stage.messages)
    assert (outcome.status, outcome.answer) == ("limit", "first")
    assert outcome.reason.startswith(
        "count-exceeded: all 1 turns are used; no last word came: busy; the partial answer"
    )


async def test_a_last_word_is_held_to_what_answers_are_held_to():
    stage = Stage("FINAL(first)", "FINAL(last)")
    outcome = await stage.run(iterations=1, accept=lambda answer: f"{answer} is no number")
    reason = "count-exceeded: all 1 turns are used; the partial answer was not accepted: last is no number"
    assert outcome == Outcome("limit", "last", reason)
    stage = Stage("FINAL(first)", "FINAL(42)")
    outcome = await stage.run(iterations=1, accept=lambda answer: None if answer == "42" else "no")
    assert outcome == Outcome("limit", "42", "count-exceeded: all 1 turns are used")


async def test_a_last_word_that_is_none_leaves_the_partial_answer():
    stage = Stage("FINAL(first)", CODE)
    outcome = await stage.run(iterations=1, accept=lambda answer: "no")
    assert (outcome.answer, outcome.reason.partition("; ")[2]) == ("first", "the partial answer was not accepted: no")


async def test_a_time_out_while_the_last_word_is_checked_leaves_it():
    stage = Stage(CODE, "FINAL(last)")

    async def endless(_answer: str) -> str | None:
        await anyio.sleep_forever()

    loop = stage.loop(iterations=1)
    loop.accept = endless
    with anyio.move_on_after(0.05):
        await loop.run(stage.messages)
    assert loop.stopped("limit", "time is over") == Outcome(
        "limit", "last", "time is over; the partial answer was not accepted: it could not be checked in time"
    )


@pytest.mark.parametrize("error", [TimeExceeded("time is over"), NotPermitted("not this model")])
async def test_no_last_word_where_it_could_not_be_paid_or_waited_for(error: AirlockError):
    stage = Stage(CODE, error)
    assert await stage.run() == Outcome("limit", None, f"{error.kind}: {error}")
    assert stage.last == [False, False]


async def test_an_answer_nobody_accepted_is_no_longer_than_any_other():
    stage = Stage(CODE, BudgetExhausted("no money"), "FINAL(" + "x" * 5000 + ")")
    assert await stage.run() == Outcome("limit", "x" * 1000, "budget-exhausted: no money")


async def test_an_answer_that_is_not_accepted_is_told_and_asked_for_again():
    stage = Stage("FINAL(x)", "FINAL(42)")
    assert await stage.run(accept=lambda answer: None if answer == "42" else "it is no number") == answered("42")
    assert stage.told() == "That answer was not accepted: it is no number. Put it right and give it again."


async def test_an_answer_that_is_never_accepted_ends_at_the_limit():
    stage = Stage("FINAL(1)", "FINAL(2)", "FINAL(3)")
    outcome = await stage.run(iterations=2, accept=lambda answer: "no")
    assert outcome.status == "limit"
    assert outcome.reason == "count-exceeded: all 2 turns are used; the partial answer was not accepted: no"


async def test_a_limit_that_a_cell_runs_into_is_one_of_the_query():
    stage = Stage(CODE, "FINAL(42)", cells=[CountExceeded("enough")])
    assert await stage.run() == Outcome("limit", "42", "count-exceeded: enough")


@pytest.mark.parametrize("error", [ProviderRefused("401"), SandboxDied("gone")])
async def test_what_is_no_limit_is_raised(error: AirlockError):
    stage = Stage(error) if isinstance(error, ProviderRefused) else Stage(CODE, cells=[error])
    with pytest.raises(type(error)):
        await stage.run()
    assert stage.events == []


async def test_turns_and_cells_are_counted():
    stage = Stage(f"{CODE}\n{CODE}", "FINAL_VAR(x)", cells=[cell(), cell(), cell(answer="42")])
    loop = stage.loop()
    await loop.run(stage.messages)
    assert (loop.turns, loop.cells) == (2, 3)
