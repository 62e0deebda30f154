"""Airlock as an ordinary user: fewer barriers, all of them said, and a guest is bounded all the same.

The project may lie where only root may go, so it is shown to that user at a public place, in a mount namespace of our
own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.guest.processes import OURS
from tests.command import PROJECT, Airlock, until

USER = 1_900_000_000 + os.getpid()  # nobody else on this machine has it


@pytest.fixture
def airlock() -> Iterator[Airlock]:
    folder = Path(tempfile.mkdtemp(prefix="airlock-user-", dir="/tmp"))  # where every user may go
    try:
        place = folder / "project"
        for path in (folder, place, folder / "home"):
            path.mkdir(exist_ok=True)
            os.chown(path, USER, USER)
        script = f'mount --bind {PROJECT} {place} && cd {folder} && exec "$@"'
        become = [
            "setpriv",
            f"--reuid={USER}",
            f"--regid={USER}",
            "--clear-groups",
            "--no-new-privs",
            "--inh-caps=-all",
        ]
        prefix = ["unshare", "--mount", "sh", "-ec", script, "sh", *become]
        python = place / ".venv" / "bin" / "python"
        command = Airlock(
            folder / "home",
            folder,
            env={"PYTHONPATH": str(place)},
            prefix=prefix,
            program=[str(python), "-m", "orchestrator.cli"],
        )
        command.file("context.txt", "one\ntwo\n")
        yield command
        until(lambda: not processes(), 5.0)
        command.nothing_left()
    finally:
        shutil.rmtree(folder)


def processes() -> list[str]:
    """Processes of this user that are in a process id namespace of their own: guests."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if fields["Uid"].split()[0] == str(USER) and len(fields["NSpid"].split()) > 1:
            found.append(fields["Name"])
    return found


def test_doctor_says_what_is_lacking(airlock: Airlock) -> None:
    done = airlock("doctor", "--backend", "bubblewrap", code=0)
    assert done.lines == ["usable: bubblewrap"]
    assert f"as user id {USER}" in done.out
    assert "lack  user ids   not root: all sandboxes run under your user id" in done.out
    assert "lack  cgroup     " in done.out
    assert "FAIL" not in done.out
    bounded = "memory, CPU and processes are bounded by rlimits only: a process at a time, not the sandbox as a whole"
    assert f"lack  deviates   {bounded} (3 of the promises)" in done.out


CELL = """
import os
print(len(context), sorted(os.listdir("/")))
for path in ("/etc/passwd", "/home", "/root", "/tmp/../proc/1/environ"):
    try:
        open(path)
    except OSError as error:
        print(error.strerror)
"""


def test_a_cell_and_a_query(airlock: Airlock) -> None:
    done = airlock("exec", airlock.file("cell.py", CELL), "--context", "context.txt", code=0)
    assert done.out.startswith("8 [")
    assert len(done.out.splitlines()) == 5
    script = airlock.file("script.yaml", "root: ['FINAL(42)']")
    done = airlock("run", "What?", "--context", "context.txt", "--model", f"scripted:{script}", code=0)
    assert done.out == "42\n"
    assert oct((airlock.home / "airlock.db").stat().st_mode & 0o777) == "0o600"


def test_memory_and_processes_are_bounded_by_rlimits(airlock: Airlock) -> None:
    code = f"""
import os, resource
hog = []
try:
    while True:
        hog.append(os.urandom(1 << 24))
except MemoryError:
    print("memory", len(hog) * 16 < 2 * 256 + 1024 + 1)
hog.clear()
made = 0
try:
    while made < 10_000:
        if not os.fork():
            while True: pass
        made += 1
except OSError as error:
    print("processes", made <= 64 + {OURS})
"""
    policy = airlock.policy(sandbox_memory="256 MiB", sandbox_pids="64", time_cell="20 s")
    done = airlock("exec", airlock.file("cell.py", code), "--context", "context.txt", "--policy", policy)
    assert done.out in ("memory True\nprocesses True\n", ""), done
    assert done.code in (0, 4)


def test_a_fork_bomb(airlock: Airlock) -> None:
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    policy = airlock.policy(sandbox_pids="16", time_cell="1 s")
    done = airlock("exec", airlock.file("cell.py", code), "--context", "context.txt", "--policy", policy, code=3)
    assert done.said.startswith("timeout: ")


def test_a_context_that_this_user_may_not_read(airlock: Airlock) -> None:
    secret = airlock.file("secret.txt", "for root alone")
    secret.chmod(0o600)
    done = airlock("exec", airlock.file("cell.py", "pass"), "--context", secret, code=2)
    assert done.said == f"{secret}: permission denied; make it readable for this user"
    closed = airlock.folder / "closed"
    closed.mkdir(mode=0o700)
    done = airlock("exec", airlock.file("cell.py", "pass"), "--context", closed, code=2)
    assert "permission denied" in done.said


def test_a_data_folder_that_this_user_may_not_write(airlock: Airlock) -> None:
    home, airlock.home = airlock.home, airlock.folder / "context.txt" / "home"
    assert "cannot use the data folder" in airlock("doctor", code=4).out
    airlock.home = airlock.folder / "closed"
    airlock.home.mkdir(mode=0o700)
    assert "Permission denied" in airlock("models", "list", code=4).said
    assert f"cannot read {airlock.home}/airlock.toml: permission denied" in airlock("audit", "show", code=2).said
    airlock.home = Path("/airlock-home")
    done = airlock("exec", airlock.file("cell.py", "pass"), "--context", "context.txt", code=4)
    assert done.said == "cannot use the data folder /airlock-home: Permission denied"
    airlock.home = home
