"""What is shown of queries: a list opens nothing that it does not show, and keeps nobody else from being answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from orchestrator.server import queries_view
from orchestrator.server.routes import queries
from orchestrator.server.service import Principal
from orchestrator.store import journal
from orchestrator.store.journal import QUEUED
from orchestrator.store.vault import Keeper
from tests.unit.helpers import Store
from tests.unit.serving import Small, add, small


@pytest.fixture
def service(store: Store) -> Iterator[Small]:
    with small(store.home, database=store.url) as made:
        others: Any = made.service.under_way
        others.account = dict[str, Any]().get  # none runs here
        yield made


def test_a_list_has_of_each_query_what_is_shown_of_it_alone_but_its_answer(service: Small):
    ids = [add(service, n, status) for n, status in enumerate(("open", QUEUED, "interrupted", "answered", "failed"))]
    ids.append(add(service, len(ids), "answered", kept=False))
    add(service, 100, "answered", tenant="other")
    reads = service.bearer("read")
    listed = service.client.get("/v1/queries", headers=reads).json()["queries"]
    assert sorted(query["id"] for query in listed) == ids
    for query in listed:
        alone = service.client.get(f"/v1/queries/{query['id']}", headers=reads).json()
        answer = alone.pop("answer")
        question = alone["question"] and alone["question"][:200]
        assert query == {**alone, "question": question, "time_limit_s": None}
        shown = alone["question"] is not None
        assert (answer == "It was Ann.") == (shown and alone["status"] in ("answered", "failed")), alone


def test_a_list_opens_no_payload_that_it_does_not_show(service: Small, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        add(service, number, "answered")
    opened: list[str] = []
    whole = Keeper.open

    def noticed(keeper: Keeper, seq: int, name: str, sealed: bytes) -> Any:
        opened.append(name)
        return whole(keeper, seq, name, sealed)

    monkeypatch.setattr(Keeper, "open", noticed)
    reads = service.bearer("read")
    assert len(service.client.get("/v1/queries", headers=reads).json()["queries"]) == 3
    assert opened == ["question"] * 3
    opened.clear()
    service.client.get(f"/v1/queries/{add(service, 4, 'answered')}", headers=reads)
    assert sorted(opened) == ["answer", "policy", "question"]


@pytest.mark.anyio
async def test_the_reads_of_one_tenant_leave_threads_to_the_others(service: Small, monkeypatch: pytest.MonkeyPatch):
    """As many as it asks for at once; everybody's key is looked up by the same threads."""
    page, over = queries_view.page, threading.Event()

    def slow(tx: journal.Connection, tenant: str, *rest: Any) -> Any:
        assert tenant != "slow" or over.wait(10)
        return page(tx, tenant, *rest)

    monkeypatch.setattr(queries_view, "page", slow)
    there: Any = SimpleNamespace(platform=service.service.platform, books=service.service.books)
    one, other = (Principal(name, frozenset({"read"}), "key", "key") for name in ("slow", "other"))
    asking = 50  # more than there are threads
    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(asking):
                tasks.start_soon(queries.list_queries, there, one)
            await anyio.wait_all_tasks_blocked()
            try:
                with anyio.fail_after(2):
                    assert await queries.list_queries(there, other) == {"queries": [], "next": None}
            finally:
                over.set()
    finally:
        over.set()
