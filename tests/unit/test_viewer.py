"""The viewer's files: what they are sent with, and what must not be in them."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from orchestrator.server.problems import Problem
from orchestrator.server.routes import viewer

pytestmark = pytest.mark.anyio
PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "orchestrator" / "server" / "viewer"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
PAGES = {"/": "index.html", "/login": "login.html", "/q/20261126-012029-6f505fff19": "query.html"}
ADDRESSES = [*PAGES, *(f"/static/{path.name}" for path in FILES if path.suffix != ".html")]


async def refused(_request: Any, error: Any) -> Any:
    return error.response()


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    app = FastAPI(exception_handlers={Problem: refused})
    app.include_router(viewer.router)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://service") as made:
        yield made


@pytest.mark.parametrize("address", ADDRESSES)
async def test_what_a_file_is_sent_with(client: httpx2.AsyncClient, address: str) -> None:
    answer = await client.get(address)
    assert answer.status_code == 200
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    name = PAGES.get(address, address.rpartition("/")[2])
    assert answer.headers["Content-Type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    assert answer.content == (FOLDER / name).read_bytes()
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        **dict.fromkeys(("script-src", "style-src", "img-src", "connect-src", "form-action"), "'self'"),
        **dict.fromkeys(("base-uri", "frame-ancestors", "trusted-types"), "'none'"),
        "require-trusted-types-for": "'script'",
    }
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert "camera=()" in answer.headers["Permissions-Policy"]
    assert "Set-Cookie" not in answer.headers


async def test_a_file_is_sent_once(client: httpx2.AsyncClient) -> None:
    first = await client.get("/static/style.css")
    for known in (first.headers["ETag"], f'"other", W/{first.headers["ETag"]}', "*"):
        again = await client.get("/static/style.css", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["ETag"] == first.headers["ETag"]
    assert (await client.get("/static/style.css", headers={"If-None-Match": '"other"'})).status_code == 200
    assert (await client.get("/static/dom.js")).headers["ETag"] != first.headers["ETag"]


@pytest.mark.parametrize("address", ADDRESSES)
async def test_its_head_is_that_of_the_file(client: httpx2.AsyncClient, address: str) -> None:
    head, whole = await client.head(address), await client.get(address)
    assert (head.status_code, head.headers) == (200, whole.headers)


@pytest.mark.parametrize(
    "address",
    [
        "/static/",
        "/static/none.js",
        "/static/index.html",
        "/static/..%2fservice.py",
        "/static/%2e%2e/service.py",
        "/static/%2fetc%2fpasswd",
        "/static/style.css%00",
        "/static/STYLE.CSS",
        "/q/",
        "/q/last",
        "/q/20261126-012029-6f505fff19%0a",
        "/q/%D9%A2%D9%A0%D9%A2%D9%A6%D9%A1%D9%A1%D9%A2%D9%A6-012029-6f505fff19",  # digits, but not ours
    ],
)
async def test_nothing_else_is_there(client: httpx2.AsyncClient, address: str) -> None:
    assert (await client.get(address)).status_code == 404


FORBIDDEN = {
    "markup from text": r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|ContextualFragment|srcdoc",
    "a parser": r"DOMParser|XMLSerializer|<template",
    "code from text": r"\beval\b|Function\(|set(Timeout|Interval)\(\s*[\"'`]|javascript:|\bimport\(",
    "style attributes": r"\bstyle\s*=|\.style\b|[\"']style[\"']|cssText|<style",
    "inline handlers": r"\son(?!e\b)[a-z]+\s*=|\.on[a-z]+\s*=|[\"']on[a-z]+[\"']\s*[,:]",
    "somewhere else": r"(?<![:\w])//\w|https?://(?!www\.w3\.org/2000/svg\b)|@import|url\(|window\.open|postMessage|sendBeacon",
    "memory in the browser": r"localStorage|sessionStorage|indexedDB|document\.cookie|serviceWorker",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_sources_have_no(path: Path, what: str) -> None:
    found = re.search(FORBIDDEN[what], path.read_text())
    assert found is None, found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("markup from text", "box.innerHTML = text"),
        ("code from text", 'setTimeout("go()", 1)'),
        ("style attributes", '<p style="color: red">'),
        ("style attributes", "box.style.width = width"),
        ("inline handlers", '<img src=x onerror="go()">'),
        ("inline handlers", "box.onclick = go"),
        ("somewhere else", '<script src="//cdn.example/x.js">'),
    ],
)
def test_what_is_forbidden_would_be_found(what: str, line: str) -> None:
    assert re.search(FORBIDDEN[what], line)


@pytest.mark.parametrize("name", PAGES.values())
def test_a_page_has_no_script_of_its_own(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert re.findall(r"<script([^>]*)>([^<]*)</script>", text) == [
        (f' type="module" src="/static/{ {"index": "queries"}.get(name[:-5], name[:-5]) }.js"', "")
    ]
    for address in re.findall(r"(?:src|href|action)=\"([^\"]*)\"", text):
        assert re.fullmatch(r"#[a-z]+|/|/login|/static/[a-z]+\.(js|css|svg)", address), address


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_modules_are_of_this_folder(path: Path) -> None:
    imported = re.findall(r"from \"([^\"]+)\"", path.read_text())
    assert all(name.startswith("./") and (FOLDER / name).is_file() for name in imported)


def test_links_are_made_of_checked_ids_alone() -> None:
    """Where an address is put into the page, it is one of these."""
    made = [
        found.strip()
        for path in SCRIPTS
        for found in re.findall(r"(?:\bhref: |\.href = |location\.(?:assign|replace)\()(.*)", path.read_text())
    ]
    assert sorted(made) == sorted(
        [
            "`/login?next=${encodeURIComponent(location.pathname)}`);",
            '"/login");',
            "`/q/${id}`);",
            "next());",
            'address("/", { status: filter });',
            'address("/", { status: filter, cursor: next });',
            'address("/", { status: place("status").value })));',
            "`/q/${id}` });",
            '`/v1/audit/queries/${this.id}/export`, download: `${this.id}.tar` }, "Export"));',
        ]
    )


def test_the_wheel_has_them(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("orchestrator/server/viewer/")}
    assert packed == {f"orchestrator/server/viewer/{path.name}" for path in FILES}
