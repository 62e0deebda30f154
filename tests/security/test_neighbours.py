"""Attack: the supervisor beside it, and what lies about: memory, descriptors, arguments, environment."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.sandboxes import Repl, processes_of
from tests.security.attacks import Weak, breaches, number, with_more

pytestmark = pytest.mark.anyio

SIGNALS = """
for signal in range(1, 65):
    for _ in range(3):
        try:
            os.kill(1, signal)
        except OSError:
            pass
"""
MEMORY = """
import subprocess, sys
# Of the same user id, and, as programs are, dumpable: without a filter its memory is to be had.
child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
local = ctypes.create_string_buffer(64)
class Span(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
mine = Span(ctypes.addressof(local), 64)
for who, pid in (('supervisor', 1), ('child', child.pid)):
    for name, call in (('read', READV), ('write', WRITEV)):
        if syscall(call, pid, ctypes.byref(mine), 1, ctypes.byref(Span(id(None), 8)), 1, 0) not in REFUSED:
            breach(name, who)
    if syscall(PTRACE, 0x4206, pid, 0, 0) == 0:  # PTRACE_SEIZE
        breach('trace', who)
child.kill()
"""
LEAKS = """
import platform, socket, sys
print(sys.argv, sys.orig_argv, sys.path, sys.executable, sys.prefix, dict(os.environ), os.environb, os.getcwd())
print(platform.uname(), socket.gethostname(), os.getlogin if False else '', os.getuid(), os.getgid(), os.getgroups())
print({name: getattr(module, '__file__', None) for name, module in list(sys.modules.items())})
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')
print([environ[i] for i in range(4)])
"""
DESCRIPTORS = """
import stat
sockets = 0
for fd in range(4096):
    try:
        status = os.fstat(fd)
    except OSError:
        continue
    pipe = stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)
    if not pipe and status.st_rdev != os.makedev(1, 3):
        breach(fd, oct(status.st_mode))
    sockets += stat.S_ISSOCK(status.st_mode)
if sockets > 1:  # the worker's to the supervisor
    breach('sockets', sockets)
"""


async def test_signals_to_process_1(repl: Repl):
    """Was fatal for the sandbox by way of SIGINT, for which Python has a handler of its own."""
    await repl.run("kept = 1")
    assert await breaches(repl, SIGNALS) == []
    assert await repl.out("kept") == "1"


async def test_the_memory_of_the_supervisor(repl: Repl, weak: Weak):
    numbers = {"READV": number("process_vm_readv"), "WRITEV": number("process_vm_writev"), "PTRACE": number("ptrace")}
    assert await breaches(repl, MEMORY, **numbers) == []
    async with weak.open(filtered=False) as unfiltered:  # the second defence: the supervisor is not dumpable
        found = await breaches(unfiltered, MEMORY, **numbers)
    assert {"read child", "trace child"} <= set(found)
    assert not [breach for breach in found if "supervisor" in breach]


async def test_secrets_of_the_host(repl: Repl, weak: Weak, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-host")
    secrets = ["sk-secret", str(home), str(Path.cwd()), str(Path.home()), socket.gethostname(), "airlock", sys.prefix]
    text = (await repl.run("import ctypes, os\nlibc = ctypes.CDLL(None)" + LEAKS)).text("out")
    assert "sys.path" not in text
    assert [secret for secret in secrets if secret in text] == []
    leak = with_more("--setenv", "OPENAI_API_KEY", "sk-secret-of-the-host", "--setenv", "HOME", str(home))
    async with weak.open(leak) as leaky:
        text = (await leaky.run("import ctypes, os\nlibc = ctypes.CDLL(None)" + LEAKS)).text("out")
        assert [secret for secret in secrets if secret in text][:2] == secrets[:2]


async def test_open_descriptors(repl: Repl):
    assert await breaches(repl, DESCRIPTORS) == []
    # And as the host sees them: none leads to a file.
    for pid in processes_of(repl.slot.uid):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            assert str(entry.readlink()).startswith(
                ("pipe:", "socket:", "/dev/null", "/memfd:bwrap-stderr", "anon_inode:")
            )
    assert await breaches(repl, "opened = os.open('/agent.pyz', os.O_RDONLY)\n" + DESCRIPTORS) != []
