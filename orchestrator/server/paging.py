"""How every list of the service is paged: `limit` and `cursor` in, `next` out, which is the next page's `cursor`.

Records of a query are no such list: they have numbers, and what comes `after` one is asked for by its number.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query
from pydantic import Field

from orchestrator.server.problems import Problem

T = TypeVar("T")
_MOST = 400  # characters of a cursor


def make_cursor(of: str, at: str, name: str) -> str:
    """A place in a list: whose it is, when the row was made, and its name. It tells nothing that the list does not."""
    return base64.urlsafe_b64encode(f"{of} {at} {name}".encode()).decode().rstrip("=")


_EXAMPLE = make_cursor("queries", "2026-11-26T01:02:03.004Z", "20261126-010203-0123456789")
Limit = Annotated[int, Query(ge=1, le=200, description="how many at most")]
# That it is one of ours, `read_cursor` says, in one line for all that is wrong with it.
Cursor = Annotated[
    str | None,
    Query(
        description="`next` of the page before",
        examples=[_EXAMPLE],
        json_schema_extra={"minLength": 1, "maxLength": _MOST},
    ),
]
Next = Annotated[str | None, Field(description="the next page's `cursor`; null on the last page", examples=[_EXAMPLE])]


def read_cursor(of: str, text: str) -> tuple[str, str]:
    """When the row was made, and its name. Raises Problem, alike for all that is none of this list."""
    try:
        raw = base64.b64decode(text[:_MOST] + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
        list_, at, name = raw.split(" ")
        if list_ != of or not (at + name).isprintable() or make_cursor(of, at, name) != text:
            raise ValueError
    except (binascii.Error, ValueError):
        raise Problem(422, "bad-request", "this is no cursor: take `next` of the page before") from None
    return at, name


def cut(of: str, rows: Sequence[T], limit: int, place: Callable[[T], tuple[str, str]]) -> tuple[list[T], str | None]:
    """A page out of rows of which one more than `limit` was looked for, and the cursor of the next."""
    page = list(rows[:limit])
    return page, make_cursor(of, *place(page[-1])) if len(rows) > limit else None
