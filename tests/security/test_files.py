"""Attack: read what is the host's, write where nothing may be written."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from orchestrator.sandbox.base import Backend
from orchestrator.store.contexts import ContextStore
from tests.sandboxes import Repl, open_repl
from tests.security.attacks import Weak, breaches, with_more, without

pytestmark = pytest.mark.anyio

LOOK = """
import stat
PATHS = '/proc /sys /run /var /root /home /boot /mnt /media /srv /opt /bin /sbin /dev/shm /dev/pts /dev/tty '
PATHS += '/dev/mqueue /etc/passwd /etc/shadow /etc/hostname /etc/resolv.conf /etc/machine-id /usr/bin/sh /usr/bin/bash'
for path in [*PATHS.split(), *HOST]:
    if os.path.lexists(path):
        breach('host path', path)
if set(os.listdir('/')) - {'tmp', 'dev', 'lib64', 'lib', 'etc', 'context', 'agent.pyz', 'usr'}:
    breach('root', os.listdir('/'))
if set(os.listdir('/etc')) - {'ld.so.cache'}:
    breach('etc', os.listdir('/etc'))
if set(os.listdir('/dev')) != {'null', 'zero', 'full', 'random', 'urandom'}:
    breach('devices', os.listdir('/dev'))
for folder, folders, files in os.walk('/'):
    try:
        with open(folder + '/written', 'w') as file:
            file.write('x')
        if folder != '/tmp':
            breach('write', folder)
    except OSError:
        pass
    for name in files:
        mode = os.lstat(os.path.join(folder, name)).st_mode if not folder.startswith('/proc') else 0
        if mode & (stat.S_ISUID | stat.S_ISGID):
            breach('set-uid', name)
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and folder != '/dev') or stat.S_ISSOCK(mode):
            breach('device', name)
"""
TMP = """
import mmap
with open('/tmp/program', 'wb') as file:
    file.write(b'#!' + __import__('sys').executable.encode() + b'\\n')
os.chmod('/tmp/program', 0o4755)
if os.statvfs('/tmp').f_flag & os.ST_NOSUID == 0:
    breach('set-uid programs')
try:
    os.mknod('/tmp/null', 0o20666, os.makedev(1, 3))
    open('/tmp/null', 'w')
    breach('devices')
except OSError:
    pass
"""
CHANGE = """
import sys
for path in ['/context/' + name for name in os.listdir('/context')] + [sys.executable, '/agent.pyz']:
    for what, call in (('mode', lambda: os.chmod(path, 0o666)), ('time', lambda: os.utime(path)),
                       ('content', lambda: open(path, 'r+b')), ('name', lambda: os.rename(path, path + 'x'))):
        try:
            call()
            breach(what)
        except OSError:
            pass
"""


def writable_slot(arguments: list[str]) -> list[str]:
    at = arguments.index("/context") - 2
    return [*arguments[:at], "--bind", *arguments[at + 1 :]]


async def test_files_of_the_host(repl: Repl, weak: Weak, home: Path):
    host = [str(home), str(Path(__file__).parent), str(Path.home()), str(repl.slot.folder)]
    assert await breaches(repl, LOOK, HOST=host) == []
    program = Path(tempfile.mkdtemp())
    try:
        program.chmod(0o755)
        (program / "su").touch(mode=0o4755)
        (program / "su").chmod(0o4755)
        more = f"--ro-bind {program / 'su'} /usr/bin/su --ro-bind /etc/passwd /etc/passwd --proc /proc --dev /dev"
        async with weak.open(without("--remount-ro", 1), with_more(*more.split())) as open_root:
            found = "\n".join(await breaches(open_root, LOOK, HOST=host))
    finally:
        shutil.rmtree(program)
    for what in (
        "host path /proc",
        "host path /etc/passwd",
        "root [",
        "etc [",
        "devices [",
        "write /usr",
        "set-uid su",
    ):
        assert what in found


async def test_the_one_writable_folder_gives_no_privileges(repl: Repl, weak: Weak):
    assert await breaches(repl, TMP) == []


async def test_changing_the_context_or_the_programs(repl: Repl, weak: Weak, home: Path):
    store = ContextStore(home / "contexts")
    repl.sandbox.attach(store.ingest_value("precious"))
    assert await breaches(repl, CHANGE) == []
    mine = store.ingest_value("of a test that changes it")
    async with weak.open(writable_slot) as stranger:  # a writable mount, but the files are another user's
        stranger.sandbox.attach(mine)
        assert await breaches(stranger, CHANGE) == []
    async with weak.open(writable_slot, own_uid=False) as owner:
        owner.sandbox.attach(mine)
        assert {"mode", "time", "name"} <= set(await breaches(owner, CHANGE))


async def test_contexts_of_others_are_not_there(repl: Repl, backend: Backend, home: Path):
    look = """
for folder, _, files in os.walk('/'):
    for name in {'data', 'manifest.json'} & {*files}:
        breach(folder)
"""
    async with open_repl(backend, home) as other:
        other.sandbox.attach(ContextStore(home / "contexts").ingest_value("another's"))
        assert await breaches(other, look) == ["/context", "/context"]
        assert await breaches(repl, look) == []
