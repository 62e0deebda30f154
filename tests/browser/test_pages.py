"""What a person does with the viewer, and what a hostile text cannot."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from orchestrator.named_policy import load_policy
from orchestrator.store.db import Database
from orchestrator.store.journal import key_created
from orchestrator.store.registry import Registry
from orchestrator.store.signing import Notary
from orchestrator.store.vault import open_vault
from tests.service import Served
from tests.visits import CONTEXT, LINGER, PAUSE, Visit, visiting

PHONE = {"width": 320, "height": 640}
HOSTILE = "<script>window.pwned = 'question'</script> \u202e\u2066<img src=x onerror='window.pwned=1'> which one?"


@pytest.fixture(scope="package")
def answered(chromium: Browser, service: Served, key: str) -> str:
    """A query that has run to its answer, with a hostile question."""
    with visiting(chromium, service) as visit:
        visit.log_in(key)
        query = visit.ask(HOSTILE)
        visit.ends("answered")
        return query


def test_a_key_that_is_not_good_is_told(visit: Visit):
    visit.go("/q/20261126-012029-6f505fff19")  # of nobody who has logged in
    page = visit.page
    page.wait_for_url(re.compile(r"/login\?next="))
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("al_aaaaaaaaaaaa_" + "A" * 49)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not good")
    expect(page.get_by_label("API key")).to_be_focused()
    visit.shot("login-refused")


def test_the_way_back_is_never_elsewhere(visit: Visit, key: str):
    for elsewhere in ("https://elsewhere.invalid/", "//elsewhere.invalid", "javascript:window.pwned=1", "/q/../login"):
        visit.page.goto("about:blank")  # nothing of the page before is under way then
        visit.page.context.clear_cookies()
        visit.go(f"/login?next={elsewhere}")
        visit.page.get_by_label("API key").fill(key)
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_url(visit.service.url + "/")


def test_a_query_from_the_question_to_the_answer(visit: Visit, key: str):
    page = visit.page
    visit.log_in(key)
    visit.shot("list-empty")
    visit.ask("Which reports speak of an outage?", CONTEXT + PAUSE)
    expect(page.locator("#status")).to_have_text("running turn 1")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(1)
    expect(visit.turn(2)).to_be_visible()
    visit.ends("answered")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(page.get_by_role("article")).to_have_count(4)
    expect(page.get_by_role("region", name="Answer")).to_contain_text("Billing was hit hardest.")
    second = visit.turn(2)
    expect(second.get_by_text("14 sub-calls")).to_be_visible()
    expect(second.locator(".code .py-ours", has_text="llm_query_batched")).to_have_count(1)
    expect(second.get_by_label("output")).to_contain_text("outages in [1, 7, 12]")
    expect(page.get_by_role("meter", name="Money")).to_have_attribute("aria-valuetext", re.compile(r"^\$0\.\d+ of \$"))
    # A sub-call opens to what was asked and what was said.
    first = second.locator("details.call").nth(1)
    first.locator("summary").click()
    expect(first.get_by_label("prompt")).to_contain_text("report 1: on day 1 all was down")
    expect(first.get_by_label("completion")).to_contain_text("billing was away")
    # There are more of them than are shown at first.
    expect(second.locator("details.call:not(.child)")).to_have_count(8)
    second.get_by_role("button", name="Show 6 more").click()
    expect(second.locator("details.call:not(.child)")).to_have_count(14)
    # The child query is a tree of its own, which the outline leads to.
    page.get_by_role("complementary").get_by_role("button", name=re.compile("^root.1 ")).click()
    child = page.locator("details.child").first
    expect(child.get_by_role("article", name="root.1, turn 1", exact=True)).to_contain_text("Cell 1")
    visit.shot("query-opened")
    # And it is in the list.
    page.get_by_role("link", name="Queries").click()
    row = page.get_by_role("row", name=re.compile("Which reports speak of an outage"))
    expect(row).to_contain_text("answered")
    visit.shot("list")
    page.get_by_label("Status").select_option("cancelled")
    expect(page.get_by_text("No query is cancelled.")).to_be_visible()


def test_a_query_is_cancelled(visit: Visit, key: str):
    page = visit.page
    visit.log_in(key)
    visit.ask("Will this end?", LINGER)
    expect(visit.turn(1)).to_contain_text("Cell 1 running")
    expect(page.get_by_role("meter", name="Money")).to_have_attribute("aria-valuetext", re.compile("held"))
    visit.shot("query-running")
    page.get_by_role("button", name="Cancel").click()
    visit.ends("cancelled")
    expect(page.get_by_role("region", name="Answer")).to_contain_text("There is no answer.")
    # In a list that is open meanwhile it is seen to end as well.
    other = page.context.new_page()
    visit.go("/")
    page.get_by_role("button", name="New query").wait_for()
    query = visit.ask("And this?", LINGER)
    other.goto(visit.service.url)
    row = other.get_by_role("row", name=re.compile(r"And this\?"))
    expect(row).to_contain_text(re.compile("running|queued"))
    page.get_by_role("button", name="Cancel").click()
    expect(row).to_contain_text("cancelled", timeout=10_000)
    assert page.url.endswith(query)


def test_hostile_text_stays_text(visit: Visit, key: str, answered: str):
    """Question, reply, code, output, error, sub-call and answer; the rest is looked at after every test."""
    page = visit.page
    visit.log_in(key, f"/q/{answered}")
    visit.ends("answered")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_have_text(HOSTILE.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066"))
    expect(page).to_have_title(re.compile(re.escape("</script> \\u202e")))
    assert not {"\u202e", "\u2066"} & set(page.title())
    third = visit.turn(3)
    expect(third.get_by_label("reply")).to_contain_text("</pre></article><script>window.pwned")
    output = third.get_by_label("output")
    expect(output).to_contain_text("\\u202eright to left\\u202c \\x1b[31mred\\x1b[0m \\x00 \\u2028")
    assert output.locator(".escape").count() == 6
    expect(third.get_by_label("errors")).to_contain_text("<svg onload='window.pwned = 1'>")
    expect(third.get_by_label("errors")).to_contain_text("ValueError: <iframe srcdoc=")
    expect(page.get_by_role("region", name="Answer")).to_contain_text(
        '<a href="javascript:window.pwned=1">read more</a>'
    )
    page.locator("details.call summary").nth(1).click()
    expect(page.get_by_label("completion")).to_contain_text("<img src=x onerror=")
    # What was too long for the page is brought when it is asked for.
    before = output.evaluate("(element) => element.textContent.length")
    third.get_by_role("button", name=re.compile("Show all")).click()
    expect(third.get_by_role("button", name=re.compile("Show all"))).to_have_count(0)
    assert before < 9000 * 5 < output.evaluate("(element) => element.textContent.length")
    third.get_by_text("Sent to the model").click()
    expect(third.get_by_label("message").first).to_be_visible()
    # Every link is one of ours.
    links = page.locator("a").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))")
    assert set(links) == {"#timeline", "/", f"/v1/audit/queries/{answered}/export"}
    page.locator("details.child summary").first.click()
    expect(page.get_by_role("article", name="root.1, turn 3", exact=True)).to_contain_text("<script>window.pwned")
    visit.shot("query-hostile")
    visit.go("/")
    expect(page.get_by_role("row", name=re.compile("which one"))).to_contain_text("<script>window.pwned")


def test_the_name_of_a_file_is_hostile_too(visit: Visit, key: str, tmp_path: Path):
    page = visit.page
    file = tmp_path / "<img src=x onerror=window.pwned=1>\u202e.txt"
    file.write_text("report 1: all was down\n" * 500_000)  # more than is sent at once
    visit.log_in(key)
    page.get_by_role("button", name="New query").click()
    form = page.get_by_role("dialog")
    form.get_by_label("Question").fill("And in this file?")
    form.get_by_role("radio", name="File").check()
    form.get_by_label("File of the context").set_input_files(file)
    form.get_by_role("button", name="Ask").click()
    page.wait_for_url(re.compile(r"/q/"))
    visit.ends("answered")
    expect(page.get_by_text("text, 12 MB")).to_be_visible()
    with visit.service.client() as client:
        names = [context["name"] for context in client.get("/v1/contexts").json()["contexts"]]
    assert "<img src=x onerror=window.pwned=1>_.txt" in names
    expect(visit.turn(1).get_by_label("output")).to_contain_text("11500000 characters")


def test_a_question_that_is_refused_says_why(visit: Visit, key: str):
    page = visit.page
    visit.log_in(key)
    page.get_by_role("button", name="New query").click()
    form = page.get_by_role("dialog")
    form.get_by_label("Question").fill("How much?")
    form.get_by_role("button", name="Ask").click()
    expect(form.get_by_role("alert")).to_contain_text("Paste a text")
    form.get_by_label("Text of the context").fill("some")
    form.get_by_label("Budget").fill("0.000001")
    form.get_by_role("button", name="Ask").click()
    expect(form.get_by_role("alert")).to_contain_text("0.000001 USD")
    visit.shot("ask-refused")


def test_the_models_are_those_of_the_service(visit: Visit, key: str):
    page = visit.page
    visit.log_in(key)
    page.get_by_role("button", name="New query").click()
    model = f"scripted:{visit.service.airlock.folder / 'script.yaml'}"
    page.get_by_label("Model").select_option(model)
    visit.send("By which model?")
    expect(page.get_by_text(f"model {model}")).to_be_visible()
    visit.ends("answered")


def test_the_journal_is_asked(visit: Visit, key: str, answered: str, tmp_path: Path):
    page = visit.page
    visit.log_in(key, f"/q/{answered}")
    badge = page.get_by_text("Journal verified")
    badge.click()
    for name in ("integrity", "append-only", "completeness", "payloads"):
        expect(page.locator("#verdict")).to_contain_text(f"holds {name}")
    page.get_by_role("button", name="Replay").click()
    expect(page.locator("#replay")).to_contain_text("the same", timeout=30_000)
    expect(page.locator("#replay")).to_contain_text(re.compile(r"[0-9]+ cells again: [0-9]+ the same, 0 different"))
    visit.shot("query-replayed")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    download.value.save_as(tmp_path / "export.tar")
    with tarfile.open(tmp_path / "export.tar") as archive:
        assert archive.getnames()


def test_by_the_keyboard_alone(visit: Visit, key: str, answered: str):
    page = visit.page
    visit.go("/")
    page.wait_for_url(re.compile("/login"))
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    page.wait_for_url(visit.service.url + "/")
    page.get_by_role("row", name=re.compile("which one")).wait_for()
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the queries")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    visit.go(f"/q/{answered}")
    expect(page.get_by_role("article")).to_have_count(4)
    for keys, turn in (("j", 1), ("j", 2), ("ArrowDown", 3), ("k", 2), ("ArrowUp", 1), ("k", 1)):
        page.keyboard.press(keys)
        expect(visit.turn(turn)).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).boxShadow")
    assert outline != "none"
    page.keyboard.press("j")
    for _ in range(12):  # from the turn to its first sub-call, which opens and closes
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.calls') !== null"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("details.call[open]")).to_have_count(1)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("details.call[open]")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "size"), [("desk", {"width": 1280, "height": 900}), ("phone", PHONE)])
def test_how_it_looks(chromium: Browser, service: Served, key: str, answered: str, scheme: str, name: str, size: dict):
    with visiting(chromium, service, viewport=size, color_scheme=scheme, reduced_motion="reduce") as visit:
        page = visit.page
        visit.go("/login")
        visit.require_narrow()
        visit.shot(f"login-{name}-{scheme}")
        visit.log_in(key)
        page.get_by_role("row", name=re.compile("which one")).wait_for()
        visit.require_narrow()
        visit.shot(f"list-{name}-{scheme}")
        page.get_by_role("button", name="New query").click()
        visit.require_narrow()
        visit.shot(f"ask-{name}-{scheme}")
        visit.go(f"/q/{answered}")
        visit.ends("answered")
        page.get_by_text("Journal verified").click()
        page.locator("details.child summary").first.click()
        page.locator("details.child details.call summary").first.click()
        visit.require_narrow()
        visit.shot(f"query-{name}-{scheme}")
        back, text = page.evaluate(
            "[document.documentElement, document.querySelector('#status .status')]"
            ".map((one) => getComputedStyle(one)).map((style, i) => i ? style.animationName : style.backgroundColor)"
        )
        assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == (scheme == "dark")
        assert text == "none"


def test_a_session_ends_with_its_key(visit: Visit, key: str):
    page = visit.page
    visit.log_in(key)
    cookie = next(one for one in page.context.cookies() if one["name"].endswith("airlock"))
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"], cookie["path"]) == (True, True, "Strict", "/")
    assert key not in cookie["value"]
    assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]
    # Without the session's token nothing is changed, not even by a page of ours.
    sent = "fetch('/v1/queries', {method: 'POST', body: '{}', headers: {'Content-Type': 'application/json'}})"
    assert page.evaluate(f"{sent}.then((answer) => answer.status)") == 403
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(re.compile("/login"))
    assert page.context.cookies() == []
    assert page.evaluate("fetch('/v1/session').then((answer) => answer.status)") == 401


def test_the_way_back_after_logging_out_shows_nothing_of_before(visit: Visit, key: str, answered: str):
    page = visit.page
    visit.log_in(key, f"/q/{answered}")
    visit.ends("answered")
    page.evaluate(
        """addEventListener("pageshow", ({ persisted }) => {
            sessionStorage.setItem("back", JSON.stringify([persisted, document.body.checkVisibility()]));
        })"""
    )
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(re.compile("/login"))
    page.go_back(wait_until="commit")
    page.wait_for_url(re.compile(r"/login\?next="))
    assert page.evaluate("sessionStorage.getItem('back')") == "[true,false]"  # the page as it was, and unseen
    assert "which one" not in page.content()


def test_what_is_not_kept_is_said_to_be(visit: Visit, service: Served):
    visit.log_in(service.key("forgetful"))
    policy = load_policy("development")
    with registry(service) as tenants:
        kept = policy.audit.model_copy(update={"payloads": ()})
        tenants.set_policy("forgetful", policy.model_copy(update={"audit": kept}), by="a test")
    visit.ask("A question that nobody keeps?")
    visit.ends("answered")
    page = visit.page
    expect(page.get_by_role("heading", level=1)).to_have_text("Question: not kept")
    expect(page.get_by_role("region", name="Answer")).to_contain_text("The answer: not kept")
    second = visit.turn(2)
    for what in ("The reply: not kept", "The code: not kept", "output: not kept", "errors: not kept"):
        expect(second.get_by_text(what)).to_be_visible()
    second.locator("details.call summary").first.click()
    expect(second.locator("details.call").first).to_contain_text("The prompt: not kept")
    expect(second.locator("details.call").first).to_contain_text("The completion: not kept")
    assert "nobody keeps" not in page.content()


@contextmanager
def registry(service: Served) -> Iterator[Registry]:
    """Beside the service, as the command line has it."""
    home = service.airlock.home
    db = Database(home)
    try:
        vault = open_vault(db, home, None, key_created)
        yield Registry(db, vault, Notary(vault.signer(), home / "heads", vault.stamp))
    finally:
        db.close()


def test_another_tenants_query_is_not_there(visit: Visit, service: Served, answered: str):
    visit.log_in(service.key("other"), f"/q/{answered}")
    expect(visit.page.get_by_role("alert")).to_have_text("there is no such query")
    assert "which one" not in visit.page.content()
