"""Read what is the host's, write where nothing may be written."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.store.contexts import ContextStore
from tests.sandboxes import Repl
from tests.security import host_view
from tests.security.frame import Attack, Stage, attacked, breaches, cell, seen
from tests.security.weak import (
    OPEN_PROC,
    WITH_SLOTS,
    WITH_YARD,
    WRITABLE_PROC,
    WRITABLE_ROOT,
    Weak,
    body_with,
    host_config,
    with_more,
)

READ = """
for path in [*HOST, '/root', '/home', '/boot', '/mnt', '/srv', '/run/docker.sock', '/var/run/docker.sock', '/var/lib',
             '/etc/passwd', '/etc/shadow', '/etc/machine-id', '/etc/ssl', '/usr/bin/sh', '/bin/sh']:
    if os.path.lexists(path):
        breach('path', path)
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if folder != '/' or name not in ('proc', 'sys')]
    if 'secret' in files:
        breach(open(folder + '/secret').read())
"""
WRITE = """
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if folder != '/' or name not in ('proc', 'sys', 'tmp')]
    try:
        os.close(os.open(folder + '/written', os.O_CREAT | os.O_WRONLY))
        breach(folder)
        os.unlink(folder + '/written')
    except OSError:
        pass
"""
SECRETS = """
import gzip
for path, text in SECRETS.items():
    try:
        with open(path, 'rb') as file:
            found = file.read()
        found = gzip.decompress(found) if path.endswith('.gz') else found
        if found and found.decode(errors='replace').startswith(text):
            breach(path)
    except (OSError, EOFError):
        pass
for path in COUNTERS:
    try:
        with open(path, 'rb') as file:
            if file.read(64):
                breach(path)
    except OSError:
        pass
for folder, names in FOLDERS.items():
    try:
        if {*os.listdir(folder)} & {*names}:
            breach(folder)
    except OSError:
        pass
"""
SWITCHES = """
for path in ('/proc/sysrq-trigger', '/proc/sys/kernel/core_pattern', '/proc/sys/kernel/modprobe',
             '/proc/sys/kernel/hostname', '/proc/sys/vm/drop_caches', '/proc/sys/fs/binfmt_misc/register',
             '/proc/mtrr', '/proc/kcore', '/proc/kmsg', '/sys/kernel/uevent_helper', '/sys/power/state',
             '/sys/fs/cgroup/memory/release_agent'):
    try:
        fd = os.open(path, os.O_WRONLY)  # nothing is written
        if os.fstat(fd).st_rdev != os.makedev(1, 3):
            breach(path)
        os.close(fd)
    except OSError:
        pass
"""
DEVICES = """
import re, stat
held = []
for folder, _, files in os.walk('/dev'):
    for name in files:
        if re.fullmatch('fuse|kmsg|mem|port|kvm|(sd|vd|xvd|nvme|loop)[a-z0-9]*', name):
            try:
                held.append(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK))
                breach('device')
            except OSError:
                pass
llm_query('look')
for fd in held:
    os.close(fd)
"""
SET_UID = """
import stat
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if folder != '/' or name not in ('proc', 'sys')]
    for name in files:
        path = os.path.join(folder, name)
        if os.lstat(path).st_mode & (stat.S_ISUID | stat.S_ISGID):
            breach('found')
            if in_child(lambda: os.execv(path, [path])):  # it ends well when it is root
                breach('root')
"""
OWN = """
for path in ('/proc/self/mountinfo', '/proc/self/mounts', '/proc/self/cgroup', '/proc/1/mountinfo', '/proc/1/cgroup'):
    try:
        with open(path) as file:
            text = file.read()
        for secret in SECRETS:
            if secret in text:
                breach(path, secret)
    except OSError:
        pass
"""
TOLD = """
import platform, socket, sys
told = [sys.argv, sys.orig_argv, sys.path, sys.executable, sys.prefix, dict(os.environ), os.getcwd(), platform.uname(),
        socket.gethostname(), os.getgroups(),
        {name: getattr(module, '__file__', None) for name, module in list(sys.modules.items())}]
for pid in ('self', '1'):
    for name in ('environ', 'cmdline'):
        try:
            with open(f'/proc/{pid}/{name}') as file:
                told.append(file.read())
        except OSError:
            pass
for secret in SECRETS:
    if secret in repr(told):
        breach(secret)
"""
OTHERS = """
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if folder != '/' or name not in ('proc', 'sys')]
    for name in {'data', 'manifest.json'} & {*files}:
        breach(name)
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
        breach('descriptor')
    sockets += stat.S_ISSOCK(status.st_mode)
if sockets > 1:  # the worker's to the supervisor
    breach('sockets')
"""
LEAKY_AGENT = """
closerange = os.closerange
def leak(low, high):
    closerange(low, high)
    os.open('/', os.O_RDONLY)
os.closerange = leak
"""
COUNTERS = (
    "interrupts softirqs vmstat zoneinfo schedstat diskstats buddyinfo pagetypeinfo slabinfo locks keys key-users "
)
COUNTERS += (
    "timer_list sched_debug swaps partitions kallsyms modules iomem ioports kcore kmsg vmallocinfo pressure/cpu "
)
COUNTERS += "sys/fs/file-nr sys/fs/inode-nr sys/kernel/random/entropy_avail"


def of_the_host(stage: Stage, repl: Repl) -> Mapping[str, Any]:
    return {"HOST": [str(stage.yard), str(stage.home), str(Path.cwd()), str(Path.home()), str(repl.slot.folder)]}


def constants(_stage: Stage, _repl: Repl) -> Mapping[str, Any]:
    """What the host's kernel says of itself, and no sandbox needs to know."""
    secrets: dict[str, str] = {}
    for name in ("/proc/cmdline", "/proc/sys/kernel/random/boot_id", "/proc/crypto", "/proc/devices"):
        secrets[name] = Path(name).read_text(errors="replace")[:40]
    if Path("/proc/config.gz").exists():
        secrets["/proc/config.gz"] = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()[:40]
    for name in ("/sys/kernel/notes", "/sys/kernel/vmcoreinfo"):
        if Path(name).exists():
            secrets[name] = Path(name).read_bytes()[:40].decode(errors="replace")[:20]
    folders = {
        name: [entry.name for entry in Path(name).iterdir()]
        for name in ("/sys/block", "/sys/class/dmi/id", "/sys/bus/pci/devices", "/sys/class/net")
        if Path(name).is_dir()
    }
    folders["/sys/class/net"].remove("lo")
    return {"SECRETS": secrets, "COUNTERS": [f"/proc/{name}" for name in COUNTERS.split()], "FOLDERS": folders}


def paths(stage: Stage, repl: Repl) -> Mapping[str, Any]:
    return {"SECRETS": [str(repl.slot.folder), "/guest-", "/docker/containers", "airlock-"]}


async def told(stage: Stage) -> list[str]:
    repl = await stage.shared()
    secrets = ["sk-secret", str(stage.home), str(Path.cwd()), str(Path.home()), os.uname().nodename, sys.prefix]
    return breaches(await attacked(repl, TOLD, {"SECRETS": secrets}))


async def of_others(stage: Stage) -> list[str]:
    store = ContextStore(stage.home / "contexts")
    async with stage.open() as other:
        other.sandbox.attach(store.ingest_value("another's"))
        there = breaches(await attacked(other, OTHERS))
        assert {"data", "manifest.json"} <= set(there), "the attack finds what there is"
        return breaches(await attacked(await stage.shared(), OTHERS))


LEAKED_ENVIRONMENT = Weak(
    (with_more("--setenv", "OPENAI_API_KEY", "sk-secret-of-the-host"),),
    (body_with(Env=["PATH=/usr/bin", "HOME=/tmp", "OPENAI_API_KEY=sk-secret-of-the-host"]),),
)
NEW_PRIVILEGES = Weak((), (host_config(SecurityOpt=["seccomp=unconfined"]),))
HOST_DEVICES = Weak(
    (with_more("--dev-bind", "/dev/fuse", "/dev/fuse"),),
    (host_config(Devices=[{"PathOnHost": "/dev/fuse", "PathInContainer": "/dev/fuse", "CgroupPermissions": "rwm"}]),),
    own_uid=False,
)
GVISOR = ("gvisor",)
ATTACKS = [
    Attack("files", "files of the host", cell(READ, of_the_host), WITH_YARD, frozenset({"secret of the host"})),
    Attack("files", "writing outside of /tmp", cell(WRITE), WRITABLE_ROOT, frozenset({"/usr"})),
    Attack(
        "files",
        "what /proc and /sys tell of the host",
        cell(SECRETS, constants),
        OPEN_PROC,
        frozenset({"/proc/cmdline", "/proc/sys/kernel/random/boot_id", "/proc/interrupts", "/sys/block"}),
        GVISOR,
    ),
    Attack(
        "files",
        "switches in /proc and /sys",
        cell(SWITCHES),
        WRITABLE_PROC,
        frozenset({"/proc/sys/kernel/core_pattern"}),
        GVISOR,
    ),
    Attack("files", "devices", seen(DEVICES, host_view.devices), HOST_DEVICES, frozenset({"device"}), GVISOR),
    Attack("files", "set-uid programs", cell(SET_UID), WITH_YARD | NEW_PRIVILEGES, frozenset({"found"})),
    Attack(
        "files",
        "host paths in mountinfo",
        cell(OWN, paths),
        OPEN_PROC,
        elsewhere=GVISOR,
        known={"docker": "the path of its slot's folder"},
    ),
    Attack("files", "keys and paths in what a process is told", told, LEAKED_ENVIRONMENT, frozenset({"sk-secret"})),
    Attack("files", "contexts and slots of others", of_others, WITH_SLOTS, frozenset({"data", "manifest.json"})),
    Attack("files", "leaked descriptors", cell(DESCRIPTORS), Weak(agent=LEAKY_AGENT), frozenset({"descriptor"})),
]
