"""Use system calls and privileges that no cell has any business with, and turn on the agent beside it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from tests.sandboxes import BACKENDS
from tests.security import host_view
from tests.security.frame import Attack, Stage, cell, number, seen, survives
from tests.security.weak import NO_FILTER, OPEN_PROC, PRIVILEGED, UNFILTERED, USER_NAMESPACES, Weak, host_config

CAPABILITIES = """
import socket
os.makedirs('/tmp/point', exist_ok=True)
for what, function in (
    ('chroot', lambda: os.chroot('/tmp') or 1), ('root', lambda: os.setresuid(0, 0, 0) or os.setgroups([7]) or 1),
    ('host name', lambda: socket.sethostname('x') or 1),
    ('owner', lambda: os.chown('/tmp/point', 1234, 1234) or 1),
    ('capability', lambda: any(libc.prctl(23, number, 0, 0, 0) == 1 for number in range(41))),
    ('priority', lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) or 1),
):
    if in_child(function):
        breach(what)
"""
DEVICE = """
import stat
held = []
for kind, number in ((stat.S_IFCHR, (10, 229)), (stat.S_IFBLK, DISK)):  # fuse, what is below the host's root
    try:
        os.mknod('/tmp/device', kind | 0o666, os.makedev(*number))
        held.append(os.open('/tmp/device', os.O_RDONLY | os.O_NONBLOCK))
        breach('device')
    except OSError:
        pass
    if os.path.lexists('/tmp/device'):
        os.unlink('/tmp/device')
llm_query('look')
for fd in held:
    os.close(fd)
"""
# name -> arguments that get past the first checks. Refused is "not permitted" or "not there"; any other answer, also
# "bad address", says that the call reached the kernel's code.
CALLS: dict[str, tuple[int, ...]] = {
    "pidfd_open": (2, 0),
    "pidfd_getfd": (-1, 0, 0),
    "pidfd_send_signal": (-1, 0, 0, 0),
    "process_vm_readv": (2, 0, 0, 0, 0, 0),
    "process_vm_writev": (2, 0, 0, 0, 0, 0),
    "kcmp": (2, 2, 99, 0, 0),
    "memfd_secret": (99,),
    "modify_ldt": (0, 0, 0),
    "vmsplice": (-1, 0, 0, 0),
    "clone3": (0, 0),
    "fanotify_init": (0, 0),
    "landlock_create_ruleset": (0, 0, 1),
    "quotactl": (99, 0, 0, 0),
    "process_madvise": (-1, 0, 0, 0, 0),
    "mount_setattr": (-1, 0, 0, 0, 0),
    "open_tree": (-1, 0, 0xFFFF),
    "fsopen": (0, 0xFFFF),
}
# gVisor has these of its own: what they do stays in there.
OF_LINUX_ONLY = {
    "ptrace": (99, 0, 0, 0),  # 0 would have the supervisor trace the worker, which then waits for it
    "capset": (0, 0),
    "name_to_handle_at": (-1, 0, 0, 0, 0),
    "setns": (-1, 0),
    "memfd_create": (0, 0),
    "unshare": (0,),
    "personality": (0xFFFFFFFF,),
    "msgget": (0, 0o1600),
    "shmget": (0, 4096, 0o1600),
    "semget": (0, 1, 0o1600),
    "mq_open": (0, 0, 0, 0),
    "inotify_init1": (0,),
    "clock_adjtime": (0, 0),
    "execveat": (-1, 0, 0, 0, 0),
    "setuid": (-1,),
    "setgid": (-1,),
}
SURFACE = """
for name, (number, arguments) in CALLS.items():
    result = call(number, *arguments)
    if -result not in REFUSED:
        breach(name)
"""
# Those that any kernel answers when it is asked; others may be switched off here.
ALWAYS = frozenset({"process_vm_readv", "pidfd_open", "pidfd_getfd", "vmsplice", "clone3"})
NAMESPACES = """
import signal
FLAGS = dict(user=0x10000000, mnt=0x20000, pid=0x20000000, net=0x40000000, uts=0x4000000, ipc=0x8000000,
             cgroup=0x2000000, time=0x80)
held = []
for name, flag in FLAGS.items():
    for flags in (flag, flag | FLAGS['user']):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            if call(UNSHARE, flags) == 0:
                os.write(write, b'x')
                signal.pause()
            os._exit(0)
        os.close(write)
        if os.read(read, 1):
            breach('unshare', name)
        os.close(read)
        held.append(pid)
        if flag != 0x80:  # the exit signal's bits, for clone
            pid = call(CLONE, flags | 17, 0, 0, 0, 0)
            if not pid:
                signal.pause()
            if pid > 0:
                held.append(pid)
                breach('clone', name)
llm_query('look')
for pid in held:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
MOUNT = """
import signal
def try_all():
    os.makedirs('/tmp/point', exist_ok=True)
    for what, arguments in (
        ('mount', (b'none', b'/tmp/point', b'tmpfs', 0, None)), ('bind', (b'/', b'/tmp/point', None, 4096, None)),
        ('remount', (b'none', b'/context', None, 32 | 4096, None)),
        ('proc', (b'proc', b'/tmp/point', b'proc', 0, None)),
    ):
        if libc.mount(*arguments[:3], ctypes.c_ulong(arguments[3]), arguments[4]) == 0:
            breach(what)
held = []
for flags in (0, 0x10000000 | 0x20000):  # as it is, and as the root of a user namespace with mounts of its own
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        if not flags or call(UNSHARE, flags) == 0:
            try_all()
        os.close(write)
        signal.pause()
    os.close(write)
    os.read(read, 1)
    os.close(read)
    held.append(pid)
llm_query('look')
for pid in held:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
AGENT = """
local = ctypes.create_string_buffer(64)
class Span(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
mine = Span(ctypes.addressof(local), 64)
for name, number in (('read', READV), ('write', WRITEV)):
    if -call(number, 1, ctypes.byref(mine), 1, ctypes.byref(Span(id(None), 8)), 1, 0) not in REFUSED:
        breach(name)
if in_child(lambda: call(PTRACE, 0x4206, 1, 0, 0) == 0):  # PTRACE_SEIZE; the child's end lets it go
    breach('trace')
for name in ('mem', 'environ', 'maps', 'fd/0', 'map_files'):
    path = '/proc/1/' + name
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            os.close(os.open(path, os.O_RDONLY))
        breach(name)
    except OSError:
        pass
"""
KEYRING = """
serial = call(ADD_KEY, b'user', b'airlock', b'secret', 6, ctypes.c_int(-3))  # the session's keyring
if serial > 0:
    breach('key')
    call(KEYCTL, 3, serial)  # revoked
if call(KEYCTL, 1, 0) > 0:
    breach('keyring')
"""
BPF = """
class Map(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ('kind', 'key', 'value', 'most', 'flags')]
fd = call(BPF, 0, ctypes.byref(Map(2, 4, 4, 1, 0)), ctypes.sizeof(Map))
if fd >= 0:
    breach('map')
llm_query('look')
if fd >= 0:
    os.close(fd)
"""
PERF = """
attributes = (ctypes.c_uint64 * 16)()
attributes[0] = 1 | 112 << 32  # software events, the structure's size
attributes[5] = 1 << 5 | 1 << 6  # without kernel and hypervisor: what any user may ask for
fd = call(PERF, attributes, 0, -1, -1, 0)
if fd >= 0:
    breach('counter')
llm_query('look')
if fd >= 0:
    os.close(fd)
"""
HOLD = """
fd = call(NUMBER, *ARGUMENTS)
if fd >= 0:
    breach('descriptor')
llm_query('look')
if fd >= 0:
    os.close(fd)
"""
RING = "ARGUMENTS = (4, (ctypes.c_uint8 * 120)())\n" + HOLD
I386 = r"""
import mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b'\xb8\x14\x00\x00\x00\xcd\x80\xc3')  # mov eax, 20 (getpid there); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
def ask():
    if ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid():
        breach('i386')
in_child(ask)
"""
SIGNALS = """
for signal in range(1, 65):
    for _ in range(3):
        try:
            os.kill(1, signal)
        except OSError:
            pass
"""


async def root_on_the_host(stage: Stage) -> list[str]:
    """User ids and capabilities of the guest's processes as the host's kernel has them."""
    repl = await stage.shared()
    await repl.run("import os\nos.getuid()")
    found: set[str] = set()
    for status in host_view.guests(repl):
        if "0" in status["Uid"].split() + status["Gid"].split() + status["Groups"].split():
            found.add("root")
        if stage.backend != "gvisor" and set(status["Uid"].split()) != {str(repl.slot.uid)}:
            found.add("a user id that is not its own")
        on_the_host = status["user"] == str(Path("/proc/self/ns/user").readlink())
        if on_the_host and any(int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")):
            found.add("capabilities")
    assert host_view.guests(repl)
    return sorted(found)


async def signals(stage: Stage) -> list[str]:
    async with stage.open() as repl:
        return await survives(repl, SIGNALS)


def numbers(*names: str) -> dict[str, int]:
    return {name.upper(): number(name) for name in names}


def surface(*more: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    every = {name: value for part in (CALLS, *more) for name, value in part.items()}
    return {name: (number(name), arguments) for name, arguments in every.items()}


async def surface_of(stage: Stage) -> list[str]:
    more = () if stage.backend == "gvisor" else (OF_LINUX_ONLY,)
    return await cell(SURFACE, CALLS=surface(*more))(stage)


assert platform.machine() == "x86_64", "bring the code of this machine's second ABI, or take it off the list"
SOFT_AGENT = UNFILTERED | OPEN_PROC | Weak(agent="harden = lambda: None")
# Rings are paid for out of RLIMIT_MEMLOCK.
LOCKED_MEMORY = UNFILTERED | Weak(
    body=(host_config(Ulimits=[]),),
    agent="import resource\nlimit, locked = resource.setrlimit, resource.RLIMIT_MEMLOCK\n"
    "resource.setrlimit = lambda what, most: what == locked or limit(what, most)",
)
OWN_SIGINT = Weak(agent="signal.signal = lambda number, what, real=signal.signal: number == 2 or real(number, what)")
DISK = Path("/").stat().st_dev  # where it is a part of something else, fuse is left
DEVICES = PRIVILEGED | Weak(body=(host_config(Tmpfs={"/tmp": "rw,dev,mode=1777"}, DeviceCgroupRules=["a *:* rwm"]),))
GVISOR = ("gvisor",)
NOT_IN_BWRAP = ("bubblewrap", "gvisor")
DESCRIPTOR = frozenset({"descriptor"})
ATTACKS = [
    Attack("privilege", "capabilities", cell(CAPABILITIES), PRIVILEGED, frozenset({"chroot", "capability"})),
    Attack("privilege", "root on the host", root_on_the_host, Weak(own_uid=False), frozenset({"root"}), GVISOR),
    Attack(
        "privilege",
        "making devices",
        seen(DEVICE, host_view.devices, DISK=(os.major(DISK), os.minor(DISK))),
        DEVICES,
        frozenset({"device"}),
        NOT_IN_BWRAP,
    ),
    Attack(
        "privilege",
        "namespaces",
        seen(NAMESPACES, host_view.namespaces, **numbers("unshare", "clone")),
        UNFILTERED,
        frozenset({"unshare user", "clone user", "unshare net"}),
        GVISOR,
        walls={"bubblewrap": (NO_FILTER, USER_NAMESPACES)},
    ),
    Attack(
        "privilege",
        "mounts",
        seen(MOUNT, host_view.mounts, **numbers("unshare")),
        UNFILTERED,
        frozenset({"mount"}),
        GVISOR,
    ),
    Attack(
        "privilege",
        "memory and tracing of the agent",
        cell(AGENT, READV=number("process_vm_readv"), WRITEV=number("process_vm_writev"), PTRACE=number("ptrace")),
        SOFT_AGENT,
        frozenset({"environ"}),
        walls=dict.fromkeys(BACKENDS, (UNFILTERED,)),
    ),
    Attack(
        "privilege",
        "signals to the agent",
        signals,
        OWN_SIGINT,
        known={"gvisor": "a signal to process 1 ends the sandbox"},
    ),
    Attack(
        "privilege", "keyring", cell(KEYRING, **numbers("add_key", "keyctl")), UNFILTERED, frozenset({"key"}), GVISOR
    ),
    Attack(
        "privilege", "bpf", seen(BPF, host_view.objects, **numbers("bpf")), PRIVILEGED, frozenset({"map"}), NOT_IN_BWRAP
    ),
    Attack(
        "privilege",
        "perf",
        seen(PERF, host_view.objects, PERF=number("perf_event_open")),
        PRIVILEGED,
        frozenset({"counter"}),
        GVISOR,
    ),
    Attack(
        "privilege",
        "userfaultfd",
        seen(HOLD, host_view.objects, NUMBER=number("userfaultfd"), ARGUMENTS=(1,)),
        UNFILTERED,
        DESCRIPTOR,
        GVISOR,
    ),
    Attack(
        "privilege",
        "io_uring",
        seen(RING, host_view.objects, NUMBER=number("io_uring_setup")),
        LOCKED_MEMORY,
        DESCRIPTOR,
        GVISOR,
    ),
    Attack("privilege", "other system calls that no cell needs", surface_of, UNFILTERED, ALWAYS, GVISOR),
    Attack("privilege", "system calls of i386", cell(I386), UNFILTERED, frozenset({"i386"}), GVISOR),
]
