"""The guest's view of a context gives what a plain str, list or JSON value would give."""

from __future__ import annotations

import json
import re
import tracemalloc
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.guest.context import LazyList, form, load
from orchestrator.guest.lazytext import LazyText
from orchestrator.store.contexts import ContextStore

# Few characters, so that searches hit; line ends of every kind; 1 to 4 bytes; NUL.
ALPHABET = "ab \n\r\t\x0b\x1c\x85\u2028é€😀\0"
texts = st.one_of(st.text(ALPHABET, max_size=60), st.text("ab\n ", max_size=60), st.text(max_size=40))
subs = st.text("ab \né€😀", max_size=3)
offsets = st.none() | st.integers(-70, 70)
strides = st.integers(1, 9)


def lazy(text: str, stride: int = 4, window: int = 5, overlap: int = 30, limit: int = 1 << 20) -> LazyText:
    data = text.encode()
    index = [len(text[:at].encode()) for at in range(0, len(text), stride)]
    ascii_only = len(data) == len(text)
    view = memoryview(b"<<" + data + b">>")[2:-2]
    return LazyText(view, len(text), None if ascii_only else index, stride, limit, window, overlap)


def outcome(call: Any) -> Any:
    """The result, or the error's type: both sides have to agree on either."""
    try:
        return call()
    except (TypeError, ValueError, IndexError) as error:
        return type(error)


@given(texts, strides, strides, offsets, offsets, st.none() | st.integers(-4, 4).filter(bool))
def test_slices_and_items(text: str, stride: int, window: int, start: int | None, end: int | None, step: int | None):
    view = lazy(text, stride, window)
    assert len(view) == len(text)
    assert str(view) == text
    assert list(view) == list(text)
    assert view[start:end:step] == text[start:end:step]
    assert outcome(lambda: view[start or 0]) == outcome(lambda: text[start or 0])


@given(texts, strides, strides, subs, offsets, offsets)
def test_searching_for_a_str(text: str, stride: int, window: int, sub: str, start: int | None, end: int | None):
    view = lazy(text, stride, window)
    for name in ("find", "rfind", "index", "rindex", "count", "startswith", "endswith"):
        for bounds in ((), (start,), (start, end)):
            call = methodcaller(name, sub, *bounds)
            assert outcome(lambda: call(view)) == outcome(lambda: call(text)), name  # noqa: B023 - called at once
    assert view.startswith((sub, "a")) == text.startswith((sub, "a"))
    assert view.endswith((sub, "a")) == text.endswith((sub, "a"))
    assert (sub in view) == (sub in text)


@given(texts, strides, strides, st.none() | subs, st.integers(-1, 3), st.booleans())
def test_taking_apart(text: str, stride: int, window: int, sep: str | None, maxsplit: int, keepends: bool):
    view = lazy(text, stride, window, overlap=60)
    assert list(view.splitlines(keepends)) == text.splitlines(keepends)
    assert outcome(lambda: list(view.split(sep, maxsplit))) == outcome(lambda: text.split(sep, maxsplit))


PATTERNS = [
    "a", "", "a*", "|a", "a|", "b??", r"\b", r"\B", r"\w+", r"\s", "^", "$", "(?m)^", "(?m)$", r"\A.", r".\Z",
    "(?m)^a.?$", "(?<=a)b", "(?<!a)b", "(?<=b\n)a", "a(?=b)", "a(?!b)", r"(a)(b)?", r"(?P<x>[ab])(?P<y>\s)?", r"(.)\1",
    "é|€",    "(?i)É", ".", "(?s).", "[^a]", r"(?=(ab))", "(?:ab|a)(?:b|\n)?", "\0",
]  # fmt: skip


def facts(match: Any) -> Any:
    numbers = range(len(match.groups()) + 1)
    return (
        match.group(), match.groups(), match.groups("-"), match.groupdict(), match.span(), match.start(), match.end(),
        [match.span(number) for number in numbers], [match[number] for number in numbers], match.lastgroup,
        match.group(*numbers), [match.start(name) for name in match.groupdict()],
    )  # fmt: skip


@given(texts, strides, strides, st.sampled_from(PATTERNS), st.integers(-3, 70))
@settings(max_examples=400)
def test_regular_expressions(text: str, stride: int, window: int, pattern: str, pos: int):
    view, regex = lazy(text, stride, window, overlap=60), re.compile(pattern)
    assert [facts(match) for match in view.finditer(pattern)] == [facts(match) for match in regex.finditer(text)]
    assert [facts(match) for match in view.finditer(regex, pos)] == [
        facts(match) for match in regex.finditer(text, pos)
    ]
    assert view.findall(pattern) == regex.findall(text)
    ours, theirs = view.search(pattern, pos), regex.search(text, pos)
    assert (ours and facts(ours)) == (theirs and facts(theirs))


@given(
    st.text("ab\né", max_size=80), st.integers(3, 9), st.sampled_from(["a", "ab?", "(?m)^a", "(?<=b)a", "a$", "b(?!a)"])
)
def test_regular_expressions_across_narrow_windows(text: str, overlap: int, pattern: str):
    view = lazy(text, window=2, overlap=overlap)
    assert [match.span() for match in view.finditer(pattern)] == [match.span() for match in re.finditer(pattern, text)]


def test_flags_go_by_name():
    assert lazy("xA").search("a", flags=re.IGNORECASE).start() == 1  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(TypeError, match=r"flags=re\.I"):
        lazy("xA").search("a", re.IGNORECASE)


def test_a_match_longer_than_the_overlap_is_refused():
    with pytest.raises(ValueError, match="longer than 3"):
        list(lazy("aaaaaa", overlap=3).finditer("a+"))


def test_a_match_does_not_keep_its_window():
    view = lazy("needle " + "x" * 1_000_000, stride=1 << 20, window=1 << 20, overlap=1 << 20)
    tracemalloc.start()
    match = view.search("needle")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert match is not None
    assert kept < 100_000


def test_too_large_for_a_str_is_a_memory_error_with_advice():
    view = lazy("é" * 500, limit=1000)
    for call in (lambda: str(view), lambda: view[:], lambda: f"{view}", lambda: list(view.splitlines())):
        with pytest.raises(MemoryError, match="at most 250 characters"):
            call()
    with pytest.raises(MemoryError, match="at most 250"):
        list(view.split("x"))
    assert view[100:350] == "é" * 250
    assert view[::-5] == "é" * 100
    assert repr(view).startswith("<LazyText of 500 characters")


def test_other_methods_of_str_are_refused_with_advice():
    view = lazy("abc")
    with pytest.raises(TypeError, match=r"context\[a:b\].lower\(\)"):
        view.lower()
    with pytest.raises(AttributeError):
        _ = view.no_such_method
    for call in (lambda: 1 in view, lambda: view.find(1), lambda: view.startswith(b"a"), lambda: view.split(1)):  # pyright: ignore
        with pytest.raises(TypeError):
            call()
    assert "\ud800" not in view


def attached(context: Any, tmp_path: Path) -> str:
    slot = tmp_path / "slot"
    slot.mkdir(exist_ok=True)
    for name, path in context.files.items():
        (slot / name).unlink(missing_ok=True)
        (slot / name).hardlink_to(path)
    return str(slot)


BIG, SMALL = 1 << 30, 4000


@pytest.mark.parametrize("text", ["plain\r\n" * 200, "é€😀\n" * 200, "\ufeffx" * 300])
def test_text(tmp_path: Path, text: str):
    folder = attached(ContextStore(tmp_path, stride=16).ingest_value(text), tmp_path)
    assert load(folder, BIG) == text
    view: Any = load(folder, SMALL)
    assert isinstance(view, LazyText)
    assert view[100:200] == text[100:200]
    assert view.rfind("\n") == text.rfind("\n")


JSON_VALUES: list[list[Any]] = [
    [{"id": number, "text": f"a, [b] {number}", "more": [1, [2, "},{"]]} for number in range(300)],
    [f"é,{number}" for number in range(500)],
    list(range(1000)),
    [[], {}, None, True, 1.5, "x, y", ",", '"', "\\,"] * 60,
    [[1, 2, 3] * 50] * 20,
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", JSON_VALUES)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_lists_of_json(tmp_path: Path, value: list[Any], suffix: str, indent: int | None):
    source = tmp_path / f"source{suffix}"
    ending = "\n" if indent else ""
    source.write_text(
        json.dumps(value, ensure_ascii=False, indent=indent) + ending
        if suffix == ".json"
        else "\n".join(map(json.dumps, value)) + ending
    )
    folder = attached(ContextStore(tmp_path / "store", stride=64).ingest(source), tmp_path)
    assert load(folder, BIG) == value
    items: Any = load(folder, 39 * Path(folder, "data").stat().st_size)
    assert isinstance(items, LazyList)
    assert len(items) == len(value)
    assert list(items) == value
    assert [items[-1], items[0], items[7], items[5]] == [value[-1], value[0], value[7], value[5]]
    assert items[3:9:2] == value[3:9:2]
    assert items[9:3:-1] == value[9:3:-1]
    assert items[5:2] == []
    assert value[4] in items
    with pytest.raises(IndexError):
        items[len(value)]
    with pytest.raises(MemoryError, match="iterate"):
        load(folder, 10_000)[:]  # pyright: ignore
    with pytest.raises(MemoryError, match="too large to parse"):
        load(folder, 50)[0]  # pyright: ignore


def test_a_large_json_dict_is_its_text(tmp_path: Path):
    value = {f"key {number}": number for number in range(500)}
    folder = attached(ContextStore(tmp_path, stride=64).ingest_value(value), tmp_path)
    assert load(folder, BIG) == value
    view = load(folder, SMALL)
    assert isinstance(view, LazyText)
    assert json.loads(str(lazy(json.dumps(value)))) == value
    assert view.find('"key 499"') > 0
    size = Path(folder, "data").stat().st_size
    assert isinstance(load(folder, 39 * size), LazyText)  # as a text it would fit


def test_documents(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    documents = [{"path": f"{number:02}.txt", "text": f"é{number}\n" * number * 30} for number in range(20)]
    for document in documents:
        (source / document["path"]).write_text(document["text"])
    folder = attached(ContextStore(tmp_path / "store", stride=16).ingest(source), tmp_path)
    assert load(folder, BIG) == documents
    items: Any = load(folder, 40_000)
    assert isinstance(items, LazyList)
    assert len(items) == 20
    assert items[1] == documents[1]
    assert items[1:3] == documents[1:3]
    large = items[-1]["text"]
    assert isinstance(large, LazyText)
    assert large[500:700] == documents[-1]["text"][500:700]
    assert large.count("é19\n") == 570
    with pytest.raises(MemoryError):
        items[:]


def test_form_is_decided_by_what_the_value_takes_in_memory():
    assert form("text", 100, 100, None, 800) == "plain"
    assert form("text", 101, 101, None, 800) == "lazy"
    assert form("text", 100, 99, None, 800) == "lazy"
    assert form("documents", 100, 100, 1, 800) == "lazy"
    assert form("json", 100, 100, None, 4000) == "plain"
    assert form("jsonl", 101, 101, 1, 4000) == "lazy"
