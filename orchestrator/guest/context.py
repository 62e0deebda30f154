"""`context` in the REPL: a plain value where it fits in memory, else a view that decodes what is touched.

The host's `store/contexts.py` writes the two files read here: `data` (UTF-8) and `manifest.json`, and lists its fields.
The text is hostile and may be gigabytes; the manifest is the host's own. Nothing here writes.
"""

from __future__ import annotations

import mmap
import os
from _bisect import bisect_right
from abc import abstractmethod

from .lazytext import LazyText
from .lean import Sequence, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Values = Sequence[Any]
else:
    Values = Sequence  # subscripts need typing

_MAPPED = 256 << 10  # bytes; a smaller file is read in one go, which under gVisor takes far less than its pages would
_ITEM_OVERHEAD = 500  # bytes that one small dict with its path costs, above its text


def form(kind: str, size: int, chars: int, items: int | None, memory_bytes: int) -> str:
    """ "plain" (a str, list or JSON value) or "lazy", for a context of `size` bytes in a sandbox of `memory_bytes`.

    A plain text or list of documents takes at most an eighth of the memory (a str that is not ASCII may take 4 bytes a
    character); a parsed JSON value at most a quarter, if it is ten times the size of its text.
    """
    if kind in ("json", "jsonl"):
        return "plain" if size * 10 <= memory_bytes // 4 else "lazy"
    decoded = (chars if size == chars else 4 * chars) + _ITEM_OVERHEAD * (items or 0)
    return "plain" if decoded <= memory_bytes // 8 else "lazy"


def load(folder: str, memory_bytes: int) -> object:
    """The context in `folder`: str, list or JSON value; LazyText or LazyList where `form` says "lazy".

    A lazy JSON value that is no list is a LazyText of its JSON. Raises OSError where a file cannot be read.
    """
    facts: dict[str, Any] = loads(str(_bytes(f"{folder}/manifest.json"), "utf-8"))
    data = _bytes(f"{folder}/data")
    kind: str = facts["kind"]
    lazy = form(kind, facts["bytes"], facts["chars"], facts["items"], memory_bytes) == "lazy"
    if kind == "documents":
        items = Documents(data, facts, memory_bytes)
    elif kind == "json" and not lazy:
        import json

        return json.loads(str(data, "utf-8"))
    elif "blocks" in facts:
        items = Items(data, facts, memory_bytes)
    else:
        return _text(data, facts["chars"], facts["index"], facts["stride"], memory_bytes, lazy)
    return items if lazy else list(items)


def _bytes(path: str) -> memoryview:
    """Of a file, mapped where reading would be the slower way. Not `open`: that takes twice as many system calls."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if size > _MAPPED:
            return memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ))
        return memoryview(os.read(fd, size))
    finally:
        os.close(fd)


def _text(
    data: memoryview, chars: int, index: list[int] | None, stride: int, memory_bytes: int, lazy: bool
) -> str | LazyText:
    return LazyText(data, chars, index, stride, memory_bytes // 8) if lazy else str(data, "utf-8")


class LazyList(Values):
    """A list too large to hold: items are parsed when touched. A slice is a list, up to a share of the memory."""

    def __init__(self, data: memoryview, facts: dict[str, Any], memory_bytes: int) -> None:
        self._data, self._facts, self._memory_bytes = data, facts, memory_bytes
        self._length: int = facts["items"]

    @abstractmethod
    def _item(self, number: int) -> Any: ...

    @abstractmethod
    def _slice_bytes(self, first: int, last: int) -> int:
        """An upper bound of what items first to last take in memory."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return map(self._item, range(self._length))

    def __getitem__(self, key: int | slice) -> Any:
        if not isinstance(key, slice):
            if not -self._length <= key < self._length:
                raise IndexError(f"index {key} is outside a list of {self._length:,} items")
            return self._item(key % self._length)
        picked = range(self._length)[key]
        ends = sorted((picked[0], picked[-1])) if picked else ()
        if ends and self._slice_bytes(*ends) > self._memory_bytes // 4:
            raise MemoryError(f"{len(picked):,} items are too many for one list here; take fewer, or iterate")
        return [self._item(number) for number in picked]

    def __repr__(self) -> str:
        return f"<LazyList of {self._length:,} items: index, slice or iterate it>"


class Documents(LazyList):
    """{"path": str, "text": str} each; the text is a LazyText where it is large itself."""

    def _item(self, number: int) -> dict[str, Any]:
        path, start, size, chars, index = self._facts["documents"][number]
        data, memory_bytes = self._data[start : start + size], self._memory_bytes
        lazy = form("text", size, chars, None, memory_bytes) == "lazy"
        return {"path": path, "text": _text(data, chars, index, self._facts["stride"], memory_bytes, lazy)}

    def _slice_bytes(self, first: int, last: int) -> int:
        documents = self._facts["documents"]
        return 4 * (documents[last][1] + documents[last][2] - documents[first][1]) + _ITEM_OVERHEAD * (last - first)


class Items(LazyList):
    """JSON lines, or the items of a JSON list. `blocks` in the manifest: item numbers, and their byte offsets.

    A block is parsed as a whole and the last one is kept, so that iterating parses each item once.
    """

    def __init__(self, data: memoryview, facts: dict[str, Any], memory_bytes: int) -> None:
        super().__init__(data, facts, memory_bytes)
        self._numbers, self._offsets = facts["blocks"]
        self._cached: tuple[int, list[Any]] = (-1, [])

    def _block(self, number: int) -> int:
        """Of an item."""
        return bisect_right(self._numbers, number) - 1

    def _item(self, number: int) -> Any:
        block = self._block(number)
        cached, items = self._cached
        if cached != block:
            items = self._parse(block)
            self._cached = (block, items)
        return items[number - self._numbers[block]]

    def _end(self, block: int) -> int:
        return self._offsets[block + 1] if block + 1 < len(self._offsets) else len(self._data)

    def _parse(self, block: int) -> list[Any]:
        import json

        start, end = self._offsets[block], self._end(block)
        if (end - start) * 10 > self._memory_bytes:
            raise MemoryError(
                f"item {self._numbers[block]:,} is {end - start:,} bytes of JSON, too large to parse here"
            )
        # A block ends with a line end, the comma of its last item, or the bracket of the list. No str in valid JSON
        # holds a bare line end, so lines can be parsed as one list, which takes half the time.
        body = str(self._data[start:end], "utf-8").rstrip(" \t\r\n")
        body = body.replace("\n", ",") if self._facts["kind"] == "jsonl" else body[:-1]
        return json.loads(f"[{body}]")

    def _slice_bytes(self, first: int, last: int) -> int:
        return 10 * (self._end(self._block(last)) - self._offsets[self._block(first)])
