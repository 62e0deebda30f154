"""deploy/airlock.service: under what it takes away, sandboxes start, and keep what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

from tests.command import PROJECT, Airlock
from tests.unit.test_deploy import which

UNIT = (PROJECT / "deploy" / "airlock.service").read_text()
# What systemd does with SystemCallFilter=, to what it starts: the names, and the command, are arguments.
FILTER = """
import os, sys
import pyseccomp
filter = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
for name in sys.argv[1].split(","):
    try:
        filter.add_rule(pyseccomp.ALLOW, name)
    except (OSError, RuntimeError, ValueError):
        pass  # not of this machine's architecture
filter.load()
os.execv(sys.argv[2], sys.argv[2:])
"""

# What systemd does with ProtectKernelTunables= to /proc/sys, and with ReadWritePaths= to the path in it ($0).
READ_ONLY = """
mount --bind /proc/sys /proc/sys
[ -z "$0" ] || mount --bind "$0" "$0"
mount -o remount,bind,ro /proc/sys
exec "$@"
"""


def setting(name: str) -> str:
    found = re.findall(rf"(?m)^{name}=(.*)$", UNIT)
    assert len(found) == 1, name
    return found[0]


def calls(names: list[str]) -> set[str]:
    """Of these names and systemd's groups of them."""
    found: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            found.add(name)
            continue
        command = [which("systemd-analyze"), "syscall-filter", name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        found |= calls([line.strip() for line in listed if line.strip() and not line.strip().startswith("#")])
    return found


def confined(airlock: Airlock, *, without: str = "", writable: str | None = None) -> Airlock:
    """The command as the unit has it run.

    without: a system call that is not permitted either. writable: the path in /proc/sys that can be; else the unit's.
    """
    names = {name.removeprefix("CAP_").lower() for name in setting("CapabilityBoundingSet").split()}
    bound = ",".join(["-all", *(f"+{name}" for name in sorted(names))])
    permitted = calls(setting("SystemCallFilter").split()) - {without}
    assert setting("NoNewPrivileges") == "yes"
    assert setting("UMask") == "0022"
    assert setting("ProtectKernelTunables") == "yes"
    path = setting("ReadWritePaths") if writable is None else writable
    prefix = ["unshare", "--mount", "sh", "-e", "-c", READ_ONLY, path]
    prefix += [which("setpriv"), "--no-new-privs", "--bounding-set", bound]
    return replace(airlock, prefix=(*prefix, sys.executable, "-c", FILTER, ",".join(sorted(permitted))))


def test_sandboxes_keep_their_promises_under_the_unit(airlock: Airlock):
    found = confined(airlock)("doctor", "--backend", "bubblewrap", "--json", code=0).json
    (backend,) = found["backends"]
    assert backend["usable"] is True
    assert backend["broken"] == backend["deviations"] == {}
    assert backend["kept"] == backend["promises"] > 50


def test_what_the_unit_takes_away_is_taken_away(airlock: Airlock):
    """That the commands of this test do what systemd would: without one more call, no sandbox starts."""
    done = confined(airlock, without="sethostname")("doctor", "--backend", "bubblewrap", "--json", code=4)
    assert "hostname" in json.dumps(done.json)


def test_a_sandbox_needs_the_one_tunable_that_the_unit_leaves_it(airlock: Airlock):
    done = confined(airlock, writable="")("doctor", "--backend", "bubblewrap", "--json", code=4)
    assert "/proc/sys/user/max_user_namespaces: Read-only file system" in json.dumps(done.json)
