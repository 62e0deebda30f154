"""The guest agent runs on every Python from 3.9 that the machine has, in the real sandbox."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from orchestrator.sandbox.bubblewrap import Bubblewrap
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import MIB, SECCOMP, open_repl

SYSTEM = Path(os.path.realpath("/usr/bin/python3"))


def pythons() -> list[Path]:
    places = [*Path("/usr/bin").glob("python3.*"), *Path.home().glob(".pyenv/versions/3.*/bin/python3")]
    found = {Path(os.path.realpath(path)) for path in places if not path.name.endswith("config")}
    return sorted(path for path in found if version(path) >= (3, 9))


def version(python: Path) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    return tuple(map(int, subprocess.run([python, "-c", code], capture_output=True, check=True).stdout.split()))


PYTHONS = pythons()


def test_the_system_python_is_among_them():
    assert SYSTEM in PYTHONS


@pytest.mark.anyio
@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: str(path))
async def test_the_agent_runs_on(python: Path, home: Path):
    async with open_repl(Bubblewrap(home / "cache", SECCOMP, python), home, memory_bytes=64 * MIB) as repl:
        assert tuple(map(int, repl.sandbox.python.split(".")[:2])) == version(python)
        repl.sandbox.attach(ContextStore(home / "contexts").ingest_value("lazy é " * MIB))
        assert await repl.out("x = [type(context).__name__, context.count('lazy')]\nx") == f"['LazyText', {MIB}]"
        assert await repl.out("llm_query_batched(['a', 'b'])") == "['reply to a', 'reply to b']"
        threaded = (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nx.append(llm_query('c'))"
        )
        assert await repl.out(threaded) == ""
        assert (await repl.run("import ctypes\nctypes.string_at(0)")).detail.startswith("the cell crashed with SIGSEGV")
        assert (await repl.run("1 / 0")).text("err").endswith("ZeroDivisionError: division by zero\n")
        assert (await repl.run("while True:\n    pass", 0.2)).status == "timeout"
        assert await repl.out("x[2], threading.active_count()") == "('reply to c', 1)"
        modules = (
            "import json, re, sqlite3, decimal, zlib, lzma, bz2, hashlib, uuid, asyncio, multiprocessing, subprocess"
        )
        assert await repl.out(modules) == ""
        assert await repl.out("asyncio.run(asyncio.sleep(0, 'ran'))") == "'ran'"
        assert (await repl.run("FINAL(x[2])")).answer == "reply to c"
