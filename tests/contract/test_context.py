"""The context inside a sandbox: of every kind, hot, lazy where it is large, and never to be changed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import KILL_ALL, MIB, Repl, open_repl

pytestmark = pytest.mark.anyio

# The context


def _folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("first")
    (path / "sub" / "b.txt").write_text("second é")
    return path


async def test_a_context_of_each_kind(repl: Repl, store: ContextStore, backend: Backend, home: Path, tmp_path: Path):
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


async def test_attaching_is_hot_and_survives_a_crash(repl: Repl, store: ContextStore):
    assert await repl.out("x = 1\nprint(context)") == "None"
    repl.sandbox.attach(store.ingest_value("hot"))
    assert await repl.out("context, x") == "('hot', 1)"
    await repl.run("context = 'overwritten'\nimport os\nos._exit(1)")
    assert await repl.out("context, x") == "('hot', 1)"
    await repl.run(KILL_ALL)
    assert await repl.out("context, 'x' in globals()") == "('hot', False)"


async def test_a_context_attached_in_a_cell_that_crashes_is_there_in_the_next(repl: Repl, store: ContextStore):
    await repl.run("x = 1")
    repl.sandbox.attach(store.ingest_value("hot"))
    await repl.run("import os\nos._exit(1)")
    assert await repl.out("context, x") == "('hot', 1)"


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


async def test_the_context_is_read_only(repl: Repl, store: ContextStore):
    context = store.ingest_value("precious")
    before = {name: (path.read_bytes(), path.stat().st_mode) for name, path in context.files.items()}
    repl.sandbox.attach(context)
    attempts = """
        import os, shutil
        def attempt(what, *arguments, **options):
            try:
                what(*arguments, **options)
            except OSError:
                return
            print('BREACH', what.__name__, arguments)
        for name in os.listdir('/context'):
            path = '/context/' + name
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
                attempt(os.open, path, flags)
            attempt(os.rename, path, '/context/other')
            attempt(os.rename, path, '/tmp/other')
            attempt(os.unlink, path)
            attempt(os.chmod, path, 0o777)
            attempt(os.chown, path, os.getuid(), os.getgid())
            attempt(os.truncate, path, 0)
            attempt(os.utime, path)
            attempt(os.link, path, '/tmp/link')
            attempt(os.link, path, '/context/link')
        attempt(os.symlink, '/etc/passwd', '/context/symlink')
        attempt(os.mkdir, '/context/folder')
        attempt(os.mkfifo, '/context/fifo')
        attempt(os.open, '/context/new', os.O_CREAT | os.O_WRONLY)
        attempt(os.rename, '/context', '/tmp/context')
        attempt(os.rmdir, '/context')
        attempt(os.chmod, '/context', 0o777)
        print(sorted(os.listdir('/context')))
        """
    assert await repl.out(attempts) == str(sorted(context.files))
    assert {name: (path.read_bytes(), path.stat().st_mode) for name, path in context.files.items()} == before
    assert stat.S_IMODE(context.files["data"].stat().st_mode) == 0o444
    assert store.verify(context)
