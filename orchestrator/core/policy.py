"""What a tenant and a query may do. Deny by default: every limit has a value, every unknown key is an error.

A policy only ever gets narrower: `Policy.narrowed` is the pointwise minimum, so a request cannot widen what its tenant
was granted, nor a tenant what the platform allows. Quantities carry their unit in the file and are exact integers here.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal, Self, cast

import rfc8785
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from orchestrator.core.units import cores, parse_bytes, parse_millicores, parse_ms, parse_usd, usd

ISOLATION = ("namespace", "container", "gvisor", "microvm")  # weakest first
IMAGES = ("python", "data")  # what has fewer programs first
PAYLOADS = ("question", "policy", "schema", "code", "prompt", "completion", "stdout", "stderr", "answer")
MOST_DEPTH = 8


def _quantity(parse: Callable[[object], int], show: Callable[[int], str]) -> tuple[Any, ...]:
    return BeforeValidator(parse), PlainSerializer(show, return_type=str)


# Beyond these a number is a slip, and further down some kernel or clock would not take it.
_MOST_BYTES, _MOST_MS = 1 << 44, 366 * 24 * 3600 * 1000
_positive = Field(gt=0)
Bytes = Annotated[int, *_quantity(parse_bytes, lambda n: f"{n} B"), Field(gt=0, le=_MOST_BYTES)]
Millis = Annotated[int, *_quantity(parse_ms, lambda n: f"{n} ms"), Field(gt=0, le=_MOST_MS)]
Millicores = Annotated[int, *_quantity(parse_millicores, cores), _positive]
Nano = Annotated[int, *_quantity(parse_usd, lambda n: f"{usd(n)} USD"), Field(ge=0)]
_MOST = 2**53 - 1  # the largest integer of canonical JSON
Count = Annotated[int, Field(ge=0, le=_MOST, strict=True)]
AtLeastOne = Annotated[int, Field(ge=1, le=_MOST, strict=True)]


def _one_list(value: object) -> object:
    # A file has one list of patterns; narrowing adds further lists, all of which must be passed.
    if isinstance(value, list):
        items = cast("list[object]", value)
        if not any(isinstance(item, list) for item in items):
            return (items,)
    return cast("object", value)


def _payloads(value: object) -> object:
    """In one order, each once, so that equal policies have one hash."""
    if isinstance(value, str):
        if value not in ("keep", "hash"):
            raise ValueError(f"has to be keep, hash, or a list of {', '.join(PAYLOADS)}")
        return PAYLOADS if value == "keep" else ()
    if isinstance(value, list | tuple):
        named = cast("list[object]", value)
        return tuple(name for name in PAYLOADS if name in named) + tuple(name for name in named if name not in PAYLOADS)
    return value


def _shown_payloads(value: tuple[str, ...]) -> str | list[str]:
    return list(value) if 0 < len(value) < len(PAYLOADS) else "keep" if value else "hash"


Kept = Annotated[
    tuple[Literal["question", "policy", "schema", "code", "prompt", "completion", "stdout", "stderr", "answer"], ...],
    BeforeValidator(_payloads),
    PlainSerializer(_shown_payloads),
]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
Allowed = Annotated[tuple[Patterns, ...], BeforeValidator(_one_list)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def narrowed(self, other: Self) -> Self:
        """Field by field, the stricter of the two."""
        return self.model_copy(
            update={
                name: _stricter(name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields
            }
        )


def _stricter(name: str, mine: Any, theirs: Any) -> Any:
    if isinstance(mine, _Section):
        return mine.narrowed(theirs)
    if name == "least_isolation":
        return max(mine, theirs, key=ISOLATION.index)
    if name == "image":
        return min(mine, theirs, key=IMAGES.index)
    if name == "payloads":
        return tuple(kind for kind in mine if kind in theirs)
    if name == "verify_context":
        return mine or theirs
    if name == "dedupe":
        return mine and theirs
    if name == "fallbacks":  # in the order of the first; what one does not name is not asked
        return tuple(model for model in mine if model in theirs)
    if name in ("root", "sub"):  # allow-lists: a model has to pass both
        return tuple(dict.fromkeys((*mine, *theirs)))
    return min(mine, theirs)


class Models(_Section):
    """root, sub: which models may be asked, as lists of patterns; a model must match one of every list.

    fallbacks: asked in this order in place of a model whose provider fails. dedupe: answer identical calls of one
    query once.
    """

    root: Allowed
    sub: Allowed
    fallbacks: Annotated[tuple[str, ...], Field(max_length=8)]
    prompt: Bytes
    output_tokens: AtLeastOne
    output_floor: AtLeastOne
    dedupe: Annotated[bool, Field(strict=True)]

    def permits(self, role: Literal["root", "sub"], model: str) -> bool:
        lists: Allowed = getattr(self, role)
        return all(any(fnmatch.fnmatchcase(model, pattern) for pattern in patterns) for patterns in lists)


class Money(_Section):
    """child_share: per cent of what its parent has left that one child query may spend."""

    query: Nano
    child_share: Annotated[int, Field(ge=1, le=100, strict=True)]
    tenant_day: Nano
    tenant_month: Nano


class Time(_Section):
    """query: wall clock of the whole query. cell: of one cell. idle: how long one LM request may go unanswered."""

    query: Millis
    cell: Millis
    idle: Millis


class Counts(_Section):
    """depth: 0 no sub-calls, 1 plain calls, from 2 on child queries. children: in the whole tree of a query."""

    iterations: AtLeastOne
    sub_calls: Count
    batch: AtLeastOne
    depth: Annotated[int, Field(ge=0, le=MOST_DEPTH, strict=True)]
    children: Count
    children_in_flight: AtLeastOne
    in_flight: AtLeastOne
    retries: Count


class SandboxLimits(_Section):
    """image: what a container runs. output: bytes a cell may print. shown: characters of it that the root LM sees."""

    least_isolation: Literal["namespace", "container", "gvisor", "microvm"]
    image: Literal["python", "data"]
    cpu: Millicores
    memory: Bytes
    pids: AtLeastOne
    tmp: Bytes
    files: Annotated[int, Field(ge=32, le=_MOST, strict=True)]
    output: Bytes
    shown: AtLeastOne


class Tenant(_Section):
    """in_flight, requests_minute, tokens_minute: of LM calls of all its queries. share: its weight when others wait."""

    queries_at_once: AtLeastOne
    in_flight: AtLeastOne
    requests_minute: AtLeastOne
    tokens_minute: AtLeastOne
    share: AtLeastOne


class Audit(_Section):
    """payloads: which are kept; of the others only hashes are. verify_context: hash it again at the end."""

    payloads: Kept
    verify_context: Annotated[bool, Field(strict=True)]


class Content(_Section):
    question_chars: AtLeastOne
    child_context: Bytes
    answer_chars: AtLeastOne


class Policy(_Section):
    models: Models
    money: Money
    time: Time
    counts: Counts
    sandbox: SandboxLimits
    tenant: Tenant
    audit: Audit
    content: Content

    def sha256(self) -> str:
        """Hex SHA-256 of the canonical JSON (RFC 8785) of the policy."""
        return _sha256(self)  # pyright: ignore[reportArgumentType]  frozen: pydantic gives it a hash


@lru_cache(256)  # a policy never changes, and half a millisecond of each query would go into this
def _sha256(policy: Policy) -> str:
    return hashlib.sha256(rfc8785.dumps(policy.model_dump(mode="json"))).hexdigest()
