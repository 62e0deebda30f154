"""Every attack on every backend, and the proof that it can succeed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from _pytest.mark import ParameterSet

from orchestrator.sandbox.base import Backend
from tests.security.attacks import ATTACKS
from tests.security.frame import HELD, HOLE, WHOLE, Attack, Stages
from tests.security.table import kept, promised, render

pytestmark = pytest.mark.anyio


async def attempt(attack: Attack, stages: Stages, backend: str) -> list[str]:
    """On a sandbox that is weakened as the attack says."""
    with pytest.MonkeyPatch.context() as patch:
        if attack.weak.host:
            attack.weak.host(patch)
        return await attack.attempt(stages.stage(backend, attack.weak))


async def prove(attack: Attack, stages: Stages, backend: str) -> None:
    """The attack works where the defence is not."""
    if (attack.name, backend) not in stages.proved:
        found = await attempt(attack, stages, backend)
        assert found, f"the attack gets nothing from a sandbox of {backend} without the defence: it proves nothing"
        assert set(found) >= attack.expected()
        stages.proved.add((attack.name, backend))


TIMED = {"CPU"}  # whose share is measured
assert {attack.name for attack in ATTACKS} > TIMED


def param(attack: Attack) -> ParameterSet:
    marks = [pytest.mark.alone] if attack.name in TIMED else []
    return pytest.param(attack, id=f"{attack.group}: {attack.name}", marks=marks)


@pytest.mark.parametrize("attack", [param(attack) for attack in ATTACKS])
async def test_attack(
    attack: Attack, backend: Backend, stages: Stages, record_property: Callable[[str, object], None]
) -> None:
    def say(word: str) -> None:
        record_property("containment", json.dumps([attack.group, attack.name, backend.name, word]))

    say("not run")
    found = await attack.attempt(stages.stage(backend.name, WHOLE))
    say(HOLE if found else "not proved")
    if backend.name in attack.known:
        assert found, "it fails here: take it off the list of what is known"
        return
    assert not found
    for wall in attack.walls.get(backend.name, ()):
        assert await attack.attempt(stages.stage(backend.name, wall)) == [], "the other defence has to do"
    if backend.name in attack.elsewhere:
        assert await attempt(attack, stages, backend.name) == [], "it can succeed here: prove it here"
        await prove(attack, stages, "docker")
    else:
        await prove(attack, stages, backend.name)
    say(attack.word(backend.name))


def test_the_table_in_security_md_is_this_one() -> None:
    assert HELD in kept()
    assert kept() == render(promised(ATTACKS)), "write it anew: .venv/bin/python -m tests.security.table"
