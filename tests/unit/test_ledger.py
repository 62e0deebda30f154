"""Money on a real database: `spent + held <= limit` at every instant, whatever is tried."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
import sqlalchemy as sa

from orchestrator.core.errors import (
    BudgetExhausted,
    BudgetInFlight,
    CountExceeded,
    LimitError,
    RateLimited,
    StoreError,
)
from orchestrator.core.units import MOST
from orchestrator.store import ledger
from orchestrator.store.db import Database
from orchestrator.store.ledger import NotEnough, Scope
from orchestrator.store.schema import reservations, scopes
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
    assert (in_flight.limit, in_flight.asked, in_flight.left) == ("0.00000006 USD", "0.00000006 USD", "0.00 USD"), (
        "of two that refuse, the tighter one is named"
    )
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


MINUTE = Scope("tenant-minute:t:2026-11-25T18:43", None, calls=6000, tokens=1000)
AT = datetime(2026, 11, 25, 18, 43, 37, tzinfo=UTC).timestamp()


def count(db: Database, scope: Scope) -> dict[str, int]:
    """The counters of a scope's row."""
    names = ("calls", "tokens", "tokens_held", "in_flight", "children")
    columns = [scopes.c[name] for name in names]
    row = db.read(lambda tx: tx.execute(sa.select(*columns).where(scopes.c.id == scope.id)).one())
    return dict(zip(names, row, strict=True))


def opened(db: Database, *purses: Scope) -> list[Scope]:
    db.write_sync(lambda tx: ledger.open_scopes(tx, purses))
    return list(purses)


def take(db: Database, name: str, purses: list[Scope], **asked: int) -> None:
    amount = asked.pop("amount", 1)
    db.write_sync(lambda tx: ledger.reserve(tx, name, "q", "root", amount, purses, clock=lambda: AT, **asked))


def refused(db: Database, purses: list[Scope], **asked: int) -> LimitError:
    before = [(balance(db, scope), count(db, scope)) for scope in purses]
    with pytest.raises(NotEnough) as caught:
        take(db, "refused", purses, **asked)
    assert [(balance(db, scope), count(db, scope)) for scope in purses] == before
    assert isinstance(caught.value.error, BudgetExhausted | BudgetInFlight) or caught.value.free == 0
    assert "\n" not in str(caught.value.error)
    return caught.value.error


def test_a_call_is_counted_and_its_tokens_are_settled(db: Database):
    purses = opened(db, QUERY, MINUTE)
    take(db, "a", purses, tokens=300, children=1)
    for scope in purses:
        assert count(db, scope) == {"calls": 1, "tokens": 0, "tokens_held": 300, "in_flight": 1, "children": 1}
    db.write_sync(lambda tx: ledger.settle(tx, "a", 1, 120))
    for scope in purses:
        assert count(db, scope) == {"calls": 1, "tokens": 120, "tokens_held": 0, "in_flight": 0, "children": 1}


@pytest.mark.parametrize(("said", "used"), [(None, 300), (0, 0), (300, 300), (10**9, 300)])
def test_tokens_are_settled_to_what_was_used_and_never_to_more_than_was_held(db: Database, said: Any, used: int):
    purses = opened(db, MINUTE)
    take(db, "a", purses, tokens=300)
    db.write_sync(lambda tx: ledger.settle(tx, "a", 1, said))
    assert count(db, MINUTE)["tokens"] == used


def test_less_than_no_tokens_cannot_be_settled(db: Database):
    take(db, "a", opened(db, MINUTE), tokens=300)
    with pytest.raises(StoreError, match="cannot be settled to -1 tokens"):
        db.write_sync(lambda tx: ledger.settle(tx, "a", 1, -1))
    assert count(db, MINUTE)["tokens_held"] == 300


def test_a_call_that_was_given_up_stays_counted_and_a_last_word_never_was(db: Database):
    purses = opened(db, QUERY, MINUTE)
    take(db, "a", purses, tokens=300)
    take(db, ledger.set_aside("q"), purses, calls=0)
    assert count(db, QUERY)["in_flight"] == 1
    for name in ("a", ledger.set_aside("q")):
        db.write_sync(lambda tx, name=name: ledger.void(tx, name))
    assert count(db, MINUTE) == {"calls": 1, "tokens": 0, "tokens_held": 0, "in_flight": 0, "children": 0}
    assert balance(db) == (0, 0)


@pytest.mark.parametrize("what", ["limit", "calls", "tokens", "in_flight", "children"])
def test_each_limit_permits_all_of_it_and_not_one_more(db: Database, what: str):
    asked = {"limit": "amount", "in_flight": "calls"}.get(what, what)
    tight = Scope("query:tight", **{"limit": None, what: 3})
    purses = opened(db, tight, Scope("query:loose", None))
    nothing = {"amount": 0, "calls": 0}
    take(db, "a", purses, **{**nothing, asked: 3})
    for order in (purses, purses[::-1]):
        refused(db, order, **{**nothing, asked: 1})
    take(db, "b", purses, **nothing)


def test_a_minute_that_is_used_up_says_when_to_come_back(db: Database):
    purses = opened(db, QUERY, MINUTE)
    db.write_sync(lambda tx: tx.execute(sa.update(scopes).where(scopes.c.id == MINUTE.id).values(calls=6000)))
    error = refused(db, purses)
    assert str(error) == "the tenant's 6,000 requests of this minute are used up: come back in 23 s"
    assert isinstance(error, RateLimited)
    assert error.retry_after == 23
    assert (error.limit, error.asked, error.left) == ("6,000 requests of this minute", "1 request", "0 requests")


def test_tokens_of_a_minute(db: Database):
    purses = opened(db, QUERY, MINUTE)
    take(db, "a", purses, tokens=900)
    error = refused(db, purses, tokens=101)
    assert str(error) == (
        "this needs 101 tokens, and of the tenant's 1,000 tokens of this minute 100 are left: come back in 23 s"
    )
    assert isinstance(error, RateLimited)
    error = refused(db, purses, tokens=1001)  # however long it waits
    assert isinstance(error, CountExceeded)
    assert str(error) == "this needs 1,001 tokens, and the tenant's limit is 1,000 tokens a minute: ask for less"


def test_a_minute_that_is_over_asks_for_no_wait(db: Database):
    minute = Scope("tenant-minute:t:2026-11-25T18:40", None, calls=0)
    purses = opened(db, minute)
    assert isinstance(refused(db, purses), CountExceeded)
    take(db, "a", [Scope(minute.id, None, calls=1)])
    error = refused(db, [Scope(minute.id, None, calls=1)])
    assert isinstance(error, RateLimited)
    assert error.retry_after == 0


def test_calls_in_flight_are_to_be_waited_for(db: Database):
    purses = opened(db, Scope("query:q", 100, in_flight=2))
    take(db, "a", purses)
    take(db, "b", purses)
    error = refused(db, purses)
    assert isinstance(error, RateLimited)
    assert error.retry_after == 0.1
    assert str(error) == "the query's 2 calls in flight are used up: come back when one has ended"
    settle(db, "a", 0)
    take(db, "c", purses)
    assert isinstance(refused(db, purses, calls=3), CountExceeded)


def test_children_and_calls_of_a_query_do_not_come_back(db: Database):
    purses = opened(db, Scope("node:q:root.1", 100, calls=3, children=2))
    take(db, "a", purses, calls=0, children=2)
    settle(db, "a", 0)
    error = refused(db, purses, calls=0, children=1)
    assert isinstance(error, CountExceeded)
    assert str(error) == "the child query's 2 child queries are used up"
    take(db, "b", purses, calls=3)
    settle(db, "b", 0)
    assert str(refused(db, purses)) == "the child query's 3 requests are used up"


def test_what_waiting_cannot_mend_is_said_first(db: Database):
    purses = opened(
        db, Scope("tenant-day:t:2026-11-25", 100, in_flight=1), Scope("node:q:root.1", 50, children=0), MINUTE
    )
    take(db, "a", purses, amount=40, tokens=1000)
    assert isinstance(refused(db, purses, amount=20, tokens=1, children=1), CountExceeded)
    assert isinstance(refused(db, purses, amount=20, tokens=1), BudgetInFlight)
    minute = refused(db, purses, amount=1, tokens=1)
    assert isinstance(minute, RateLimited)
    assert minute.retry_after == 23
    assert refused(db, purses[:2]).retry_after == 0.1  # pyright: ignore[reportAttributeAccessIssue]
    settle(db, "a", 40)
    assert isinstance(refused(db, purses, amount=20, children=1), BudgetExhausted)


def test_less_than_nothing_is_a_fault(db: Database):
    for asked in ({"amount": -1}, {"tokens": -1}, {"calls": -1}, {"children": -1}):
        with pytest.raises(AssertionError):
            take(db, "a", BOTH, **asked)
    assert balance(db) == (0, 0)


def test_a_scope_that_was_not_opened_is_a_fault(db: Database):
    with pytest.raises(StoreError, match="scope query:other is not open"):
        take(db, "a", [QUERY, Scope("query:other", 100)])
    assert balance(db) == (0, 0)


def test_numbers_beyond_the_database_are_refused_without_a_limit_too(db: Database):
    purses = opened(db, Scope("platform:2026-11", None))
    assert isinstance(refused(db, purses, amount=10**30), BudgetExhausted)
    assert isinstance(refused(db, purses, tokens=10**30), CountExceeded)
    take(db, "a", purses, amount=MOST)
    assert isinstance(refused(db, purses, amount=MOST), BudgetInFlight)


def test_the_last_words_of_a_child_and_of_those_above_it_never_come_free_to_it(db: Database):
    node = Scope("node:q:root.1", 60)
    purses = [*opened(db, node), QUERY]
    take(db, ledger.set_aside("q"), [QUERY], amount=50, calls=0)
    take(db, ledger.set_aside("q", "root.1"), purses, amount=20, calls=0)
    take(db, ledger.set_aside("q", "root.2"), [QUERY], amount=10, calls=0)

    def ask(node_name: str, amount: int) -> LimitError:
        with pytest.raises(NotEnough) as caught:
            db.write_sync(lambda tx: ledger.reserve(tx, "r", "q", node_name, amount, purses))
        return caught.value.error

    assert isinstance(ask("root.1", 31), BudgetExhausted)  # 50 and 20 stay, whatever else comes free
    assert isinstance(ask("root.1", 30), BudgetInFlight)  # the other child's 10 will
    assert isinstance(ask("root.1", 41), BudgetExhausted)
    assert ledger.is_set_aside(ledger.set_aside("q", "root.1"))
    assert not ledger.is_set_aside("q:root.c1:1")


def test_what_is_left_is_what_the_tightest_purse_has(db: Database):
    purses = opened(db, QUERY, DAY, MINUTE)
    assert db.read(lambda tx: ledger.left(tx, purses)) == 60
    take(db, "a", purses, amount=50, tokens=1)
    settle(db, "a", 20)
    take(db, "b", [QUERY], amount=75)
    assert db.read(lambda tx: ledger.left(tx, purses)) == 5
    assert db.read(lambda tx: ledger.left(tx, [Scope(QUERY.id, 10)])) == 0
    assert db.read(lambda tx: ledger.left(tx, [MINUTE])) > 10**18


def minutes(db: Database) -> list[str]:
    ids = db.read(lambda tx: tx.execute(sa.select(scopes.c.id).order_by(scopes.c.id)).scalars().all())
    return [name.removeprefix("tenant-minute:") for name in ids if name.startswith("tenant-minute:")]


def test_a_new_minute_forgets_what_is_over_and_nothing_of_others(db: Database):
    def minute(tenant: str, at: str) -> Scope:
        return Scope(f"tenant-minute:{tenant}:2026-11-25T{at}", None, calls=10)

    busy = minute("a", "18:39")
    others = [minute("a:1", "18:30"), minute("a:2026-11-25T18", "18:30"), minute("A", "18:30"), minute("aa", "18:30")]
    opened(db, busy)
    take(db, "busy", [busy])
    opened(db, *others, *[minute("a", f"18:{at}") for at in (40, 41, 42)])
    ids = lambda *found: sorted(scope.id.removeprefix("tenant-minute:") for scope in found)  # noqa: E731
    assert sorted(minutes(db)) == ids(busy, *others, minute("a", "18:41"), minute("a", "18:42"))
    opened(db, minute("a", "18:42"))  # not its first
    settle(db, "busy", 0)
    opened(db, minute("a", "19:00"))
    assert sorted(minutes(db)) == ids(*others, minute("a", "19:00"))


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
