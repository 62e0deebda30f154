"""Is each log what its signed heads say, and does its time go forward? One pass over each, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from orchestrator.audit.chains import Chains
from orchestrator.audit.evidence import Entry, Evidence
from orchestrator.audit.trees import Growing, Tiles
from orchestrator.audit.verdicts import Name, Report
from orchestrator.core.merkle import HASH, WIDTH, leaf_hash
from orchestrator.core.notes import Checkpoint, NoteError, Verifier, open_checkpoint

Known = tuple[Checkpoint, str]  # and what it is to the caller
CLOCKS_S = 60  # that the clocks of two machines may differ


class Logs:
    """Each entry is handed on to its chain. checkpoints: how many were looked at. newest: time of a record."""

    def __init__(
        self, evidence: Evidence, chains: Chains, verifier: Verifier | None, now: datetime, report: Report
    ) -> None:
        self._evidence = evidence
        self._chains = chains
        self._verifier = verifier
        self._latest = _stamp(now + timedelta(seconds=CLOCKS_S))
        self._report = report
        self.checkpoints = 0
        self.newest = ""

    def check(self, log: str, held: list[Known]) -> None:
        signed = list(self._signed(log))
        if self._evidence.whole:
            self._whole_log(log, signed, held)
        else:
            self._parts_of_log(log, signed, held)

    def _signed(self, log: str) -> Iterator[Checkpoint]:
        for size, note in self._evidence.notes(log):
            self.checkpoints += 1
            if self._verifier is None:
                continue
            try:
                head = open_checkpoint(note, self._verifier)
            except NoteError as error:
                self._report["integrity"].fault(f"log {log}: a checkpoint that is kept: {error}")
                continue
            if (head.origin, head.size) != (f"{self._verifier.name}/{log}", size):
                text = f"log {log}: a checkpoint that is kept at {size} entries is of {head.origin} at {head.size}"
                self._report["integrity"].fault(text)
            else:
                yield head

    def _whole_log(self, log: str, signed: list[Checkpoint], held: list[Known]) -> None:
        wanted: list[tuple[int, bytes, Name, str]] = [
            *((head.size, head.root, "integrity", "a checkpoint that is kept") for head in signed),
            *((head.size, head.root, "append-only", what) for head, what in held),
            *(
                (size, root, "integrity", "the platform's log")
                for size, root in self._chains.heads.get(log, {}).items()
            ),
        ]
        wanted.sort(key=lambda head: head[0], reverse=True)
        newest = max((head.size for head in signed), default=0)
        tree, latest, unsigned = Growing(), "", 0
        for entry in self._evidence.entries(log):
            self._check_heads(log, tree, wanted)
            digest = leaf_hash(entry.record)
            if not self._in_place(log, tree, entry):
                continue
            if entry.hash is not None and entry.hash != digest.hex():
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} does not match its hash")
            if not entry.is_ours:
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} was written by somebody else")
            needs_head, at = self._chains.read(log, entry, digest)
            latest = self._time(log, entry.leaf, at, latest) if at else latest
            unsigned += needs_head and entry.leaf >= newest
            for level, n, hashes in tree.add(digest):
                self._tile(log, level, n, hashes)
        self._check_heads(log, tree, wanted)
        for level, n, hashes in tree.edges():
            self._tile(log, level, n, hashes)
        for size, _root, name, what in wanted:
            text = f"log {log}: {what} has {size} entries, and {tree.size} are here: its end was cut off"
            self._report[name].fault(text)
            self._report["completeness"].fault(text)
        if unsigned:
            text = f"log {log}: {unsigned} records of an end, an erasure or a score are under no signed head"
            self._report["freshness"].fault(text)

    def _in_place(self, log: str, tree: Growing, entry: Entry) -> bool:
        if entry.leaf < tree.size:
            self._report["integrity"].fault(f"log {log}: entry {entry.leaf} has a place that is taken, or none")
            return False
        if entry.leaf > tree.size:
            lost = entry.leaf - tree.size
            self._report["completeness"].fault(f"log {log}: {lost} entries before entry {entry.leaf} are missing")
            tree.size = entry.leaf  # what follows is held to its chains alone
            tree.broken = True
        return True

    def _tile(self, log: str, level: int, n: int, hashes: bytes) -> None:
        width = len(hashes) // HASH
        kept = self._evidence.tile(log, level, n, width)
        if kept != hashes and not (kept is None and (width < WIDTH or not self._evidence.has_tiles)):
            self._report["integrity"].fault(f"log {log}: tile {level}/{n} is not that of its entries")

    def _check_heads(self, log: str, tree: Growing, wanted: list[tuple[int, bytes, Name, str]]) -> None:
        while wanted and wanted[-1][0] == tree.size:
            size, root, name, what = wanted.pop()
            if tree.broken or tree.root() != root:
                self._report[name].fault(f"log {log}: {what} has another root at {size} entries")
        while wanted and wanted[-1][0] < tree.size:  # entries before this one lack: told already
            wanted.pop()

    def _parts_of_log(self, log: str, signed: list[Checkpoint], held: list[Known]) -> None:
        """Of one query: its entries, and the tiles that lead from them to the signed head."""
        if not signed:
            self._report["integrity"].fault(f"log {log}: there is no checkpoint of it")
            return
        head = max(signed, key=lambda one: one.size)
        tiles = Tiles(self._evidence, log, head.size)
        if tiles.root() != head.root:
            self._report["integrity"].fault(f"log {log}: its tiles do not lead to the signed head")
        for other, what in held:
            if (other.size, other.root) != (head.size, head.root):
                known = tiles.root_at(other.size) if other.size <= head.size else None
                if known is None:
                    text = f"log {log}: {what} cannot be compared with this part of the log: export the whole log"
                    self._report["append-only"].fault(text)
                elif known != other.root:
                    text = f"log {log}: {what} has another root at {other.size} entries"
                    self._report["append-only"].fault(text)
        latest, before = "", -1
        for entry in self._evidence.entries(log):
            digest = leaf_hash(entry.record)
            if entry.leaf <= before or tiles.leaf(entry.leaf) != digest:
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} is not in the signed log")
            before = max(before, entry.leaf)
            _ended, at = self._chains.read(log, entry, digest)
            if at:
                latest = self._time(log, entry.leaf, at, latest)

    def _time(self, log: str, leaf: int, at: str, latest: str) -> str:
        """The latest time so far."""
        if at < latest and _read(latest) - _read(at) > timedelta(seconds=CLOCKS_S):
            text = f"log {log}: entry {leaf} is of {at}, after one of {latest}: the clock was set back"
            self._report["freshness"].fault(text)
        if at > self._latest:
            self._report["freshness"].fault(f"log {log}: entry {leaf} is of {at}, which is yet to come")
        self.newest = max(self.newest, at)
        return max(latest, at)


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read(at: str) -> datetime:
    return datetime.fromisoformat(at)
