"""Attack: the kernel itself, through system calls and privileges that a cell has no business with."""

from __future__ import annotations

import platform

import pytest

from tests.sandboxes import Repl
from tests.security.attacks import Weak, breaches, number, with_more, without

pytestmark = pytest.mark.anyio

# name -> arguments that get past the first checks. Refused is "not permitted" or "not there"; any other answer, also
# "bad address", says that the call reached the kernel's code.
CALLS: dict[str, tuple[int, ...]] = {
    "ptrace": (0, 0, 0, 0),
    "process_vm_readv": (2, 0, 0, 0, 0, 0),
    "process_vm_writev": (2, 0, 0, 0, 0, 0),
    "pidfd_open": (2, 0),
    "pidfd_getfd": (-1, 0, 0),
    "pidfd_send_signal": (-1, 0, 0, 0),
    "kcmp": (2, 2, 99, 0, 0),
    "keyctl": (0, -3, 0),
    "add_key": (0, 0, 0, 0, 0),
    "request_key": (0, 0, 0, 0),
    "userfaultfd": (1,),
    "io_uring_setup": (1, 0),
    "perf_event_open": (0, 0, -1, -1, 0),
    "bpf": (99, 0, 0),
    "memfd_create": (0, 0),
    "memfd_secret": (99,),
    "modify_ldt": (0, 0, 0),
    "vmsplice": (-1, 0, 0, 0),
    "unshare": (0,),
    "setns": (-1, 0),
    "clone3": (0, 0),
    "personality": (0xFFFFFFFF,),
    "msgget": (0, 0o1600),
    "shmget": (0, 4096, 0o1600),
    "semget": (0, 1, 0o1600),
    "mq_open": (0, 0, 0, 0),
    "inotify_init1": (0,),
    "fanotify_init": (0, 0),
    "name_to_handle_at": (-1, 0, 0, 0, 0),
    "landlock_create_ruleset": (0, 0, 1),
    "quotactl": (99, 0, 0, 0),
    "clock_adjtime": (0, 0),
    "execveat": (-1, 0, 0, 0, 0),
    "process_madvise": (-1, 0, 0, 0, 0),
    "mount_setattr": (-1, 0, 0, 0, 0),
    "open_tree": (-1, 0, 0xFFFF),
    "setuid": (-1,),
    "setgid": (-1,),
    "capset": (0, 0),
}
SURFACE = """
for name, (number, arguments) in CALLS.items():
    error = syscall(number, *arguments)
    if error not in REFUSED:
        breach(name)
"""
# Those that any kernel answers when it is asked; others may be switched off here.
ALWAYS = {"ptrace", "process_vm_readv", "pidfd_open", "pidfd_getfd", "vmsplice", "unshare", "setns", "clone3"}

NAMESPACES = """
FLAGS = dict(user=0x10000000, mnt=0x20000, pid=0x20000000, net=0x40000000, uts=0x4000000, ipc=0x8000000,
             cgroup=0x2000000, time=0x80)
for name, flag in FLAGS.items():
    for flags in (flag, flag | FLAGS['user']):
        read, write = os.pipe()
        if not os.fork():
            if syscall(UNSHARE, flags) == 0:
                os.write(write, b'x')
            os._exit(0)
        os.wait()
        os.close(write)
        if os.read(read, 1):
            breach('unshare', name)
        os.close(read)
        if flag != 0x80:  # the exit signal's bits, for clone
            pid = libc.syscall(CLONE, ctypes.c_ulong(flags | 17), 0, 0, 0, 0)
            if not pid:
                os._exit(0)
            if pid > 0:
                os.waitpid(pid, 0)
                breach('clone', name)
"""

PRIVILEGES = """
import socket, stat
for what, call in (
    ('root', lambda: os.setuid(0)), ('chroot', lambda: os.chroot('/tmp')),
    ('host name', lambda: socket.sethostname('x')),
    ('device', lambda: os.mknod('/tmp/device', stat.S_IFBLK | 0o666, os.makedev(8, 0))),
    ('owner', lambda: os.chown('/tmp', 0, 0)), ('nice', lambda: os.nice(-5)),
    ('mount', lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) and 1 / 0),
):
    try:
        call()
        breach(what)
    except (OSError, ZeroDivisionError):
        pass
if any(libc.prctl(23, capability, 0, 0, 0) == 1 for capability in range(64)):
    breach('bounding set')
if libc.prctl(39, 0, 0, 0, 0) != 1:
    breach('new privileges')
if libc.prctl(21, 0, 0, 0, 0) != 2:
    breach('no filter')
"""

I386 = r"""
import mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b'\xb8\x14\x00\x00\x00\xcd\x80\xc3')  # mov eax, 20 (getpid there); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
if ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid():
    breach('i386')
"""

no_filter = without("--seccomp", 1)
user_namespaces = without("--disable-userns")


async def test_system_calls_that_no_cell_needs(repl: Repl, weak: Weak):
    calls = {name: (number(name), arguments) for name, arguments in CALLS.items()}
    assert await breaches(repl, SURFACE, CALLS=calls) == []
    async with weak.open(filtered=False) as unfiltered:
        assert set(await breaches(unfiltered, SURFACE, CALLS=calls)) >= ALWAYS


async def test_new_namespaces(repl: Repl, weak: Weak):
    numbers = {"UNSHARE": number("unshare"), "CLONE": number("clone")}
    assert await breaches(repl, NAMESPACES, **numbers) == []
    async with weak.open(user_namespaces) as filter_only:
        assert await breaches(filter_only, NAMESPACES, **numbers) == []
    async with weak.open(filtered=False) as no_more_user_namespaces:
        assert await breaches(no_more_user_namespaces, NAMESPACES, **numbers) == []
    async with weak.open(user_namespaces, filtered=False) as neither:
        assert {"unshare user", "clone user", "unshare net"} <= set(await breaches(neither, NAMESPACES, **numbers))


async def test_privileges(repl: Repl, weak: Weak):
    assert await breaches(repl, PRIVILEGES) == []
    capable = (no_filter, user_namespaces, without("--cap-drop", 1), with_more("--cap-add", "ALL"))
    async with weak.open(*capable) as privileged:
        found = set(await breaches(privileged, PRIVILEGES))
        assert {"chroot", "bounding set", "no filter"} <= found


@pytest.mark.parametrize("machine", [platform.machine()])
async def test_the_system_calls_of_i386(repl: Repl, weak: Weak, machine: str):
    assert machine == "x86_64", "bring the code of another machine's second ABI, or take its name off this list"
    await repl.run("kept = 1")
    killed = await repl.run("import ctypes, os\nbreach = print\n" + I386)
    assert killed.detail == "the cell crashed with SIGSYS; variables are as they were before it"
    assert await repl.out("kept") == "1"
    async with weak.open(no_filter) as unfiltered:
        assert await breaches(unfiltered, I386) == ["i386"]
