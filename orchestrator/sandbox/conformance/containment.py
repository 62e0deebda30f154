"""Promises on containment: what a guest cannot reach, change or become, whatever its cells try."""

from __future__ import annotations

import socket

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.base import HOST_PATHS, SIGNALS
from orchestrator.sandbox.conformance.promise import Bench, Broken, Repl, expect, in_a_sandbox, over_sandboxes

_ENVIRONMENT = {
    "PATH",
    "HOME",
    "LANG",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "HOSTNAME",
    "PWD",
}  # with values of the backend's own
# Calls that must not succeed: code prints the name of each that did.
_TRY = """
def attempt(name, what):
    try:
        what()
    except OSError:
        return
    print('BREACH', name)
"""


async def _nothing_succeeds(repl: Repl, code: str) -> None:
    result = await repl.run(_TRY + code)
    breaches = [line for line in result.text("out").splitlines() if line.startswith("BREACH")]
    expect(result.status == "ok" and not breaches, breaches or result)


@in_a_sandbox(
    "There is no network: no device but loopback, and no way to the host, its neighbours or beyond.", invariant=1
)
async def no_network(repl: Repl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("")  # the kernel picks a name that begins with NUL
        abstract.listen()
        places = [
            ("127.0.0.1", listener.getsockname()[1]),
            ("169.254.169.254", 80),
            ("172.17.0.1", 80),
            ("1.1.1.1", 53),
        ]
        code = f"""
import socket
def reach(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(1)
        sock.connect(address)
for place in {places!r}:
    attempt(place, lambda: reach(socket.AF_INET, place))
attempt('abstract socket of the host', lambda: reach(socket.AF_UNIX, {abstract.getsockname()!r}))
attempt('DNS', lambda: socket.getaddrinfo('example.com', 53))
try:
    devices = [name for _, name in socket.if_nameindex()]
except OSError:
    devices = []
if {{*devices}} - {{'lo'}}:
    print('BREACH', devices)
"""
        await _nothing_succeeds(repl, code)


@in_a_sandbox("No socket leads past the network's absence: AF_ALG, AF_VSOCK and packets are refused.", invariant=1)
async def no_odd_sockets(repl: Repl) -> None:
    # AF_AX25, AF_PACKET, AF_CAN, AF_BLUETOOTH, AF_ALG, AF_NFC, AF_VSOCK, AF_XDP
    code = """
import socket
for family in (3, 17, 29, 31, 38, 39, 40, 44):
    for kind in (1, 2, 3, 5):
        attempt(('family', family), lambda: socket.socket(family, kind).close())
"""
    await _nothing_succeeds(repl, code)


@in_a_sandbox("Nothing of the host's environment is in the sandbox: no variable, no argument.", invariant=1)
async def no_host_environment(repl: Repl) -> None:
    names = (await repl.out("import os\nprint(*sorted(os.environ))")).split()
    expect(set(names) <= _ENVIRONMENT, names)
    words = await repl.out("import sys\nprint(*os.environ.values(), *sys.orig_argv[:-1], *sys.path, os.getcwd())")
    expect(str(repl.slot.folder.parents[1]) not in words, words)


@in_a_sandbox(
    "No path of the host is told in the sandbox, and no file of the host is there.",
    invariant=1,
    unless={HOST_PATHS: Broken},
)
async def no_host_paths(repl: Repl) -> None:
    host = [
        str(repl.slot.folder),
        str(repl.slot.folder.parents[1]),
        "/root/.bashrc",
        "/etc/shadow",
        "/var/run/docker.sock",
    ]
    code = f"""
import os
for path in {host!r}:
    if os.path.lexists(path):
        print('BREACH', path, 'is there')
for name in 'mountinfo mounts cmdline environ maps cgroup'.split():
    for process in ('self', '1'):
        try:
            with open(f'/proc/{{process}}/{{name}}') as file:
                if {"/".join(repl.slot.folder.parts[-2:])!r} in file.read():
                    print('BREACH', f'/proc/{{process}}/{{name}} tells where the context lies on the host')
        except OSError:
            pass
"""
    await _nothing_succeeds(repl, code)


@over_sandboxes("The context cannot be changed, nor anything be written beside it.", invariant=10)
async def read_only_context(bench: Bench) -> None:
    code = """
import os
for name in os.listdir('/context'):
    path = '/context/' + name
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        attempt('open', lambda: os.open(path, flags))
    attempt('rename', lambda: os.rename(path, '/context/other'))
    attempt('move', lambda: os.rename(path, '/tmp/other'))
    attempt('unlink', lambda: os.unlink(path))
    attempt('chmod', lambda: os.chmod(path, 0o777))
    attempt('chown', lambda: os.chown(path, os.getuid(), os.getgid()))
    attempt('truncate', lambda: os.truncate(path, 0))
    attempt('utime', lambda: os.utime(path))
    attempt('link', lambda: os.link(path, '/tmp/link'))
    attempt('link beside', lambda: os.link(path, '/context/link'))
attempt('symlink', lambda: os.symlink('/etc/passwd', '/context/symlink'))
attempt('mkdir', lambda: os.mkdir('/context/folder'))
attempt('mkfifo', lambda: os.mkfifo('/context/fifo'))
attempt('create', lambda: os.open('/context/new', os.O_CREAT | os.O_WRONLY))
attempt('rename folder', lambda: os.rename('/context', '/tmp/context'))
attempt('rmdir', lambda: os.rmdir('/context'))
attempt('chmod folder', lambda: os.chmod('/context', 0o777))
"""
    async with bench.open() as repl:
        files = repl.attach("precious")
        before = [(file.read_bytes(), file.stat().st_mode) for file in files]
        await _nothing_succeeds(repl, code)
        await repl.prints("sorted(os.listdir('/context'))", "['data', 'manifest.json']")
        expect([(file.read_bytes(), file.stat().st_mode) for file in files] == before, "the files have changed")
        expect(sorted(repl.slot.folder.iterdir()) == sorted(files), "the slot's folder has more in it")


@in_a_sandbox("Nothing but /tmp can be written, and no program there makes anybody somebody else.", invariant=10)
async def nothing_but_tmp_is_written(repl: Repl) -> None:
    code = """
import os, stat
def write(path):
    with open(path, 'w') as file:
        file.write('x')
for folder, folders, files in os.walk('/'):
    if folder in ('/proc', '/sys'):
        folders.clear()
    elif folder != '/tmp':
        attempt(folder, lambda: write(folder + '/written'))
    for name in files:
        if os.lstat(os.path.join(folder, name)).st_mode & (stat.S_ISUID | stat.S_ISGID):
            print('BREACH', 'set-uid', name)
for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/self/oom_score_adj_of_1'):
    attempt(path, lambda: write(path))
"""
    await _nothing_succeeds(repl, code)


@in_a_sandbox("A guest has no privileges, and can get none.")
async def no_privileges(repl: Repl) -> None:
    code = """
import ctypes, os, socket, stat
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    if result:
        raise OSError(ctypes.get_errno())
if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid()):
    print('BREACH it is root')
attempt('setuid', lambda: os.setuid(0))
attempt('chroot', lambda: os.chroot('/tmp'))
def device():
    os.mknod('/tmp/device', stat.S_IFCHR | 0o666, os.makedev(1, 1))
    os.close(os.open('/tmp/device', os.O_RDONLY))
attempt('device', device)
if libc.prctl(39, 0, 0, 0, 0) != 1:
    print('BREACH a program may bring new privileges')
attempt('chown', lambda: os.chown('/tmp', 0, 0))
attempt('mount', lambda: refused(libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0)))
attempt('host name', lambda: socket.sethostname('x'))
"""
    await _nothing_succeeds(repl, code)


@in_a_sandbox("The agent's supervisor cannot be traced or read by a cell.")
async def the_agent_is_out_of_reach(repl: Repl) -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def trace():
    if libc.ptrace(0x4206, 1, 0, 0):  # PTRACE_SEIZE
        raise OSError(ctypes.get_errno())
attempt('trace', trace)
attempt('memory', lambda: open('/proc/1/mem', 'r+b'))
"""
    await _nothing_succeeds(repl, code)


@in_a_sandbox("No descriptor of the agent can be opened by a cell, the channel's least of all.")
async def the_channel_is_out_of_reach(repl: Repl) -> None:
    code = """
import os, stat
def channel(number, flags):
    fd = os.open(f'/proc/1/fd/{number}', flags | os.O_NONBLOCK)
    of_its_own = stat.S_ISFIFO(os.fstat(fd).st_mode) or stat.S_ISSOCK(os.fstat(fd).st_mode)
    os.close(fd)
    if not of_its_own:
        raise OSError
for number in range(16):
    for flags in (os.O_RDONLY, os.O_WRONLY):
        attempt(number, lambda: channel(number, flags))
"""
    await _nothing_succeeds(repl, code)


@over_sandboxes("The agent's supervisor cannot be ended by a cell.", unless={SIGNALS: SandboxDied})
async def the_agent_takes_no_signals(bench: Bench) -> None:
    code = """
import os
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
"""
    async with bench.open() as repl:
        await repl.prints(f"before = 'kept'\n{code}", "")
        await repl.prints("before", "'kept'")
