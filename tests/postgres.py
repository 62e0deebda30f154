"""A real PostgreSQL server for tests: Debian's, in a temporary folder, on a Unix socket, with fsync on.

It ends with the process that started it, whatever becomes of that.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

import psycopg

from tests.command import until

ROLE = "airlock"  # has to give PASSWORD; everyone else on this socket is trusted
PASSWORD = "pass:wörd/%"  # noqa: S105  with what an address has to quote
_FOLDERS = "/usr/lib/postgresql"


def programs() -> Path:
    """The newest version's folder. `make test` installs it (deploy/setup.sh)."""
    found = sorted(Path(_FOLDERS).glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    assert found, f"there is no PostgreSQL in {_FOLDERS}: run `bash deploy/setup.sh tests`"
    return found[-1].parent


class Postgres:
    """A context manager: the server runs from `with` on, and nothing of it is left after."""

    def __enter__(self) -> Self:
        self._user = "postgres" if os.geteuid() == 0 else getpass.getuser()  # it refuses to run as root
        self.folder = Path(tempfile.mkdtemp(prefix="airlock-postgres-"))
        shutil.chown(self.folder, self._user)
        self._count = 0
        try:
            self._initialise()
            self.start()
            self.admin(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_process"):
            self.stop()
        shutil.rmtree(self.folder)

    def _initialise(self) -> None:
        options = ["--auth=trust", "--encoding=UTF8", "--username=postgres", "--no-sync", "--no-instructions"]
        # A language's collation, as on most servers: what depends on bytes has to say so.
        self._run(
            "initdb",
            f"--pgdata={self.folder}/data",
            "--locale=C.UTF-8",
            "--icu-locale=en-US",
            "--locale-provider=icu",
            *options,
        )
        rules = self.folder / "data" / "pg_hba.conf"
        rules.write_text(f"local all {ROLE} scram-sha-256\nlocal all all trust\n")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._as_user, programs() / program, *arguments], capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stderr

    @property
    def _as_user(self) -> list[str]:
        entry = pwd.getpwnam(self._user)
        if os.geteuid() != 0:
            return ["setpriv", "--pdeathsig=QUIT"]
        return ["setpriv", "--pdeathsig=QUIT", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]

    def start(self) -> None:
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.folder), "max_connections": "200"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [*self._as_user, programs() / "postgres", "-D", f"{self.folder}/data", *options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """At once, as a crash would: sessions end in the middle of what they do."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(20)

    def url(self, database: str, user: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def admin(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run as the server's superuser; the rows, if there are any."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def fresh(self, template: str = "template0") -> str:
        """The name of a new database."""
        self._count += 1
        name = f"fresh{self._count}"
        self.admin(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        self.admin(f"DROP DATABASE {name} WITH (FORCE)")
