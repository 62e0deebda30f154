"""Policies only ever get narrower, and their hash tells any two apart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from orchestrator.core.policy import IMAGES, ISOLATION, MOST_DEPTH, PAYLOADS, Policy
from orchestrator.core.policy_file import parse_policy
from tests.unit.helpers import DEFAULT, POLICIES, policy, quick

PATTERNS = ("*", "gpt-*", "gpt-5", "local:*", "gpt-[45]")
MODELS = ("gpt-5", "gpt-4", "local:x", "o3")
RANK = {
    "least_isolation": lambda value: -ISOLATION.index(value),
    "image": IMAGES.index,
}


def leaves(model: type[BaseModel] = Policy, above: str = "") -> list[str]:
    """The keys of a policy file, dotted."""
    found: list[str] = []
    for name, info in model.model_fields.items():
        section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        found += leaves(info.annotation, f"{name}.") if section else [above + name]  # pyright: ignore
    return found


def values(key: str) -> st.SearchStrategy[Any]:
    match key:
        case "models.root" | "models.sub":
            return st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3).map(lambda names: (tuple(names),))
        case "sandbox.least_isolation":
            return st.sampled_from(ISOLATION)
        case "sandbox.image":
            return st.sampled_from(IMAGES)
        case "audit.payloads":
            return st.sets(st.sampled_from(PAYLOADS)).map(lambda names: tuple(n for n in PAYLOADS if n in names))
        case "models.fallbacks":
            return st.permutations(MODELS).map(lambda names: tuple(names[:2]))
        case "audit.verify_context" | "models.dedupe":
            return st.booleans()
        case "counts.depth":
            return st.integers(0, MOST_DEPTH)
        case "money.child_share":
            return st.integers(1, 100)
        case _:
            return st.integers(32, 1 << 34)


def assemble(flat: dict[str, Any]) -> Policy:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return policy(**sections)


policies = st.fixed_dictionaries({key: values(key) for key in leaves()}).map(assemble)


def leaf(rules: Policy, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(rules, section), name)


def loosest(rules: Policy, key: str) -> Any:
    """The field as a number that grows with what it allows."""
    value, name = leaf(rules, key), key.split(".")[1]
    return -value if name == "verify_context" else RANK.get(name, lambda plain: plain)(value)


def permitted(rules: Policy) -> set[tuple[str, str]]:
    return {(role, model) for role in ("root", "sub") for model in MODELS if rules.models.permits(role, model)}  # pyright: ignore


@quick
@given(policies, policies)
def test_narrowing_never_widens(mine: Policy, theirs: Policy):
    both = mine.narrowed(theirs)
    for key in leaves():
        if key not in ("models.root", "models.sub", "models.fallbacks", "audit.payloads"):
            assert loosest(both, key) == min(loosest(mine, key), loosest(theirs, key)), key
    assert permitted(both) == permitted(mine) & permitted(theirs)
    assert set(both.audit.payloads) == set(mine.audit.payloads) & set(theirs.audit.payloads)
    assert both.models.fallbacks == tuple(name for name in mine.models.fallbacks if name in theirs.models.fallbacks)


@quick
@given(policies, policies)
def test_narrowing_twice_is_narrowing_once(mine: Policy, theirs: Policy):
    once = mine.narrowed(theirs)
    assert once.narrowed(theirs) == once == once.narrowed(mine)
    assert mine.narrowed(mine) == mine


@quick
@given(policies, policies)
def test_who_narrows_whom_has_no_effect(mine: Policy, theirs: Policy):
    one, other = mine.narrowed(theirs), theirs.narrowed(mine)
    assert all(leaf(one, key) == leaf(other, key) for key in leaves() if not key.startswith("models."))
    assert permitted(one) == permitted(other)


@quick
@given(policies, policies)
def test_policies_have_one_hash_only_when_they_are_equal(mine: Policy, theirs: Policy):
    assert (mine.sha256() == theirs.sha256()) == (mine == theirs)
    assert mine.sha256() == mine.model_copy(deep=True).sha256()


@pytest.mark.parametrize("key", leaves())
def test_every_field_is_in_the_hash(key: str):
    section, name = key.split(".")
    value = leaf(DEFAULT, key)
    others = {"least_isolation": "gvisor", "verify_context": False, "dedupe": True}
    other = (
        PAYLOADS[:1]
        if name == "payloads"
        else ("x",)
        if name in ("fallbacks", "payloads")
        else (("x",),)
        if isinstance(value, tuple)
        else others.get(name, value + 1 if type(value) is int else None)
    )
    assert policy(**{section: {name: other}}).sha256() != DEFAULT.sha256()


@quick
@given(policies)
def test_a_policy_that_is_shown_can_be_read_back(rules: Policy):
    assert parse_policy(yaml.safe_dump(rules.model_dump(mode="json")), "shown") == rules


def test_a_large_cpu_share_is_told_from_the_next():
    one, other = (policy(sandbox={"cpu": 1_000_000_000 + more}) for more in (1, 2))
    assert one.sha256() != other.sha256()


def test_the_readme_has_every_key_and_no_other():
    told = re.findall(r"^\| `([a-z_.]+)` \|", (POLICIES / "README.md").read_text(), re.MULTILINE)
    assert told == leaves()


def test_a_model_has_to_pass_every_list():
    rules = policy(models={"root": (("gpt-*",), ("*-5",))})
    assert rules.models.permits("root", "gpt-5")
    assert not rules.models.permits("root", "gpt-4")
    assert not rules.models.permits("root", "claude-5")
