"""One control group a sandbox, for memory, processes and CPU: version 2 where it is there, else version 1.

https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/. Without a writable hierarchy there is none, and
the rlimits of the guest agent are what is left; `airlock doctor` says so.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

CONTROLLERS = ("memory", "pids", "cpu")
LEAF = (
    "orchestrator"  # a group of this name was made to live in, as deploy/delegated.sh does: sandboxes are put beside it
)
_PERIOD_US = 100_000
# Of another process's share where CPUs are wanting: guests make way for the loop, the proxy and the journal. Containers
# do among what their engine runs: with its cgroupfs driver that is they alone.
WEIGHT = 0.25
SHARES = int(1024 * WEIGHT)  # in the unit of version 1, and of container engines


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where this process may make control groups: controller -> folder. Version 2 has one folder for all."""

    version: int
    folders: Mapping[str, Path]


def find_hierarchy(mountinfo: str, own: str) -> Hierarchy | None:
    """From the texts of /proc/self/mountinfo and /proc/self/cgroup; None when no controller is mounted."""
    mounts: dict[str, tuple[Path, str]] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup2":
            mounts[""] = (Path(point), root)
        elif kind == "cgroup":
            for controller in options.split(","):
                mounts[controller] = (Path(point), root)
    paths: dict[str, str] = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    if all(name in mounts and name in paths for name in CONTROLLERS):
        # cpuacct only measures; most systems mount it together with cpu, some apart.
        names = [*CONTROLLERS, *({"cpuacct"} & mounts.keys() & paths.keys())]
        return Hierarchy(1, {name: _below(*mounts[name], paths[name]) for name in names})
    if "" in mounts and "" in paths:
        folder = _below(*mounts[""], paths[""])
        if folder.name == LEAF:
            folder = folder.parent
        return Hierarchy(2, dict.fromkeys(CONTROLLERS, folder))
    return None


def _below(mount: Path, root: str, path: str) -> Path:
    # The mount may show only a part of the hierarchy (root), as it does in containers.
    inside = path[len(root) :] if root != "/" and path.startswith(root) else path
    return mount / inside.strip("/")


def own_hierarchy() -> Hierarchy | None:
    """The hierarchy of this process, if it may make groups there."""
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    return find_hierarchy(mountinfo, own)


class Cgroup:
    """A group for one sandbox. Every file of it may vanish or refuse; what cannot be read is None."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self.version = hierarchy.version
        self.folders = {controller: folder / name for controller, folder in hierarchy.folders.items()}

    def create(self, *, memory_bytes: int, pids: int, cpus: float) -> bool:
        """Make it and set its limits; False, with nothing left behind, when this process may not."""
        self.remove()
        try:
            for folder in set(self.folders.values()):
                if self.version == 2:
                    _enable(folder.parent)
                folder.mkdir()
            for controller, name, value in self._settings(memory_bytes, pids, cpus):
                (self.folders[controller] / name).write_text(value)
        except OSError:
            self.remove()
            return False
        # Swap accounting is a boot option in version 1; without it there is no such file, and often no swap.
        swap = "memory.swap.max" if self.version == 2 else "memory.memsw.limit_in_bytes"
        with contextlib.suppress(OSError):
            (self.folders["memory"] / swap).write_text("0" if self.version == 2 else str(memory_bytes))
        return True

    def _settings(self, memory_bytes: int, pids: int, cpus: float) -> list[tuple[str, str, str]]:
        quota = str(max(1000, int(cpus * _PERIOD_US)))
        if self.version == 2:
            limits = [("memory", "memory.max", str(memory_bytes)), ("cpu", "cpu.max", f"{quota} {_PERIOD_US}")]
            limits.append(("cpu", "cpu.weight", str(int(100 * WEIGHT))))
        else:
            limits = [("memory", "memory.limit_in_bytes", str(memory_bytes)), ("cpu", "cpu.cfs_quota_us", quota)]
            limits.append(("cpu", "cpu.shares", str(SHARES)))
        return [*limits, ("pids", "pids.max", str(pids))]

    def add(self, pid: int) -> None:
        """Raises OSError."""
        for folder in set(self.folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    @contextlib.contextmanager
    def joined(self) -> Generator[None]:
        """While it lasts, this thread is in the group, and so is, from its birth, what it starts. Version 1 only.

        To move another process the kernel waits for every CPU, 1 to 15 ms a controller; a thread's own step is free.
        Raises OSError.
        """
        try:
            for folder in set(self.folders.values()):
                (folder / "tasks").write_text("0")
            yield
        finally:
            for folder in {folder.parent for folder in self.folders.values()}:
                (folder / "tasks").write_text("0")

    def is_of(self, container: str) -> bool:
        """Whether every folder of it is named for this container, as engines name them."""
        return all(container in str(folder) for folder in self.folders.values())

    def cpu_s(self) -> float | None:
        if self.version == 2:
            micros = self._field("cpu", "cpu.stat", "usage_usec")
            return None if micros is None else micros / 1e6
        nanos = self._number("cpuacct", "cpuacct.usage") if "cpuacct" in self.folders else None
        return None if nanos is None else nanos / 1e9

    def peak_memory(self) -> int | None:
        return self._number("memory", "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")

    def oom_kills(self) -> int:
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return self._field("memory", name, "oom_kill") or 0

    def kill(self, within_s: float) -> bool:
        """Kill every process in it, and wait; whether all have ended. The one that could start more has to be dead."""
        until = time.monotonic() + within_s
        try:
            members = (self.folders["pids"] / "cgroup.procs").read_text().split()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return all(_end(int(pid), until) for pid in members)

    def remove(self) -> None:
        """Remove it, once the last process in it is gone; nothing happens when it is not there."""
        for folder in set(self.folders.values()):
            for _ in range(200):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:  # EBUSY: the kernel is still taking a dead process's last page away
                    time.sleep(0.005)
                else:
                    break

    def _number(self, controller: str, name: str) -> int | None:
        try:
            return int((self.folders[controller] / name).read_text())
        except (OSError, ValueError):
            return None

    def _field(self, controller: str, name: str, field: str) -> int | None:
        try:
            text = (self.folders[controller] / name).read_text()
        except OSError:
            return None
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == field and value.isdecimal():
                return int(value)
        return None


def _end(pid: int, until: float) -> bool:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        return bool(select.select([process], [], [], max(0.0, until - time.monotonic()))[0])
    except ProcessLookupError:
        return True
    except OSError:
        return False
    finally:
        os.close(process)


def group_of(slot: int) -> Cgroup | None:
    """The group of a slot's sandbox, whether it is there or not; None where none can be."""
    hierarchy = own_hierarchy()
    return Cgroup(hierarchy, f"airlock-{slot}") if hierarchy else None


def group_with(pid: int) -> Cgroup | None:
    """The group that a process of this machine is in, to be read."""
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        its = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    hierarchy = find_hierarchy(mountinfo, its)
    return Cgroup(hierarchy, "") if hierarchy else None


def _enable(parent: Path) -> None:
    """Let children of `parent` have the controllers (version 2). Refused where processes live in `parent` itself."""
    have = (parent / "cgroup.subtree_control").read_text().split()
    if missing := [f"+{name}" for name in CONTROLLERS if name not in have]:
        (parent / "cgroup.subtree_control").write_text(" ".join(missing))
