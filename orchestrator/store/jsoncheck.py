"""Whether text is valid JSON that the guest can parse, found out in bounded memory, and where a list may be cut."""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO

import ijson  # pyright: ignore[reportMissingTypeStubs]

MAX_DEPTH = 200
"""Lists and dicts inside each other: far below what the guest's recursive parser can take."""
_STEP = 65_536  # bytes fed to the parser at a time: its events wait in memory
_COMMAS = 4096  # tried for the next block's start before giving up until one stride later
_LONG_LINE = 1 << 20
_ijson: Any = ijson  # it has no types

INVALID = (_ijson.JSONError, ValueError, SystemError)
"""What JsonCheck and check_line raise."""


class JsonCheck:
    """Validates one JSON value as it passes by, and finds where in a top-level list a block of items can start.

    top: type of the value. items: of the list, or values of the dict, on top. numbers, offsets: the blocks.
    position: bytes fed before the part that failed.
    """

    def __init__(self, stride: int = sys.maxsize) -> None:
        self.top = ""
        self.items = self.position = 0
        self.numbers: list[int] = []
        self.offsets: list[int] = []
        self._stride, self._step = stride, min(stride, _STEP)
        self._seek_from = sys.maxsize  # byte offset
        self._tried = self._depth = 0
        self._events: Any = _ijson.sendable_list()
        self._parser: Any = _ijson.basic_parse_coro(self._events)

    def feed(self, data: bytes) -> None:
        """Raises one of INVALID.

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
        """`feed` without the search for blocks."""
        self._parser.send(part)
        self._take_events()

    def close(self) -> None:
        """The value is complete, or one of INVALID is raised."""
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


def where(stream: BinaryIO, position: int) -> int:
    """Byte offset at which the JSON goes wrong, in the part at `position`: parsed again, that part byte by byte."""
    check = JsonCheck()
    stream.seek(0)
    for start in range(0, position, _STEP):
        check.parse(stream.read(min(_STEP, position - start)))
    try:
        while byte := stream.read(1):
            check.parse(byte)
            position += 1
    except INVALID:
        pass
    return position


def reason(error: Exception) -> str:
    """Of one of INVALID, in a few words."""
    if isinstance(error, SystemError):  # what ijson makes of the ValueError from int()
        return f"a number of more than {sys.get_int_max_str_digits():,} digits"
    return str(error).splitlines()[0].rstrip(".")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)


def check_line(line: bytes, text: str) -> None:
    """line: one JSON value without white space around it; text: the same, decoded. Raises one of INVALID.

    The streaming parser is slower, but bounds depth and memory.
    """
    if len(line) <= _LONG_LINE and line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        _, end = _STRICT.raw_decode(text)
        if end < len(text):
            raise ValueError(f"more than one value, from character {end + 1} on")
    else:
        check = JsonCheck()
        check.feed(line)
        check.close()
