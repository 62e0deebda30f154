"""An export: one tar that can be checked with FORMAT.md alone. Written from evidence, and read as evidence again.

What is read may come from anybody: names are held to their forms, sizes are bounded, nothing is unpacked.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from orchestrator.audit.evidence import Entry, Evidence, Reservation
from orchestrator.audit.trees import Growing
from orchestrator.core.merkle import HASH, HEIGHT, WIDTH, leaf_hash, path
from orchestrator.core.notes import Verifier
from orchestrator.core.tenants import NAME
from orchestrator.core.units import read_usd, usd
from orchestrator.files import open_regular

FORMAT = Path(__file__).with_name("FORMAT.md")
_MOST_MEMBER = 64 << 20  # bytes of one that is read as a whole
_MOST_LINE = 1 << 20
_LOG = rf"(platform|tenants/{NAME})"
_QUERY = r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}"
_TILE = re.compile(
    rf"logs/{_LOG}/tile/(entries|[0-9]|[1-5][0-9]|6[0-3])/((?:x\d{{3}}/)*\d{{3}})(?:\.p/([1-9]\d{{0,2}}))?"
)
_NOTE = re.compile(rf"logs/{_LOG}/checkpoints/(\d{{1,19}})")
_ENTRIES = re.compile(rf"logs/{_LOG}/entries\.jsonl")
_PAYLOAD = re.compile(rf"payloads/({_QUERY})/(\d{{1,9}})/([a-z_]{{1,32}})")
_OTHERS = ("FORMAT.md", "key", "queries.jsonl", "ledger.jsonl")
_SALT = 16


def write_archive(evidence: Evidence, out: IO[bytes]) -> None:
    """All of the evidence, the same one always as the same bytes. Raises ValueError on names that have no place."""
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        writer = _Writer(tar)
        writer.add("FORMAT.md", FORMAT.read_bytes())
        if verifier := evidence.verifier():
            writer.add("key", f"{verifier}\n".encode())
        for log in evidence.logs():
            for size, note in evidence.notes(log):
                writer.add(f"logs/{log}/checkpoints/{size}", note.encode())
            (writer.whole_log if evidence.whole else writer.parts_of_log)(evidence, log)
        rows = list(evidence.queries())
        writer.lines("queries.jsonl", ({"query": q, "tenant": tenant, "status": how} for q, tenant, how in rows))
        writer.lines("ledger.jsonl", _ledger(evidence))
        for query, tenant, _status in rows:
            for seq, name, opened in evidence.payloads(tenant, query):
                if opened:
                    writer.add(f"payloads/{query}/{seq}/{name}", b"".join(opened))


def _ledger(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for one in evidence.reservations():
        money = {"settled_usd": usd(one.settled), "held_usd": usd(one.open)}
        counted = {"calls": one.calls, "open": one.is_open, "scopes": json.loads(one.scopes)}
        yield {"reservation": one.id, "query": one.query, **money, **counted}
    for scope, spent, held, calls, in_flight in evidence.scopes():
        counts = {"calls": calls, "in_flight": in_flight}
        yield {"scope": scope, "spent_usd": usd(spent), "held_usd": usd(held), **counts}


class _Writer:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(self, name: str, content: bytes) -> None:
        if not _is_known(name):
            raise ValueError(f"{name[:200]!r} has no place in an export")
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._tar.addfile(info, io.BytesIO(content))

    def lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        self.add(name, b"".join([json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows]))

    def whole_log(self, evidence: Evidence, log: str) -> None:
        """Its entries in bundles, and all of its tiles."""
        tree, bundle = Growing(), list[bytes]()
        for entry in evidence.entries(log):
            bundle.append(struct.pack(">H", len(entry.record)) + entry.record)
            for level, n, hashes in tree.add(leaf_hash(entry.record)):
                self.add(f"logs/{log}/{path(level, n)}", hashes)
            if len(bundle) == WIDTH:
                self.add(f"logs/{log}/{path('entries', tree.size // WIDTH - 1)}", b"".join(bundle))
                bundle.clear()
        if bundle:
            self.add(f"logs/{log}/{path('entries', tree.size // WIDTH, len(bundle))}", b"".join(bundle))
        for level, n, hashes in tree.edges():
            self.add(f"logs/{log}/{path(level, n, len(hashes) // HASH)}", hashes)

    def parts_of_log(self, evidence: Evidence, log: str) -> None:
        """Some entries, with the tiles that lead from them to the signed head."""
        entries = list(evidence.entries(log))
        rows = [{"leaf": entry.leaf, "record": entry.record.decode()} for entry in entries]
        self.lines(f"logs/{log}/entries.jsonl", rows)
        size = max((size for size, _note in evidence.notes(log)), default=0)
        for level, n in sorted(leading([entry.leaf for entry in entries], size)):
            width = min(WIDTH, (size >> (HEIGHT * level)) - n * WIDTH)
            if hashes := evidence.tile(log, level, n, width):
                self.add(f"logs/{log}/{path(level, n, width)}", hashes)


def leading(leaves: Iterable[int], size: int) -> set[tuple[int, int]]:
    """(level, n) of the tiles that lead from these entries to the root of a log with `size` entries."""
    found: set[tuple[int, int]] = set()
    indices, level = {leaf // WIDTH for leaf in leaves}, 0
    while count := size >> (HEIGHT * level):
        found |= {(level, n) for n in indices if n * WIDTH < count}
        if count % WIDTH:
            found.add((level, count // WIDTH))
        indices, level = {n // WIDTH for n in indices}, level + 1
    return found


def _is_known(name: str) -> bool:
    return name in _OTHERS or any(form.fullmatch(name) for form in (_TILE, _NOTE, _ENTRIES, _PAYLOAD))


class _Plain(tarfile.TarInfo):
    """Extended headers, which no export needs, take memory and time before anybody can look at them."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or self.size < 0:
            raise tarfile.ReadError("it holds what is no plain file, and so has no place in an export")
        return super()._proc_member(tar)  # pyright: ignore


class Archive(Evidence):
    """An export that was read. Raises ValueError where it is none; then and later one line says why."""

    def __init__(self, file: Path) -> None:
        self._members: dict[str, tarfile.TarInfo] = {}
        self._tiles: dict[tuple[str, str, int], tuple[int, str]] = {}  # (log, level, n) -> (width, name)
        self._sizes: dict[str, list[int]] = {}
        self._payloads: dict[str, list[str]] = {}
        with contextlib.ExitStack() as undone:
            stream = undone.enter_context(open_regular(file))
            try:
                self._tar = tarfile.open(fileobj=stream, mode="r:", tarinfo=_Plain)  # noqa: SIM115  ends with the stream
                for member in self._tar:
                    self._index(member)
                if "FORMAT.md" not in self._members or not self.logs():
                    raise ValueError("it has no FORMAT.md, or no log")
            except (tarfile.TarError, EOFError, OverflowError, ValueError, RecursionError) as error:
                detail = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"{file} is not an export of a journal: {detail}") from None
            self._close = undone.pop_all().close
        self.whole = not any(_ENTRIES.fullmatch(name) for name in self._members)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _index(self, member: tarfile.TarInfo) -> None:
        name = member.name
        if not _is_known(name) or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise ValueError(f"it holds {name[:100]!r}, which has no place in an export")
        if name in self._members:
            raise ValueError(f"it holds {name[:100]!r} twice")
        self._members[name] = member
        if found := _TILE.fullmatch(name):
            log, level, number, width = found.groups()
            place = log, level, int(number.replace("x", "").replace("/", ""))
            if place in self._tiles or int(width or WIDTH) > WIDTH:
                raise ValueError(f"it holds {name[:100]!r} in two widths, or too wide")
            self._tiles[place] = int(width or WIDTH), name
        elif found := _NOTE.fullmatch(name):
            self._sizes.setdefault(found[1], []).append(int(found[2]))
        elif found := _PAYLOAD.fullmatch(name):
            self._payloads.setdefault(found[1], []).append(name)

    def _read(self, name: str) -> bytes:
        member = self._members[name]
        if member.size > _MOST_MEMBER:
            raise ValueError(f"{name} has {member.size:,} bytes")
        try:
            stream = self._tar.extractfile(member)
            content = stream.read() if stream else b""
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{name}: {error}") from None
        if len(content) != member.size:
            raise ValueError(f"{name} is cut")
        return content

    def _lines(self, name: str) -> Iterator[Any]:
        stream = self._tar.extractfile(self._members[name]) if name in self._members else None
        while stream and (line := stream.readline(_MOST_LINE)):
            yield json.loads(line)

    def verifier(self) -> Verifier | None:
        return Verifier.read(self._read("key").decode("utf-8", "replace")) if "key" in self._members else None

    def logs(self) -> list[str]:
        held = {found[1] for name in self._members if (found := _ENTRIES.fullmatch(name))}
        return sorted({log for log, _level, _n in self._tiles} | self._sizes.keys() | held)

    def entries(self, log: str) -> Iterator[Entry]:
        if not self.whole:
            for row in self._lines(f"logs/{log}/entries.jsonl"):
                record = row["record"].encode()
                yield Entry(int(row["leaf"]), record)
            return
        for number in sorted(n for name, level, n in self._tiles if (name, level) == (log, "entries")):
            width, name = self._tiles[log, "entries", number]
            content, at = self._read(name), 0
            for place in range(width):
                (length,) = struct.unpack_from(">H", content, at) if at + 2 <= len(content) else (len(content),)
                record = content[at + 2 : at + 2 + length]
                if len(record) != length:
                    raise ValueError(f"{name} is cut")
                at += 2 + length
                yield Entry(number * WIDTH + place, record)
            if at != len(content):
                raise ValueError(f"{name} holds more than its {width} entries")

    def notes(self, log: str) -> Iterator[tuple[int, str]]:
        for size in sorted(self._sizes.get(log, [])):
            yield size, self._read(f"logs/{log}/checkpoints/{size}").decode("utf-8", "replace")

    def tile(self, log: str, level: int, n: int, width: int) -> bytes | None:
        kept = self._tiles.get((log, str(level), n))
        return None if kept is None else self._read(kept[1])[: width * HASH]

    def queries(self) -> Iterator[tuple[str, str, str]]:
        for row in self._lines("queries.jsonl"):
            yield str(row["query"]), str(row["tenant"]), str(row["status"])

    def reservations(self) -> Iterator[Reservation]:
        for row in self._lines("ledger.jsonl"):
            if "query" in row:
                money = read_usd(row["settled_usd"]), read_usd(row["held_usd"])
                counted = bool(row["open"]), int(row["calls"]), json.dumps(row["scopes"])
                yield Reservation(str(row["reservation"]), str(row["query"]), *money, *counted)

    def scopes(self) -> Iterator[tuple[str, int, int, int, int]]:
        for row in self._lines("ledger.jsonl"):
            if "scope" in row:
                money = read_usd(row["spent_usd"]), read_usd(row["held_usd"])
                yield str(row["scope"]), *money, int(row["calls"]), int(row["in_flight"])

    def payloads(self, tenant: str, query: str) -> Iterator[tuple[int, str, tuple[bytes, bytes] | None]]:
        del tenant  # an export's payloads are open
        for name in self._payloads.get(query, ()):
            _, _, seq, what = name.split("/")
            content = self._read(name)
            yield int(seq), what, (content[:_SALT], content[_SALT:])
