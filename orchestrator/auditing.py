"""The journal of a data folder, opened for those who read, check, hand out and erase."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, TypeVar

import anyio
import anyio.to_thread

from orchestrator.audit.archive import Archive, write_archive
from orchestrator.audit.evidence import Evidence, LiveEvidence, QueryEvidence
from orchestrator.audit.verdicts import Report
from orchestrator.audit.verify import verify
from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.events import Event, Recorded, read_record
from orchestrator.core.merkle import goes_on, includes, leaf_hash
from orchestrator.core.notes import Checkpoint, Growth, NoteError, Proof, Verifier, open_checkpoint
from orchestrator.data_folder import database_address, load_config, open_database, open_keys
from orchestrator.files import Unreadable, Unwritable, draft, read_text
from orchestrator.loop.past import Past
from orchestrator.loop.reader import read_past
from orchestrator.store import journal, logs
from orchestrator.store.anchors import Anchor, Receipt, anchor
from orchestrator.store.db import Database
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault
from orchestrator.wiring import TENANT, standing

T = TypeVar("T")
POLL_S = 0.1  # between two looks at a journal that others write
AT_ONCE = 500  # records of one look


@dataclass(frozen=True, slots=True)
class Books:
    """A data folder's database and the keys to it."""

    home: Path
    db: Database
    vault: Vault

    def find(self, text: str) -> str:
        """The query whose id begins with `text`, or the newest for `last`. Raises RequestError, StoreError."""
        found = self.db.read(lambda tx: journal.find_query(tx, text))
        if len(found) != 1:
            several = f"several queries begin with {text!r}, the newest of them: {', '.join(found[:3])}"
            raise RequestError(several if found else f"there is no query {text!r} in the journal")
        return found[0]

    def notary(self) -> Notary:
        return Notary(self.vault.signer(), self.home / "heads", self.vault.stamp)

    def sign(self, tenant: str) -> str:
        """The note of the tenant's log as it is now."""
        notary = self.notary()
        signed = self.db.write_sync(lambda tx: notary.sign(tx, tenant))
        notary.remember(signed)
        return signed.note

    def record(self, query: str, work: Callable[[journal.Connection], T]) -> T:
        """Run `work`, which adds to the log of the query's tenant, and sign that in the same transaction."""
        notary, tenant = self.notary(), self.tenant_of(query)
        done, signed = self.db.write_sync(lambda tx: (work(tx), notary.sign(tx, tenant)))
        notary.remember(signed)
        return done

    def tenant_of(self, query: str) -> str:
        return self.db.read(lambda tx: journal.tenant_of(tx, query))


@contextmanager
def open_books(home: Path) -> Generator[Books]:
    """Raises RequestError where there is no journal, StoreError."""
    if not database_address(home) and not os.path.lexists(home / "airlock.db"):  # nor where we may not look
        raise RequestError(f"there is no journal in {home}: nothing has been run with this data folder")
    db = open_database(home)
    try:
        yield Books(home, db, open_keys(db, home))
    finally:
        db.close()


@dataclass(frozen=True, slots=True)
class Run:
    """A query as the journal has it. payloads: (seq, name) -> text. fault: what is wrong with the chain, or None."""

    chain: list[tuple[bytes, str]]
    payloads: Mapping[tuple[int, str], str]
    fault: str | None


def read_run(home: Path, text: str) -> Run:
    """For people to read. text: see `Books.find`. Raises RequestError, StoreError."""
    with open_books(home) as books:
        query = books.find(text)
        keeper = books.vault.opener(books.tenant_of(query), query)
        kept = books.db.read(lambda tx: list(journal.kept_payloads(tx, query)))
        chain = books.db.read(lambda tx: journal.chain(tx, query))
        opened = {(seq, name): keeper.open(seq, name, sealed) for seq, name, sealed in kept if keeper}
        payloads = {place: text[1].decode("utf-8", "replace") for place, text in opened.items() if text}
        closed = books.db.read(lambda tx: journal.is_closed(tx, query))
        return Run(chain, payloads, journal.fault(chain, kept, keeper, closed=closed))


def read_notes(files: Sequence[Path]) -> list[str]:
    """Checkpoints that somebody holds. Raises RequestError."""
    try:
        return [read_text(file) for file in files]
    except Unreadable as why:
        raise RequestError(f"cannot read a checkpoint: {why}") from None


def read_verifier(text: str | None) -> Verifier | None:
    """Raises RequestError."""
    try:
        return None if text is None else Verifier.read(text)
    except NoteError as error:
        raise RequestError(f"--key: {error}") from None


def verify_home(home: Path, held: Sequence[str], trusted: Verifier | None, places: Sequence[str] = ()) -> Report:
    """places: anchors, where further checkpoints are held. Raises RequestError, StoreError."""
    anchors = [anchor(place) for place in places]
    with open_books(home) as books:

        def work(tx: journal.Connection) -> Report:
            evidence, signer = LiveEvidence(tx, books.vault), books.vault.existing_signer()
            remembered = books.notary().notes() if signer else []
            known = [*held, *_anchored(evidence, anchors)]
            return verify(evidence, known, trusted or (signer.verifier if signer else None), remembered=remembered)

        return books.db.read(work)


def _anchored(evidence: Evidence, anchors: Sequence[Anchor]) -> Iterator[str]:
    for log in {*evidence.logs(), *([logs.PLATFORM] if evidence.whole else [])}:
        for place in anchors:
            if note := place.latest(log):
                yield note.decode("utf-8", "replace")


def verify_archive(file: Path, held: Sequence[str], trusted: Verifier | None, places: Sequence[str] = ()) -> Report:
    """places: see `verify_home`. Raises RequestError where it is no export."""
    anchors = [anchor(place) for place in places]
    try:
        with Archive(file) as archive:
            return verify(archive, [*held, *_anchored(archive, anchors)], trusted)
    except Unreadable as why:
        raise RequestError(f"cannot read {file}: {why}") from None
    except ValueError as error:
        raise RequestError(str(error)) from None


def verify_query(books: Books, query: str) -> Report:
    """One query, with nothing of any log but its tenant's. Raises StoreError."""
    tenant = books.tenant_of(query)
    if not books.db.read(partial(journal.is_closed, query=query)):  # else its closing signed the log
        with suppress(StoreError):  # a log that cannot be signed is found to be damaged below
            books.sign(tenant)
    notary = books.notary()
    remembered = notary.note(logs.tenants_log(tenant))  # before the snapshot: what is signed meanwhile is no fault

    def work(tx: journal.Connection) -> Report:
        evidence = QueryEvidence(tx, books.vault, query)
        return verify(evidence, trusted=notary.verifier, remembered=[remembered] if remembered else [])

    return books.db.read(work)


def export_archive(home: Path, text: str | None, out: Path) -> None:
    """All of the journal, or a query (see `Books.find`), in one tar at `out`. Raises RequestError, StoreError."""
    with open_books(home) as books:
        query = None if text is None else books.find(text)
        try:
            with draft(out) as file:
                write_export(books, query, file)
        except Unwritable as why:
            raise RequestError(f"cannot write {out}: {why}") from None


def write_export(books: Books, query: str | None, file: IO[bytes]) -> None:
    """All of the journal, or one query, as a tar. Raises StoreError, and what writing to the file raises."""
    for tenant in [books.tenant_of(query)] if query else books.db.read(journal.tenants):
        books.sign(tenant)

    def write(tx: journal.Connection) -> None:
        evidence = QueryEvidence(tx, books.vault, query) if query else LiveEvidence(tx, books.vault)
        try:
            write_archive(evidence, file)
        except ValueError as error:
            raise StoreError(f"the journal cannot be exported, what is stored of it is damaged: {error}") from None

    books.db.read(write)


def histories(books: Books, text: str | None) -> Generator[list[Recorded]]:
    """The records of all queries, or of one (see `Books.find`), each with its payloads' texts. Raises StoreError."""
    named = books.db.read(journal.all_queries) if text is None else [books.find(text)]
    for query in named:
        keeper = books.vault.opener(books.tenant_of(query), query)
        if fault := books.db.read(partial(_fault, query=query)):
            raise StoreError(f"query {query} is not whole: {fault}; see `airlock audit verify`")
        yield books.db.read(partial(journal.history, query=query, keeper=keeper))


def _fault(tx: journal.Connection, query: str) -> str | None:
    return journal.fault(journal.chain(tx, query))


def scores(books: Books) -> dict[str, Decimal]:
    """Query -> the score that was given last."""
    found: dict[str, Decimal] = {}
    for tenant in books.db.read(journal.tenants):
        for record, _hash in books.db.read(partial(journal.chain, query=journal.own_chain(tenant).id)):
            fields = json.loads(record)
            if fields["type"] == "query.scored":
                found[fields["body"]["query"]] = Decimal(fields["body"]["score"])
    return found


def prove(books: Books, query: str, seq: int) -> str:
    """That a record, which is in the proof, is in its log (C2SP tlog-proof). Raises RequestError, StoreError."""
    found = books.db.read(lambda tx: journal.leaf_of(tx, query, seq))
    if found is None:
        raise RequestError(f"query {query} has no record {seq}")
    tenant = books.tenant_of(query)
    note = books.sign(tenant)
    head = open_checkpoint(note, books.notary().verifier)
    path = books.db.read(lambda tx: logs.tree(tx, logs.tenants_log(tenant)).inclusion(found[0], head.size))
    return Proof(found[0], path, note, found[1]).text()


def check_proof(text: str, trusted: Verifier) -> bytes:
    """The record that the proof shows to be in a log. Raises RequestError where it does not."""
    try:
        proof = Proof.read(text)
        head = open_checkpoint(proof.note, trusted)
    except NoteError as error:
        raise RequestError(f"this proves nothing: {error}") from None
    if not includes(leaf_hash(proof.extra), proof.index, head.size, proof.path, head.root):
        raise RequestError("this proves nothing: the record in it is not in the log that was signed")
    return proof.extra


def prove_growth(books: Books, tenant: str, old: int) -> str | None:
    """That the tenant's log went on from its first `old` entries (C2SP tlog-witness); None where it never had as many.

    old: from 1 on. Raises StoreError.
    """
    note = books.sign(tenant)
    head = open_checkpoint(note, books.notary().verifier)
    if old > head.size:
        return None
    path = books.db.read(lambda tx: logs.tree(tx, logs.tenants_log(tenant)).consistency(old, head.size))
    return Growth(old, path, note).text()


def check_growth(text: str, held: Sequence[str], trusted: Verifier) -> Checkpoint:
    """The checkpoint that the log went on to from the one that is held. Raises RequestError where that is not shown."""
    if len(held) != 1:
        raise RequestError("what a log went on from is one checkpoint that you hold: give it with --checkpoint")
    try:
        growth = Growth.read(text)
        before, now = open_checkpoint(held[0], trusted), open_checkpoint(growth.note, trusted)
    except NoteError as error:
        raise RequestError(f"this proves nothing: {error}") from None
    if before.origin != now.origin:
        raise RequestError(f"this proves nothing: it is of {now.origin}, and the checkpoint of {before.origin}")
    if before.size != growth.old:
        raise RequestError(f"this proves nothing: it begins at {growth.old}, and the checkpoint at {before.size}")
    if not goes_on(before.size, before.root, now.size, now.root, growth.path):
        raise RequestError("this proves nothing: the log that was signed does not go on from the checkpoint")
    return now


def erase(home: Path, text: str, seq: int | None, name: str | None, why: str) -> tuple[int, bool]:
    """How many payloads were removed, and whether nothing of them is left on disk. Raises RequestError, StoreError."""
    with open_books(home) as books:
        query = books.find(text)
        count = books.record(query, lambda tx: journal.erase(tx, query, seq, name, why))
        return count, books.db.scrub()


def score(home: Path, text: str, value: Decimal, by: str) -> str:
    """Put on record how good an answer was, from 0 to 1; its query. Raises RequestError, StoreError."""
    with open_books(home) as books:
        query = books.find(text)
        own = journal.own_chain(books.tenant_of(query))
        event = Event("query.scored", "root", {"query": query, "score": f"{value:f}", "by": by})
        books.record(query, lambda tx: journal.append(tx, own, event))
        return query


def put_anchors(home: Path, places: Sequence[str]) -> list[str]:
    """Put the newest checkpoint of every log to each place, and that on record; one line for each that was put.

    Raises RequestError, StoreError.
    """
    named = places or load_config(home).audit.anchors
    if not named:
        raise RequestError("say where checkpoints are to be put, or list places in airlock.toml: [audit] anchors")
    anchors, done = [anchor(place) for place in named], list[str]()
    with open_books(home) as books:
        notary = books.notary()
        heads: dict[str, tuple[Checkpoint, str]] = {}
        for tenant in books.db.read(journal.tenants):
            signed = books.db.write_sync(partial(notary.sign, tenant=tenant))
            notary.remember(signed)
            heads |= signed.heads
        for log, (head, note) in heads.items():
            for place in anchors:
                receipt = place.put(log, head.size, note.encode())
                if receipt.proof != note.encode():
                    _keep_receipt(home, head, receipt)
                body = {
                    "log": log,
                    "size": head.size,
                    "root": b64encode(head.root).decode(),
                    "where": receipt.where[:500],
                    "receipt_sha256": sha256(receipt.proof).hexdigest(),
                }
                event = Event("log.anchored", "root", body)
                books.db.write_sync(lambda tx, event=event: journal.append(tx, journal.PLATFORM, event))
                done.append(f"{log} at {head.size:,} entries: {receipt.where}")
    return done


def _keep_receipt(home: Path, head: Checkpoint, receipt: Receipt) -> None:
    """What an authority has signed is of use only to who has it; named by what it is a receipt for, and of whom."""
    folder = home / "receipts"
    name = sha256(f"{head.text()}{receipt.where}".encode()).hexdigest()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / f"{name}.tsr").write_bytes(receipt.proof)
        (folder / f"{name}.txt").write_text(f"{head.text()}{receipt.where}\n")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}") from None


def verifier_of(home: Path) -> Verifier:
    """Whose signatures the logs of this data folder have. Raises RequestError, StoreError."""
    with open_books(home) as books:
        signer = books.vault.existing_signer()
        if signer is None:
            raise RequestError("nothing has been signed with this data folder yet")
        return signer.verifier


def past_of(home: Path, text: str, *, to_resume: bool = False) -> Past:
    """A query as a replay takes it, and as `--resume` is set up by. text: see `Books.find`.

    Raises RequestError where it is not there, or not to be resumed; NotKept, StoreError.
    """
    with open_books(home) as books:
        query = books.find(text)
        if to_resume:
            books.db.read(partial(standing, query=query, tenant=TENANT))
        return past_in(books, query)


def past_in(books: Books, query: str) -> Past:
    """Likewise, of a query that is there. Raises NotKept, StoreError."""
    (records,) = histories(books, query)
    return read_past(records)


async def follow(
    books: Books, query: str, after: int = -1, *, to_interruption: bool = False
) -> AsyncGenerator[Recorded]:
    """The query's records after number `after`, as they are written, to the one that closes it. Raises StoreError.

    to_interruption: end also where it was interrupted, and did not go on yet.
    """
    keeper = await anyio.to_thread.run_sync(books.vault.opener, books.tenant_of(query), query)
    while True:
        read = partial(journal.after, query=query, seq=after, most=AT_ONCE, keeper=keeper)
        rows = await anyio.to_thread.run_sync(books.db.look, read)
        kind = ""
        for record, texts in rows:
            recorded = read_record(record, texts)
            after, kind = recorded.seq, recorded.type
            yield recorded
        if len(rows) == AT_ONCE:
            continue
        if kind == "query.closed" or (kind == "query.interrupted" and to_interruption):
            return
        await anyio.sleep(POLL_S)
