"""Exports that are not sent yet: files of the service's, of which one tenant has a few at most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.server.problems import Problem
from orchestrator.server.routes.audit import EXPORTS, export_query
from orchestrator.server.service import Principal
from tests.unit.serving import Small, add, small

pytestmark = pytest.mark.anyio
SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Small]:
    with small(tmp_path) as made:
        made.registry.add_tenant("acme", by="a test")
        others: Any = made.service
        others.feed = SimpleNamespace(over=anyio.Event())
        yield made


async def stays() -> Any:
    await anyio.sleep_forever()


async def gone() -> Any:
    return {"type": "http.disconnect"}


async def never(_message: Any) -> None:
    await anyio.sleep_forever()


async def export(service: Small, query: str, tenant: str = "acme") -> Response:
    asks = Principal(tenant, frozenset({"audit"}), "key", "key")
    return await export_query(Request(SCOPE, stays), service.service, asks, query)


async def test_of_one_tenant_few_are_under_way_until_they_are_sent_or_given_up(service: Small):
    mine, others = add(service, 1, "answered"), add(service, 2, "answered", tenant="other")
    made = [await export(service, mine) for _ in range(EXPORTS)]
    with pytest.raises(Problem) as caught:
        await export(service, mine)
    assert (caught.value.status, caught.value.kind) == (429, "exports-at-once")
    assert int(caught.value.headers["Retry-After"]) > 0
    elsewhere = await export(service, others, "other")

    sent = bytearray()

    async def take(message: Any) -> None:
        sent.extend(message.get("body", b""))

    await made.pop()(SCOPE, stays, take)
    assert f"{mine}" in sent.decode("utf-8", "replace")
    made.append(await export(service, mine))  # there is room again
    await made.pop()(SCOPE, gone, never)  # its client has gone, and takes nothing
    made.append(await export(service, mine))
    with pytest.raises(Problem):
        await export(service, mine)
    for response in (*made, elsewhere):
        await response(SCOPE, stays, take)


async def test_one_that_cannot_be_written_is_none_that_is_under_way(service: Small):
    mine = add(service, 1, "answered")
    service.service.home /= "gone"
    for _ in range(EXPORTS + 1):
        with pytest.raises(Exception, match="cannot write an export"):
            await export(service, mine)
