"""The context store: what comes in is checked, kept once, described without its text, and verified."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import ContextError, StoreError
from orchestrator.store.contexts import ContextStore
from orchestrator.store.drafts import Draft
from orchestrator.store.readers import CHUNK, Meter, read_json_lines


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    return ContextStore(tmp_path / "store", stride=16)


def written(tmp_path: Path, data: bytes, name: str = "source.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def data_of(context: Any) -> bytes:
    return context.files["data"].read_bytes()


def facts_of(context: Any) -> dict[str, Any]:
    return json.loads(context.files["manifest.json"].read_bytes())


def refused(call: Any) -> str:
    with pytest.raises(ContextError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def files_in(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "store").rglob("*") if path.is_file())


def test_a_text_is_kept_as_it_is(store: ContextStore, tmp_path: Path):
    text = "\ufeffGrüße\r\n".encode() * 100
    context = store.ingest(written(tmp_path, text))
    assert data_of(context) == text
    assert (context.kind, context.bytes, context.chars, context.items) == ("text", len(text), len(text.decode()), None)
    assert context.sha256 == hashlib.sha256(text).hexdigest()
    assert context.id == hashlib.sha256(context.files["manifest.json"].read_bytes()).hexdigest()
    assert context.shape == {"type": "str", "characters": "800"}
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in context.files.values())
    assert store.open(context.id) == context
    assert store.verify(context)
    assert store.ingest_stream(io.BytesIO(text)) == context
    assert store.ingest_value(text.decode()) == context
    assert files_in(tmp_path) == ["data", "manifests"]


def test_the_same_content_at_once_is_kept_once(tmp_path: Path):
    source = written(tmp_path, b"x" * 3 * CHUNK)

    def ingest(_: int) -> str:
        context = ContextStore(tmp_path / "store").ingest(source)
        assert data_of(context) == source.read_bytes()
        return context.id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ingest, range(24)))) == 1
    assert files_in(tmp_path) == ["data", "manifests"]


@given(st.text("aé€😀\n", max_size=100), st.integers(1, 40))
def test_the_index_holds_the_byte_offset_of_each_strideth_character(text: str, cut: int):
    meter = Meter(7)
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    encoded = b"".join(meter.add(piece.encode() if piece.isascii() else piece) for piece in pieces)
    offsets = [len(text[:at].encode()) for at in range(0, len(text), 7)]
    assert encoded == text.encode()
    assert (meter.bytes, meter.chars) == (len(encoded), len(text))
    assert meter.index == (None if text.isascii() or len(text) <= 7 else offsets)


@pytest.mark.parametrize("at", [0, 5, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 7])
@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"\xc3(", b"\xf0\x9f\x98"])
def test_what_is_not_utf8_is_refused_with_its_offset(store: ContextStore, tmp_path: Path, at: int, bad: bytes):
    source = written(tmp_path, b"a" * at + bad + b"b" * 10)
    said = refused(lambda: store.ingest(source))
    assert f"not UTF-8 at byte {at} " in said
    assert "--encoding latin-1 or --encoding replace" in said
    replaced = store.ingest(source, encoding="replace")
    assert data_of(replaced).decode() == source.read_bytes().decode(errors="replace")
    latin = store.ingest(source, encoding="latin-1")
    assert data_of(latin).decode() == source.read_bytes().decode("latin-1")
    assert latin.chars == source.stat().st_size


def test_a_character_cut_off_at_the_end_is_refused(store: ContextStore, tmp_path: Path):
    assert "at byte 3 " in refused(lambda: store.ingest(written(tmp_path, "aaa€".encode()[:-1])))


def test_characters_across_chunks(store: ContextStore, tmp_path: Path):
    text = "a" + "€" * CHUNK
    context = store.ingest(written(tmp_path, text.encode()))
    assert (context.chars, data_of(context)) == (len(text), text.encode())


@pytest.mark.parametrize("at", [3, CHUNK + 3])
def test_binary_is_refused(store: ContextStore, tmp_path: Path, at: int):
    source = written(tmp_path, b"a" * at + b"\0\xff")
    assert f"looks binary (NUL byte at offset {at})" in refused(lambda: store.ingest(source))
    assert store.ingest(source, encoding="replace").chars == at + 2


def test_sources_that_cannot_be_read(store: ContextStore, tmp_path: Path):
    assert "no such file" in refused(lambda: store.ingest(tmp_path / "no\nthing"))
    assert "is empty" in refused(lambda: store.ingest(written(tmp_path, b"")))
    assert "is empty" in refused(lambda: store.ingest(written(tmp_path, b"\n \n", "blank.jsonl")))
    assert "is empty" in refused(lambda: store.ingest_stream(io.BytesIO()))
    assert "neither a file nor a folder" in refused(lambda: store.ingest(Path("/dev/zero")))
    assert "no encoding 'utf-7'" in refused(lambda: store.ingest(written(tmp_path, b"x"), encoding="utf-7"))  # pyright: ignore
    (tmp_path / "empty").mkdir()
    assert "holds no readable text (left out: nothing)" in refused(lambda: store.ingest(tmp_path / "empty"))
    assert not list((tmp_path / "store" / "drafts").iterdir())
    assert files_in(tmp_path) == []


def test_without_permission(store: ContextStore, tmp_path: Path):
    written(tmp_path, b"x").chmod(0)
    tmp_path.chmod(0o755)
    child = os.fork()
    if not child:
        try:
            os.chdir(tmp_path)  # the folders above it are closed to others
            if os.geteuid() == 0:  # who may read everything
                os.setuid(65_534)
            store.ingest(Path("source.txt"))
        except ContextError as error:
            os._exit(0 if "permission denied" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_is_its_text_documents(store: ContextStore, tmp_path: Path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (
        ("z.txt", "zz"),
        ("b/é.md", "é" * 20),
        ("empty", ""),
        (".git/config", "x"),
        ("pic", "\x89\0PNG"),
    ):
        (folder / name).write_text(text)
    (folder / "link.txt").symlink_to("/etc/passwd")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    context = store.ingest(folder)
    assert facts_of(context)["documents"] == [
        ["empty", 0, 0, 0, None],
        ["z.txt", 0, 2, 2, None],
        ["b/é.md", 2, 40, 20, [0, 32]],
    ]
    assert (context.kind, context.items, context.chars, context.bytes) == ("documents", 3, 22, 42)
    assert context.shape == {
        "type": 'list of {"path": str, "text": str}',
        "documents": "3",
        "characters": "22",
        "characters per document": "min 0, median 2, max 20",
        "files left out": "1 binary, 1 hidden, 1 special, 2 symlink",
    }
    (folder / "z.txt").write_bytes(b"caf\xe9")
    assert "z.txt: is not UTF-8 at byte 3" in refused(lambda: store.ingest(folder))


@pytest.mark.parametrize(
    ("text", "at", "why"),
    [
        ('{"a": [1,, 2]}', 9, "unallowed token"),
        ("[1, 2", 5, "premature EOF"),
        ("[1] x", 4, "trailing garbage"),
        ("[NaN]", 1, "invalid char"),
        (f"[{'1,' * 100_000} nope]", 200_003, "invalid string"),
        ("[" * 300, 200, "nested deeper than 200"),
        (f"[{'1' * 5000} ]", 5001, "more than 4,300 digits"),
    ],
)
def test_json_that_is_not_valid(store: ContextStore, tmp_path: Path, text: str, at: int, why: str):
    said = refused(lambda: store.ingest(written(tmp_path, text.encode(), "source.json")))
    assert f"at byte {at} " in said
    assert why in said


def test_json(store: ContextStore, tmp_path: Path):
    for text, top, items in (('\ufeff[1, "a,b", {"c": [1]}]', "list", 3), ('{"a": 1, "b": [1, 2]}', "dict", None)):
        context = store.ingest(written(tmp_path, text.encode(), "source.JSON"))
        assert data_of(context).decode() == text.removeprefix("\ufeff")
        assert (context.kind, context.items, context.shape["type"]) == ("json", items, top)
    assert context.shape == {"type": "dict", "keys": "2", "characters of JSON": "21"}
    for text, top in (("5", "int"), ("5.0", "float"), ("true", "bool"), ("null", "NoneType"), ('"a"', "str")):
        assert store.ingest(written(tmp_path, text.encode(), "source.json")).shape["type"] == top


def test_json_lines(store: ContextStore, tmp_path: Path):
    lines = [json.dumps({"id": number, "é": "é"}, ensure_ascii=False) for number in range(50)]
    context = store.ingest(written(tmp_path, ("\ufeff" + "\r\n\n".join(lines)).encode(), "source.jsonl"))
    assert (context.kind, context.items) == ("jsonl", 50)
    assert [json.loads(line) for line in data_of(context).splitlines()] == list(map(json.loads, lines))
    assert context.chars == len(data_of(context).decode())
    assert context.shape == {"type": "list", "items": "50", "characters of JSON": f"{context.chars:,}"}
    numbers, offsets = facts_of(context)["blocks"]
    ends = [0, *(at + 1 for at, byte in enumerate(data_of(context)) if byte == 10)]
    assert offsets == [ends[number] for number in numbers]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "Expecting property name"),
        (b"[NaN]", "NaN is not JSON"),
        (b"1, 2", "more than one value"),
        (b"\x0b1", "Expecting value"),
        (b"[" * 300 + b"]" * 300, "nested deeper"),
        (b"[" + b"[]," * CHUNK, "premature EOF"),
        (b"1" * 5000, "digits"),
    ],
)
def test_a_json_line_that_is_not_valid(store: ContextStore, tmp_path: Path, line: bytes, why: str):
    said = refused(lambda: store.ingest(written(tmp_path, b"1\n\n" + line + b"\n2\n", "source.ndjson")))
    assert "line 3 is not valid JSON" in said
    assert why in said


def test_a_line_above_the_limit(tmp_path: Path):
    pieces = [b'1\n"', b"x" * CHUNK, b"x" * CHUNK, b'"']
    with Draft(tmp_path) as draft:
        said = refused(lambda: read_json_lines(draft, pieces, 16, "source", max_line=CHUNK))
    assert "line 2 is longer than 1 MiB" in said


def test_values(store: ContextStore):
    assert store.ingest_value("nul \0 is text here").chars == 18
    many = store.ingest_value(["a\nb", {"é": [1]}, None])
    assert (many.kind, many.items, many.shape["type"]) == ("jsonl", 3, "list")
    assert data_of(many).decode() == '"a\\nb"\n{"é": [1]}\nnull\n'
    assert store.ingest_value({"a": 1}).kind == "json"
    loop: list[Any] = []
    loop.append(loop)
    assert "is a int" in refused(lambda: store.ingest_value(5))
    assert "is empty" in refused(lambda: store.ingest_value([]))
    for value in ("\ud800", ["\ud800"], {"a": "\ud800"}):
        assert "surrogate" in refused(lambda: store.ingest_value(value))  # noqa: B023 - called at once
    for value in ([b"x"], {"a": object()}, [float("nan")], loop):
        assert "JSON cannot hold it" in refused(lambda: store.ingest_value(value))  # noqa: B023


def test_shape_never_holds_content(store: ContextStore, tmp_path: Path):
    folder = tmp_path / "secret-name"
    folder.mkdir()
    (folder / "secret-path").write_text("secret-text")
    sources = [folder, folder / "secret-path", written(tmp_path, b'{"secret-key": "secret"}', "secret.json")]
    assert all("secret" not in str(store.ingest(source).shape) for source in sources)


def test_damage_shows(store: ContextStore):
    context = store.ingest_value("text " * 10)
    for path in context.files.values():
        good = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(good.replace(b"t", b"T", 1))
        assert not store.verify(context)
        path.write_bytes(good)
        assert store.verify(context)
    context.files["data"].unlink()
    assert not store.verify(context)
    context.files["manifest.json"].write_bytes(b"{}")
    with pytest.raises(StoreError, match="damaged"):
        store.open(context.id)


def test_ingesting_again_heals_what_is_damaged(store: ContextStore, tmp_path: Path):
    context = store.ingest_value("text " * 10)
    link = tmp_path / "link"
    link.hardlink_to(context.files["data"])
    for path in context.files.values():
        for damage in (b"cut", path.read_bytes().replace(b"t", b"T", 1)):
            path.chmod(0o600)
            path.write_bytes(damage)
            assert not store.verify(context)
            assert store.ingest_value("text " * 10) == context
            assert store.verify(context)
            assert path.stat().st_mode & 0o777 == 0o444
    assert link.read_bytes() == b"cut"  # whoever has the old file keeps it


@pytest.mark.parametrize("context_id", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_an_id_is_checked(store: ContextStore, context_id: str):
    assert "64 hexadecimal" in refused(lambda: store.open(context_id))
    assert "no context" in refused(lambda: store.open("0" * 64))


def test_a_store_that_cannot_be_written(store: ContextStore, tmp_path: Path):
    source = written(tmp_path, b"x" * 4 * CHUNK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK, hard))
    try:
        with pytest.raises(StoreError, match="cannot be written") as caught:
            store.ingest(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value).splitlines()) == 1
    assert files_in(tmp_path) == []
    with pytest.raises(StoreError):
        ContextStore(source / "below").ingest(source)


def test_what_a_killed_process_left_goes_with_the_next_ingest(store: ContextStore, tmp_path: Path):
    store.ingest_value("first")
    (tmp_path / "store" / "drafts" / "left").write_bytes(b"half")
    store.ingest_value("second")
    assert files_in(tmp_path) == ["data", "data", "manifests", "manifests"]


def test_a_line_in_very_many_pieces_is_read_in_proportion_to_them(store: ContextStore):
    """A guest gives them one by one; what they cost the host must not grow with their square."""

    def seconds(pieces: int) -> float:
        line = ['"', *["x"] * pieces, '"']
        times: list[float] = []
        for _ in range(3):
            began = time.process_time()
            assert store.ingest_pieces("jsonl", line).chars == pieces + 3
            times.append(time.process_time() - began)
        return min(times)

    seconds(10)
    assert seconds(32_000) < 64 * seconds(2_000)


def test_of_nothing_an_empty_text_or_list_is_made(store: ContextStore):
    made = {kind: store.ingest_pieces(kind, ["", ""]) for kind in ("text", "jsonl")}
    assert {kind: (data_of(context), context.shape["type"]) for kind, context in made.items()} == {
        "text": (b'""', "str"),
        "jsonl": (b"[]", "list"),
    }
