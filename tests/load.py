"""Many queries of many tenants on one service, as its clients bring them: for a test, and for figures."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import httpx2

from tests.command import Airlock
from tests.service import Served

LOOK_S = 0.25  # between two looks of a client at one of its queries
SCRIPT = """
root:
  - |
    ```repl
    said = llm_query("Which number is it? " + context)
    print(said)
    ```
  - FINAL_VAR(said)
sub:
  - match: 'the number is (\\d+)'
    reply: '\\1'
"""
ENDED = ("answered", "limit", "refused", "failed", "cancelled")


@dataclass(slots=True)
class Load:
    """What came of it. looks: seconds of each GET of a query. ends: query -> as its client saw it at its end."""

    looks: list[float] = field(default_factory=list[float])
    ends: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    wrong: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


def price(airlock: Airlock) -> tuple[str, str]:
    """Options by which the scripted model costs something."""
    return ("--price", f"scripted:{airlock.folder}/script.yaml=1,3")


async def crowd(server: Served, tenants: int, queries: int) -> Load:
    """Ask `queries` at once, each with a number of its own in its context, and see all to their ends."""
    load = Load()
    begun = time.perf_counter()
    async with clients(server, tenants) as each, anyio.create_task_group() as tasks:
        for number, client in enumerate(each):
            tasks.start_soon(see_through, client, range(number, queries, tenants), load)
    load.seconds = time.perf_counter() - begun
    return load


async def ask_all(server: Served, tenants: int, queries: int) -> dict[str, tuple[str, str]]:
    """Query -> its tenant, and the number that it has to find."""
    asked: dict[str, tuple[str, str]] = {}

    async def ask(tenant: int, client: httpx2.AsyncClient) -> None:
        for query, number in (await asked_at_once(client, range(tenant, queries, tenants))).items():
            asked[query] = (f"tenant-{tenant}", number)

    async with clients(server, tenants) as each, anyio.create_task_group() as tasks:
        for tenant, client in enumerate(each):
            tasks.start_soon(ask, tenant, client)
    return asked


@asynccontextmanager
async def clients(server: Served, tenants: int) -> AsyncIterator[list[httpx2.AsyncClient]]:
    async with AsyncExitStack() as stack:
        made: list[httpx2.AsyncClient] = []
        for number in range(tenants):
            headers = {"Authorization": f"Bearer {server.key(f'tenant-{number}')}"}
            client = httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=60, trust_env=False)
            made.append(await stack.enter_async_context(client))
        yield made


async def asked_at_once(client: httpx2.AsyncClient, numbers: range) -> dict[str, str]:
    """Query -> its number."""
    asked: dict[str, str] = {}

    async def ask(number: str) -> None:
        body = {"question": "Which number?", "context": {"text": f"the number is {number}."}}
        answer = await client.post("/v1/queries", json=body)
        assert answer.status_code == 202, answer.text
        asked[answer.json()["id"]] = number

    async with anyio.create_task_group() as tasks:
        for number in numbers:
            tasks.start_soon(ask, str(number))
    return asked


async def see_through(client: httpx2.AsyncClient, numbers: range, load: Load) -> None:
    """One tenant: ask all at once, and look at them by turns until the last one has ended."""
    asked = await asked_at_once(client, numbers)
    while asked:
        for query in list(asked):
            begun = time.perf_counter()
            answer = await client.get(f"/v1/queries/{query}")
            load.looks.append(time.perf_counter() - begun)
            found = answer.json()
            if found["status"] in ENDED:
                load.ends[query] = found
                number = asked.pop(query)
                if (found["status"], found["answer"]) != ("answered", number):
                    load.wrong.append(f"{query}, {number}: {found}")
            await anyio.sleep(LOOK_S)


def memory_mb(server: Served) -> float:
    """Of the service itself, resident."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found
    return int(found[1]) / 1000


def money(airlock: Airlock) -> tuple[Decimal, Decimal, dict[str, Decimal]]:
    """USD that all months have spent, that all calls had cost, and that of each query; exact."""
    nano = Decimal(1_000_000_000)
    (spent,) = airlock.rows("SELECT coalesce(sum(spent), 0) FROM scopes WHERE id LIKE 'tenant-month:%'")[0]
    each: dict[str, Decimal] = {}
    for (query,) in airlock.rows("SELECT id FROM queries"):
        costs = [row["body"]["cost_usd"] for row in airlock.records(query) if row["type"] == "call.result"]
        each[query] = sum(map(Decimal, costs), Decimal(0))
    return Decimal(spent) / nano, sum(each.values(), Decimal(0)), each
