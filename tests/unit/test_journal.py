"""The journal in a real store: one chain a query, payloads apart, and a dead owner's queries closed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import NotKept, RequestError
from orchestrator.core.events import Event
from orchestrator.core.redact import Redactor
from orchestrator.loop.recovery import recover
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.schema import payloads, queries, records
from orchestrator.store.vault import Keeper
from tests.command import until
from tests.unit.helpers import Store, keeper, quick

KEY = QueryKey("q1", "tenant", "policy", keeper("q1"))
PURSE = Scope("query:q1", 1000)


def opened(db: Database, key: QueryKey = KEY) -> QueryKey:
    db.write_sync(
        lambda tx: journal.open_query(tx, key, db.owner, Event("query.opened", "root", {}, {"question": "Who?"}))
    )
    return key


def append(db: Database, key: QueryKey = KEY, body: Any = None, **texts: str) -> None:
    db.write_sync(lambda tx: journal.append(tx, key, Event("cell.started", "root", body or {}, texts)))


def close(db: Database, key: QueryKey = KEY) -> None:
    event = Event("query.closed", "root", {"status": "answered"}, {"answer": "42"})
    db.write_sync(lambda tx: journal.close_query(tx, key, "answered", event))


def read(db: Database, key: QueryKey = KEY) -> tuple[list[tuple[bytes, str]], list[tuple[int, str, bytes]]]:
    return db.read(lambda tx: journal.chain(tx, key.id)), db.read(lambda tx: list(journal.kept_payloads(tx, key.id)))


def opened_text(seq: int, name: str, sealed: bytes) -> bytes:
    both = keeper("q1").open(seq, name, sealed)
    assert both
    return both[1]


def status(db: Database, key: QueryKey = KEY) -> str:
    return db.read(lambda tx: tx.execute(sa.select(queries.c.status).where(queries.c.id == key.id)).scalar_one())


def test_a_query_from_opening_to_closing(db: Database):
    opened(db)
    append(db, code="print(1)")
    close(db)
    links, kept = read(db)
    fields = [json.loads(record) for record, _ in links]
    assert [field["type"] for field in fields] == ["query.opened", "cell.started", "query.closed"]
    assert fields[-1]["body"] == {"status": "answered", "records": 3}
    assert {(field["query"], field["tenant"], field["policy"]) for field in fields} == {("q1", "tenant", "policy")}
    assert [(seq, name, opened_text(seq, name, sealed)) for seq, name, sealed in kept] == [
        (0, "question", b"Who?"),
        (1, "code", b"print(1)"),
        (2, "answer", b"42"),
    ]
    assert journal.fault(links, kept, KEY.keeper) is None
    assert status(db) == "answered"


def test_queries_have_chains_of_their_own(db: Database):
    other = replace(KEY, id="q2")
    for key in (KEY, other):
        opened(db, key)
    for key in (KEY, other, KEY):
        append(db, key, code="x")
    assert [len(read(db, key)[0]) for key in (KEY, other)] == [3, 2]
    assert all(journal.fault(*read(db, key), KEY.keeper) is None for key in (KEY, other))


def test_without_keeping_only_the_commitments_are_there(db: Database):
    key = opened(db, replace(KEY, keeper=None))
    append(db, key, code="secret")
    links, kept = read(db, key)
    assert kept == []
    assert b"secret" not in b"".join(record for record, _ in links)
    assert json.loads(links[1][0])["payloads"]["code"]["bytes"] == 6


def test_a_payload_that_is_erased_leaves_the_chain_whole(db: Database):
    opened(db)
    append(db, code="secret")
    db.write_sync(lambda tx: tx.execute(sa.delete(payloads).where(payloads.c.name == "code")))
    assert journal.fault(*read(db), KEY.keeper) is None


@pytest.mark.parametrize(
    "change", [{"sealed": b"other"}, {"sealed": b""}, {"sealed": bytes(60)}, {"name": "other"}, {"seq": 0}, {"seq": 9}]
)
def test_a_payload_that_was_changed_or_moved_shows(db: Database, change: dict[str, Any]):
    opened(db)
    append(db, code="print(1)")
    db.write_sync(lambda tx: tx.execute(sa.update(payloads).where(payloads.c.name == "code").values(change)))
    assert "is not what was recorded" in str(journal.fault(*read(db), KEY.keeper))


def test_a_record_that_was_changed_shows(db: Database):
    opened(db)
    append(db, body={"cell": 1})
    edited = read(db)[0][1][0].replace(b'"cell":1', b'"cell":2')
    db.write_sync(lambda tx: tx.execute(sa.update(records).where(records.c.seq == 1).values(record=edited)))
    assert journal.fault(*read(db), KEY.keeper) == "record 1 does not match its hash"


def test_equal_payloads_have_unequal_commitments(db: Database):
    opened(db)
    append(db, code="x")
    append(db, code="x")
    first, second = (json.loads(record)["payloads"]["code"] for record, _ in read(db)[0][1:])
    assert first["commitment"] != second["commitment"]


def test_any_text_is_a_payload(db: Database):
    opened(db)

    @quick
    @given(st.dictionaries(st.sampled_from(["code", "stdout", "stderr"]), st.text(), max_size=3))
    def check(texts: dict[str, str]) -> None:
        append(db, **texts)
        links, kept = read(db)
        newest = [row for row in kept if row[0] == len(links) - 1]
        latest = {name: opened_text(seq, name, sealed).decode() for seq, name, sealed in newest}
        assert latest == {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}
        assert journal.fault(links, kept, KEY.keeper) is None

    check()


def test_a_body_that_cannot_be_recorded_undoes_its_step(db: Database):
    opened(db)
    with pytest.raises(ValueError, match="floats"):
        append(db, body={"seconds": 0.5}, code="x")
    assert [len(part) for part in read(db)] == [1, 1]


TOKEN = "sk-proj-" + "a1B2c3D4" * 8


@pytest.mark.parametrize("kind", journal.SAID)
def test_secrets_go_before_what_others_said_is_cut(db: Database, kind: Any):
    """Half a key is not known for one."""
    ((name, most),) = journal.SAID[kind].items()
    key = opened(db, replace(KEY, keeper=Keeper(bytes(32), "q1", (), Redactor().redact)))
    for room in (0, 1, 20, len(TOKEN) - 1, len(TOKEN), len(TOKEN) + 1):
        said = "x" * (most - room - 1) + " " + TOKEN + " " + "y" * most
        db.write_sync(lambda tx, said=said: journal.append(tx, key, Event(kind, "root", {name: said})))
        recorded = json.loads(read(db)[0][-1][0])["body"][name]
        assert "sk-" not in recorded
        assert recorded == (said[: most - room] + "[redacted: API key] " + "y" * most)[:most]
    ours = QueryKey("q1", "tenant", "policy")
    db.write_sync(lambda tx: journal.append(tx, ours, Event(kind, "root", {name: "z" * 2 * most})))
    assert json.loads(read(db)[0][-1][0])["body"][name] == "z" * most


def test_queries_are_found_by_how_they_begin(db: Database):
    for name in ("20260101-a", "20260101-b", "20260202-c", "2026%"):
        opened(db, replace(KEY, id=name))
    find = lambda text: db.read(lambda tx: journal.find_query(tx, text))  # noqa: E731
    assert find("20260202") == ["20260202-c"]
    assert sorted(find("20260101")) == ["20260101-a", "20260101-b"]
    assert find("2026%") == ["2026%"]
    assert find("nothing") == []
    assert len(find("last")) == 1
    assert len(find("")) == 4


def test_open_queries_are_counted_for_each_tenant(db: Database):
    for number, tenant in enumerate(["a", "a", "b"]):
        opened(db, QueryKey(f"q{number}", tenant, "p", keeper("q1")))
    close(db, QueryKey("q0", "a", "p", keeper("q1")))
    assert [db.read(lambda tx, who=who: journal.open_queries(tx, who)) for who in "abc"] == [1, 1, 0]


@pytest.mark.anyio
async def test_records_of_concurrent_tasks_make_one_chain(db: Database):
    opened(db)
    async with anyio.create_task_group() as tasks:
        for number in range(40):
            event = Event("cell.started", "root", {"cell": number}, {"code": str(number)})
            tasks.start_soon(db.write, lambda tx, event=event: journal.append(tx, KEY, event))
    links, kept = read(db)
    assert len(links) == len(kept) == 41
    assert journal.fault(links, kept, KEY.keeper) is None


def die_with_money_held(store: Store, body: Any = None) -> None:
    """In a child that ends as `kill -9` ends it: one call is settled, one in flight, the last word set aside."""
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        return
    try:
        db = store.open()

        def work(tx: Any) -> None:
            journal.open_query(tx, KEY, db.owner, Event("query.opened", "root", body or {}))
            ledger.open_scopes(tx, [PURSE])
            for name, amount in ((ledger.set_aside("q1"), 100), ("q1:root.c1:1", 30), ("q1:root.c2:1", 50)):
                ledger.reserve(tx, name, "q1", "root", amount, [PURSE])
            ledger.settle(tx, "q1:root.c1:1", 20)

        db.write_sync(work)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_query_whose_process_died_is_closed_and_charged(store: Store):
    die_with_money_held(store)
    db = store.open()
    until(db.dead_owners)
    assert recover(db) == 1
    assert db.read(lambda tx: ledger.balance(tx, PURSE.id)) == (70, 0)
    assert db.read(lambda tx: ledger.open_reservations(tx, "q1")) == []
    links, kept = read(db)
    assert journal.fault(links, kept, KEY.keeper) is None
    result, closing = (json.loads(record) for record, _ in links[-2:])
    assert (result["body"]["call"], result["body"]["outcome"]) == ("root.c2", "unknown")
    assert (closing["body"]["status"], closing["body"]["cost_usd"]) == ("failed", "0.00000007")
    assert status(db) == "failed"
    assert recover(db) == 0
    db.close()


def test_a_query_whose_process_died_is_interrupted_if_it_can_be_resumed(store: Store):
    die_with_money_held(store, {"payloads": "keep"})
    db = store.open()
    told = list[str]()
    assert recover(db, tell=told.append) == 1
    assert told == ["q1"]
    assert db.read(lambda tx: ledger.balance(tx, PURSE.id)) == (70, 0)
    assert db.read(lambda tx: ledger.open_reservations(tx, "q1")) == []
    links, kept = read(db)
    assert journal.fault(links, kept, closed=db.read(lambda tx: journal.is_closed(tx, "q1"))) is None
    before, result, interrupted = (json.loads(record) for record, _ in links[-3:])
    assert (result["body"]["call"], result["body"]["outcome"]) == ("root.c2", "unknown")
    assert interrupted["body"]["until"] == before["at"]
    assert interrupted["body"]["records"] == len(links)
    assert db.read(lambda tx: journal.status_of(tx, "q1")) == ("interrupted", "tenant")
    assert db.read(lambda tx: journal.open_queries(tx, "tenant")) == 0
    assert recover(db) == 0
    assert db.read(lambda tx: ledger.times_set_aside(tx, "q1", "root")) == 1
    assert db.read(lambda tx: ledger.times_set_aside(tx, "q1", "root.1")) == 0
    db.close()


def test_one_alone_resumes_a_query(store: Store):
    """And when that one has died, another may."""
    die_with_money_held(store, {"payloads": "keep"})
    first, second = store.open(), store.open()
    recover(first)

    def resume(db: Database) -> bool:
        return bool(
            db.write_sync(lambda tx: journal.resume_query(tx, KEY, db.owner, Event("query.resumed", "root", {})))
        )

    assert [resume(first), resume(second), resume(first)] == [True, False, False]
    assert status(second) == "open"
    assert recover(second) == 0  # its owner lives
    first.close()
    until(second.dead_owners)  # a server ends a session in its own time
    assert recover(second) == 1
    assert resume(second)
    close(second)
    assert not resume(second)
    links, kept = read(second)
    assert journal.fault(links, kept, KEY.keeper, closed=True) is None
    kinds = [json.loads(record)["type"] for record, _ in links]
    assert kinds[-5:] == [*["query.interrupted", "query.resumed"] * 2, "query.closed"]
    second.close()


def test_what_anything_was_erased_of_is_not_resumed(store: Store):
    """It was read before, in another transaction."""
    die_with_money_held(store, {"payloads": "keep"})
    db = store.open()
    recover(db)

    def resume() -> object:
        return db.write_sync(lambda tx: journal.resume_query(tx, KEY, db.owner, Event("query.resumed", "root", {})))

    assert db.write_sync(lambda tx: journal.erase(tx, "q1", 7, None, "none is there")) == 0
    assert resume()
    append(db, code="x")
    db.close()
    db = store.open()
    until(db.dead_owners)
    assert recover(db) == 1
    other = opened(db, replace(KEY, id="q2"))
    close(db, other)
    assert db.write_sync(lambda tx: journal.erase(tx, "q2", None, None, '"query":"q1"')) == 2
    assert resume()
    db.close()
    db = store.open()
    until(db.dead_owners)
    assert recover(db) == 1
    assert db.write_sync(lambda tx: journal.erase(tx, "q1", 4, "code", "")) == 1
    with pytest.raises(NotKept, match="payloads of query q1 were erased: it cannot be resumed any more"):
        resume()
    assert status(db) == "interrupted"
    db.close()


def test_nothing_is_erased_of_an_open_query(db: Database):
    opened(db)
    with pytest.raises(RequestError, match="query q1 is not closed: its payloads are still needed"):
        db.write_sync(lambda tx: journal.erase(tx, "q1", None, None, ""))
    assert [len(part) for part in read(db)] == [1, 1]


def test_an_interruption_that_was_cut_off_or_moved_does_not_match(store: Store):
    die_with_money_held(store, {"payloads": "keep"})
    db = store.open()
    recover(db)
    event = Event("query.interrupted", "root", {"records": 99})
    db.write_sync(lambda tx: journal.append(tx, KEY, event))
    links, kept = read(db)
    assert journal.fault(links, kept) == "the closing record does not match the number of records"
    db.close()


def test_a_query_of_a_living_owner_is_left_alone(db: Database, store: Store):
    opened(db)
    other = store.open()
    assert recover(other) == 0
    assert status(db) == "open"
    other.close()
