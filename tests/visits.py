"""A person's browser on the service, and what no page may ever do, looked at after each visit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

from tests.service import Served

SHOTS = Path(__file__).parents[1] / "bench-results" / "screenshots"
LINGER, PAUSE = "linger", "\npause"  # at a context's end: the first cell takes its time, so that it is seen to run
CONTEXT = "\n\n".join(f"report {n}: on day {n} all was {'down' if n in (1, 7, 12) else 'well'}" for n in range(40))
WATCH = """
    window.violations = [];
    addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@dataclass
class Visit:
    """A page, and what it did that it must not."""

    page: Page
    service: Served
    faults: list[str] = field(default_factory=list[str])

    def go(self, address: str) -> None:
        self.page.goto(self.service.url + address)

    def log_in(self, key: str, address: str = "/") -> None:
        self.go(address)
        self.page.wait_for_url(re.compile("/login"))  # and its script: without one, a form leads to the first page
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url(self.service.url + address)

    def ask(self, question: str, context: str = CONTEXT) -> str:
        """By the form; the query's id."""
        self.page.get_by_role("button", name="New query").click()
        return self.send(question, context)

    def send(self, question: str, context: str = CONTEXT) -> str:
        """With the form that is open."""
        form = self.page.get_by_role("dialog")
        form.get_by_label("Question").fill(question)
        form.get_by_label("Text of the context").fill(context)
        form.get_by_role("button", name="Ask").click()
        self.page.wait_for_url(re.compile(r"/q/"))
        return self.page.url.rpartition("/")[2]

    def turn(self, number: int) -> Locator:
        """Of the root."""
        return self.page.get_by_role("article", name=f"Turn {number}", exact=True)

    def ends(self, status: str) -> None:
        expect(self.page.locator("#status")).to_have_text(status, timeout=20_000)

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def require_narrow(self) -> None:
        """That nothing is wider than the page."""
        width: int = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= self.page.viewport_size["width"]  # type: ignore[index]

    def watch(self) -> None:
        page, origin = self.page, self.service.url

        def wrong(what: str) -> Callable[[Any], None]:
            return lambda told: self.faults.append(f"{what}: {getattr(told, 'text', told)}")

        def requested(request: Any) -> None:
            if not request.url.startswith((f"{origin}/", f"blob:{origin}/")):
                self.faults.append(f"asked elsewhere: {request.url}")

        page.on("pageerror", wrong("error"))
        page.on("dialog", wrong("dialog"))
        page.on("request", requested)
        page.on("popup", wrong("popup"))
        page.on("console", lambda told: "Content Security Policy" in told.text and wrong("console")(told))
        page.add_init_script(WATCH)

    def require_harmless(self) -> None:
        assert self.faults == []
        assert self.page.evaluate("[window.pwned ?? null, window.violations]") == [None, []]
        assert self.page.locator("main script, main img, main iframe, main a[href^='javascript:']").count() == 0


@contextmanager
def visiting(browser: Browser, service: Served, **options: Any) -> Iterator[Visit]:
    context = browser.new_context(**options)
    context.set_default_timeout(15_000)
    visit = Visit(context.new_page(), service)
    visit.watch()
    yield visit
    visit.require_harmless()
    context.close()
