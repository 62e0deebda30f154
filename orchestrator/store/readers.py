"""From a source to the data and the facts of a context: a text, a folder, JSON or JSON lines, in any encoding.

A reader writes the UTF-8 data to a draft and returns what the manifest says of it; `contexts.py` lists these facts. All
of them raise ContextError where the source is not what it should be. `name` is what errors call the source.

Everything is streamed: memory does not grow with the context, but for the tables in the manifest.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

from orchestrator.core.errors import ContextError
from orchestrator.store.drafts import Draft
from orchestrator.store.jsoncheck import INVALID, JsonCheck, check_line, reason, where

Encoding = Literal["utf-8", "latin-1", "replace"]
Facts = dict[str, Any]

CHUNK = 1 << 20
MAX_LINE = 256 << 20
"""Bytes of one JSON line."""
_CODECS = {"utf-8": ("utf-8", "strict"), "latin-1": ("latin-1", "strict"), "replace": ("utf-8", "replace")}


def read_text(draft: Draft, pieces: Iterable[bytes | str], stride: int) -> Facts:
    meter = Meter(stride)
    for piece in pieces:
        draft.write(meter.add(piece))
    return {"chars": meter.chars, "index": meter.index, "items": None}


def read_folder(draft: Draft, folder: Path, encoding: Encoding, stride: int) -> Facts:
    documents: list[tuple[str, int, int, int, list[int] | None]] = []
    skipped: Counter[str] = Counter()
    for path in _walk(folder, skipped):
        name = shown(os.path.join(folder, path))  # noqa: PTH118 - there may be a million of them; Path is slow
        with _opened(os.path.join(folder, path), name) as stream:  # noqa: PTH118
            pieces = chunks(stream, name)
            first = next(pieces, b"")
            if b"\0" in first:
                skipped["binary"] += 1
                continue
            meter, offset = Meter(stride), draft.size
            for piece in decoded(chain([first], pieces), encoding, name):
                draft.write(meter.add(piece))
        path_text = os.fsencode(path).decode(errors="replace")
        documents.append((path_text, offset, meter.bytes, meter.chars, meter.index))
    if not draft.size:
        left_out = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "nothing"
        raise ContextError(
            f"{shown(folder)}: holds no readable text (left out: {left_out}); give a folder of text files"
        )
    return {
        "chars": sum(document[3] for document in documents),
        "documents": documents,
        "items": len(documents),
        "skipped": skipped,
    }


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[str]:
    """Regular files below the folder, as paths in it, sorted: those of a folder first, then its folders."""
    waiting = [""]
    while waiting:
        here = waiting.pop()
        with reading(shown(folder / here)), os.scandir(folder / here) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        below: list[str] = []
        for entry in entries:
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif entry.is_symlink():
                skipped["symlink"] += 1
            elif entry.is_dir(follow_symlinks=False):
                below.append(f"{here}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield here + entry.name
            else:
                skipped["special"] += 1
        waiting.extend(reversed(below))


def _opened(path: str, name: str) -> BinaryIO:
    """A regular file. Whoever owns the folder may swap it for a link or a pipe since it was listed."""
    with reading(name):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ContextError(f"{name}: changed while it was read; try again")
    return os.fdopen(handle, "rb")


def read_json(draft: Draft, pieces: Iterable[bytes | str], stride: int, name: str) -> Facts:
    meter, check = Meter(stride), JsonCheck(stride)
    try:
        for piece in _without_bom(pieces):
            data = meter.add(piece)
            draft.write(data)
            check.feed(data)
        check.close()
    except UnicodeEncodeError:  # a ValueError too, but not the parser's
        raise
    except INVALID as error:
        at = where(draft.stream, check.position)
        raise ContextError(
            f"{name}: is not valid JSON at byte {at} ({reason(error)}); mend it, or rename it .txt"
        ) from None
    facts: Facts = {"chars": meter.chars, "index": meter.index, "items": None, "top": check.top}
    if check.top == "list":
        facts |= {"blocks": [check.numbers, check.offsets], "items": check.items}
    if check.top == "dict":
        facts["keys"] = check.items
    return facts


def read_json_lines(
    draft: Draft, pieces: Iterable[bytes | str], stride: int, name: str, *, max_line: int = MAX_LINE
) -> Facts:
    items = chars = 0
    numbers: list[int] = []
    offsets: list[int] = []
    for number, padded in enumerate(_lines(_without_bom(pieces), name, max_line), 1):
        line = padded.strip(b" \t\r")
        if not line:
            continue
        text = line.decode()
        try:
            check_line(line, text)
        except INVALID as error:
            raise ContextError(f"{name}: line {number} is not valid JSON ({reason(error)}); mend or drop it") from None
        if not offsets or draft.size - offsets[-1] >= stride:
            numbers.append(items)
            offsets.append(draft.size)
        draft.write(line + b"\n")
        items += 1
        chars += len(text) + 1
    return {"blocks": [numbers, offsets], "chars": chars, "index": None, "items": items}


def _lines(pieces: Iterable[bytes | str], name: str, max_line: int) -> Iterator[bytes]:
    """Lines in UTF-8, without their end."""
    held: list[bytes] = []
    size, number = 0, 1
    for piece in pieces:
        first, *rest = (piece if isinstance(piece, bytes) else piece.encode()).split(b"\n")
        held.append(first)
        size += len(first)  # of what is held: counted anew for each piece, very many small ones would take minutes
        if size > max_line:
            raise ContextError(f"{name}: line {number} is longer than {max_line >> 20} MiB; split it up")
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
            size = len(held[0])
            number += len(rest)
    yield b"".join(held)


class Meter:
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


# From bytes to characters


def _without_bom(pieces: Iterable[bytes | str]) -> Iterator[bytes | str]:
    for number, piece in enumerate(pieces):
        yield piece.removeprefix("\ufeff") if number == 0 and isinstance(piece, str) else piece


def decoded(chunks: Iterable[bytes], encoding: Encoding, name: str) -> Iterator[bytes | str]:
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


def chunks(stream: BinaryIO, name: str) -> Iterator[bytes]:
    while True:
        with reading(name):
            chunk = stream.read(CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def reading(name: str) -> Generator[None]:
    """Makes of an OSError a ContextError."""
    try:
        yield
    except FileNotFoundError:
        raise ContextError(f"{name}: no such file or folder; check the path") from None
    except PermissionError:
        raise ContextError(f"{name}: permission denied; make it readable for this user") from None
    except OSError as error:
        raise ContextError(f"{name}: cannot be read ({error.strerror}); check the path and the disk") from None


def shown(path: Path | str) -> str:
    """The path on one line, whatever its name holds."""
    text = str(path)
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)
