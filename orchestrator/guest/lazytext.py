"""A text that stays on disk: the methods of str that searching needs, decoding only what is touched.

Every offset a caller sees counts characters. Inside, a byte offset becomes a character offset through `index`, the byte
offset of every `stride`-th character; ASCII text needs none, there both are the same.
"""

from __future__ import annotations

from _bisect import bisect_right
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Iterator
    from typing import Any

WINDOW = 4 << 20
"""Bytes, or characters, worked on at a time."""
OVERLAP = 1 << 20
"""Characters: the longest match of a regular expression, and the farthest one looks ahead or behind."""


class LazyText:
    """A text too large to be a str: the methods of str that searching needs, with the same results.

    Slices and pieces are str, up to `limit` bytes in memory; above it MemoryError. `splitlines` and `split` are
    iterators. `search`, `finditer` and `findall` take a regular expression and are exact for matches of up to OVERLAP
    characters; a longer one raises ValueError.
    """

    def __init__(
        self,
        data: memoryview,
        chars: int,
        index: list[int] | None,
        stride: int,
        limit: int,
        window: int = WINDOW,
        overlap: int = OVERLAP,
    ) -> None:
        self._data, self._size, self._chars = data, len(data), chars
        self._ascii = self._size == chars
        self._index, self._stride = index or [0], stride
        self._limit = limit if self._ascii else limit // 4  # a str may take 4 bytes a character
        self._window, self._overlap = window, overlap
        self._cached: tuple[int, str] = (-1, "")  # the block touched last; one tuple, so that threads see it whole

    # Bytes and characters

    def _bytes(self, lo: int, hi: int) -> bytes:
        return bytes(self._data[lo:hi])

    def _text(self, lo: int, hi: int) -> str:
        """Of bytes [lo, hi)."""
        return str(self._data[lo:hi], "utf-8")

    def _block(self, number: int) -> str:
        """Characters [number * stride, (number + 1) * stride)."""
        cached, text = self._cached
        if cached != number:
            ends = self._index[number + 1 : number + 2] or [self._size]
            text = self._text(self._index[number], ends[0])
            self._cached = (number, text)
        return text

    def _byte_at(self, char: int) -> int:
        if self._ascii:
            return char
        if char == self._chars:
            return self._size
        number, inside = divmod(char, self._stride)
        return self._index[number] + len(self._block(number)[:inside].encode())

    def _char_at(self, byte: int) -> int:
        if self._ascii:
            return byte
        number = bisect_right(self._index, byte) - 1
        return number * self._stride + len(self._text(self._index[number], byte))

    def _decode(self, lo: int, hi: int) -> str:
        return self._text(self._byte_at(lo), self._byte_at(hi))

    def _fits(self, size: int) -> None:
        if size > self._limit:
            raise MemoryError(
                f"{size:,} is too large for one str here: take at most {self._limit:,} characters at a time"
            )

    def _span(self, start: int | None, end: int | None) -> tuple[int, int]:
        """As str methods read start and end: character offsets, where a start beyond the end finds nothing."""
        lo, hi = start or 0, self._chars if end is None else end
        return (
            max(lo + self._chars, 0) if lo < 0 else lo,
            max(hi + self._chars, 0) if hi < 0 else min(hi, self._chars),
        )

    # Looking at it

    def __len__(self) -> int:
        return self._chars

    def __getitem__(self, key: int | slice) -> str:
        if not isinstance(key, slice):
            if not -self._chars <= key < self._chars:
                raise IndexError(f"index {key} is outside a text of {self._chars:,} characters")
            at = key % self._chars
            return self._text(at, at + 1) if self._ascii else self._block(at // self._stride)[at % self._stride]
        picked = range(self._chars)[key]
        self._fits(len(picked))
        if not picked:
            return ""
        lo, hi = min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1
        if hi - lo > max(self._limit, self._window):
            return "".join(self[at] for at in picked)
        return self._decode(lo, hi)[:: picked.step]

    def _windows(self) -> Iterator[str]:
        for at in range(0, self._chars, self._window):
            yield self._decode(at, min(at + self._window, self._chars))

    def __iter__(self) -> Iterator[str]:
        for window in self._windows():
            yield from window

    def __str__(self) -> str:
        return self[:]

    def __repr__(self) -> str:
        return f"<LazyText of {self._chars:,} characters: slice it, or use find, count, search, finditer, splitlines>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(str, name):
            raise AttributeError(f"'LazyText' object has no attribute {name!r}")

        def refuse(*_args: object, **_kwargs: object) -> None:
            raise TypeError(f"a text of {self._chars:,} characters has no .{name}(): use slices, context[a:b].{name}()")

        return refuse

    # Searching for a str: on bytes, for UTF-8 never matches across the borders of characters.

    def _offsets(self, sub: bytes, lo: int, hi: int) -> Iterator[int]:
        """Byte offsets of `sub` (not empty) in bytes [lo, hi), without overlaps.

        Works on copies of windows: `mmap.find` is a naive loop before Python 3.13.
        """
        size = max(self._window, 4 * len(sub))
        while hi - lo >= len(sub):
            window = self._bytes(lo, min(hi, lo + size))
            end, at = 0, window.find(sub)
            while at >= 0:
                yield lo + at
                end = at + len(sub)
                at = window.find(sub, end)
            lo += max(end, len(window) - len(sub) + 1)

    def find(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        lo, hi = self._span(start, end)
        wanted = _encoded(sub)
        if lo > hi or not wanted:
            return lo if lo <= hi else -1
        at = next(self._offsets(wanted, self._byte_at(lo), self._byte_at(hi)), -1)
        return at if at < 0 else self._char_at(at)

    def rfind(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        lo, hi = self._span(start, end)
        wanted = _encoded(sub)
        if lo > hi or not wanted:
            return hi if lo <= hi else -1
        first, last = self._byte_at(lo), self._byte_at(hi)
        size = max(self._window, 4 * len(wanted))
        while last - first >= len(wanted):
            at = max(first, last - size)
            found = self._bytes(at, last).rfind(wanted)
            if found >= 0:
                return self._char_at(at + found)
            last = at + len(wanted) - 1
        return -1

    def index(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        return _found(self.find(sub, start, end))

    def rindex(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        return _found(self.rfind(sub, start, end))

    def count(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        lo, hi = self._span(start, end)
        wanted = _encoded(sub)
        if lo > hi or not wanted:
            return max(hi - lo + 1, 0)
        first, last = self._byte_at(lo), self._byte_at(hi)
        if len(wanted) == 1:  # such as the lines: too many to count one by one
            windows = range(first, last, self._window)
            return sum(self._bytes(at, min(last, at + self._window)).count(wanted) for at in windows)
        return sum(1 for _ in self._offsets(wanted, first, last))

    def __contains__(self, sub: str) -> bool:
        return self.find(sub) >= 0

    def startswith(self, prefix: str | tuple[str, ...], start: int | None = None, end: int | None = None) -> bool:
        lo, hi = self._span(start, end)
        parts = prefix if isinstance(prefix, tuple) else (prefix,)
        return any(len(_checked(part)) <= hi - lo and self._decode(lo, lo + len(part)) == part for part in parts)

    def endswith(self, suffix: str | tuple[str, ...], start: int | None = None, end: int | None = None) -> bool:
        lo, hi = self._span(start, end)
        parts = suffix if isinstance(suffix, tuple) else (suffix,)
        return any(len(_checked(part)) <= hi - lo and self._decode(hi - len(part), hi) == part for part in parts)

    # Taking it apart

    def splitlines(self, keepends: bool = False) -> Iterator[str]:
        """The lines as str.splitlines cuts them, one at a time. Raises MemoryError at a line above the limit."""
        held: list[str] = []  # the parts of a line that no window so far has ended
        carry = ""  # a \r at the end of a window: a \n may follow, and they are one line end
        for window in self._windows():
            text = carry + window
            carry = "\r" if text[-1] == "\r" else ""
            text = text[: len(text) - len(carry)]
            lines = text.splitlines(keepends)
            if text and len((text[-1] + "x").splitlines()) == 1:  # the last line goes on
                held.append(lines.pop())
                if lines:
                    lines[0] = "".join(held[:-1]) + lines[0]
                    held = held[-1:]
            elif lines:
                lines[0] = "".join(held) + lines[0]
                held = []
            self._fits(sum(map(len, held)))
            yield from lines
        yield from ("".join(held) + carry).splitlines(keepends)

    lines = iter_lines = splitlines

    def split(self, sep: str | None = None, maxsplit: int = -1) -> Iterator[str]:
        """The pieces as str.split cuts them, one at a time. Raises MemoryError at a piece above the limit."""
        if sep == "":
            raise ValueError("empty separator")
        return self._words(maxsplit) if sep is None else self._pieces(_encoded(sep), maxsplit)

    def _words(self, maxsplit: int) -> Iterator[str]:
        for number, word in enumerate(self.finditer(r"\S+")):
            if number == maxsplit:
                yield self[word.start() :]
                return
            yield word.group()

    def _pieces(self, sep: bytes, maxsplit: int) -> Iterator[str]:
        start = 0
        for at in islice(self._offsets(sep, 0, self._size), maxsplit if maxsplit >= 0 else None):
            self._fits(at - start)
            yield self._text(start, at)
            start = at + len(sep)
        self._fits(self._size - start)
        yield self._text(start, self._size)

    # Regular expressions

    def search(self, pattern: str | re.Pattern[str], pos: int = 0, *, flags: int = 0) -> Match | None:
        return next(self.finditer(pattern, pos, flags=flags), None)

    def findall(self, pattern: str | re.Pattern[str], pos: int = 0, *, flags: int = 0) -> list[Any]:
        found: list[Any] = []
        for match in self.finditer(pattern, pos, flags=flags):
            groups = match.groups("")
            found.append(match.group() if not groups else groups[0] if len(groups) == 1 else groups)
        return found

    def finditer(self, pattern: str | re.Pattern[str], pos: int = 0, *, flags: int = 0) -> Iterator[Match]:
        """Matches from character `pos` on, as re.finditer on the whole text gives them. `^` is the start of the text.

        Raises ValueError at a match longer than OVERLAP.
        """
        import re

        if isinstance(pos, re.RegexFlag):
            raise TypeError("the second argument is a position; flags go by name: search(pattern, flags=re.I)")
        return self._matches(re.compile(pattern, flags), min(max(pos, 0), self._chars))

    def _matches(self, regex: re.Pattern[str], pos: int) -> Iterator[Match]:
        while True:
            # The window reaches OVERLAP beyond [pos, edge) on both sides, so that what starts in there sees the same
            # surroundings as in the whole text; what starts behind the edge is left to the next window.
            lo, hi = max(0, pos - self._overlap), min(self._chars, pos + self._window + self._overlap)
            edge = self._chars + 1 if hi == self._chars else hi - self._overlap
            for match in regex.finditer(self._decode(lo, hi), pos - lo):
                if lo + match.start() >= edge:
                    break
                if match.end() - match.start() > self._overlap:
                    raise ValueError(
                        f"a match at {lo + match.start():,} is longer than {self._overlap:,} characters, the most this "
                        "text can find exactly: use a narrower pattern, or re on a slice"
                    )
                yield Match(match, lo)
                pos = lo + match.end()
            if hi == self._chars:
                return
            pos = max(pos, edge)


class Match:
    """What re.Match gives, with character offsets into the whole text. Keeps the groups, not the window."""

    def __init__(self, match: re.Match[str], base: int) -> None:
        self.re = match.re
        self.lastindex, self.lastgroup = match.lastindex, match.lastgroup
        self._groups = (match.group(), *match.groups())
        spans = (match.span(number) for number in range(len(self._groups)))
        self._spans = tuple((lo + base, hi + base) if lo >= 0 else (lo, hi) for lo, hi in spans)

    def _number(self, group: int | str) -> int:
        number = self.re.groupindex.get(group, -1) if isinstance(group, str) else group
        if not 0 <= number < len(self._groups):
            raise IndexError("no such group")
        return number

    def __getitem__(self, group: int | str) -> str | None:
        return self._groups[self._number(group)]

    def group(self, *groups: int | str) -> Any:
        return self[groups[0] if groups else 0] if len(groups) < 2 else tuple(self[group] for group in groups)

    def groups(self, default: Any = None) -> tuple[Any, ...]:
        return tuple(default if text is None else text for text in self._groups[1:])

    def groupdict(self, default: Any = None) -> dict[str, Any]:
        return {name: default if self[name] is None else self[name] for name in self.re.groupindex}

    def span(self, group: int | str = 0) -> tuple[int, int]:
        return self._spans[self._number(group)]

    def start(self, group: int | str = 0) -> int:
        return self.span(group)[0]

    def end(self, group: int | str = 0) -> int:
        return self.span(group)[1]

    def __repr__(self) -> str:
        return f"<Match span={self.span()}, match={self.group()[:50]!r}>"


def _checked(sub: str) -> str:
    if not isinstance(sub, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"must be str, not {type(sub).__name__}")
    return sub


def _encoded(sub: str) -> bytes:
    """UTF-8. A lone surrogate becomes bytes that no valid UTF-8 holds, so it is never found."""
    return _checked(sub).encode(errors="surrogatepass")


def _found(at: int) -> int:
    if at < 0:
        raise ValueError("substring not found")
    return at
