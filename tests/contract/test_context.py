"""What the store makes of a source, as a sandbox sees it: of every kind, and lazy where it is large."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import MIB, open_repl

pytestmark = pytest.mark.anyio


def _folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("first")
    (path / "sub" / "b.txt").write_text("second é")
    return path


async def test_a_context_of_each_kind(store: ContextStore, backend: Backend, home: Path, tmp_path: Path):
    (tmp_path / "lines.jsonl").write_text('{"n": 1}\n[2]\n')
    (tmp_path / "value.json").write_text('{"k": [1, 2]}')
    contexts = {
        "'text é'": store.ingest_value("text é"),
        "[{'path': 'a.txt', 'text': 'first'}, {'path': 'sub/b.txt', 'text': 'second é'}]": store.ingest(
            _folder(tmp_path / "docs")
        ),
        "[{'n': 1}, [2]]": store.ingest(tmp_path / "lines.jsonl"),
        "{'k': [1, 2]}": store.ingest(tmp_path / "value.json"),
    }
    for shown, context in contexts.items():
        async with open_repl(backend, home) as one:
            one.sandbox.attach(context)
            assert await one.out("context") == shown


async def test_a_large_context_is_lazy(backend: Backend, home: Path, store: ContextStore):
    text = "0123456789" * (2 * MIB) + "needle" + "é" * 100
    async with open_repl(backend, home, memory_bytes=64 * MIB) as repl:
        repl.sandbox.attach(store.ingest_value(text))
        assert await repl.out("type(context).__name__, len(context), context.find('needle')") == (
            f"('LazyText', {len(text)}, {20 * MIB})"
        )
        assert await repl.out("context[-101:-98], context.search('ne+dle').group()") == "('eéé', 'needle')"
        usage = await repl.sandbox.usage()
        assert usage.peak_memory_bytes is None or usage.peak_memory_bytes < 64 * MIB
