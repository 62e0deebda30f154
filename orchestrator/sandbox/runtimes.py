"""The runtimes that a Docker engine may have: how far they isolate, where they deviate, and which are known-bad."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.sandbox.base import EXHAUSTION, HOST_PATHS, SIGNALS, Isolation

PIDS_OF_AIRLOCK = 8  # supervisor, snapshots
PIDS_OF_SENTRY = 512  # gVisor's own threads count, too, and die first; the guest's are bounded by rlimits there


@dataclass(frozen=True, slots=True)
class Runtime:
    """backend: the name of the one that it makes. name: as the engine knows it. pids: its own, beside the guest's.

    covered: folders with nothing in them, which it starts without.
    """

    backend: str
    name: str
    isolation: Isolation
    pids: int
    covered: tuple[str, ...] = ()
    deviations: Mapping[str, str] = field(default_factory=dict[str, str])


RUNC = Runtime(
    "docker",
    "runc",
    Isolation.container,
    PIDS_OF_AIRLOCK,
    deviations={HOST_PATHS: "/proc/self/mountinfo tells the path of the slot's folder on the host"},
)
RUNSC = Runtime(
    "gvisor",
    "runsc",
    Isolation.gvisor,
    PIDS_OF_SENTRY,
    # It masks no path, and opens /proc/1/fd to whoever has the agent's user id: a cell could write to the channel.
    covered=("/proc", "/sys"),
    deviations={
        EXHAUSTION: "a cell that uses up memory, by processes too, ends its sandbox: gVisor bounds no single process",
        SIGNALS: "a cell can end its own sandbox by a signal to process 1, which gVisor does not protect",
    },
)
KATA = Runtime("kata", "kata", Isolation.microvm, PIDS_OF_AIRLOCK)
RUNTIMES = (RUNC, RUNSC, KATA)

ESCAPE = "CVE-2024-21626"  # a guest gets at a folder of the host through a descriptor that runc left open
# Packages of an older runc in which it is mended, and the number of their update from which on.
_BACKPORTS = (
    (r"1\.1\.5\+ds1-1\+deb12u(\d+)$", 1),  # Debian 12
    (r"1\.0\.0~rc93\+ds1-5\+deb11u(\d+)$", 3),  # Debian 11
    (r"1\.1\.7-0ubuntu1~22\.04\.(\d+)$", 2),
    (r"1\.1\.7-0ubuntu1~20\.04\.(\d+)$", 2),
)
_OF_2025 = "CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881"
_MENDED_2025 = ((1, 2, 8), (1, 3, 3), (1, 4, 0))  # of each line of releases


def runc_version(revision: str) -> tuple[int, int, int] | None:
    """From what the engine says of runc: v1.1.12-0-g51d5e94, 1.1.5+ds1-1+deb12u1, 1.3.0."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", revision)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def is_backport(revision: str) -> bool:
    """Whether this is a distribution's package of an older version, with ESCAPE mended."""
    return any((found := re.match(form, revision)) and int(found[1]) >= least for form, least in _BACKPORTS)


def why_refused(revision: str) -> str | None:
    """Why no guest may run in this runc: one line with the remedy. None when it may."""
    version = runc_version(revision)
    if version is None:
        return f"the engine does not say which runc it has ({revision or 'nothing'}): install 1.1.12 or newer"
    if version >= (1, 1, 12) or is_backport(revision):
        return None
    return f"runc {revision} lets guests out ({ESCAPE}): install 1.1.12 or newer, or your distribution's update of it"


def known_faults(revision: str) -> str:
    """What is known of a runc that is not refused; empty when nothing is."""
    version = runc_version(revision)
    if version is None or version >= _MENDED_2025[-1]:
        return ""
    if any(version[:2] == mended[:2] and version >= mended for mended in _MENDED_2025):
        return ""
    return (
        f"{_OF_2025} are mended in 1.2.8, 1.3.3 and 1.4.0, or by your distribution; they need a hostile image, "
        "a terminal or a mount that containers share, and sandboxes have none"
    )
