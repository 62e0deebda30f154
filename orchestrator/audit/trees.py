"""Trees as an audit sees them: grown from the entries again, or followed through the tiles that are there."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.audit.evidence import Evidence
from orchestrator.core.merkle import HASH, HEIGHT, WIDTH, node_hash, whole


class Growing:
    """The hashes of a tree's edge while entries are added, and its tiles as they become whole."""

    def __init__(self) -> None:
        self.size = 0
        self.broken = False
        self._peaks: list[bytes] = []  # of whole subtrees, the largest first
        self._edges: list[list[bytes]] = []

    def add(self, leaf: bytes) -> Iterator[tuple[int, int, bytes]]:
        """(level, n, hashes) of each tile that is whole now."""
        size = self.size
        self.size += 1
        peak = leaf
        while size & 1:
            peak = node_hash(self._peaks.pop(), peak) if self._peaks else peak
            size >>= 1
        self._peaks.append(peak)
        return self._tiles(0, leaf) if not self.broken else iter(())

    def root(self) -> bytes:
        found = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            found = node_hash(peak, found)
        return found

    def edges(self) -> Iterator[tuple[int, int, bytes]]:
        """(level, n, hashes) of each tile that is not whole."""
        if not self.broken:
            for level, edge in enumerate(self._edges):
                if edge:
                    yield level, self.size >> (HEIGHT * (level + 1)), b"".join(edge)

    def _tiles(self, level: int, added: bytes) -> Iterator[tuple[int, int, bytes]]:
        if level == len(self._edges):
            self._edges.append([])
        edge = self._edges[level]
        edge.append(added)
        if len(edge) == WIDTH:
            hashes = b"".join(edge)
            edge.clear()
            yield level, (self.size >> (HEIGHT * (level + 1))) - 1, hashes
            yield from self._tiles(level + 1, whole(hashes))


class Tiles:
    """Tiles of a log of which not all are there. What is used was checked to lead to the root that `root` gives."""

    def __init__(self, evidence: Evidence, log: str, size: int) -> None:
        self._evidence, self._log, self._size = evidence, log, size
        self._seen: dict[tuple[int, int], bytes] = {}

    def _width(self, level: int, n: int) -> int:
        return min(WIDTH, (self._size >> (HEIGHT * level)) - n * WIDTH)

    def _read(self, level: int, n: int) -> bytes:
        """As it is kept; short when it lacks."""
        width = self._width(level, n)
        found = self._evidence.tile(self._log, level, n, width) if width > 0 else None
        return found if found is not None and len(found) == width * HASH else b""

    def root(self) -> bytes:
        """Of the whole log, from the tiles at its edge."""
        return self.root_at(self._size) or b""

    def root_at(self, size: int) -> bytes | None:
        """Where the tiles that it takes are there."""
        peaks: list[bytes] = []
        level = 0
        while count := size >> (HEIGHT * level):
            n, width = divmod(count, WIDTH)
            hashes = self._read(level, n)[: width * HASH] if width else b""
            if len(hashes) < width * HASH:
                return None
            at = width * HASH
            for bit in range(HEIGHT):
                if width >> bit & 1:
                    peaks.append(whole(hashes[at - (HASH << bit) : at]))
                    at -= HASH << bit
            level += 1
        if not peaks:
            return None
        found = peaks[0]
        for peak in peaks[1:]:
            found = node_hash(peak, found)
        return found

    def leaf(self, index: int) -> bytes | None:
        """The hash of an entry, of a tile that leads to the root."""
        n, place = divmod(index, WIDTH)
        tile = self._leading(0, n)
        return tile[place * HASH : (place + 1) * HASH] if tile else None

    def _leading(self, level: int, n: int) -> bytes:
        if (level, n) not in self._seen:
            hashes = self._read(level, n)
            # One at the edge is in the root itself; a whole one is a hash of the tile above.
            if self._width(level, n) == WIDTH and hashes:
                above = self._leading(level + 1, n >> HEIGHT)
                place = (n % WIDTH) * HASH
                if above[place : place + HASH] != whole(hashes):
                    hashes = b""
            self._seen[level, n] = hashes
        return self._seen[level, n]
