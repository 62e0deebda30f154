"""Records of the journal: what happened, as canonical JSON in a hash chain. Pure; the store keeps them.

A record holds no payload. Prompts, completions, code, output and answers are kept apart; the record has a salted
commitment to each (SHA-256 of salt and bytes), so a payload can be erased while the chain still verifies. The hash of a
record is that of an entry in a log of RFC 6962 (`merkle.leaf_hash`), so chains and logs are over the same hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from orchestrator.core.merkle import leaf_hash

VERSION = 1
GENESIS = "0" * 64
MOST_BYTES = 16 * 1024  # of a record

EventType = Literal[
    "query.opened",
    "node.opened",
    "node.closed",
    "sandbox.started",
    "sandbox.ended",
    "call.intent",
    "call.result",
    "call.refused",
    "call.repeated",
    "budget.told",
    "budget.held",
    "cell.started",
    "cell.ended",
    "cell.replayed",
    "limit.hit",
    "context.verified",
    "query.narrowed",
    "query.interrupted",
    "query.resumed",
    "query.closed",
]
LogEventType = Literal[  # in a chain of a log's own, of no query
    "key.created",
    "tenant.head",
    "payload.erased",
    "query.scored",
    "log.anchored",
    "admin.action",
]


@dataclass(frozen=True, slots=True)
class Event:
    """What the loop or the proxy wants recorded. body: JSON without floats, money as text. payloads: name -> text."""

    type: EventType | LogEventType
    node: str
    body: Mapping[str, Any]
    payloads: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Sealed:
    """An event with its place in the chain. record: the canonical bytes. hash: of them, hex."""

    seq: int
    record: bytes
    hash: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """A record read back. payloads: name -> text of those that are kept. committed: name -> what it says of them."""

    query: str
    seq: int
    at: str
    type: str
    node: str
    body: Mapping[str, Any]
    payloads: Mapping[str, str]
    committed: Mapping[str, Mapping[str, Any]]
    tenant: str = ""
    policy: str = ""


def read_record(record: bytes, payloads: Mapping[str, str]) -> Recorded:
    """Of a chain that was found to be whole."""
    fields = json.loads(record)
    names = ("query", "seq", "at", "type", "node", "body", "tenant", "policy")
    return Recorded(**{name: fields[name] for name in names}, payloads=payloads, committed=fields["payloads"])


def commitment(salt: bytes, payload: bytes) -> str:
    return hashlib.sha256(salt + payload).hexdigest()


def seal(
    event: Event, *, query: str, tenant: str, policy: str, seq: int, at: str, prev: str, payloads: Mapping[str, Any]
) -> Sealed:
    """Give `event` its place after the record with hash `prev`.

    at: RFC 3339 time in UTC. policy: SHA-256 of the effective policy. payloads: name -> {"commitment", "bytes",
    "kept"}, and "redacted" where secrets were taken out: how many. Raises ValueError on what canonical JSON without
    floats cannot hold, and on more than MOST_BYTES.
    """
    fields = {
        "v": VERSION,
        "query": query,
        "tenant": tenant,
        "policy": policy,
        "node": event.node,
        "seq": seq,
        "at": at,
        "type": event.type,
        "body": dict(event.body),
        "payloads": dict(payloads),
        "prev": prev,
    }
    if _unfit(fields["body"]):
        raise ValueError(f"{event.type}: records hold no floats, and no integers of more than 53 bits")
    record = canonical(fields)
    if len(record) > MOST_BYTES:
        raise ValueError(f"{event.type}: a record has at most {MOST_BYTES:,} bytes, not {len(record):,}")
    return Sealed(seq, record, leaf_hash(record).hex())


def canonical(fields: Mapping[str, Any]) -> bytes:
    """RFC 8785, by the C half of json: without floats, and with ASCII keys, this is what the RFC asks for.

    A test holds it to the library rfc8785, ten times as slow. Half of a surrogate pair, which is no text, becomes "?":
    a record has to be possible whatever a provider or a guest has said.
    """
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _unfit(value: Any) -> bool:
    """Whether canonical JSON as other languages read it would not hold the value exactly."""
    if isinstance(value, float):
        return True
    if isinstance(value, int):
        return abs(value) >= 2**53
    if isinstance(value, Mapping):
        return any(_unfit(item) for item in cast("Mapping[str, Any]", value).values())
    return isinstance(value, list | tuple) and any(_unfit(item) for item in cast("list[Any]", value))


def chain_fault(records: list[tuple[bytes, str]]) -> str | None:
    """What is wrong with a query's chain of (record, hash), or None. A closed query also commits its length.

    What a chain cannot show by itself: that its tail, closing record included, was cut off, and that all of its hashes
    were made anew. For that its head has to be known from elsewhere.
    """
    prev = GENESIS
    for number, (record, digest) in enumerate(records):
        if leaf_hash(record).hex() != digest:
            return f"record {number} does not match its hash"
        try:
            fields = json.loads(record)
            follows = fields["seq"] == number and fields["prev"] == prev
            ends = fields["type"] == "query.closed"
            length = fields["body"]["records"] if ends or fields["type"] == "query.interrupted" else None
        except (ValueError, TypeError, LookupError, RecursionError):
            return f"record {number} is not a record"
        if not follows:
            return f"record {number} does not follow the one before it"
        if length is not None and (length != number + 1 or (ends and length != len(records))):
            return "the closing record does not match the number of records"
        prev = digest
    return None
