"""Schemas of requests: small, checked apart, and nobody waits for those of another tenant."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from orchestrator.core.errors import CountExceeded, RequestError
from orchestrator.loop import engine
from orchestrator.server.problems import problem_of
from orchestrator.server.schemas import MOST, checked
from orchestrator.server.service import Principal

pytestmark = pytest.mark.anyio
ANN, BOB = (Principal(name, frozenset({"query"}), "key", "key") for name in ("ann", "bob"))
GOOD: dict[str, Any] = {"type": "object", "required": ["n"]}
# Each set of characters is walked through when the pattern is compiled: minutes, in 25 kB.
ENDLESS = {"pattern": "(?i)" + "[\0-\uffff]" * 3000}


async def test_a_schema_is_given_back():
    assert await checked(ANN, "answer_schema", GOOD) == GOOD


@pytest.mark.parametrize("schema", [{"type": 1}, {"minimum": float("nan")}, {"$schema": []}, {"pattern": "("}])
async def test_what_is_none_is_refused(schema: dict[str, Any]):
    with pytest.raises(RequestError, match=r"^there is not a JSON Schema: "):
        await checked(ANN, "there", schema)


async def test_a_large_one_is_refused_before_it_is_checked():
    at_most = {"const": "x" * (MOST - len(json.dumps({"const": ""})))}
    assert await checked(ANN, "answer_schema", at_most) == at_most
    with pytest.raises(CountExceeded, match="65,537 bytes as JSON; 65,536 are permitted") as caught:
        await checked(ANN, "answer_schema", {"const": at_most["const"] + "x"})
    problem = problem_of(caught.value)
    assert (problem.status, problem.more) == (413, {"rule": "answer_schema"})


async def test_one_that_takes_hours_to_check_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "SCHEMA_S", 1.0)
    with pytest.raises(RequestError, match="could not be checked within 1 s: make it simpler"):
        await checked(ANN, "answer_schema", ENDLESS)


async def test_nobody_waits_for_those_of_another_tenant(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "SCHEMA_S", 100.0)
    ended: list[str] = []

    async def endless() -> None:
        try:
            await checked(ANN, "answer_schema", ENDLESS)
        finally:
            ended.append("ann")

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(endless)
            await anyio.wait_all_tasks_blocked()
            assert await checked(BOB, "answer_schema", GOOD) == GOOD
            assert ended == []
            tasks.cancel_scope.cancel()
