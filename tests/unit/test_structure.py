"""JSON bodies with much outside of their strings: refused before they are parsed, on every route that takes JSON."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from orchestrator.server import structure
from orchestrator.server.problems import Problem
from orchestrator.server.service import Principal
from orchestrator.server.structure import LARGE, MOST, _worked, require_little_structure  # pyright: ignore
from tests.unit.helpers import quick
from tests.unit.serving import Small, small

MUCH = b"[" + b"[]," * (MOST // 3) + b"0]"
LONG = "x" * (2 * MOST)
FIELDS = {f"field{number}": 0 for number in range(MOST // 5)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with small(tmp_path_factory.mktemp("service")) as made:
        yield made


def refused(body: bytes) -> int | None:
    try:
        require_little_structure(body)
    except Problem as problem:
        return problem.status
    return None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'"' + b"a" * (9 << 20) + b'"',
        json.dumps(LONG + '[],"\\' * MOST).encode(),  # what looks like structure, in a string
        json.dumps([LONG, "\\", LONG, '\\"', LONG]).encode(),
        json.dumps({LONG: LONG}, ensure_ascii=False).encode(),
        json.dumps("\u2222\u0122" * MOST, ensure_ascii=False).encode(),
    ],
)
def test_long_strings_are_no_structure(body: bytes):
    assert refused(body) is None


@pytest.mark.parametrize(
    "body",
    [
        MUCH,
        b'["' + LONG.encode() + b'",' + MUCH + b"]",
        b'["\\\\",' + MUCH + b"]",  # a string that a backslash ends
        b'["\\\\\\"",' + MUCH + b"]",
        b"[" + b'"",' * (MOST // 3) + b"0]",
        b'"' * (MOST + 2),
        json.dumps(FIELDS).encode(),
        b"1" * (MOST + 1),
        b" " * (MOST + 1),
    ],
)
def test_much_outside_of_strings_is_refused(body: bytes):
    assert refused(body) == 413


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_hides_nothing(encoding: str):
    """A character whose halves look like a quote makes of all that follows a string, where bytes are counted."""
    body = f'["\u0122",{MUCH.decode()}]'.encode(encoding)
    assert json.loads(body)[0] == "\u0122"
    assert refused(body) == 400


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["\\", '"', '\\"', '"\\\\', "[],"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@quick
@given(value=values, ascii_only=st.booleans())
def test_what_is_counted_is_what_the_parser_reads_outside_of_strings(value: Any, ascii_only: bool):
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    expected = len(re.sub(rb'"(?:[^"\\]|\\.)*"', b'""', body))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "MOST", expected)
        assert refused(body) is None
        patch.setattr(structure, "MOST", expected - 1)
        assert refused(body) == 413


@pytest.mark.parametrize("size", [100, LARGE])
def test_a_large_body_is_checked_and_parsed_beside_the_event_loop(
    service: Small, monkeypatch: pytest.MonkeyPatch, size: int
):
    on_the_loop: list[bool] = []

    def noticed(work: Callable[..., Any]) -> Callable[..., Any]:
        def noticing(body: Any, *rest: Any, **named: Any) -> Any:
            if len(body) > size:
                on_the_loop.append(_is_loop())
            return work(body, *rest, **named)

        return noticing

    monkeypatch.setattr(json, "loads", noticed(json.loads))
    monkeypatch.setattr(structure, "require_little_structure", noticed(require_little_structure))
    headers = {**service.bearer("query"), "Content-Type": "application/json"}
    for end, told in ((b'"}', "body.context"), (b'"', "is not JSON")):
        body = b'{"question": "' + b"x" * size + end
        answer = service.client.post("/v1/queries", content=body, headers=headers)
        assert told in answer.text
    assert on_the_loop == [size < LARGE] * 4


def _is_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@pytest.mark.anyio
async def test_large_bodies_are_few_at_once_and_one_of_a_tenant():
    over, running = threading.Event(), list[str]()

    async def send(tenant: str) -> None:
        def work(_body: bytes) -> None:
            running.append(tenant)
            assert over.wait(10)

        principal = Principal(tenant, frozenset(), "key", "key")
        await _worked(Request({"type": "http", "state": {"principal": principal}}), bytes(LARGE + 1), work)

    async with anyio.create_task_group() as tasks:
        try:
            for tenant in ("flood", "flood", "flood", "flood", "other", "third"):
                tasks.start_soon(send, tenant)
            with anyio.fail_after(2):
                while len(running) < 2:
                    await anyio.lowlevel.checkpoint()
            assert sorted(running) == ["flood", "other"]
        finally:
            over.set()
    assert sorted(running[2:]) == ["flood"] * 3 + ["third"]
    assert running.index("third") < 4, "its turn comes before all of the flood"


def test_no_route_that_takes_json_parses_it(service: Small, monkeypatch: pytest.MonkeyPatch):
    parsed: list[int] = []
    loads = json.loads

    def counted(text: Any, *rest: Any, **named: Any) -> Any:
        parsed.append(len(text))
        return loads(text, *rest, **named)

    document = service.client.get("/openapi.json").json()
    headers = {**service.bearer("admin", "query", "read", "audit"), "Content-Type": "application/json"}
    routes = [
        (method, path, route)
        for path, item in document["paths"].items()
        for method, route in item.items()
        if "application/json" in route.get("requestBody", {}).get("content", {})
    ]
    assert len(routes) >= 8
    monkeypatch.setattr(json, "loads", counted)
    for method, path, route in routes:
        answer = service.client.request(method, re.sub("{[a-z_]+}", "acme", path), content=MUCH, headers=headers)
        assert answer.status_code == 413, (path, answer.text)
        assert "413" in route["responses"], path
        assert "PUT /v1/contexts" in answer.text
    assert not [size for size in parsed if size >= len(MUCH)]
