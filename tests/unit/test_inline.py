"""The context within a request: which forms there are, and that what is kept is what was given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from pydantic import TypeAdapter, ValidationError

from orchestrator.core.context import Context
from orchestrator.core.errors import AirlockError, ContextError, CountExceeded
from orchestrator.server import inline
from orchestrator.server.inline import Given, stored
from orchestrator.server.problems import Problem, problem_of
from orchestrator.server.service import Principal
from orchestrator.settings import ServerSettings
from orchestrator.store import holdings
from orchestrator.store.contexts import ContextStore
from tests.command import until
from tests.unit.helpers import database

pytestmark = pytest.mark.anyio
ADAPTER: TypeAdapter[Any] = TypeAdapter(Given)
ANN, BOB = (Principal(name, frozenset({"query"}), "key", "key") for name in ("ann", "bob"))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    """The parts of a service that this takes: a real database and a real store."""
    db = database(tmp_path)
    platform = SimpleNamespace(db=db, contexts=ContextStore(tmp_path / "contexts"))
    settings = ServerSettings(inline_bytes=1024, stored_bytes=2048)
    yield SimpleNamespace(home=tmp_path, settings=settings, platform=platform)
    db.close()


async def keep(service: Any, given: dict[str, Any], principal: Principal = ANN) -> Context:
    return await stored(service, principal, ADAPTER.validate_json(json.dumps(given)))


@pytest.mark.parametrize(
    ("given", "kind", "data"),
    [
        ({"text": "Grüße\n"}, "text", "Grüße\n"),
        ({"documents": [{"path": "a/b.txt", "text": "x"}]}, "jsonl", '{"path": "a/b.txt", "text": "x"}\n'),
        ({"json": [1, "two"]}, "jsonl", '1\n"two"\n'),
        ({"json": {"a": None}}, "json", '{"a": null}'),
        ({"json": "text"}, "json", '"text"'),
        ({"json": []}, "json", "[]"),
        ({"json": None}, "json", "null"),
        ({"json": 1.5}, "json", "1.5"),
    ],
)
async def test_each_form_is_kept(service: Any, given: dict[str, Any], kind: str, data: str):
    context = await keep(service, given)
    assert (context.kind, context.files["data"].read_text()) == (kind, data)
    assert service.platform.db.look(lambda tx: holdings.holds(tx, "ann", context.id))
    assert await keep(service, {"id": context.id}) == context


async def test_another_tenants_is_not_there(service: Any):
    context = await keep(service, {"text": "mine"})
    with pytest.raises(Problem) as caught:
        await keep(service, {"id": context.id}, BOB)
    with pytest.raises(Problem) as other:
        await keep(service, {"id": "0" * 64}, BOB)
    assert caught.value.status == 404
    assert caught.value.body() == other.value.body()


@pytest.mark.parametrize(
    "given",
    [
        {},
        [],
        "text",
        None,
        {"text": 1},
        {"text": "a", "id": "0" * 64},
        {"text": "a", "name": "b"},
        {"id": "0" * 63},
        {"id": "../../../etc/passwd"},
        {"id": "A" * 64},
        {"documents": []},
        {"documents": [{"path": "a"}]},
        {"documents": [{"path": "a", "text": "x"}, {"path": "a", "text": "y"}]},
        *(
            {"documents": [{"path": path, "text": "x"}]}
            for path in (
                "",
                "/etc/passwd",
                "a/../b",
                "..",
                "a\\..\\b",
                "\\\\host",
                "a//b",
                "a\0b",
                "a\nb",
                "a\u202eb",
                "./a",
            )
        ),
        {"documents": [{"path": "a" * 1025, "text": "x"}]},
    ],
)
def test_what_is_not_of_a_form_is_refused(given: Any):
    with pytest.raises(ValidationError):
        ADAPTER.validate_json(json.dumps(given))


def test_one_fault_is_told_once():
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python({"text": 1})
    assert [fault["loc"] for fault in caught.value.errors()] == [("text", "text")]


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, ["\ud800"], float("nan"), [float("inf")]])
async def test_what_json_cannot_hold_is_refused(service: Any, value: Any):
    with pytest.raises(ContextError):
        await stored(service, ANN, ADAPTER.validate_python({"json": value}))


@pytest.mark.parametrize("given", [{"text": "x" * 1025}, {"json": ["x"] * 300}, {"json": "x" * 1023}])
async def test_what_is_too_large_is_refused(service: Any, given: dict[str, Any]):
    with pytest.raises(CountExceeded, match="more than 1,024 bytes") as caught:
        await keep(service, given)
    assert status(caught.value) == 413
    assert not any((service.home / "contexts" / "drafts").iterdir())


async def test_what_a_tenant_has_stored_counts(service: Any):
    await keep(service, {"text": "x" * 1024})
    await keep(service, {"text": "x" * 1024})  # the same one
    await keep(service, {"text": "y" * 1000})
    with pytest.raises(CountExceeded, match="24 bytes are left of the 2,048"):
        await keep(service, {"text": "z" * 25})
    data = service.home / "contexts" / "data"
    until(lambda: len(list(data.iterdir())) == 2)  # what was refused does not stay
    await keep(service, {"text": "z" * 25}, BOB)


async def test_nobody_waits_for_what_another_tenant_gives(service: Any, monkeypatch: pytest.MonkeyPatch):
    """However much of it: one tenant's never has all places."""
    ingest, go_on, ended = inline._ingest, Event(), list[str]()

    def slow(service: Any, tenant: str, given: Any) -> Context:
        if tenant == "ann":
            go_on.wait(60)
        ended.append(tenant)
        return ingest(service, tenant, given)

    monkeypatch.setattr(inline, "_ingest", slow)
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(keep, service, {"text": "of ann"})
        await anyio.wait_all_tasks_blocked()
        try:
            with anyio.fail_after(30):
                await keep(service, {"text": "of bob"}, BOB)
            assert ended == ["bob"]
        finally:
            go_on.set()
    assert ended == ["bob", *["ann"] * 10]


@pytest.mark.parametrize("given", [{"text": ""}])
async def test_nothing_is_no_context(service: Any, given: dict[str, Any]):
    with pytest.raises(ContextError, match="is empty") as caught:
        await keep(service, given)
    assert status(caught.value) == 422


def status(error: AirlockError) -> int:
    return problem_of(error).status
