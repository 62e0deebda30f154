"""Where control groups are made, from the kernel's texts, and what is written there."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.cgroup import Cgroup, Hierarchy, find_hierarchy

V1 = "".join(
    f"{30 + n} 31 0:{n} / /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
    for n, name in enumerate(("cpu", "cpuacct", "memory", "pids", "freezer"))
)
V1_JOINED = V1.replace("/cpu rw,relatime - cgroup cgroup rw,cpu\n", "/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n")
V2 = "25 24 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
OTHER = "23 1 254:0 / / rw,relatime - ext4 /dev/root rw\n24 23 0:5 / /proc rw - proc proc rw\n"


def test_version_1():
    own = "8:pids:/\n4:memory:/a/b\n3:cpuset:/\n2:cpuacct:/\n1:cpu:/\n0::/\n"
    found = find_hierarchy(OTHER + V1, own)
    assert found == Hierarchy(
        1,
        {
            "memory": Path("/sys/fs/cgroup/memory/a/b"),
            "pids": Path("/sys/fs/cgroup/pids"),
            "cpu": Path("/sys/fs/cgroup/cpu"),
            "cpuacct": Path("/sys/fs/cgroup/cpuacct"),
        },
    )


def test_version_1_with_controllers_mounted_together():
    own = "5:pids:/x\n4:memory:/x\n3:cpu,cpuacct:/x\n"
    found = find_hierarchy(OTHER + V1_JOINED, own)
    assert found
    assert found.folders["cpu"] == Path("/sys/fs/cgroup/cpu,cpuacct/x")


def test_version_2():
    found = find_hierarchy(OTHER + V2, "0::/user.slice/user-1000.slice\n")
    folder = Path("/sys/fs/cgroup/user.slice/user-1000.slice")
    assert found == Hierarchy(2, {"memory": folder, "pids": folder, "cpu": folder})


def test_version_2_beside_the_group_that_was_made_to_live_in():
    """A group that has processes gives no controllers to groups below it."""
    found = find_hierarchy(OTHER + V2, "0::/system.slice/airlock.service/orchestrator\n")
    folder = Path("/sys/fs/cgroup/system.slice/airlock.service")
    assert found == Hierarchy(2, {"memory": folder, "pids": folder, "cpu": folder})


def test_hybrid_uses_version_1():
    own = "8:pids:/\n4:memory:/\n2:cpuacct:/\n1:cpu:/\n0::/\n"
    found = find_hierarchy(OTHER + HYBRID, own)
    assert found
    assert found.version == 1


@pytest.mark.parametrize(
    ("root", "path", "folder"),
    [
        ("/docker/abc", "/docker/abc", "/sys/fs/cgroup"),
        ("/docker/abc", "/docker/abc/sub", "/sys/fs/cgroup/sub"),
        ("/docker/abc", "/", "/sys/fs/cgroup"),
        ("/", "/", "/sys/fs/cgroup"),
    ],
)
def test_in_a_container_only_a_part_is_mounted(root: str, path: str, folder: str):
    found = find_hierarchy(V2.replace(" / /sys", f" {root} /sys"), f"0::{path}\n")
    assert found
    assert found.folders["memory"] == Path(folder)


@pytest.mark.parametrize(("mountinfo", "own"), [("", ""), (OTHER, "0::/\n"), (OTHER + V2, ""), (V1, "4:memory:/\n")])
def test_without_the_controllers_there_is_none(mountinfo: str, own: str):
    assert find_hierarchy(mountinfo, own) is None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.subtree_control").write_text("memory")
    return tmp_path


def hierarchy(tree: Path) -> Hierarchy:
    return Hierarchy(2, dict.fromkeys(("memory", "pids", "cpu"), tree))


def test_a_version_2_group_is_made_with_its_limits(tree: Path):
    group = Cgroup(hierarchy(tree), "airlock-3")
    assert group.create(memory_bytes=1 << 20, pids=7, cpus=1.5)
    written = {path.name: path.read_text() for path in (tree / "airlock-3").iterdir()}
    assert written == {
        "memory.max": str(1 << 20),
        "memory.swap.max": "0",
        "pids.max": "7",
        "cpu.max": "150000 100000",
        "cpu.weight": "25",
    }
    assert (tree / "cgroup.subtree_control").read_text() == "+pids +cpu"
    group.add(42)
    assert (tree / "airlock-3" / "cgroup.procs").read_text() == "42"


def test_what_a_group_used(tree: Path):
    group = Cgroup(hierarchy(tree), "airlock-3")
    group.create(memory_bytes=1 << 20, pids=7, cpus=1.0)
    folder = tree / "airlock-3"
    assert (group.cpu_s(), group.peak_memory(), group.oom_kills()) == (None, None, 0)
    (folder / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (folder / "memory.peak").write_text("123\n")
    (folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert (group.cpu_s(), group.peak_memory(), group.oom_kills()) == (1.5, 123, 1)


def test_where_no_group_may_be_made_there_is_none(tmp_path: Path):
    group = Cgroup(Hierarchy(2, dict.fromkeys(("memory", "pids", "cpu"), tmp_path)), "airlock-3")
    assert not group.create(memory_bytes=1 << 20, pids=7, cpus=1.0)  # no cgroup.subtree_control: no control group here
    assert list(tmp_path.iterdir()) == []
    group.remove()


def test_a_group_that_is_there_no_more_measures_nothing(tmp_path: Path):
    group = Cgroup(hierarchy(tmp_path), "airlock-3")
    assert (group.cpu_s(), group.peak_memory(), group.oom_kills()) == (None, None, 0)
    with pytest.raises(OSError, match="No such file"):
        group.add(1)
