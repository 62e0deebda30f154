"""What every export needs: records read with nothing taken for granted, and lines that no text in them can break.

Bodies are read by name and type. What is missing, or of a type that was not expected, is read as nothing: a newer
Airlock may have written the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any, cast

from orchestrator.core.events import Recorded

VERSION = version("airlock")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# JSON leaves these as they are: ends of lines to some readers, and what a terminal would obey or reorder text by.
_UNSAFE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def line(fields: Mapping[str, Any]) -> str:
    """One object as one line of JSON, with its end."""
    text = clean(json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def clean(text: str) -> str:
    """Half of a surrogate pair, which is no text, becomes "?", as in the records themselves."""
    return text.encode("utf-8", "replace").decode()


def text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return value if isinstance(value, str) else ""


def number(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def part(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def policy_of(opened: Recorded) -> Mapping[str, Any]:
    """The policy of a query; nothing where it is not kept."""
    try:
        found: Any = json.loads(opened.payloads.get("policy", ""))
    except (ValueError, RecursionError):
        return {}
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def texts(body: Mapping[str, Any], name: str) -> list[str]:
    value = body.get(name)
    return [item for item in cast("list[Any]", value) if isinstance(item, str)] if isinstance(value, list) else []


def shown(record: Recorded, name: str) -> str:
    """A payload for people to read, or what became of it."""
    kept = record.payloads.get(name)
    if kept is not None:
        return kept
    return f"(not kept: {size(record, name):,} bytes)" if name in record.committed else ""


def size(record: Recorded, name: str) -> int:
    """Bytes of a payload, kept or not."""
    return number(record.committed.get(name, {}), "bytes")


def milliseconds(record: Recorded) -> int:
    """Since 1970."""
    return (datetime.fromisoformat(record.at) - EPOCH) // timedelta(milliseconds=1)


def provider(model: str) -> str:
    """Who answers for a model's name, as far as the name tells: any server may speak the protocol of OpenAI."""
    kind, colon, _ = model.partition(":")
    return kind if colon and kind in ("local", "scripted") else "openai" if model else ""
