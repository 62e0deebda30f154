"""The command `airlock` as tests use it: the real one, in a process of its own, on a data folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from orchestrator.audit.evidence import LiveEvidence
from orchestrator.audit.verify import verify
from orchestrator.auditing import histories, open_books
from orchestrator.core.events import Recorded
from orchestrator.sandbox.cgroup import own_hierarchy
from orchestrator.sandbox.slots import UID_BASE, mark_of
from orchestrator.store.db import Database
from orchestrator.store.journal import key_created
from orchestrator.store.vault import open_vault
from tests.records import read
from tests.warm import Warm

PROGRAM = str(Path(sys.executable).with_name("airlock"))
PROJECT = Path(__file__).parents[1]
_LOCKS = Path("/run/airlock/slots")


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for what another process brings about, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {condition}"
        time.sleep(0.01)  # between two looks; nothing depends on how long it takes
    return found


def children(process: int) -> list[int]:
    """Processes that this one has started and that it has not waited for, whichever of its threads did."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            found += map(int, (task / "children").read_text().split())
    return found


@dataclass
class Done:
    """How a command ended. lines: those of standard error."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()

    @property
    def said(self) -> str:
        """The one line that says what is wrong: the last one, and the only one that begins like this."""
        faults = [line for line in self.lines if line.startswith("airlock: ")]
        assert len(faults) == 1, self
        assert faults[0] == self.lines[-1], self
        assert "Traceback" not in self.err, self
        return faults[0].removeprefix("airlock: ")

    @property
    def json(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, self
        return json.loads(self.out)


@dataclass
class Airlock:
    """home: its data folder. folder: where it runs. prefix: a command that runs it (unshare, setpriv ...).

    warm: forks commands, which saves a second each; what has a prefix, a session or a program of its own is cold.
    before: what others had left on this machine when the test began.
    """

    home: Path
    folder: Path
    warm: Warm | None = None
    env: dict[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    program: Sequence[str] = (PROGRAM,)
    before: set[int] = field(default_factory=lambda: slots_left())

    def __call__(
        self,
        *arguments: object,
        stdin: bytes | None = None,
        code: int | None = None,
        doom: dict[str, Any] | None = None,
    ) -> Done:
        """Run it to its end. code: the exit code there has to be. doom: how it kills itself, if it is warm."""
        with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as err:
            given.write(stdin or b"")
            given.seek(0)
            stdio = (given, out, err)
            if warm := self._warm():
                found = warm.run(
                    list(map(str, arguments)), self.environment, self.folder, [f.fileno() for f in stdio], doom
                )
            else:
                options = dict(zip(("stdin", "stdout", "stderr"), stdio, strict=True))
                command = self.command(arguments)
                found = subprocess.run(command, env=self.environment, cwd=self.folder, timeout=90, **options).returncode
            out.seek(0)
            err.seek(0)
            done = Done(found, out.read().decode(), err.read().decode())
        assert code is None or found == code, done
        return done

    @contextmanager
    def started(self, *arguments: object, **options: Any) -> Iterator[Running]:
        """Start it; it does not outlive the block."""
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
        with self._popen(arguments, pipes) as process:
            try:
                yield Running(process)
            finally:
                if process.poll() is None:
                    process.kill()

    def _warm(self) -> Warm | None:
        return self.warm if not self.prefix and self.program == (PROGRAM,) else None

    def _popen(self, arguments: Sequence[object], options: dict[str, Any]) -> subprocess.Popen[bytes]:
        if (warm := self._warm()) and options.keys() <= {"stdin", "stdout", "stderr"}:
            return warm.popen(list(map(str, arguments)), self.environment, self.folder, **options)
        return subprocess.Popen(self.command(arguments), env=self.environment, cwd=self.folder, **options)

    def command(self, arguments: Sequence[object]) -> list[str]:
        return [*self.prefix, *self.program, *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        own = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "AIRLOCK_HOME": str(self.home), "LANG": "C.UTF-8"}
        return own | self.env

    # What tests give it

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def policy(self, base: str = "default", **changes: str) -> Path:
        """A policy file like a shipped one, but for these keys: `time_idle="1 s"` is `idle` of section `time`."""
        text = (PROJECT / "policies" / f"{base}.yaml").read_text()
        for name, value in changes.items():
            section, _, key = name.partition("_")
            text, found = re.subn(rf"(?m)^({section}:\n(?:  .*\n)*?  {key}: ).*$", rf"\g<1>{value}", text)
            assert found == 1, name
        return self.file("policy.yaml", text)

    # What it left behind

    def rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.home}/airlock.db?mode=ro", uri=True)) as db:
            return db.execute(query, values).fetchall()

    def records(self, query: str = "") -> list[dict[str, Any]]:
        """The journal of a query, held to the schema of records; of the newest when none is named."""
        query = query or self.rows("SELECT id FROM queries ORDER BY opened_at DESC LIMIT 1")[0][0]
        return [read(row[0]) for row in self.rows("SELECT record FROM records WHERE query=? ORDER BY seq", query)]

    def history(self, query: str = "") -> list[Recorded]:
        """The same, with the payloads."""
        query = query or self.records()[0]["query"]
        with open_books(self.home) as books:
            return next(histories(books, query))

    def closing(self) -> dict[str, Any]:
        """The closing record's body of the newest query."""
        record = self.records()[-1]
        assert record["type"] == "query.closed"
        return record["body"]

    def nothing_left(self) -> None:
        """The common check after every test.

        No process, control group or folder of a sandbox is left; all money is settled; all journals are closed, or
        end with an interruption.
        """
        until(lambda: slots_left(self.home) <= self.before, 5.0)
        assert not list(self.home.glob("slots/slot-*"))
        assert not list(self.home.glob("contexts/drafts/*"))
        assert not list(self.home.glob("owners/*"))
        if not (self.home / "airlock.db").exists():
            return
        assert self.rows("SELECT id FROM reservations WHERE state='open'") == []
        assert self.rows("SELECT id, held FROM scopes WHERE held != 0") == []
        for (record,) in self.rows("SELECT record FROM records"):
            read(record)
        with closing(sqlite3.connect(self.home / "airlock.db")) as driver, driver:
            driver.execute("DROP TRIGGER IF EXISTS lose")  # with which tests have records get lost
        db = Database(self.home)
        try:
            keys = open_vault(db, self.home, self.env.get("AIRLOCK_MASTER_KEY"), key_created)
            report = db.read(lambda tx: verify(LiveEvidence(tx, keys)))
        finally:
            db.close()
        assert all(verdict.holds for verdict in report.values()), report
        assert " 0 of them open" in report["completeness"].note


@dataclass
class Running:
    process: subprocess.Popen[bytes]

    def line(self) -> str:
        """The next line that it prints on standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()

    def end(self) -> Done:
        out, err = self.process.communicate(timeout=60)
        return Done(self.process.returncode, out.decode(), err.decode())

    def interrupt(self, number: int = signal.SIGINT) -> Done:
        self.process.send_signal(number)
        return self.end()


def slots_left(home: Path | None = None) -> set[int]:
    """Slots with a process or a control group that no orchestrator holds any more.

    Others may be at work on this machine: what a living process has locked is not looked at, nor, where home is given,
    what a dead one has left under another data folder.
    """
    found = {uid - UID_BASE for uid in _user_ids() if uid >= UID_BASE} | set(_groups())
    return {number for number in found if not held(number) and _may_be_of(home, number)}


def _may_be_of(home: Path | None, number: int) -> bool:
    """A slot that was given back in order has no mark: what is left in it may be anyone's."""
    lock = _LOCKS / f"{number}.lock"
    mark = lock.read_bytes() if lock.exists() else b""
    return home is None or mark in (b"", mark_of(home / "slots"))


def _user_ids() -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = (folder / "status").read_text()
            except OSError:  # it ended while we looked
                continue
            if "\nState:\tZ" not in status:
                yield int(status.partition("\nUid:")[2].split(maxsplit=1)[0])


def _groups() -> Iterator[int]:
    hierarchy = own_hierarchy()
    for folder in set(hierarchy.folders.values()) if hierarchy else ():
        for group in folder.glob("airlock-*"):
            number = group.name.removeprefix("airlock-")
            if number.isdecimal():
                yield int(number)


def held(number: int) -> bool:
    try:
        inode = (_LOCKS / f"{number}.lock").stat().st_ino
    except FileNotFoundError:
        return False
    locks = Path("/proc/locks").read_text().splitlines()
    return any(line.split()[5].endswith(f":{inode}") for line in locks if " FLOCK " in line and "->" not in line)


def copy_home(seed: Path, target: Path) -> Path:
    shutil.copytree(seed, target, ignore=shutil.ignore_patterns("owners", "*-wal", "*-shm"))
    return target
