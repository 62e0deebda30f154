"""Every way to tamper with a journal, and the verdict that has to tell; on a live database and on an export."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.audit.archive import Archive, write_archive
from orchestrator.audit.evidence import LiveEvidence, QueryEvidence
from orchestrator.audit.verdicts import NAMES, Name, Report
from orchestrator.audit.verify import verify
from orchestrator.core.errors import StoreError
from orchestrator.core.events import Event, canonical
from orchestrator.core.merkle import leaf_hash
from orchestrator.core.notes import Checkpoint, Signer
from orchestrator.store import journal, ledger, logs
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey, own_chain
from orchestrator.store.ledger import Scope
from orchestrator.store.schema import checkpoints, keys, payloads, queries, records, reservations, scopes, tiles
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault, open_vault
from tests.unit.helpers import Everything, Store, fill, quick

COST = 7  # nano-USD of each call


@dataclass
class Journal:
    """A few queries of two tenants, as the loop and the proxy write them."""

    db: Database
    vault: Vault
    notary: Notary

    def query(self, name: str, tenant: str, calls: int = 2, *, closed: bool = True) -> str:
        """The note of the tenant's log after it."""
        key = QueryKey(name, tenant, "0" * 64, self.vault.keeper(tenant, name, Everything()))
        purses = [
            Scope(f"query:{name}", 10**9),
            Scope(f"tenant-day:{tenant}:now", 10**9),
            Scope(f"tenant-month:{tenant}:now", 10**9),
            Scope("platform:now", None),
        ]

        def work(tx: Any) -> Any:
            ledger.open_scopes(tx, purses)
            journal.open_query(tx, key, self.db.owner, Event("query.opened", "root", {}, {"question": "Who?"}))
            for number in range(calls):
                intent = {"call": f"root.c{number}", "attempt": 1, "bound_usd": "0.00000001"}
                ledger.reserve(tx, f"{name}:root.c{number}:1", name, "root", 10, purses)
                journal.append(tx, key, Event("call.intent", "root", intent, {"prompt": f"Is it {number}?"}))
                ledger.settle(tx, f"{name}:root.c{number}:1", COST)
                result = {"call": f"root.c{number}", "outcome": "answered", "cost_usd": "0.000000007"}
                journal.append(tx, key, Event("call.result", "root", result, {"completion": "yes"}))
            if not closed:
                return None
            body = {"status": "answered", "cost_usd": f"0.{COST * calls:09d}" if calls else "0.00"}
            journal.close_query(tx, key, "answered", Event("query.closed", "root", body, {"answer": "42"}))
            return self.notary.sign(tx, tenant)

        signed = self.db.write_sync(work)
        if not closed:
            return ""
        self.notary.remember(signed)
        return signed.note

    def check(self, *held: str, **options: Any) -> Report:
        """As `auditing.verify_home` does."""
        known = {"trusted": self.notary.verifier, "remembered": self.notary.notes(), **options}
        return self.db.read(lambda tx: verify(LiveEvidence(tx, self.vault), held, **known))

    def export(self, query: str | None = None) -> bytes:
        out = io.BytesIO()

        def work(tx: Any) -> None:
            write_archive(QueryEvidence(tx, self.vault, query) if query else LiveEvidence(tx, self.vault), out)

        self.db.read(work)
        return out.getvalue()

    def do(self, *statements: Any) -> None:
        def work(tx: Any) -> None:
            for statement in statements:
                tx.execute(statement)

        self.db.write_sync(work)


@contextmanager
def opened(store: Store, calls: int = 130) -> Generator[Journal]:
    db = store.open()
    vault = open_vault(db, store.home, None, journal.key_created)
    made = Journal(db, vault, Notary(vault.signer(), store.home / "heads", vault.stamp))
    made.query("q1", "acme")
    made.query("q2", "acme", calls)
    made.query("q3", "other", 1)
    made.query("q4", "acme", 0)
    yield made
    db.close()


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Journal]:
    """With more than one tile of a tenant's log."""
    fill(tmp_path)
    with opened(Store(tmp_path)) as made:
        yield made


def failing(report: Report) -> set[Name]:
    assert tuple(report) == NAMES
    assert all(verdict.holds == (not verdict.faults) for verdict in report.values())
    return {name for name, verdict in report.items() if not verdict.holds}


def said(report: Report) -> str:
    return "\n".join(fault for verdict in report.values() for fault in verdict.faults)


def of(query: str, seq: int) -> Any:
    return (records.c.query == query) & (records.c.seq == seq)


def record(books: Journal, query: str, seq: int) -> bytes:
    return books.db.read(lambda tx: tx.execute(sa.select(records.c.record).where(of(query, seq))).scalar_one())


def test_a_journal_that_nobody_touched_is_whole(store: Store):
    with opened(store) as books:
        report, export = books.check(), books.export()
    assert failing(report) == set(), said(report)
    assert len(export) > 200_000
    assert report["completeness"].note == "4 queries, 0 of them open, 0 interrupted"
    assert report["payloads"].note == "274 match, 0 erased, 0 never kept"


def test_a_query_that_is_open_is_known_to_be(books: Journal):
    books.query("q5", "acme", closed=False)
    report = books.check()
    assert failing(report) == set(), said(report)
    assert report["completeness"].note == "5 queries, 1 of them open, 0 interrupted"


# Tampering: each entry is (what is done, the verdicts that have to fail).


def a_bit(books: Journal) -> None:
    before = record(books, "q2", 7)
    after = before.replace(b"root.c3", b"root.c2")
    books.do(sa.update(records).where(of("q2", 7)).values(record=after))


def a_bit_and_its_hash(books: Journal) -> None:
    after = record(books, "q1", 1).replace(b"root.c0", b"root.c9")
    books.do(sa.update(records).where(of("q1", 1)).values(record=after, hash=leaf_hash(after).hex()))


def a_chain_made_anew(books: Journal) -> None:
    """The cost of a call is lower, and all that follows in its chain and in the tables fits; but for the signature."""
    chain = books.db.read(lambda tx: journal.chain(tx, "q1"))
    prev = chain[1][1]
    for seq, (old, _hash) in list(enumerate(chain))[2:]:
        fields = json.loads(old)
        fields["prev"] = prev
        fields["body"] |= {"cost_usd": "0.000000001"} if seq == 2 else {}
        fields["body"] |= {"cost_usd": "0.000000008"} if fields["type"] == "query.closed" else {}
        made = canonical(fields)
        prev = leaf_hash(made).hex()
        books.do(sa.update(records).where(of("q1", seq)).values(record=made, hash=prev))
    less = {"spent": scopes.c.spent - 6}
    books.do(
        sa.update(reservations).where(reservations.c.id == "q1:root.c0:1").values(settled=1),
        sa.update(scopes)
        .where(scopes.c.id.in_(["query:q1", "tenant-day:acme:now", "tenant-month:acme:now", "platform:now"]))
        .values(**less),
    )


def a_record_removed(books: Journal) -> None:
    books.do(sa.delete(records).where(of("q2", 9)))


def a_record_removed_and_the_rest_moved_up(books: Journal) -> None:
    gone = books.db.read(lambda tx: tx.execute(sa.select(records.c.leaf).where(of("q2", 9))).scalar_one())
    books.do(sa.delete(records).where(of("q2", 9)))
    later = sa.select(records.c.leaf).where(records.c.log == "tenants/acme", records.c.leaf > gone)
    for leaf in sorted(books.db.read(lambda tx: list(tx.execute(later).scalars()))):
        here = (records.c.log == "tenants/acme") & (records.c.leaf == leaf)
        books.do(sa.update(records).where(here).values(leaf=leaf - 1))


def the_tail_cut(books: Journal) -> None:
    """With all that names it: the last query's records, its row, and its checkpoint."""
    last = sa.select(sa.func.max(checkpoints.c.size)).where(checkpoints.c.log == "tenants/acme").scalar_subquery()
    books.do(
        sa.delete(records).where(records.c.query == "q4"),
        sa.delete(queries).where(queries.c.id == "q4"),
        sa.delete(checkpoints).where(checkpoints.c.log == "tenants/acme", checkpoints.c.size == last),
    )


def the_closing_cut(books: Journal) -> None:
    books.do(sa.delete(records).where(records.c.query == "q4", records.c.seq == 1))


def two_swapped(books: Journal) -> None:
    rows = books.db.read(lambda tx: tx.execute(sa.select(records).where(of("q2", 3) | of("q2", 5))).all())
    first, second = sorted(rows, key=lambda row: row.seq)
    for place, other in ((first, second), (second, first)):
        here = of("q2", place.seq)
        books.do(sa.update(records).where(here).values(record=other.record, hash=other.hash))


def a_query_dropped(books: Journal) -> None:
    """Of the middle, from all tables."""
    books.do(
        sa.delete(records).where(records.c.query == "q1"),
        sa.delete(queries).where(queries.c.id == "q1"),
        sa.delete(payloads).where(payloads.c.query == "q1"),
        sa.delete(reservations).where(reservations.c.query == "q1"),
        sa.delete(scopes).where(scopes.c.id == "query:q1"),
        sa.update(scopes)
        .where(scopes.c.id.in_(["tenant-day:acme:now", "tenant-month:acme:now", "platform:now"]))
        .values(spent=scopes.c.spent - 14, calls=scopes.c.calls - 2),
    )


def a_tenant_dropped(books: Journal) -> None:
    books.do(
        sa.delete(records).where(records.c.log == "tenants/other"),
        sa.delete(checkpoints).where(checkpoints.c.log == "tenants/other"),
        sa.delete(queries).where(queries.c.tenant == "other"),
        sa.delete(payloads).where(payloads.c.query == "q3"),
        sa.delete(reservations).where(reservations.c.query == "q3"),
        sa.delete(scopes).where(scopes.c.id.in_(["query:q3", "tenant-day:other:now", "tenant-month:other:now"])),
        sa.delete(keys).where(keys.c.id == "tenants/other"),
        sa.update(scopes).where(scopes.c.id == "platform:now").values(spent=scopes.c.spent - COST),
    )


def a_payload_changed(books: Journal) -> None:
    other = books.vault.keeper("acme", "q1", Everything()).seal(1, "prompt", bytes(16), b"Is it another?")
    here = (payloads.c.query == "q1") & (payloads.c.seq == 1)
    books.do(sa.update(payloads).where(here).values(sealed=other))


def a_payload_removed(books: Journal) -> None:
    books.do(sa.delete(payloads).where(payloads.c.query == "q1", payloads.c.seq == 1))


def a_payload_added(books: Journal) -> None:
    sealed = books.vault.keeper("acme", "q1", Everything()).seal(1, "stdout", bytes(16), b"I did it")
    books.do(sa.insert(payloads).values(query="q1", seq=1, name="stdout", sealed=sealed))


def money_moved(books: Journal) -> None:
    books.do(sa.update(scopes).where(scopes.c.id == "tenant-day:acme:now").values(spent=0))


def a_call_made_cheaper(books: Journal) -> None:
    """In the ledger alone, and there everywhere."""
    names = ["query:q1", "tenant-day:acme:now", "tenant-month:acme:now", "platform:now"]
    books.do(
        sa.update(reservations).where(reservations.c.id == "q1:root.c0:1").values(settled=0),
        sa.update(scopes).where(scopes.c.id.in_(names)).values(spent=scopes.c.spent - COST),
    )


def a_tile_changed(books: Journal) -> None:
    books.do(sa.update(tiles).values(hashes=bytes(8192)))


def a_signature_changed(books: Journal) -> None:
    last = sa.select(checkpoints.c.note).where(checkpoints.c.log == "platform").limit(1)
    note = books.db.read(lambda tx: tx.execute(last).scalar_one())
    other = note[:-6] + ("AAAA" if note[-6:-2] != "AAAA" else "BBBB") + note[-2:]
    books.do(sa.update(checkpoints).where(checkpoints.c.note == note).values(note=other))


def another_query_open_again(books: Journal) -> None:
    books.do(sa.update(queries).where(queries.c.id == "q4").values(status="open"))


def another_signer(books: Journal) -> None:
    """All that the database has is signed again, by a key that it names as its own."""
    forger = Signer(books.notary.verifier.name, bytes(32))
    for log in ("tenants/acme", "tenants/other", "platform"):
        books.do(sa.delete(checkpoints).where(checkpoints.c.log == log))
        tree = books.db.read(lambda tx, log=log: logs.tree(tx, log))
        root = books.db.read(lambda tx, log=log: logs.tree(tx, log).root())
        note = forger.sign(Checkpoint(f"{forger.verifier.name}/{log}", tree.size, root).text())
        books.do(sa.insert(checkpoints).values(log=log, size=tree.size, note=note))
    books.do(sa.update(keys).where(keys.c.id == "signer").values(public=str(forger.verifier)))


def the_platforms_log_dropped(books: Journal) -> None:
    books.do(
        sa.delete(records).where(records.c.log == "platform"),
        sa.delete(checkpoints).where(checkpoints.c.log == "platform"),
    )


def everything_dropped(books: Journal) -> None:
    books.do(*[sa.delete(table) for table in (records, checkpoints, tiles, queries, payloads, reservations, scopes)])


def a_place_below_zero(books: Journal) -> None:
    books.do(sa.update(records).where(records.c.query == "platform", records.c.seq == 1).values(leaf=-1))


def numbers_moved(books: Journal) -> None:
    books.do(sa.update(records).where(records.c.query == "q4").values(seq=records.c.seq + 1000))


def a_tiles_root_changed(books: Journal) -> None:
    books.do(sa.update(tiles).values(root=bytes(32)))


def tiles_dropped(books: Journal) -> None:
    books.do(sa.delete(tiles))


def a_checkpoint_moved(books: Journal) -> None:
    last = sa.select(sa.func.max(checkpoints.c.size)).where(checkpoints.c.log == "tenants/acme").scalar_subquery()
    here = (checkpoints.c.log == "tenants/acme") & (checkpoints.c.size == last)
    books.do(sa.update(checkpoints).where(here).values(size=checkpoints.c.size + 9))


def scopes_dropped(books: Journal) -> None:
    """The ledger adds up, to nothing."""
    books.do(sa.update(reservations).values(scopes="[]"), sa.delete(scopes))


def costs_that_cancel_out(books: Journal) -> None:
    books.do(
        sa.update(reservations).where(reservations.c.id == "q1:root.c0:1").values(settled=COST - 3),
        sa.update(reservations).where(reservations.c.id == "q1:root.c1:1").values(settled=COST + 3),
    )


def money_held_for_ever(books: Journal) -> None:
    names = ["query:q1", "tenant-day:acme:now", "tenant-month:acme:now", "platform:now"]
    row = {
        "id": "q1:root.c9:1",
        "query": "q1",
        "node": "root",
        "amount": 500,
        "state": "open",
        "scopes": json.dumps(names),
    }
    books.do(
        sa.insert(reservations).values(**row, calls=1),
        sa.update(scopes)
        .where(scopes.c.id.in_(names))
        .values(held=500, calls=scopes.c.calls + 1, in_flight=scopes.c.in_flight + 1),
    )


def counters_changed(books: Journal) -> None:
    books.do(sa.update(scopes).where(scopes.c.id == "tenant-month:acme:now").values(in_flight=1_000_000))


def an_erasure_forged(books: Journal) -> None:
    """In the tenant's own chain, where nothing has signed yet what comes."""
    body = {"query": "q1", "seq": None, "name": None, "payloads": 6, "why": ""}
    books.db._writer.info.clear()  # pyright: ignore[reportPrivateUsage]  as somebody without the keys
    books.db.write_sync(lambda tx: journal.append(tx, own_chain("acme"), Event("payload.erased", "root", body)))
    books.do(sa.delete(payloads).where(payloads.c.query == "q1"))


def a_trigger(books: Journal) -> None:
    books.db.write_sync(
        lambda tx: tx.exec_driver_sql(
            "CREATE TRIGGER x AFTER UPDATE ON scopes BEGIN UPDATE scopes SET spent=0 WHERE id=NEW.id; END"
        )
    )


ATTACKS: dict[Callable[[Journal], None], set[Name]] = {
    a_bit: {"integrity"},
    a_bit_and_its_hash: {"integrity"},
    a_chain_made_anew: {"integrity"},
    a_record_removed: {"integrity", "completeness"},
    a_record_removed_and_the_rest_moved_up: {"integrity", "completeness"},
    the_tail_cut: {"completeness"},
    the_closing_cut: {"completeness"},
    two_swapped: {"integrity"},
    a_query_dropped: {"integrity", "completeness"},
    a_tenant_dropped: {"completeness"},
    a_payload_changed: {"payloads"},
    a_payload_removed: {"payloads"},
    a_payload_added: {"payloads"},
    money_moved: {"completeness"},
    a_call_made_cheaper: {"completeness"},
    a_tile_changed: {"integrity"},
    a_signature_changed: {"integrity"},
    another_query_open_again: {"completeness"},
    another_signer: {"integrity"},
    the_platforms_log_dropped: {"append-only", "completeness"},
    everything_dropped: {"append-only", "completeness"},
    a_place_below_zero: {"integrity"},
    numbers_moved: {"integrity"},
    a_tiles_root_changed: {"integrity"},
    tiles_dropped: {"integrity"},
    a_checkpoint_moved: {"integrity"},
    scopes_dropped: {"completeness"},
    costs_that_cancel_out: {"completeness"},
    money_held_for_ever: {"completeness"},
    counters_changed: {"completeness"},
    a_trigger: {"integrity"},
    an_erasure_forged: {"integrity", "freshness"},
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_tampering_shows(books: Journal, attack: Callable[[Journal], None]):
    attack(books)
    report = books.check()
    assert failing(report) >= ATTACKS[attack], said(report)


ALONE = [a_payload_changed, a_payload_removed, a_payload_added, money_moved, a_call_made_cheaper, a_tile_changed]


@pytest.mark.parametrize("attack", ALONE, ids=lambda attack: attack.__name__)
def test_what_is_not_touched_still_holds(books: Journal, attack: Callable[[Journal], None]):
    attack(books)
    assert failing(books.check()) == ATTACKS[attack]


# An export is made from rows that were made well again, or says nothing of what a database has beside them.
_NOT_EXPORTED = (
    *(a_tile_changed, a_tiles_root_changed, tiles_dropped, a_trigger, numbers_moved, everything_dropped),
    *(another_signer, the_platforms_log_dropped, an_erasure_forged),
)
EXPORTED = {attack: verdicts for attack, verdicts in ATTACKS.items() if attack not in _NOT_EXPORTED}


@pytest.mark.parametrize("attack", EXPORTED, ids=lambda attack: attack.__name__)
def test_tampering_shows_in_an_export_of_it(books: Journal, attack: Callable[[Journal], None], tmp_path: Path):
    attack(books)
    (tmp_path / "all.tar").write_bytes(books.export())
    with Archive(tmp_path / "all.tar") as archive:
        report = verify(archive)
    assert failing(report) >= EXPORTED[attack], said(report)


def test_what_somebody_without_the_keys_wrote_is_not_signed(books: Journal):
    an_erasure_forged(books)
    books.db.stamp_with(books.vault.stamp)
    with pytest.raises(StoreError, match="was written by somebody else"):
        books.query("q9", "acme")


def test_a_fork_that_was_signed_again_shows_to_who_holds_a_checkpoint(books: Journal, tmp_path: Path):
    note = books.query("q5", "acme")
    held = books.check(note)
    assert failing(held) == set(), said(held)
    the_tail_cut(books)
    books.do(
        *[sa.delete(table).where(table.c.query.in_(["q2", "q4", "q5"])) for table in (records, payloads, reservations)],
        sa.delete(queries).where(queries.c.id.in_(["q2", "q4", "q5"])),
        sa.delete(scopes).where(scopes.c.id.in_(["query:q2", "query:q4", "query:q5"])),
        sa.update(scopes)
        .where(scopes.c.id.in_(["tenant-day:acme:now", "tenant-month:acme:now"]))
        .values(spent=2 * COST, calls=2),
        sa.update(scopes).where(scopes.c.id == "platform:now").values(spent=3 * COST, calls=3),
        sa.delete(checkpoints),
        sa.delete(tiles),
        sa.delete(records).where(records.c.log == "platform"),
    )
    forger = Journal(books.db, books.vault, Notary(books.vault.signer(), tmp_path / "forgets", books.vault.stamp))
    forger.query("q6", "acme", 140)
    forger.db.write_sync(lambda tx: forger.notary.sign(tx, "other"))
    shutil.rmtree(tmp_path / "heads")
    alone = books.check()
    assert failing(alone) == set(), said(alone)  # nobody can tell who holds nothing: that is what checkpoints are for
    assert failing(books.check(note)) == {"append-only"}


def test_a_shorter_log_that_was_signed_again_shows_to_who_holds_a_checkpoint(books: Journal, tmp_path: Path):
    note = books.query("q5", "acme")
    books.do(
        *[sa.delete(table).where(table.c.query == "q5") for table in (records, payloads, reservations)],
        sa.delete(queries).where(queries.c.id == "q5"),
        sa.delete(scopes).where(scopes.c.id == "query:q5"),
        sa.update(scopes)
        .where(scopes.c.id.in_(["tenant-day:acme:now", "tenant-month:acme:now", "platform:now"]))
        .values(spent=scopes.c.spent - 14, calls=scopes.c.calls - 2),
        sa.delete(checkpoints),
        sa.delete(records).where(records.c.log == "platform"),
    )
    forger = Notary(books.vault.signer(), tmp_path / "forgets", books.vault.stamp)
    for tenant in ("acme", "other"):
        books.db.write_sync(lambda tx, tenant=tenant: forger.sign(tx, tenant))
    assert failing(books.check()) == {"append-only", "completeness"}, "what was signed last is remembered"
    shutil.rmtree(tmp_path / "heads")
    assert failing(books.check()) == set()
    report = books.check(note)
    assert "append-only" in failing(report)
    assert "its end was cut off" in said(report)


def test_a_clock_that_was_set_back_shows(books: Journal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "now", lambda: "2026-01-01T00:00:00.000Z")
    books.query("q5", "acme")
    report = books.check()
    assert failing(report) == {"freshness"}
    assert "the clock was set back" in said(report)


def test_a_time_that_is_yet_to_come_shows(books: Journal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "now", lambda: "2999-01-01T00:00:00.000Z")
    books.query("q5", "acme")
    assert failing(books.check()) == {"freshness"}


def test_a_query_that_ended_under_no_signature_shows(books: Journal):
    key = QueryKey("q5", "acme", "0" * 64)
    event = Event("query.closed", "root", {"status": "answered", "cost_usd": "0.00"})
    books.db.write_sync(lambda tx: journal.open_query(tx, key, "me", Event("query.opened", "root", {})))
    books.db.write_sync(lambda tx: journal.close_query(tx, key, "answered", event))
    assert failing(books.check()) == {"freshness"}


def test_a_signer_that_is_not_the_trusted_one_shows(books: Journal):
    trusted = Signer("airlock-real", bytes(32)).verifier
    assert "integrity" in failing(books.check(trusted=trusted))
    assert failing(books.check(trusted=books.notary.verifier)) == set()


@pytest.mark.parametrize("note", ["", "no note", "a\n1\nAAAA\n\n\u2014 x AAAAAAAA\n"])
def test_what_is_held_and_no_checkpoint_shows(books: Journal, note: str):
    assert failing(books.check(note)) == {"append-only"}


def test_a_checkpoint_of_another_log_is_told(books: Journal):
    other = Signer("airlock-other", bytes(32))
    note = other.sign("airlock-other/tenants/acme\n3\n" + "A" * 43 + "=\n")
    assert failing(books.check(note)) == {"append-only"}


def test_what_is_erased_is_gone_and_the_rest_still_proves(books: Journal):
    def work(tx: Any) -> None:
        assert journal.erase(tx, "q1", None, None, "the tenant asked") == 6
        assert journal.erase(tx, "q2", 1, "prompt", "") == 1
        books.notary.sign(tx, "acme")

    books.db.write_sync(work)
    report = books.check()
    assert failing(report) == set(), said(report)
    assert report["payloads"].note == "267 match, 7 erased, 0 never kept"
    left = books.db.read(lambda tx: list(journal.kept_payloads(tx, "q1")))
    assert left == []


def test_what_was_erased_and_comes_back_shows(books: Journal):
    back = books.db.read(lambda tx: tx.execute(sa.select(payloads).where(payloads.c.query == "q1")).mappings().all())
    books.db.write_sync(lambda tx: (journal.erase(tx, "q1", None, None, ""), books.notary.sign(tx, "acme")))
    books.do(sa.insert(payloads).values([dict(row) for row in back]))
    assert failing(books.check()) == {"payloads"}


# Exports


@pytest.fixture
def tar(books: Journal, tmp_path: Path) -> Path:
    path = tmp_path / "all.tar"
    path.write_bytes(books.export())
    return path


def test_an_export_says_what_the_database_does(books: Journal, tar: Path):
    with Archive(tar) as archive:
        report = verify(archive)
    assert failing(report) == set(), said(report)
    live = books.check()
    assert {name: verdict.note for name, verdict in report.items()} == {name: v.note for name, v in live.items()}
    assert books.export() == tar.read_bytes()


@pytest.mark.parametrize("query", ["q1", "q2", "q3", "q4"])
def test_the_export_of_one_query_proves_it_and_tells_nothing_of_others(books: Journal, tmp_path: Path, query: str):
    (tmp_path / "one.tar").write_bytes(books.export(query))
    with Archive(tmp_path / "one.tar") as archive:
        report = verify(archive)
        names = "\n".join(archive._members)  # pyright: ignore[reportPrivateUsage]
    assert failing(report) == set(), said(report)
    assert report["completeness"].note == f"a part of a journal: query {query}"
    content = (tmp_path / "one.tar").read_bytes()
    for other in {"q1", "q2", "q3", "q4"} - {query}:
        assert f'"{other}"'.encode() not in content
        assert f"/{other}/" not in names


def changed(tar: Path, name: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A tar in which one file is another, or lacks."""
    out = tar.with_name("changed.tar")
    with tarfile.open(tar) as before, tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as after:
        for member in before.getmembers():
            content = before.extractfile(member).read()  # pyright: ignore
            new = change(content) if member.name == name else content
            if new is not None:
                member.size = len(new)
                after.addfile(member, io.BytesIO(new))
    return out


def names_in(tar: Path) -> list[str]:
    with tarfile.open(tar) as opened:
        return opened.getnames()


@pytest.mark.parametrize("query", [None, "q2"])
def test_a_file_of_an_export_that_is_changed_or_lacks_shows(tmp_path: Path, query: str | None):
    """One after the other, whichever it is."""
    fill(tmp_path)
    with opened(Store(tmp_path), 3) as books:
        tar = tmp_path / "one.tar"
        tar.write_bytes(books.export(query))
        for name in names_in(tar):
            if name == "FORMAT.md" or ("/checkpoints/" in name and query is None):
                continue
            flip = lambda content: bytes([content[0] ^ 1]) + content[1:] if content else b"\n\n"  # noqa: E731
            for change in (flip, lambda _content: None):
                if change is not flip and name.endswith("tile/0/000"):
                    continue  # made from the entries, which are there
                with Archive(changed(tar, name, change)) as archive:
                    report = verify(archive)
                    lacks_tile = query is None and "/tile/" in name and "entries" not in name and change is not flip
                    assert failing(report) or lacks_tile, f"{name} of {query}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../../etc/passwd", tarfile.REGTYPE),
        ("/key", tarfile.REGTYPE),
        ("logs/tenants/../x/checkpoints/1", tarfile.REGTYPE),
        ("key", tarfile.REGTYPE),
        ("payloads/q1/0/question/x", tarfile.REGTYPE),
        ("queries.jsonl", tarfile.SYMTYPE),
        ("payloads/q9/0/x", tarfile.LNKTYPE),
        ("payloads/q9/0/x", tarfile.CHRTYPE),
        ("payloads/q9/0/x", tarfile.GNUTYPE_SPARSE),
        ("logs/platform/tile/0/000.p/4", tarfile.REGTYPE),
        ("logs/platform/tile/99/000", tarfile.REGTYPE),
    ],
)
def test_a_file_that_has_no_place_in_an_export_is_refused(tar: Path, name: str, kind: bytes):
    with tarfile.open(tar, "a") as opened:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        opened.addfile(member, io.BytesIO(b""))
    with pytest.raises(ValueError, match=r"has no place|twice|two widths|too wide"):
        Archive(tar)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_extended_headers_are_refused_before_they_take_anything(tmp_path: Path, kind: bytes):
    """One of less than nothing would be read for ever, and each in a chain takes a level of recursion."""
    for size, count in ((-512, 1), (0, 5000)):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, size
        header = member.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "x.tar").write_bytes(header * count)
        with pytest.raises(ValueError, match="no plain file"):
            Archive(tmp_path / "x.tar")


def test_a_pipe_is_no_export(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        Archive(tmp_path / "pipe")


def test_an_export_of_nothing_is_none(tar: Path, tmp_path: Path):
    """Nobody's log, and that of one Airlock without its platform's."""
    for keep in (("FORMAT.md",), ("FORMAT.md", "key"), ("FORMAT.md", "key", "logs/tenants/")):
        with (
            tarfile.open(tar) as before,
            tarfile.open(tmp_path / "less.tar", "w", format=tarfile.USTAR_FORMAT) as after,
        ):
            for member in before.getmembers():
                if member.name.startswith(keep):
                    after.addfile(member, before.extractfile(member))
        if len(keep) < 3:
            with pytest.raises(ValueError, match="no log"):
                Archive(tmp_path / "less.tar")
        else:
            with Archive(tmp_path / "less.tar") as archive:
                assert "the platform's log is missing" in said(verify(archive))


def test_a_part_of_a_journal_cannot_tell_that_a_query_went_on(books: Journal, tmp_path: Path):
    books.query("q5", "acme", closed=False)
    books.query("q6", "acme")
    (tmp_path / "one.tar").write_bytes(books.export("q5"))
    with Archive(tmp_path / "one.tar") as archive:
        report = verify(archive)
    assert failing(report) == {"completeness"}
    assert "has no end" in said(report)


@quick
@given(data=st.data())
def test_a_damaged_export_has_a_verdict_and_no_traceback(data: st.DataObject, fuzzed: tuple[bytes, Path]):
    content, path = fuzzed
    wrong = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wrong) - 1))
        wrong[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(bytes(wrong[: data.draw(st.integers(0, len(wrong)))] if data.draw(st.booleans()) else wrong))
    verdict_or_line(path)


@quick
@given(st.binary(max_size=2000))
def test_what_is_no_export_is_told_in_one_line(fuzzed: tuple[bytes, Path], content: bytes):
    fuzzed[1].write_bytes(content)
    verdict_or_line(fuzzed[1])


Change = tuple[bool, int, Any, bool]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


# Drawn before anything is read, so that no draw depends on what an export holds: within its body or not, at which key,
# what is there then, and whether that takes the whole record's place.
changes = st.tuples(st.booleans(), st.integers(0, 99), json_values, st.sampled_from([False] * 9 + [True]))


@quick
@given(st.integers(0, 99), st.integers(0, 9999), changes, st.none() | changes)
def test_records_of_any_form_have_a_verdict(
    fuzzed: tuple[bytes, Path], file: int, row: int, change: Change, inner: Change | None
):
    """A well-formed export whose entries and tables hold whatever JSON can."""
    content, path = fuzzed
    path.write_bytes(content)

    def lines(old: bytes) -> bytes:
        rows = old.splitlines()
        at = row % len(rows)
        rows[at] = altered(rows[at], change)
        found = json.loads(rows[at])
        if inner and isinstance(found, dict) and isinstance(found.get("record"), str):
            found["record"] = altered(found["record"].encode(), inner).decode()
            rows[at] = json.dumps(found).encode()
        return b"\n".join(rows) + b"\n"

    names = [name for name in names_in(path) if name.endswith(".jsonl")]
    verdict_or_line(changed(path, names[file % len(names)], lines))


def altered(line: bytes, change: Change) -> bytes:
    within, key, value, whole = change
    fields = json.loads(line)
    target = fields["body"] if within and "body" in fields else fields
    if isinstance(target, dict) and target:
        target[sorted(target)[key % len(target)]] = value
    return json.dumps(value if whole else fields).encode()


def verdict_or_line(path: Path) -> None:
    try:
        archive = Archive(path)
    except ValueError as error:
        line = str(error)
    else:
        with archive:
            assert tuple(verify(archive)) == NAMES
        line = ""
    assert "\n" not in line


def test_a_query_that_goes_on_is_looked_at_as_far_as_it_is_signed(books: Journal) -> None:
    """Between the signature and the look it may have got further."""
    books.query("q5", "acme", 3, closed=False)
    books.notary.remember(books.db.write_sync(lambda tx: books.notary.sign(tx, "acme")))
    key = QueryKey("q5", "acme", "0" * 64, books.vault.keeper("acme", "q5", Everything()))
    more = Event("call.intent", "root", {"call": "root.c9", "attempt": 1, "bound_usd": "1.00"}, {"prompt": "More?"})
    books.db.write_sync(lambda tx: journal.append(tx, key, more))

    def work(tx: Any) -> tuple[Report, list[int]]:
        evidence = QueryEvidence(tx, books.vault, "q5")
        report = verify(evidence, trusted=books.notary.verifier)
        return report, [seq for seq, _name, _opened in evidence.payloads("acme", "q5")]

    report, kept = books.db.read(work)
    assert failing(report) == {"completeness"}
    assert "has no end" in said(report)
    assert max(kept) == 6


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The export of one query, and where to put what is made of it."""
    home = tmp_path_factory.mktemp("home")
    db = Database(home)
    vault = open_vault(db, home, None, journal.key_created)
    made = Journal(db, vault, Notary(vault.signer(), home / "heads", vault.stamp))
    made.query("q1", "acme", 3)
    content = made.export("q1")
    db.close()
    return content, home / "fuzzed.tar"
