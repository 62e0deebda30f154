"""The JSON Schema that a request gives for its answer: small, and found to be one by a process that can be ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import anyio.to_thread

from orchestrator.core.errors import CountExceeded, RequestError
from orchestrator.core.turns import Turns
from orchestrator.loop.engine import schema_fault
from orchestrator.server.service import Principal

MOST = 64 << 10  # bytes as JSON
_checks = Turns(2)  # processes at once, of all tenants; one of one


def _size(schema: Mapping[str, Any]) -> int:
    """As JSON. Of a body of the largest size it takes a moment, for which nobody else is to wait."""
    return len(json.dumps(schema))


async def checked(principal: Principal, place: str, schema: dict[str, Any]) -> Mapping[str, Any]:
    """The schema, when the tenant has had its turn. place: what it is called. Raises RequestError, CountExceeded."""
    try:
        size = await anyio.to_thread.run_sync(_size, schema)
    except RecursionError:
        raise RequestError(f"{place} is not a JSON Schema: it is nested too deeply") from None
    if size > MOST:
        text = f"{place} has {size:,} bytes as JSON; {MOST:,} are permitted"
        raise CountExceeded(text, limit=str(MOST), rule="answer_schema")
    async with _checks.turn(principal.tenant, 1, most=_checks.most_of_one):
        fault = await schema_fault(schema)
    if fault is not None:
        raise RequestError(f"{place} is not a JSON Schema: {fault}")
    return schema
