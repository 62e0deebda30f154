"""What another policy would change: each key by itself, and against what the platform permits."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.core.policy import Policy
from orchestrator.core.policy_changes import Change, changes
from tests.unit.helpers import DEFAULT, policy


def only(old: Policy | None, new: Policy | None, platform: Policy = DEFAULT) -> Change:
    (found,) = changes(platform, old, new)
    return found


def test_nothing_changes():
    assert changes(DEFAULT, None, None) == []
    assert changes(DEFAULT, None, DEFAULT) == []
    assert changes(DEFAULT, DEFAULT, DEFAULT) == []


@pytest.mark.parametrize(
    ("section", "key", "less", "now", "then"),
    [
        ("money", "tenant_day", 10**9, "20.00 USD", "1.00 USD"),
        ("time", "query", 1000, "15 min", "1 s"),
        ("counts", "depth", 0, 1, 0),
        ("sandbox", "least_isolation", "gvisor", "namespace", "gvisor"),
        ("sandbox", "memory", 1, "1 GiB", "1 B"),
        ("audit", "payloads", ("answer",), "keep", ["answer"]),
        ("models", "root", (("a*",),), ["*"], [["*"], ["a*"]]),
    ],
)
def test_narrower_and_back(section: str, key: str, less: Any, now: Any, then: Any):
    narrow = policy(**{section: {key: less}})
    assert only(None, narrow) == Change(f"{section}.{key}", now, then, "narrower", False)
    assert only(narrow, None) == Change(f"{section}.{key}", then, now, "wider", False)
    assert only(narrow, DEFAULT) == Change(f"{section}.{key}", then, now, "wider", False)


def test_wider_than_the_platform_has_no_effect():
    wide = policy(money={"tenant_day": 10**12})
    assert only(None, wide) == Change("money.tenant_day", "20.00 USD", "20.00 USD", "none", True)
    narrow = policy(money={"tenant_day": 1})
    assert only(narrow, wide) == Change("money.tenant_day", "0.000000001 USD", "20.00 USD", "wider", True)


def test_another_list_of_models():
    old, new = policy(models={"sub": (("a*",),)}), policy(models={"sub": (("b*",),)})
    assert only(old, new) == Change("models.sub", [["*"], ["a*"]], [["*"], ["b*"]], "other", False)


def test_lists_in_another_order_are_the_same():
    old, new = policy(models={"sub": (("a*",), ("b*",))}), policy(models={"sub": (("b*",), ("a*",))})
    assert changes(DEFAULT, old, new) == []


def test_every_key_is_looked_at():
    strict = Policy.model_validate(
        {**DEFAULT.model_dump(mode="json"), "audit": {"payloads": "hash", "verify_context": True}}
    )
    assert [found.key for found in changes(DEFAULT, None, strict)] == ["audit.payloads"]
    everything = changes(policy(), policy(), policy(tenant={"share": 0}, content={"answer_chars": 1}))
    assert [found.key for found in everything] == ["tenant.share", "content.answer_chars"]
