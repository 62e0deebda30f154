"""What another policy would change for a tenant, key by key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from orchestrator.core.policy import Policy
from orchestrator.core.policy_file import policy_values

_LISTS = ("models.root", "models.sub")  # a model has to pass them all, in whatever order


@dataclass(frozen=True, slots=True)
class Change:
    """now, then: as policies are written, both as narrowed by the platform's.

    change: other: in part narrower, in part wider. beyond: the tenant's own would be wider than the platform's, which
    holds.
    """

    key: str
    now: Any
    then: Any
    change: Literal["none", "narrower", "wider", "other"]
    beyond: bool


def changes(platform: Policy, old: Policy | None, new: Policy | None) -> list[Change]:
    """Of every key that changes, or that is beyond the platform's. None: the platform's alone."""
    before = platform.narrowed(old or platform)
    after = platform.narrowed(new or platform)
    both, own = _flat(before.narrowed(after)), _flat(new or platform)
    was, shown_before, shown_after = _flat(before), _shown(before), _shown(after)
    found: list[Change] = []
    for key, will in _flat(after).items():
        change = _direction(was[key], will, both[key])
        beyond = key not in _LISTS and will != own[key]
        if change != "none" or beyond:
            found.append(Change(key, shown_before[key], shown_after[key], change, beyond))
    return found


def _direction(was: Any, will: Any, both: Any) -> Literal["none", "narrower", "wider", "other"]:
    """both: the stricter of the two."""
    if was == will:
        return "none"
    return "narrower" if both == will else "wider" if both == was else "other"


def _flat(policy: Policy) -> dict[str, Any]:
    """Key -> value."""
    sections: dict[str, BaseModel] = {section: getattr(policy, section) for section in Policy.model_fields}
    flat: dict[str, Any] = {f"{section}.{key}": value for section, fields in sections.items() for key, value in fields}
    return {key: frozenset(value) if key in _LISTS else value for key, value in flat.items()}


def _shown(policy: Policy) -> dict[str, Any]:
    """Key -> value, as a policy file has it."""
    return {
        f"{section}.{name}": value
        for section, fields in policy_values(policy).items()
        for name, value in fields.items()
    }
