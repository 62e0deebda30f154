"""What the tests of the store run on: a file of SQLite, and a database of a real PostgreSQL server."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from orchestrator.store.db import Database
from tests.postgres import Postgres
from tests.unit.exported import Ran, ran
from tests.unit.helpers import Store, fill


@pytest.fixture(scope="session")
def template(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database whose migrations are run, to be copied."""
    name = postgres.fresh()
    Database(tmp_path_factory.mktemp("home"), postgres.url(name)).close()
    return name


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ran]]:
    """Queries that ran, to be exported."""
    yield from ran(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def sqlite(tmp_path: Path) -> Store:
    """An empty database; its migrations are run once for all tests."""
    fill(tmp_path)
    return Store(tmp_path)


@pytest.fixture
def postgresql(tmp_path: Path, postgres: Postgres, template: str) -> Iterator[Store]:
    name = postgres.fresh(template)
    yield Store(tmp_path, postgres.url(name), postgres)
    postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> Store:
    """Both, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def db(store: Store) -> Iterator[Database]:
    made = store.open()
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was captured may hold half a character, which a worker of xdist cannot send."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report
