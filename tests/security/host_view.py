"""What the host sees of a sandbox: its processes, and what these hold of the host's kernel. For root."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.sandboxes import Repl, status_of

_PRIVILEGED_OBJECTS = ("anon_inode:[io_uring]", "anon_inode:[userfaultfd]", "anon_inode:[perf_event]")
_PRIVILEGED_OBJECTS += ("anon_inode:bpf", "/secretmem", "/memfd:secretmem")
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9))  # null, zero, full, random, urandom


def _group(repl: Repl) -> Path:
    guest: Any = repl.sandbox._guest  # pyright: ignore[reportPrivateUsage]
    group = getattr(guest, "_cgroup", None) or getattr(guest, "_group", None)
    assert group, "the tests of isolation need a control group"
    return group.folders["pids"]


def processes(repl: Repl) -> list[int]:
    """Those of the sandbox's control group, gVisor's own included, and bwrap's."""
    return [int(pid) for pid in (_group(repl) / "cgroup.procs").read_text().split()]


def tasks(repl: Repl) -> int:
    """Processes and threads, dead ones that nobody has collected included."""
    return int((_group(repl) / "pids.current").read_text())


def guests(repl: Repl) -> list[dict[str, str]]:
    """The status of those that run the guest's code: not bwrap, nor the process that opens files for gVisor."""
    own = Path("/proc/self/ns/mnt").readlink()
    found: list[dict[str, str]] = []
    for pid in processes(repl):
        with contextlib.suppress(OSError):
            started = Path(f"/proc/{pid}/cmdline").read_bytes()
            if not started.startswith(b"runsc-gofer") and b"bwrap" not in started.split(b"\0")[0]:
                assert Path(f"/proc/{pid}/ns/mnt").readlink() != own
                found.append(status_of(pid) | {"user": str(Path(f"/proc/{pid}/ns/user").readlink())})
    return found


def _links(pid: int, folder: str) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/{folder}").iterdir():
            with contextlib.suppress(OSError):
                yield entry.name, str(entry.readlink())


def sockets(repl: Repl) -> set[str]:
    """Sockets of the host's kernel that are no Unix sockets."""
    found: set[str] = set()
    for pid in processes(repl):
        with contextlib.suppress(OSError):
            unix = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
            found |= {
                link
                for _, link in _links(pid, "fd")
                if link.startswith("socket:[") and link.removeprefix("socket:[").removesuffix("]") not in unix
            }
    return found


def objects(repl: Repl) -> set[str]:
    """What only system calls that no cell needs make."""
    links = {f"{pid} {name} {link}" for pid in processes(repl) for name, link in _links(pid, "fd")}
    return {link for link in links if link.split(" ", 2)[2].startswith(_PRIVILEGED_OBJECTS)}


def devices(repl: Repl) -> set[str]:
    """Device files of the host that are held open."""
    found: set[str] = set()
    for pid in processes(repl):
        for name, _ in _links(pid, "fd"):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/fd/{name}").stat()
                number = os.major(status.st_rdev), os.minor(status.st_rdev)
                if stat.S_ISBLK(status.st_mode) or (stat.S_ISCHR(status.st_mode) and number not in _DEVICES):
                    found.add(f"{pid} {name} {number}")
    return found


def namespaces(repl: Repl) -> set[str]:
    return {link for pid in processes(repl) for name, link in _links(pid, "ns") if "_for_children" not in name}


def mounts(repl: Repl) -> set[str]:
    found: set[str] = set()
    for pid in processes(repl):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
                point, options = line.split()[4:6]
                found.add(f"{point} {options.split(',')[0]} {line.split(' - ')[1]}")
    return found
