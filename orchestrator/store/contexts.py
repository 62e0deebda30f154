"""The context store: every context once, by content, read-only, ready to be linked into a sandbox's slot folder.

    root/data/<sha256 of the data>         UTF-8, mode 0444; contexts with the same data share it
    root/manifests/<sha256 of the manifest>  canonical JSON, mode 0444; its name is the context's id
    root/drafts/                           files under way, gone when their ingest ends

`guest/context.py` reads both files. The fields of the manifest:

    kind       text, documents, json, jsonl
    bytes      of the data; chars: characters of it; sha256: of the data
    items      documents, JSON lines, or items of a top-level JSON list; else null
    index      byte offset of every `stride`-th character; null for ASCII, where bytes and characters are the same
               (text and json)
    stride     characters between two entries of an index
    documents  [path, byte offset, bytes, chars, index] of each document; index is null in a short one, too
    blocks     [numbers, offsets]: items that can be parsed from a byte offset on, about one every `stride` bytes
               (jsonl, and json with a list on top)
    top        type of the JSON value: list, dict, str, int, float, bool, NoneType; keys: of a dict, their number
    skipped    what of a folder was left out: {"symlink": 2, "hidden": 1, "binary": 1, "special": 1}

A byte order mark stays in a text, whose SHA-256 is that of the file; JSON has none, so it is dropped there. Blank JSON
lines, and white space around lines, are dropped. In a folder, hidden entries, symbolic links, special files and files
with a NUL byte in their first CHUNK are skipped and counted.

Everything is streamed: memory does not grow with the context, but for the tables in the manifest.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

import ijson  # pyright: ignore[reportMissingTypeStubs]

from orchestrator.core.context import Context, ContextKind
from orchestrator.core.errors import ContextError, StoreError

Encoding = Literal["utf-8", "latin-1", "replace"]

STRIDE = 65_536
CHUNK = 1 << 20
MAX_LINE = 256 << 20
"""Bytes of one JSON line."""
MAX_DEPTH = 200
"""Lists and dicts inside each other: far below what the guest's recursive parser can take."""
_JSON_STEP = 65_536  # bytes fed to the parser at a time: its events wait in memory
_COMMAS = 4096  # tried for the next block's start before giving up until one stride later
_KINDS: dict[str, ContextKind] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_CODECS = {"utf-8": ("utf-8", "strict"), "latin-1": ("latin-1", "strict"), "replace": ("utf-8", "replace")}
_ID = re.compile(r"[0-9a-f]{64}")
_ijson: Any = ijson  # it has no types
_INVALID = (_ijson.JSONError, ValueError, SystemError)


class ContextStore:
    """root: a folder on the file system of the slot folders. stride: see the manifest; small ones are for tests.

    Safe for threads and processes at once. Every method blocks: call it in a thread from async code.
    """

    def __init__(self, root: Path, *, stride: int = STRIDE) -> None:
        self._root, self._stride = root, stride

    def ingest(self, source: Path, *, encoding: Encoding = "utf-8") -> Context:
        """Store a file (.json: json, .jsonl or .ndjson: jsonl, else text) or a folder (documents).

        Raises ContextError where the source cannot be read as asked, StoreError where the store cannot be written.
        """
        name = _shown(source)
        with _reading(name):
            mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            return self._keep("documents", name, lambda draft: _documents(draft, source, encoding))
        if not stat.S_ISREG(mode):
            raise ContextError(f"{name}: is neither a file nor a folder; pipe it to standard input instead")
        kind = _KINDS.get(source.suffix.lower(), "text")
        fill = {"text": _text, "json": _json, "jsonl": _jsonl}[kind]
        with _reading(name):
            stream = source.open("rb")
        with stream:
            pieces = _decoded(_chunks(stream, name), encoding, name)
            return self._keep(kind, name, lambda draft: fill(draft, pieces, name))

    def ingest_stream(self, stream: BinaryIO, *, encoding: Encoding = "utf-8", name: str = "standard input") -> Context:
        """Store a text from a stream of bytes. name: what errors call it. Raises as `ingest` does."""
        pieces = _decoded(_chunks(stream, name), encoding, name)
        return self._keep("text", name, lambda draft: _text(draft, pieces, name))

    def ingest_value(self, value: object) -> Context:
        """Store a str as text, a list as jsonl (one item a line, so that a large one is lazy too), a dict as json.

        Raises ContextError for any other type and for what JSON cannot hold, StoreError as `ingest` does.
        """
        name = "context"
        try:
            if isinstance(value, str):
                texts = (value[at : at + CHUNK] for at in range(0, len(value), CHUNK))
                return self._keep("text", name, lambda draft: _text(draft, texts, name))
            if isinstance(value, list | tuple):
                lines = (_dumps(item) + "\n" for item in cast("list[object]", value))
                return self._keep("jsonl", name, lambda draft: _jsonl(draft, lines, name))
            if isinstance(value, dict):
                return self._keep("json", name, lambda draft: _json(draft, [_dumps(cast("object", value))], name))
        except UnicodeEncodeError:
            raise ContextError(
                f"{name}: holds half of a surrogate pair, no character; decode its source with errors='replace'"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ContextError(f"{name}: JSON cannot hold it ({error}); pass str, numbers, lists and dicts") from None
        raise ContextError(f"{name}: is a {type(value).__name__}; pass a str, a list or a dict, or the path of a file")

    def open(self, context_id: str) -> Context:
        """The stored context. Raises ContextError where there is none by this id, StoreError where it is damaged."""
        if not _ID.fullmatch(context_id):
            raise ContextError("a context id is 64 hexadecimal digits; copy it from the journal")
        try:
            manifest = (self._root / "manifests" / context_id).read_bytes()
        except FileNotFoundError:
            raise ContextError(f"no context {context_id} in this store; ingest it again") from None
        except OSError as error:
            raise StoreError(f"context {context_id} cannot be read: {error.strerror}; check {self._root}") from None
        if hashlib.sha256(manifest).hexdigest() != context_id:
            raise StoreError(
                f"the manifest of context {context_id} is damaged; check the disk, and delete {self._root}"
            )
        return self._context(context_id, manifest)

    def verify(self, context: Context) -> bool:
        """Whether manifest and data are still what the context's id says. Reads all of the data."""
        try:
            if self.open(context.id).sha256 != context.sha256:
                return False
            with context.files["data"].open("rb") as data:
                return hashlib.file_digest(data, "sha256").hexdigest() == context.sha256
        except (ContextError, StoreError, OSError):
            return False

    def _keep(self, kind: ContextKind, name: str, fill: Callable[[_Draft], dict[str, Any]]) -> Context:
        """Let `fill` write the data and say what it is, then put data and manifest in place, in this order."""
        with _storing(self._root), self._drafts() as folder, _Draft(folder, self._stride) as draft:
            facts = fill(draft)
            if not draft.size:
                raise ContextError(f"{name}: is empty; give a context that holds text")
            facts |= {"kind": kind, "bytes": draft.size, "stride": self._stride}
            facts["sha256"] = draft.place(self._root / "data")
            manifest = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
            with _Draft(folder, self._stride) as second:
                second.write(manifest)
                return self._context(second.place(self._root / "manifests"), manifest)

    @contextmanager
    def _drafts(self) -> Generator[Path]:
        """The folder for drafts. Its lock is shared by all who ingest: whoever gets it alone may clear it.

        So what a killed process left behind goes with the next ingest, and never a draft that is under way.
        """
        folder = self._root / "drafts"
        for each in (self._root, folder, self._root / "data", self._root / "manifests"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in folder.iterdir():
                    left.unlink()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield folder
        finally:
            os.close(lock)

    def _context(self, context_id: str, manifest: bytes) -> Context:
        facts: dict[str, Any] = json.loads(manifest)
        if not _ID.fullmatch(facts["sha256"]):
            raise StoreError(f"the manifest of context {context_id} names no data; delete it and ingest again")
        return Context(
            id=context_id,
            sha256=facts["sha256"],
            kind=facts["kind"],
            bytes=facts["bytes"],
            chars=facts["chars"],
            items=facts["items"],
            files={
                "data": self._root / "data" / facts["sha256"],
                "manifest.json": self._root / "manifests" / context_id,
            },
            shape=_shape(facts),
        )


def _shape(facts: dict[str, Any]) -> dict[str, str]:
    """What the root LM is told: types and sizes, nothing of the content, to which paths belong."""
    kind, characters = facts["kind"], f"{facts['chars']:,}"
    if kind == "text":
        return {"type": "str", "characters": characters}
    if kind == "documents":
        lengths = sorted(document[3] for document in facts["documents"])
        middle = lengths[len(lengths) // 2]
        shape = {
            "type": 'list of {"path": str, "text": str}',
            "documents": f"{facts['items']:,}",
            "characters": characters,
            "characters per document": f"min {lengths[0]:,}, median {middle:,}, max {lengths[-1]:,}",
        }
        left_out = ", ".join(f"{count:,} {why}" for why, count in facts["skipped"].items())
        return shape | ({"files left out": left_out} if left_out else {})
    top = "list" if kind == "jsonl" else facts["top"]
    counted = {"list": {"items": facts["items"]}, "dict": {"keys": facts.get("keys")}}.get(top, {})
    return {"type": top, **{name: f"{count:,}" for name, count in counted.items()}, "characters of JSON": characters}


class _Draft:
    """A file under way: written and hashed, then put in its place by its SHA-256, or gone."""

    def __init__(self, folder: Path, stride: int) -> None:
        self.stride = stride
        self.size = 0
        self._hash = hashlib.sha256()
        handle, path = tempfile.mkstemp(dir=folder)
        self._path = Path(path)
        self.stream = os.fdopen(handle, "w+b", buffering=CHUNK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stream.close()
        finally:
            self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self._hash.update(data)
        self.size += len(data)

    def place(self, folder: Path) -> str:
        """Put the file in the folder, durably, and return its name.

        A file that is there already is kept, for slots link it; one of another size is damaged, and replaced.
        """
        self.stream.flush()
        os.fchmod(self.stream.fileno(), 0o444)
        os.fsync(self.stream.fileno())
        name = self._hash.hexdigest()
        final = folder / name
        try:
            final.hardlink_to(self._path)
        except FileExistsError:
            if final.stat().st_size != self.size:
                self._path.replace(final)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return name


class _Meter:
    """Counts one text as it passes by, and notes the byte offset of every `stride`-th character."""

    def __init__(self, stride: int) -> None:
        self.bytes = self.chars = 0
        self._stride = stride
        self._index: list[int] = []

    def add(self, piece: bytes | str) -> bytes:
        """The piece in UTF-8. ASCII may come as bytes, other text comes as str."""
        cuts = range(-self.chars % self._stride, len(piece), self._stride)
        self.chars += len(piece)
        if isinstance(piece, bytes):
            self._index.extend(self.bytes + cut for cut in cuts)
            self.bytes += len(piece)
            return piece
        parts: list[bytes] = []
        for start, end in pairwise((0, *cuts, len(piece))):
            parts.append(piece[start:end].encode())
            self.bytes += len(parts[-1])
            self._index.append(self.bytes)
        self._index.pop()  # the end of the piece is no cut
        return b"".join(parts)

    @property
    def index(self) -> list[int] | None:
        """None where characters are bytes, or all of them lie in the first stride."""
        return self._index if self.chars != self.bytes and len(self._index) > 1 else None


def _text(draft: _Draft, pieces: Iterable[bytes | str], _name: str) -> dict[str, Any]:
    meter = _Meter(draft.stride)
    for piece in pieces:
        draft.write(meter.add(piece))
    return {"chars": meter.chars, "index": meter.index, "items": None}


def _documents(draft: _Draft, folder: Path, encoding: Encoding) -> dict[str, Any]:
    documents: list[tuple[str, int, int, int, list[int] | None]] = []
    skipped: Counter[str] = Counter()
    for path in _walk(folder, skipped):
        name = _shown(path)
        with _reading(name):
            # Whoever owns the folder may swap a file for a link or a pipe since it was listed.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ContextError(f"{name}: changed while it was read; try again")
            chunks = _chunks(stream, name)
            first = next(chunks, b"")
            if b"\0" in first:
                skipped["binary"] += 1
                continue
            meter, offset = _Meter(draft.stride), draft.size
            for piece in _decoded(chain([first], chunks), encoding, name):
                draft.write(meter.add(piece))
        relative = os.fsencode(path.relative_to(folder)).decode(errors="replace")
        documents.append((relative, offset, meter.bytes, meter.chars, meter.index))
    if not draft.size:
        left_out = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "nothing"
        raise ContextError(
            f"{_shown(folder)}: holds no readable text (left out: {left_out}); give a folder of text files"
        )
    return {
        "chars": sum(document[3] for document in documents),
        "documents": documents,
        "items": len(documents),
        "skipped": skipped,
    }


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Regular files below the folder, sorted by name: those of a folder first, then its folders."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        with _reading(_shown(here)), os.scandir(here) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        below: list[Path] = []
        for entry in entries:
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif entry.is_symlink():
                skipped["symlink"] += 1
            elif entry.is_dir(follow_symlinks=False):
                below.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
            else:
                skipped["special"] += 1
        waiting.extend(reversed(below))


def _jsonl(draft: _Draft, pieces: Iterable[bytes | str], name: str) -> dict[str, Any]:
    items = chars = 0
    numbers: list[int] = []
    offsets: list[int] = []
    for number, padded in enumerate(_lines(_without_bom(pieces), name), 1):
        line = padded.strip(b" \t\r")
        if not line:
            continue
        text = line.decode()
        try:
            _check_line(line, text)
        except _INVALID as error:
            raise ContextError(f"{name}: line {number} is not valid JSON ({_reason(error)}); mend or drop it") from None
        if not offsets or draft.size - offsets[-1] >= draft.stride:
            numbers.append(items)
            offsets.append(draft.size)
        draft.write(line + b"\n")
        items += 1
        chars += len(text) + 1
    return {"blocks": [numbers, offsets], "chars": chars, "index": None, "items": items}


def _lines(pieces: Iterable[bytes | str], name: str) -> Iterator[bytes]:
    """Lines in UTF-8, without their end."""
    held: list[bytes] = []
    number = 1
    for piece in pieces:
        first, *rest = (piece if isinstance(piece, bytes) else piece.encode()).split(b"\n")
        held.append(first)
        if sum(map(len, held)) > MAX_LINE:
            raise ContextError(f"{name}: line {number} is longer than {MAX_LINE >> 20} MiB; split it up")
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
            number += len(rest)
    yield b"".join(held)


def _check_line(line: bytes, text: str) -> None:
    """Raises one of _INVALID. The streaming parser is slower, and bounds depth and memory."""
    if len(line) <= CHUNK and line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        _, end = _STRICT.raw_decode(text)
        if end < len(text):
            raise ValueError(f"more than one value, from character {end + 1} on")
    else:
        check = _JsonCheck(sys.maxsize)
        check.feed(line)
        check.close()


def _json(draft: _Draft, pieces: Iterable[bytes | str], name: str) -> dict[str, Any]:
    meter, check = _Meter(draft.stride), _JsonCheck(draft.stride)
    try:
        for piece in _without_bom(pieces):
            data = meter.add(piece)
            draft.write(data)
            check.feed(data)
        check.close()
    except UnicodeEncodeError:  # a ValueError too, but not the parser's
        raise
    except _INVALID as error:
        at = _where(draft, check.position)
        raise ContextError(
            f"{name}: is not valid JSON at byte {at} ({_reason(error)}); mend it, or rename it .txt"
        ) from None
    facts: dict[str, Any] = {"chars": meter.chars, "index": meter.index, "items": None, "top": check.top}
    if check.top == "list":
        facts |= {"blocks": [check.numbers, check.offsets], "items": check.items}
    if check.top == "dict":
        facts["keys"] = check.items
    return facts


class _JsonCheck:
    """Validates one JSON value as it passes by, and finds where in a top-level list a block of items can start.

    top: type of the value. items: of the list, or values of the dict, on top. numbers, offsets: the blocks.
    position: bytes fed before the part that failed.
    """

    def __init__(self, stride: int) -> None:
        self.top = ""
        self.items = self.position = 0
        self.numbers: list[int] = []
        self.offsets: list[int] = []
        self._stride, self._step = stride, min(stride, _JSON_STEP)
        self._seek_from = sys.maxsize  # byte offset
        self._tried = self._depth = 0
        self._events: Any = _ijson.sendable_list()
        self._parser: Any = _ijson.basic_parse_coro(self._events)

    def feed(self, data: bytes) -> None:
        """Raises one of _INVALID.

        The parser does not say where it is. So where a block is due, parts end at commas: if an item was completed
        since the last comma, and only the top list is open, then this comma ends the item, and is not inside a str.
        """
        start = 0
        while start < len(data):
            seeking = self.position >= self._seek_from
            end = start + (self._step if seeking else min(self._step, self._seek_from - self.position))
            if seeking:
                end = data.find(b",", start, end) + 1 or end
            part = data[start:end]
            before = self.top, self.items
            self.parse(part)
            if self.top == "list" and not before[0]:
                self._block(0, self.position + part.index(b"[") + 1)
            self.position += len(part)
            if seeking and part.endswith(b",") and self._depth == 1 and self.items > before[1]:
                self._block(self.items, self.position)
            elif seeking:
                self._tried += 1
                if self._tried == _COMMAS:
                    self._tried, self._seek_from = 0, self.position + self._stride
            start = end

    def _block(self, number: int, offset: int) -> None:
        self.numbers.append(number)
        self.offsets.append(offset)
        self._tried, self._seek_from = 0, offset + self._stride

    def parse(self, part: bytes) -> None:
        self._parser.send(part)
        self._take_events()

    def close(self) -> None:
        self._parser.close()
        self._take_events()

    def _take_events(self) -> None:
        for event, value in self._events:
            if event in ("start_array", "start_map"):
                self.top = self.top or ("list" if event == "start_array" else "dict")
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise ValueError(f"nested deeper than {MAX_DEPTH}")
                continue
            if event in ("end_array", "end_map"):
                self._depth -= 1
            if self._depth == 1 and event != "map_key":
                self.items += 1
            elif not self.top:
                self.top = "float" if event == "number" and not isinstance(value, int) else type(value).__name__
        self._events.clear()


def _where(draft: _Draft, position: int) -> int:
    """Byte offset at which the JSON in the draft goes wrong, in the part at `position`: parsed again byte by byte."""
    if position == draft.size:
        return position
    check = _JsonCheck(sys.maxsize)
    draft.stream.seek(0)
    for start in range(0, position, _JSON_STEP):
        check.parse(draft.stream.read(min(_JSON_STEP, position - start)))
    try:
        while byte := draft.stream.read(1):
            check.parse(byte)
            position += 1
    except _INVALID:
        pass
    return position


def _reason(error: Exception) -> str:
    if isinstance(error, SystemError):  # what ijson makes of the ValueError from int()
        return f"a number of more than {sys.get_int_max_str_digits():,} digits"
    return str(error).splitlines()[0].rstrip(".")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _without_bom(pieces: Iterable[bytes | str]) -> Iterator[bytes | str]:
    for number, piece in enumerate(pieces):
        yield piece.removeprefix("\ufeff") if number == 0 and isinstance(piece, str) else piece


def _decoded(chunks: Iterable[bytes], encoding: Encoding, name: str) -> Iterator[bytes | str]:
    """Whole characters: ASCII as bytes, the rest as str. Raises ContextError at what the encoding does not allow."""
    if encoding not in _CODECS:
        raise ContextError(f"no encoding {encoding!r}; use {', '.join(_CODECS)}")
    codec, errors = _CODECS[encoding]
    decoder = codecs.getincrementaldecoder(codec)(errors)
    read = 0
    for chunk in chain(chunks, [b""]):  # the empty one at the end: is a character left incomplete?
        pending = len(decoder.getstate()[0])
        if encoding == "utf-8" and (nul := chunk.find(b"\0")) >= 0:
            raise ContextError(f"{name}: looks binary (NUL byte at offset {read + nul}); convert it to text first")
        if chunk.isascii() and not pending:
            yield chunk
        else:
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = read - pending + error.start
                raise ContextError(
                    f"{name}: is not UTF-8 at byte {at} ({error.reason}); use --encoding latin-1 or --encoding replace"
                ) from None
        read += len(chunk)


def _chunks(stream: BinaryIO, name: str) -> Iterator[bytes]:
    while True:
        with _reading(name):
            chunk = stream.read(CHUNK)
        if not chunk:
            return
        yield chunk


def _shown(path: Path) -> str:
    """The path on one line, whatever its name holds."""
    return "".join(char if char.isprintable() else "?" for char in str(path))


@contextmanager
def _reading(name: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ContextError(f"{name}: no such file or folder; check the path") from None
    except PermissionError:
        raise ContextError(f"{name}: permission denied; make it readable for this user") from None
    except OSError as error:
        raise ContextError(f"{name}: cannot be read ({error.strerror}); check the path and the disk") from None


@contextmanager
def _storing(root: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the context store {root} cannot be written ({error.strerror}); free space there, or set AIRLOCK_HOME"
        ) from None
