"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.errors import SandboxUnusable
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.docker import engine
from orchestrator.sandbox.registry import NAMES, build_image, make_backend
from orchestrator.settings import docker_socket
from tests.postgres import Postgres
from tests.security.table import render

REQUIRED = [name for name in os.environ.get("AIRLOCK_REQUIRE_BACKENDS", "").split(",") if name]
# Tests end programs by these, which inherit that whoever started the tests has them ignored (nohup, cron).
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
assert set(REQUIRED) <= set(NAMES), f"AIRLOCK_REQUIRE_BACKENDS names what is no backend: {REQUIRED}"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def _no_file_leaves_its_mark_on_the_process() -> Iterator[None]:
    """Which files share a process, and in which order, is chance."""
    before = of_the_process()
    yield
    for what, now in of_the_process().items():
        assert now == before[what]


def of_the_process() -> dict[str, Any]:
    """What tests change for their own sake, and have to put back. The alarm is pytest-timeout's."""
    umask = os.umask(0)
    os.umask(umask)
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    loggers = [logging.getLogger(name) for name in (None, "airlock", "uvicorn", "uvicorn.error", "orchestrator")]
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "folder": Path.cwd(),
        "umask": umask,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals() if number != signal.SIGALRM},
        "hooks": hooks,
        "logging": [(log.level, log.propagate, log.disabled, log.handlers[:]) for log in loggers],
    }


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for all tests: the agent is packed and the filter compiled once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server. It is never skipped: what is said of both databases is tried on both."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def image(home: Path) -> Iterator[str]:
    """The containers' image, built once. An engine that is absent is a failure where it is required."""
    with built(home, "python") as made:
        yield made


@contextmanager
def built(home: Path, name: str) -> Iterator[str]:
    try:
        made = build_image(home, name, offline=True, say=lambda _text: None)
    except SandboxUnusable as error:
        if set(REQUIRED) - {"bubblewrap"}:
            raise
        pytest.skip(str(error))
    yield made
    with engine(docker_socket()) as api:
        api.remove_image(made, force=True)  # by its digest: that of another session stays


@pytest.fixture(scope="session", params=[name for name in NAMES if name != "kata" or name in REQUIRED])
def backend(request: pytest.FixtureRequest, home: Path) -> Iterator[Backend]:
    """Every backend there is; kata, which few machines can have, where it is required."""
    if request.param != "bubblewrap":
        request.getfixturevalue("image")
    made = make_backend(request.param, least="namespace", home=home)
    try:
        made.require_usable()
    except SandboxUnusable as error:
        if request.param in REQUIRED:
            raise
        pytest.skip(str(error))
    yield made
    made.close()


_outcomes: dict[tuple[str, str, str], str] = {}


# Here, for the process that xdist's workers report to reads no other file of tests.
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for key, value in report.user_properties:
        if key == "containment":
            group, name, backend, word = json.loads(str(value))
            _outcomes[group, name, backend] = word


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _outcomes:
        terminalreporter.section("containment: attack by backend")
        terminalreporter.write_line(render(_outcomes))
