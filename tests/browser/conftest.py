"""One real browser and one real service for all tests here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.command import Airlock
from tests.service import Served, served
from tests.visits import Visit, visiting

HERE = Path(__file__).parent


# Of the package, not of the session: while Playwright's loop is there, no other can be in this thread.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    keeps = {"args": [*sandbox, "--enable-features=BackForwardCache"]}  # pages as they were, as people's browsers do
    without = ["--disable-back-forward-cache"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", ignore_default_args=without, **keeps)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("service")
    airlock, script = Airlock(folder / "home", folder), (HERE / "reports.scripted.yaml").read_text()
    config = f'[prices]\n"scripted:{folder / "script.yaml"}" = [3, 15]\n'
    with served(airlock, "--policy", "development", script=script, config=config) as server:
        yield server
    airlock.nothing_left()


@pytest.fixture
def visit(chromium: Browser, service: Served) -> Iterator[Visit]:
    with visiting(chromium, service, viewport={"width": 1280, "height": 900}) as made:
        yield made


@pytest.fixture(scope="package")
def key(service: Served) -> str:
    return service.key("acme")
