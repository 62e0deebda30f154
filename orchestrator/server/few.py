"""Bodies that are wrong in a million places: each fault takes more memory and time than what it is about."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, model_validator

MOST_FIELDS = 100  # more than any object of ours has


def few(given: object, most: int = MOST_FIELDS) -> object:
    """Raises ValueError, once, before anything is said of each. Lists have `fail_fast` for it."""
    if isinstance(given, dict) and len(cast("dict[str, Any]", given)) > most:
        raise ValueError(f"an object here has at most {most} fields")
    return cast("object", given)


class Few(BaseModel):
    """An object that has few fields, also of those that it may not have."""

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: object) -> object:
        return few(given)
