"""Promises on containment: what of the design's invariants can be seen through a sandbox, and from the host."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import anyio

from orchestrator.core.errors import SandboxDied
from orchestrator.sandbox.base import HOST_PATHS, SIGNALS, UNBOUNDED, UNTOLD
from orchestrator.sandbox.conformance.promise import (
    MIB,
    Bench,
    Broken,
    Repl,
    expect,
    in_a_sandbox,
    over_sandboxes,
    processes_of,
    status_of,
)
from orchestrator.sandbox.sandbox import Call

_MEMORY_OF_AIRLOCK = 32 * MIB  # on top of what the guest has
_PROCESSES_OF_AIRLOCK = 8
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


def _guests_of(uid: int | None) -> set[int]:
    """Of a slot's user id; else, of our own, those that we have started."""
    return {pid for pid in processes_of(uid) if uid is not None or _is_ours(pid)}


def _is_ours(pid: int) -> bool:
    while pid not in (0, 1, os.getpid()):
        pid = int(status_of(pid).get("PPid", "0"))
    return pid == os.getpid()


@over_sandboxes("A sandbox is killed for certain, in the middle of a cell, with all that it started.", invariant=6)
async def killed_for_certain(bench: Bench) -> None:
    code = """
        import os
        for _ in range(3):
            if not os.fork():
                os.setsid()
                while True:
                    pass
        llm_query('x')
        while True:
            pass
        """
    uid, mine = None, set[int]()
    async with bench.open() as repl:
        uid = repl.slot.uid

        async def on_call(_call: Call) -> str:
            mine.update(_guests_of(uid))
            async with anyio.create_task_group() as tasks:
                for _ in range(3):  # idempotent, and whoever asks waits for the end
                    tasks.start_soon(repl.sandbox.close)
            return "too late"

        try:
            await repl.run(code, on_call=on_call)
        except SandboxDied:
            pass
        else:
            raise Broken("the cell ended in order although its sandbox was killed")
        with contextlib.suppress(SandboxDied):
            await repl.run("1")
            raise Broken("a dead sandbox ran a cell")
        expect(not mine & processes_of(uid), f"processes {sorted(mine & processes_of(uid))} are still there")
    expect(not repl.slot.folder.exists(), f"{repl.slot.folder} is still there")


@over_sandboxes("A sandbox that is ended while it is waited for leaves nothing behind.", invariant=6)
async def cancelled_in_the_middle(bench: Bench) -> None:
    uid, mine = None, set[int]()
    with anyio.CancelScope() as scope:
        async with bench.open() as repl:
            uid = repl.slot.uid

            async def on_call(_call: Call) -> str:
                mine.update(_guests_of(uid))
                scope.cancel()
                await anyio.sleep_forever()
                return ""

            await repl.run("import os\nos.fork()\nllm_query('x')\nwhile True: pass", on_call=on_call)
    expect(scope.cancelled_caught, "the cell ended by itself")
    expect(not mine & processes_of(uid), f"processes {sorted(mine & processes_of(uid))} are still there")


_SHARED_MEMORY = """
import mmap
areas = [mmap.mmap(-1, 16 << 20) for _ in range(AREAS)]  # shared by default, and no part of any rlimit
for area in areas:
    for at in range(0, len(area), 4096):
        area[at] = 1
'got it'
"""


@over_sandboxes(
    "All memory of a sandbox together is bounded, shared memory too.", unless={UNBOUNDED: Broken, UNTOLD: Broken}
)
async def memory_is_bounded(bench: Bench) -> None:
    async with bench.open(memory_bytes=64 * MIB) as repl:
        await repl.prints(f"AREAS = 1\n{_SHARED_MEMORY}", "'got it'")
        with contextlib.suppress(SandboxDied):  # its own affair; the machine's is that the memory is not to be had
            result = await repl.run(f"AREAS = 10\n{_SHARED_MEMORY}")
            expect(result.status == "killed", result)
        usage = await repl.sandbox.usage()
        expect(usage.oom, "the host was not told")
        expect((usage.peak_memory_bytes or 0) <= 64 * MIB + _MEMORY_OF_AIRLOCK, f"{usage.peak_memory_bytes} bytes")


async def _counts(bench: Bench, code: str, most: int, **limits: int) -> None:
    """The cell prints how much it got, which is something, and bounded; the sandbox goes on."""
    async with bench.open(**limits) as repl:
        count = int(await repl.out(f"count = 0\n{code}\ncount"))
        expect(0 < count <= most, f"it got {count}, of at most {most}")
        await repl.prints("'goes on'", "'goes on'")


@over_sandboxes("Processes are bounded.")
async def processes_are_bounded(bench: Bench) -> None:
    code = """
import os, time
while count < 1000:
    try:
        pid = os.fork()
    except OSError:
        break
    if not pid:
        while True: time.sleep(1)
    count += 1
"""
    await _counts(bench, code, 20 + _PROCESSES_OF_AIRLOCK, pids=20)


@over_sandboxes("Open files are bounded.")
async def open_files_are_bounded(bench: Bench) -> None:
    code = """
import os
try:
    while count < 5000:
        os.open('/dev/null', os.O_RDONLY)
        count += 1
except OSError:
    pass
os.closerange(64, 8192)
"""
    await _counts(bench, code, 100, files=100)


@over_sandboxes("What is written to /tmp is bounded, and so is one file there.")
async def tmp_is_bounded(bench: Bench) -> None:
    code = """
import os
with open('/tmp/large', 'wb') as large:
    try:
        os.ftruncate(large.fileno(), 1 << 40)
        count = 1 << 40
    except OSError:
        pass
os.unlink('/tmp/large')
try:
    for number in range(64):
        with open(f'/tmp/{number}', 'wb') as file:
            file.write(b'x' * (1 << 20))
        count += 1
except OSError:
    pass
"""
    await _counts(bench, code, 8, tmp_bytes=8 * MIB)


@over_sandboxes(
    "A sandbox has no more of the processors than it was given.", unless={UNBOUNDED: Broken, UNTOLD: Broken}
)
async def processors_are_bounded(bench: Bench) -> None:
    spin = "import os, time\nos.fork()\nend = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass"
    async with bench.open(cpus=0.2) as repl:
        before, started = (await repl.sandbox.usage()).cpu_s, time.monotonic()
        await repl.run(spin)
        after, took = (await repl.sandbox.usage()).cpu_s, time.monotonic() - started
    if before is None or after is None:
        raise Broken("what it used cannot be measured")
    expect((after - before) / took < 0.2 + 0.3, f"it used {after - before:.2f} s in {took:.2f} s")


@over_sandboxes("Sandboxes do not see each other, and nothing of one is in the next on its slot.", invariant=7)
async def one_sandbox_one_node(bench: Bench) -> None:
    look = "import os\n(context, sorted(os.listdir('/context')), os.listdir('/tmp'), 'secret' in globals())"
    leave = "secret = open('/tmp/secret', 'w').write('x')\nimport os\nif not os.fork():\n    while True: pass"
    async with bench.open() as one, bench.open() as other:
        one.attach("of the first")
        await one.run(leave)
        await other.prints(look, "(None, [], [], False)")
        await other.run("os.kill(-1, 9)")
        await one.prints("context", "'of the first'")
        slots = (one.slot, other.slot)
        expect(slots[0].number != slots[1].number and (slots[0].uid is None or slots[0].uid != slots[1].uid), slots)
    async with bench.open() as later:
        await later.prints(look, "(None, [], [], False)")
