"""Merkle trees as RFC 6962 section 2.1 has them, kept in tiles as C2SP tlog-tiles has them. Pure.

A tile of level L holds up to 256 hashes; hash i of tile n is that of the whole subtree over the entries
(n * 256 + i) * 256**L onwards, 256**L of them. Level 0 holds the hashes of entries. Only whole tiles are hashed into
the level above, so a tree of any size is known by its tiles, most of which never change again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

HEIGHT = 8
WIDTH = 1 << HEIGHT
HASH = 32  # bytes
EMPTY = hashlib.sha256(b"").digest()

Tiles = Callable[[int, int, int], bytes]  # (level, n, width) -> at least the first `width` hashes of that tile


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def whole(hashes: bytes) -> bytes:
    """The root over neighbouring hashes, a power of two of them, joined."""
    while len(hashes) > HASH:
        pairs = (b"\1" + hashes[at : at + 2 * HASH] for at in range(0, len(hashes), 2 * HASH))
        hashes = b"".join([hashlib.sha256(pair).digest() for pair in pairs])
    return hashes


def widths(size: int) -> Iterator[tuple[int, int, int]]:
    """(level, n, width) of every tile of a tree with `size` entries; of each level, the last may be narrower."""
    level = 0
    while count := size >> (HEIGHT * level):
        for n in range(count >> HEIGHT):
            yield level, n, WIDTH
        if count % WIDTH:
            yield level, count >> HEIGHT, count % WIDTH
        level += 1


def path(level: int | str, n: int, width: int = WIDTH) -> str:
    """The name of a tile, or of a bundle of entries (level `entries`), below a log's prefix."""
    parts = [f"{n % 1000:03d}"]
    while n := n // 1000:
        parts.insert(0, f"x{n % 1000:03d}")
    return f"tile/{level}/{'/'.join(parts)}" + ("" if width == WIDTH else f".p/{width}")


class Tree:
    """A tree as its tiles have it, at any size up to what these cover."""

    def __init__(self, tiles: Tiles, size: int) -> None:
        self._tiles = tiles
        self.size = size

    def root(self, size: int | None = None) -> bytes:
        """The tree's hash when it had `size` entries."""
        size = self.size if size is None else size
        self._require(0 <= size <= self.size)
        return self._hash(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The audit path of an entry (RFC 6962 section 2.1.1)."""
        size = self.size if size is None else size
        self._require(0 <= index < size <= self.size)
        proof: list[bytes] = []
        low, high = 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                proof.append(self._hash(middle, high))
                high = middle
            else:
                proof.append(self._hash(low, middle))
                low = middle
        return proof[::-1]

    def consistency(self, old: int, size: int | None = None) -> list[bytes]:
        """That the tree of `size` goes on from the one with `old` entries (RFC 6962 section 2.1.2)."""
        size = self.size if size is None else size
        self._require(0 < old <= size <= self.size)
        proof: list[bytes] = []
        low, high, known = 0, size, True  # known: who asks has the hash of low to old, it is the old root
        while old != high:
            middle = low + _split(high - low)
            if old <= middle:
                proof.append(self._hash(middle, high))
                high = middle
            else:
                proof.append(self._hash(low, middle))
                low, known = middle, False
        return (proof if known else [*proof, self._hash(low, high)])[::-1]

    def _hash(self, low: int, high: int) -> bytes:
        """Of the entries from `low` to `high`: a range that the recursion of RFC 6962 comes to."""
        count = high - low
        if count & (count - 1):
            middle = low + _split(count)
            return node_hash(self._hash(low, middle), self._hash(middle, high))
        level, rest = divmod(count.bit_length() - 1, HEIGHT)
        first = low >> (HEIGHT * level)  # of the hashes of that level
        n, start = divmod(first, WIDTH)
        end = start + (1 << rest)
        hashes = self._tiles(level, n, end)
        return whole(hashes[start * HASH : end * HASH])

    def _require(self, fits: bool) -> None:
        if not fits:
            raise ValueError(f"the tree has {self.size} entries")


def _split(count: int) -> int:
    """The largest power of two that is smaller than `count`."""
    return 1 << ((count - 1).bit_length() - 1)


def includes(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether the proof shows that entry `index` of the tree has this hash (RFC 9162 section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    at, last, found = index, size - 1, leaf
    for step in proof:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = node_hash(step, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, step)
        at, last = at >> 1, last >> 1
    return last == 0 and found == root


def goes_on(old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that a tree goes on from what it was (RFC 9162 section 2.1.4.2)."""
    if old == size:
        return not proof and old_root == root
    if not 0 < old < size:
        return old == 0 and not proof and old_root == EMPTY
    steps = list(proof)
    if not old & (old - 1):
        steps.insert(0, old_root)
    if not steps:
        return False
    at, last = old - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    before = now = steps[0]
    for step in steps[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            before, now = node_hash(step, before), node_hash(step, now)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            now = node_hash(now, step)
        at, last = at >> 1, last >> 1
    return last == 0 and before == old_root and now == root
