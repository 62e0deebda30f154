"""Money on a real database: `spent + held <= limit` at every instant, whatever is tried."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import sqlalchemy as sa

from orchestrator.core.errors import BudgetExhausted, BudgetInFlight, StoreError
from orchestrator.store import ledger
from orchestrator.store.db import Database
from orchestrator.store.ledger import NotEnough, Scope
from orchestrator.store.schema import reservations
from tests.unit.helpers import Store

QUERY, DAY = Scope("query:q", 100), Scope("tenant-day:d", 60)
BOTH = [QUERY, DAY]


@pytest.fixture
def db(store: Store) -> Iterator[Database]:
    made = store.open()
    made.write_sync(lambda tx: ledger.open_scopes(tx, BOTH))
    yield made
    made.close()


def reserve(db: Database, name: str, amount: int, purses: list[Scope] = BOTH) -> None:
    db.write_sync(lambda tx: ledger.reserve(tx, name, "q", "root", amount, purses))


def settle(db: Database, name: str, used: int) -> None:
    db.write_sync(lambda tx: ledger.settle(tx, name, used))


def balance(db: Database, scope: Scope = QUERY) -> tuple[int, int]:
    return db.read(lambda tx: ledger.balance(tx, scope.id))


def refusal(db: Database, amount: int, purses: list[Scope] = BOTH) -> NotEnough:
    with pytest.raises(NotEnough) as caught:
        reserve(db, "refused", amount, purses)
    return caught.value


def test_a_reservation_is_held_on_every_scope_and_settled_once(db: Database):
    reserve(db, "a", 50)
    assert balance(db) == balance(db, DAY) == (0, 50)
    settle(db, "a", 20)
    assert balance(db) == balance(db, DAY) == (20, 0)


def test_a_reservation_that_is_given_up_costs_nothing(db: Database):
    reserve(db, "a", 50)
    db.write_sync(lambda tx: ledger.void(tx, "a"))
    assert balance(db) == balance(db, DAY) == (0, 0)


@pytest.mark.parametrize("second", [lambda tx: ledger.settle(tx, "a", 1), lambda tx: ledger.void(tx, "a")])
@pytest.mark.parametrize("first", [lambda tx: ledger.settle(tx, "a", 1), lambda tx: ledger.void(tx, "a")])
def test_a_reservation_ends_once(db: Database, first: Any, second: Any):
    reserve(db, "a", 50)
    db.write_sync(first)
    before = balance(db)
    with pytest.raises(StoreError, match="is not open"):
        db.write_sync(second)
    assert balance(db) == before


@pytest.mark.parametrize("used", [51, -1])
def test_a_settlement_outside_of_the_reservation_is_a_fault(db: Database, used: int):
    reserve(db, "a", 50)
    with pytest.raises(StoreError, match="cannot be settled to"):
        settle(db, "a", used)
    assert balance(db) == (0, 50)


def test_a_name_is_reserved_once(db: Database):
    reserve(db, "a", 1)
    with pytest.raises(StoreError):
        reserve(db, "a", 1)
    assert balance(db) == (0, 1)


def test_a_refused_reservation_holds_nothing_on_any_scope(db: Database):
    refusal(db, 61)
    assert balance(db) == balance(db, DAY) == (0, 0)


def test_what_is_free_is_what_the_tightest_scope_has_left(db: Database):
    assert refusal(db, 80).free == 60
    reserve(db, "a", 10)
    assert refusal(db, 80).free == 50
    reserve(db, "a query's own", 70, [QUERY])
    assert refusal(db, 30).free == 20
    assert refusal(db, 30, [DAY, QUERY]).free == 20


def test_what_is_free_can_be_reserved(db: Database):
    reserve(db, "a", 13)
    reserve(db, "b", refusal(db, 99).free)
    assert refusal(db, 1).free == 0


def test_spent_money_exhausts_and_held_money_is_in_flight(db: Database):
    assert isinstance(refusal(db, 61).error, BudgetExhausted)
    reserve(db, "a", 60)
    in_flight = refusal(db, 60).error
    assert isinstance(in_flight, BudgetInFlight)
    assert (in_flight.limit, in_flight.asked, in_flight.left) == ("0.0000001 USD", "0.00000006 USD", "0.00000004 USD")
    settle(db, "a", 1)
    assert isinstance(refusal(db, 60).error, BudgetExhausted)


def test_spent_money_of_one_scope_outweighs_held_money_of_another(db: Database):
    reserve(db, "a day's own", 30, [DAY])
    settle(db, "a day's own", 30)
    reserve(db, "a query's own", 90, [QUERY])
    assert isinstance(refusal(db, 20).error, BudgetInFlight)
    assert isinstance(refusal(db, 40).error, BudgetExhausted)
    assert "tenant-day" in str(refusal(db, 40))


def test_money_held_for_the_last_word_never_comes_free(db: Database):
    reserve(db, ledger.set_aside("q"), 50, [QUERY])
    assert isinstance(refusal(db, 51).error, BudgetExhausted)
    reserve(db, "a", 30, [QUERY])
    assert isinstance(refusal(db, 30).error, BudgetInFlight)


def test_an_amount_beyond_all_integers_is_refused(db: Database):
    assert isinstance(refusal(db, 10**30).error, BudgetExhausted)


def test_a_limit_that_was_lowered_refuses_what_follows(db: Database):
    reserve(db, "a", 50)
    assert refusal(db, 1, [Scope(QUERY.id, 40)]).free == 0


def test_what_is_open_can_be_listed(db: Database):
    reserve(db, "a", 10)
    reserve(db, "b", 20)
    settle(db, "a", 10)
    assert db.read(lambda tx: ledger.open_reservations(tx, "q")) == [("b", "root", 20)]
    assert db.read(lambda tx: ledger.open_reservations(tx, "other")) == []


def test_a_scope_that_was_never_used_has_nothing(db: Database):
    assert balance(db, Scope("query:other", 1)) == (0, 0)


async def spend(db: Database, who: str, times: int, limit: int) -> int:
    """Reserve 7, settle to 5, as `times` tasks at once; how many got through."""
    purse, through = [Scope("query:shared", limit)], 0

    async def one(number: int) -> None:
        nonlocal through
        name = f"{who}:{number}"
        try:
            await db.write(lambda tx: ledger.reserve(tx, name, "q", "root", 7, purse))
        except NotEnough:
            return
        spent, held = balance(db, purse[0])
        assert spent + held <= limit
        await db.write(lambda tx: ledger.settle(tx, name, 5))
        through += 1

    async with anyio.create_task_group() as tasks:
        for number in range(times):
            tasks.start_soon(one, number)
    return through


@pytest.mark.anyio
async def test_64_tasks_at_once_cannot_overshoot(db: Database):
    db.write_sync(lambda tx: ledger.open_scopes(tx, [Scope("query:shared", 0)]))
    through = await spend(db, "me", 64, 100)
    assert 14 <= through <= 20
    assert balance(db, Scope("query:shared", 0)) == (5 * through, 0)


def spend_in_a_process(store: Store, who: str, limit: int, results: Any) -> None:
    db = store.open()
    results.put(anyio.run(spend, db, who, 32, limit))
    db.close()


def test_two_processes_of_32_tasks_cannot_overshoot(db: Database, store: Store):
    db.write_sync(lambda tx: ledger.open_scopes(tx, [Scope("query:shared", 0)]))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=spend_in_a_process, args=(store, who, 100, results)) for who in ("a", "b")]
    for child in children:
        child.start()
    through = sum(results.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    results.close()
    results.join_thread()
    assert 14 <= through <= 20
    assert balance(db, Scope("query:shared", 0)) == (5 * through, 0)
    ends = db.read(lambda tx: tx.execute(sa.select(reservations.c.state)).scalars().all())
    assert ends == ["settled"] * through
