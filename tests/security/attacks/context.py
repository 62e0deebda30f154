"""Change the context, or the programs that read it."""

from __future__ import annotations

import hashlib
import uuid

from orchestrator.core.context import Context
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import Repl
from tests.security.frame import Attack, Stage, attacked, breaches, cell
from tests.security.weak import OPEN_CONTEXT, Scene, Weak, body_with, host_config

WRITE = """
import mmap
path = '/context/data'
def through_a_mapping():
    with open(path, 'rb') as file:
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_WRITE)[:1] = b'X'
def through_proc():
    with open(path, 'rb') as file:
        os.close(os.open(f'/proc/self/fd/{file.fileno()}', os.O_RDWR))
for what, function in (
    ('mode', lambda: os.chmod(path, 0o666)), ('time', lambda: os.utime(path)),
    ('content', lambda: os.pwrite(os.open(path, os.O_RDWR), b'X', 0)), ('size', lambda: os.truncate(path, 0)),
    ('mapping', through_a_mapping), ('proc', through_proc), ('attribute', lambda: os.setxattr(path, 'user.x', b'x')),
):
    try:
        function()
        breach(what)
    except (OSError, PermissionError, ValueError):
        pass
"""
RENAME = """
for what, function in (
    ('new', lambda: os.close(os.open('/context/new', os.O_CREAT | os.O_WRONLY))),
    ('folder', lambda: os.mkdir('/context/d')), ('link', lambda: os.link('/context/data', '/context/link')),
    ('out', lambda: os.link('/context/data', '/tmp/link')),
    ('exchange', lambda: os.rename('/context/data', '/context/moved')),
    ('folder', lambda: os.rename('/context', '/c')), ('mode', lambda: os.chmod('/context', 0o777)),
    ('gone', lambda: os.unlink('/context/manifest.json')),
):
    try:
        function()
        breach(what)
    except OSError:
        pass
"""
SYMLINK = """
for name in ('data', 'manifest.json'):
    try:
        os.symlink('/etc/passwd', '/context/' + name)
        breach('planted')
    except OSError:
        pass
"""
RACE = """
import threading, time
stop = time.monotonic() + 0.4
def race():
    while time.monotonic() < stop:
        for function in (lambda: os.symlink('/etc/passwd', '/context/other'), lambda: os.unlink('/context/other'),
                         lambda: os.chmod('/context/data', 0o666), lambda: os.rename('/context/other', '/context/data'),
                         lambda: os.pwrite(os.open('/context/data', os.O_RDWR), b'X', 0)):
            try:
                function()
            except OSError:
                pass
threads = [threading.Thread(target=race) for _ in range(3)]
for thread in threads:
    thread.start()
llm_query('attach')
for thread in threads:
    thread.join()
"""
PROGRAMS = """
import sys
for path in (sys.executable, '/agent.pyz', os.__file__, '/usr/lib'):
    for what, function in (('time', lambda: os.utime(path)), ('name', lambda: os.rename(path, path + 'x')),
                           ('content', lambda: os.close(os.open(path, os.O_WRONLY | os.O_APPEND)))):
        try:
            function()
            breach(what)
        except OSError:
            pass
"""


def fresh(stage: Stage) -> Context:
    """A context that is nobody else's: an attack on a weakened sandbox does change it."""
    return ContextStore(stage.home / "contexts").ingest_value(f"precious {uuid.uuid4()}")


def changed(context: Context, repl: Repl) -> list[str]:
    """What the host finds of a change."""
    found = [] if hashlib.sha256(context.files["data"].read_bytes()).hexdigest() == context.sha256 else ["hash"]
    there = {entry.name: entry for entry in repl.slot.folder.iterdir()}
    if there.keys() - context.files.keys() or any(entry.is_symlink() for entry in there.values()):
        found.append("names")
    same = (name for name, path in context.files.items() if name in there and there[name].samefile(path))
    return found if set(same) == context.files.keys() else [*found, "files"]


async def write(stage: Stage) -> list[str]:
    context = fresh(stage)
    async with stage.open() as repl:
        repl.sandbox.attach(context)
        return breaches(await attacked(repl, WRITE)) + changed(context, repl)


async def rename(stage: Stage) -> list[str]:
    context = fresh(stage)
    async with stage.open() as repl:
        repl.sandbox.attach(context)
        return breaches(await attacked(repl, RENAME)) + changed(context, repl)


async def symlink(stage: Stage) -> list[str]:
    """Before the host attaches: a link that it would follow."""
    context = fresh(stage)
    async with stage.open() as repl:
        found = breaches(await attacked(repl, SYMLINK))
        try:
            repl.sandbox.attach(context)
        except OSError:
            return [*found, "refused"]
        return found + changed(context, repl)


async def race(stage: Stage) -> list[str]:
    """While the host attaches."""
    context = fresh(stage)
    refused: list[str] = []
    async with stage.open() as repl:

        async def on_call(_call: object) -> str:
            try:
                repl.sandbox.attach(context)
            except OSError:
                refused.append("refused")
            return ""

        await attacked(repl, RACE, on_call=on_call)
        return refused + changed(context, repl)


def open_agent(arguments: list[str], _scene: Scene) -> list[str]:
    at = arguments.index("/agent.pyz") - 2
    return [*arguments[:at], "--bind", *arguments[at + 1 :]]


WRITABLE_PROGRAMS = Weak((open_agent,), (host_config(ReadonlyRootfs=False), body_with(User="0:0")), own_uid=False)
ATTACKS = [
    Attack("context", "writes", write, OPEN_CONTEXT, frozenset({"mode", "content", "hash"})),
    Attack("context", "renames and new files", rename, OPEN_CONTEXT, frozenset({"new", "exchange", "names"})),
    Attack("context", "symbolic links", symlink, OPEN_CONTEXT, frozenset({"planted"})),
    Attack("context", "races with the host", race, OPEN_CONTEXT),
    Attack("context", "programs that read it", cell(PROGRAMS), WRITABLE_PROGRAMS, frozenset({"time"})),
]
