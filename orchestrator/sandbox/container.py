"""What the engine is asked for when a sandbox is made: every setting of its container, in one pure function."""

from __future__ import annotations

from typing import Any

from orchestrator.sandbox.base import SandboxSpec
from orchestrator.sandbox.cgroup import SHARES
from orchestrator.sandbox.runtimes import Runtime
from orchestrator.sandbox.slots import UID_BASE

MEMORY_OF_AIRLOCK = 32 << 20  # supervisor, and the page tables and stacks of a snapshot
INODES = 16_384  # of /tmp
# Of the host, and of no use to a cell. What is left tells no more than system calls do: cpuinfo, filesystems, loadavg,
# meminfo, uptime, version. A process's own mountinfo cannot be masked.
_MASKED = (
    *("/sys", "/proc/sys", "/proc/acpi", "/proc/asound", "/proc/buddyinfo", "/proc/cgroups", "/proc/cmdline"),
    *("/proc/config.gz", "/proc/consoles", "/proc/crypto", "/proc/devices", "/proc/diskstats", "/proc/dma"),
    *("/proc/driver", "/proc/execdomains", "/proc/interrupts", "/proc/iomem", "/proc/ioports", "/proc/kallsyms"),
    *("/proc/kcore", "/proc/key-users", "/proc/keys", "/proc/kmsg", "/proc/kpagecgroup", "/proc/kpagecount"),
    *("/proc/kpageflags", "/proc/latency_stats", "/proc/locks", "/proc/mdstat", "/proc/misc", "/proc/modules"),
    *("/proc/mtrr", "/proc/pagetypeinfo", "/proc/partitions", "/proc/pressure", "/proc/sched_debug"),
    *("/proc/schedstat", "/proc/scsi", "/proc/slabinfo", "/proc/softirqs", "/proc/stat", "/proc/swaps"),
    *("/proc/sysvipc", "/proc/timer_list", "/proc/timer_stats", "/proc/tty", "/proc/vmallocinfo"),
    *("/proc/vmstat", "/proc/zoneinfo"),
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger")
_EMPTY = "ro,noexec,nosuid,nodev,mode=555,size=4k"


def request(spec: SandboxSpec, runtime: Runtime, image: str, seccomp: str, *, apparmor: bool) -> dict[str, Any]:
    """The body of POST /containers/create. Pure. image: by digest. seccomp: the profile's JSON text."""
    uid = UID_BASE + spec.slot.number if spec.slot.uid is None else spec.slot.uid
    memory = spec.memory_bytes + MEMORY_OF_AIRLOCK
    tmpfs = f"rw,noexec,nosuid,nodev,mode=1777,size={spec.tmp_bytes},nr_inodes={INODES}"
    security = ["no-new-privileges", f"seccomp={seccomp}"]
    return {
        "Image": image,
        "User": f"{uid}:{uid}",  # of the slot alone: RLIMIT_NPROC counts by it, and no two sandboxes share an owner
        "WorkingDir": "/tmp",  # noqa: S108  the sandbox's own
        "Env": ["PATH=/usr/bin", "HOME=/tmp", "LANG=C.UTF-8"],
        "Hostname": "sandbox",
        "NetworkDisabled": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": True,
        "StdinOnce": True,  # when the orchestrator goes, standard input ends, and with it the agent
        "Tty": False,
        "Labels": {"airlock.slots": str(spec.slot.folder.parent), "airlock.slot": str(spec.slot.number)},
        "HostConfig": {
            "Runtime": runtime.name,
            "NetworkMode": "none",
            "IpcMode": "none",
            "PidMode": "",
            "CgroupnsMode": "private",
            "UTSMode": "",
            "Privileged": False,
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": [*security, "apparmor=docker-default"] if apparmor else security,
            "MaskedPaths": list(_MASKED),
            "ReadonlyPaths": list(_READ_ONLY),
            "Mounts": [
                {"Type": "bind", "Source": str(spec.slot.folder), "Target": "/context", "ReadOnly": True}
                | {"BindOptions": {"Propagation": "rprivate"}}
            ],
            "Tmpfs": {"/tmp": tmpfs} | dict.fromkeys(runtime.covered, _EMPTY),  # noqa: S108
            "Memory": memory,
            "MemorySwap": memory,  # both together: no swap
            "MemorySwappiness": 0,
            "NanoCpus": int(spec.cpus * 1_000_000_000),
            "CpuShares": SHARES,
            "PidsLimit": spec.pids + runtime.pids,
            "OomScoreAdj": 500,
            "Ulimits": [
                {"Name": "nofile", "Soft": spec.files, "Hard": spec.files},
                {"Name": "fsize", "Soft": spec.tmp_bytes, "Hard": spec.tmp_bytes},
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "memlock", "Soft": 0, "Hard": 0},
                {"Name": "msgqueue", "Soft": 0, "Hard": 0},
            ],
            "Init": False,  # the agent has to be process 1 itself
            "AutoRemove": False,  # how it ended is asked for first
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "none"},
        },
    }
