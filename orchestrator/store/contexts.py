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
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, cast

from orchestrator.core.context import Context, ContextKind
from orchestrator.core.errors import ContextError, StoreError
from orchestrator.store.drafts import LATER, Draft, drafts, is_removable, placing
from orchestrator.store.readers import (
    CHUNK,
    Encoding,
    Facts,
    chunks,
    decoded,
    read_folder,
    read_json,
    read_json_lines,
    read_text,
    reading,
    shown,
)

STRIDE = 65_536
_KINDS: dict[str, ContextKind] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_ID = re.compile(r"[0-9a-f]{64}")
Wanted = Callable[[Collection[int]], Mapping[str, int]]
"""Who is wanted, of all contexts with these numbers of bytes; id -> bytes."""


class ContextStore:
    """root: a folder on the file system of the slot folders. stride: see the manifest; small ones are for tests.
    check: called for every piece that is stored; what it raises ends the ingest, of which nothing stays behind.
    most: bytes of the data; an ingest of more raises CountExceeded.

    placed: makes contexts that can be removed again, as long as nobody stores them without it. Called with each when it
    is in place and before it could be removed: it has to put on record who wants it. What it raises ends the ingest,
    and leaves a context that nobody wants: see `remove_later`.

    Safe for threads and processes at once. Every method blocks: call it in a thread from async code.
    """

    def __init__(
        self,
        root: Path,
        *,
        stride: int = STRIDE,
        check: Callable[[], object] = lambda: None,
        most: int | None = None,
        placed: Callable[[Context], object] | None = None,
    ) -> None:
        self._root, self._stride, self._check, self._most, self._placed = root, stride, check, most, placed

    def ingest(self, source: Path, *, encoding: Encoding = "utf-8") -> Context:
        """Store a file (.json: json, .jsonl or .ndjson: jsonl, else text) or a folder (documents).

        Raises ContextError where the source cannot be read as asked, StoreError where the store cannot be written.
        """
        name = shown(source)
        with reading(name):
            mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            return self._keep("documents", name, lambda draft: read_folder(draft, source, encoding, self._stride))
        if not stat.S_ISREG(mode):
            raise ContextError(f"{name}: is neither a file nor a folder; pipe it to standard input instead")
        with reading(name):
            stream = source.open("rb")
        with stream:
            pieces = decoded(chunks(stream, name), encoding, name)
            return self._keep_pieces(_KINDS.get(source.suffix.lower(), "text"), name, pieces)

    def ingest_stream(
        self,
        stream: BinaryIO,
        *,
        kind: Literal["text", "json", "jsonl"] = "text",
        encoding: Encoding = "utf-8",
        name: str = "standard input",
    ) -> Context:
        """Store a text from a stream of bytes, or JSON. name: what errors call it. Raises as `ingest` does."""
        return self._keep_pieces(kind, name, decoded(chunks(stream, name), encoding, name))

    def ingest_value(self, value: object) -> Context:
        """Store a str as text, a list as jsonl (one item a line, so that a large one is lazy too), a dict as json.

        Raises ContextError for any other type and for what JSON cannot hold, StoreError as `ingest` does.
        """
        name = "context"
        try:
            if isinstance(value, str):
                texts = (value[at : at + CHUNK] for at in range(0, len(value), CHUNK))
                return self._keep_pieces("text", name, texts)
            if isinstance(value, list | tuple):
                lines = (_dumps(item) + "\n" for item in cast("list[object]", value))
                return self._keep_pieces("jsonl", name, lines)
            if isinstance(value, dict):
                return self._keep_pieces("json", name, [_dumps(cast("object", value))])
        except UnicodeEncodeError:
            raise ContextError(
                f"{name}: holds half of a surrogate pair, no character; decode its source with errors='replace'"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ContextError(f"{name}: JSON cannot hold it ({error}); pass str, numbers, lists and dicts") from None
        raise ContextError(f"{name}: is a {type(value).__name__}; pass a str, a list or a dict, or the path of a file")

    def ingest_pieces(self, kind: Literal["text", "jsonl"], pieces: Sequence[str]) -> Context:
        """Store a text, or a list as JSON lines, that comes in pieces. Nothing at all is an empty str, or list.

        Raises ContextError, StoreError.
        """
        if any(pieces):
            return self._keep_pieces(kind, "context", pieces)
        return self.nothing() if kind == "text" else self._keep_pieces("json", "context", ["[]"])

    def nothing(self) -> Context:
        """The context of a cell that is given none, an empty str: as JSON, as a file of no bytes cannot be mapped."""
        return self._keep_pieces("json", "context", ['""'])

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
                f"the manifest of context {context_id} is damaged; check the disk, and ingest its source again"
            )
        return self._context(context_id, json.loads(manifest))

    def verify(self, context: Context) -> bool:
        """Whether manifest and data are still what the context's id says. Reads all of the data."""
        try:
            if self.open(context.id).sha256 != context.sha256:
                return False
            with context.files["data"].open("rb") as data:
                return hashlib.file_digest(data, "sha256").hexdigest() == context.sha256
        except (ContextError, StoreError, OSError):
            return False

    def _keep_pieces(self, kind: ContextKind, name: str, pieces: Iterable[bytes | str]) -> Context:
        def fill(draft: Draft) -> Facts:
            if kind == "json":
                return read_json(draft, pieces, self._stride, name)
            if kind == "jsonl":
                return read_json_lines(draft, pieces, self._stride, name)
            return read_text(draft, pieces, self._stride)

        return self._keep(kind, name, fill)

    def _keep(self, kind: ContextKind, name: str, fill: Callable[[Draft], Facts]) -> Context:
        """Let `fill` write the data and say what it is, then put data and manifest in place, in this order."""
        folders = [self._root / name for name in ("drafts", "data", "manifests")]
        with _storing(self._root):
            for folder in (self._root, *folders):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with drafts(folders[0]), Draft(folders[0], self._check, self._most) as data, Draft(folders[0]) as manifest:
                facts = fill(data)
                if not data.size:
                    raise ContextError(f"{name}: is empty; give a context that holds text")
                facts |= {"kind": kind, "bytes": data.size, "stride": self._stride}
                data.sync()
                with placing(self._root):
                    return self._place(data, manifest, facts, *folders[1:])

    def _place(self, data: Draft, manifest: Draft, facts: Facts, to_data: Path, to_manifests: Path) -> Context:
        removable = self._placed is not None
        facts["sha256"] = data.place(to_data, removable=removable)
        manifest.write(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
        context = self._context(manifest.place(to_manifests, removable=removable), facts)
        if self._placed is not None:
            self._placed(context)
        return context

    def removable(self) -> list[str]:
        """Ids of the contexts that were only ever stored to be removed again. What a killed process left goes."""
        folders = [self._root / name for name in ("manifests", "data")]
        with _storing(self._root):
            if not all(folder.is_dir() for folder in folders):
                return []
            with placing(self._root, alone=True):
                for left in (path for folder in folders for path in folder.iterdir() if path.suffix):
                    left.unlink()
            return [path.name for path in folders[0].iterdir() if is_removable(path)]

    def remove(self, ids: Iterable[str], wanted: Wanted) -> int:
        """Remove those that can be and that nobody wants; how many those were. Waits for whoever stores something.

        wanted: asked when no other can be put in place meanwhile.
        """
        count = 0
        with _storing(self._root):
            if not (self._root / "manifests").is_dir():
                return 0
            with placing(self._root, alone=True):
                found = [context for each in ids if (context := self._unless_kept(each))]
                needed = wanted({context.bytes for context in found})
                for context in found:
                    if context.id not in needed:
                        self._remove(context, needed)
                        count += 1
        return count

    def remove_later(self, context_id: str, wanted: Wanted) -> None:
        """`remove` for nobody to wait for: how long it takes tells whether others have it. Raises nothing."""
        LATER.submit(self.remove, [context_id], wanted)

    def _unless_kept(self, context_id: str) -> Context | None:
        """None for what cannot be removed, or is damaged: whose data it has, nobody can tell."""
        if _ID.fullmatch(context_id) and is_removable(self._root / "manifests" / context_id):
            with suppress(StoreError):
                return self.open(context_id)
        return None

    def _remove(self, context: Context, needed: Mapping[str, int]) -> None:
        """The data first: what a crash leaves is a manifest, which the next sweep finds."""
        alike = (other for other, size in needed.items() if size == context.bytes)
        if is_removable(context.files["data"]) and not any(self._is_of(other, context.sha256) for other in alike):
            context.files["data"].unlink()
        context.files["manifest.json"].unlink()

    def _is_of(self, context_id: str, sha256: str) -> bool:
        try:
            return self.open(context_id).sha256 == sha256
        except ContextError:  # gone, and not because of us
            return False
        except StoreError:  # damaged: it may be
            return True

    def _context(self, context_id: str, facts: Facts) -> Context:
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


def _shape(facts: Facts) -> dict[str, str]:
    """What the root LM is told: types and sizes, nothing of the content, to which paths belong."""
    kind, characters = facts["kind"], f"{facts['chars']:,}"
    if kind == "text":
        return {"type": "str", "characters": characters}
    if kind == "documents":
        lengths = sorted(document[3] for document in facts["documents"])
        middle = lengths[len(lengths) // 2]
        left_out = ", ".join(f"{count:,} {why}" for why, count in sorted(facts["skipped"].items()))
        shape = {
            "type": 'list of {"path": str, "text": str}',
            "documents": f"{facts['items']:,}",
            "characters": characters,
            "characters per document": f"min {lengths[0]:,}, median {middle:,}, max {lengths[-1]:,}",
        }
        return shape | ({"files left out": left_out} if left_out else {})
    top = "list" if kind == "jsonl" else facts["top"]
    counted = {"list": {"items": facts["items"]}, "dict": {"keys": facts.get("keys")}}.get(top, {})
    return {"type": top, **{name: f"{count:,}" for name, count in counted.items()}, "characters of JSON": characters}


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@contextmanager
def _storing(root: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the context store {root} cannot be written ({error.strerror}); free space there, or set AIRLOCK_HOME"
        ) from None
