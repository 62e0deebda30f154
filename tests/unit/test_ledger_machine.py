"""The ledger under any order of steps, of two processes for three tenants, beside books that are plain arithmetic.

The books of this test know nothing of transactions. Whatever was done, the rows of the database are what they say.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from orchestrator.core.errors import BudgetExhausted, BudgetInFlight, CountExceeded, RateLimited, StoreError
from orchestrator.core.events import Event
from orchestrator.lm.base import Usage
from orchestrator.loop.recovery import close_abandoned, recover
from orchestrator.proxy.prices import Prices
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import NotEnough, Scope
from orchestrator.store.schema import reservations, scopes
from tests.command import until
from tests.postgres import Postgres
from tests.unit.helpers import Store, fill

# Each comes up against a limit of its own: calls, tokens, calls in flight. Their names begin alike.
TENANTS: dict[str, dict[str, int]] = {"a": {"calls": 6}, "a.b": {"tokens": 30}, "c": {"in_flight": 3}}
PLATFORM = Scope("platform:2026-11", 350_000, in_flight=9)
PRICES = Prices({"m": (Decimal(1), Decimal(2))})
SIZES = st.tuples(st.integers(0, 25), st.integers(0, 15))  # the most tokens of a call, in and out
Opening = Callable[[], Any]  # a context manager, of a Store


@dataclass(frozen=True)
class Node:
    """A query's own loop, or a child's. scopes: its own first, then those above it. process: who runs it."""

    key: QueryKey
    name: str
    scopes: tuple[Scope, ...]
    process: int


@dataclass(frozen=True)
class Call:
    """A reservation. bound: of a request with this many tokens at most, in and out."""

    name: str
    node: Node
    scopes: tuple[Scope, ...]
    amount: int
    most: tuple[int, int] = (0, 0)
    calls: int = 0
    children: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.most)


@dataclass
class Books:
    """What the row of a scope has to say."""

    spent: int = 0
    held: int = 0
    calls: int = 0
    tokens: int = 0
    tokens_held: int = 0
    in_flight: int = 0
    children: int = 0

    def room(self, scope: Scope, call: Call) -> bool:
        return all(
            (
                scope.limit is None or self.spent + self.held + call.amount <= scope.limit,
                scope.calls is None or self.calls + call.calls <= scope.calls,
                scope.tokens is None or self.tokens + self.tokens_held + call.tokens <= scope.tokens,
                scope.in_flight is None or self.in_flight + call.calls <= scope.in_flight,
                scope.children is None or self.children + call.children <= scope.children,
            )
        )

    def begin(self, call: Call) -> None:
        self.held += call.amount
        self.calls += call.calls
        self.tokens_held += call.tokens
        self.in_flight += call.calls
        self.children += call.children

    def end(self, call: Call, spent: int, tokens: int) -> None:
        self.held -= call.amount
        self.tokens_held -= call.tokens
        self.in_flight -= call.calls
        self.spent += spent
        self.tokens += tokens


@dataclass
class Process:
    db: Database
    alive: bool = True

    def die(self) -> None:
        """As by kill -9: nothing is written, and what told others that it lives is gone."""
        place: Any = self.db._place
        if self.db._engine.dialect.name == "sqlite":
            os.close(place._lock)
            place._lock = -1
        self.db._writer.invalidate()
        self.db._engine.dispose()
        self.alive = False


class Ledger(RuleBasedStateMachine):
    nodes = Bundle("nodes")
    calls = Bundle("calls")
    ended = Bundle("ended")

    def __init__(self, opening: Opening) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.store: Store = self.stack.enter_context(opening())
        self.processes = [Process(self.store.open()) for _ in range(2)]
        self.books: dict[str, Books] = {}
        self.limits: dict[str, Scope] = {}
        self.open: dict[str, Call] = {}
        self.queries: dict[str, Node] = {}  # that are open
        self.tenants: dict[str, str] = {}  # of every query
        self.acting: set[str] = set()
        self.rows_before: dict[str, Books] = {}
        self.count = 0

    def teardown(self) -> None:
        for process in self.processes:
            if process.alive:
                process.db.close()
        self.stack.close()

    # Steps

    @initialize(target=nodes)
    def first(self) -> Any:
        return multiple(*[self._query(tenant, number % 2) for number, tenant in enumerate(TENANTS)])

    @rule(target=nodes, tenant=st.sampled_from(list(TENANTS)), process=st.integers(0, 1))
    def query(self, tenant: str, process: int) -> Any:
        few = list(self.tenants.values()).count(tenant) < 3  # so that the limits of each are reached
        return self._query(tenant, process) if few and self.processes[process].alive else multiple()

    def _query(self, tenant: str, process: int) -> Node:
        self.count += 1
        key = QueryKey(f"q{self.count}", tenant, "p")
        limits = TENANTS[tenant]
        purses = (
            Scope(f"query:{key.id}", 100_000, calls=limits.get("calls"), children=2),
            Scope(f"tenant-day:{tenant}:2026-11-25", 150_000, in_flight=limits.get("in_flight")),
            Scope(f"tenant-minute:{tenant}:2026-11-25T18:43", None, limits.get("calls"), limits.get("tokens")),
            PLATFORM,
        )
        node = Node(key, "root", purses, process)
        db = self.processes[process].db

        def work(tx: journal.Connection) -> None:
            ledger.open_scopes(tx, purses)
            journal.open_query(tx, key, db.owner, Event("query.opened", "root", {}))

        db.write_sync(work)
        self._opened(purses)
        self.queries[key.id], self.tenants[key.id] = node, tenant
        self.acting.add(tenant)
        self._reserve(Call(ledger.set_aside(key.id), node, purses, 25_000))
        return node

    def _opened(self, purses: tuple[Scope, ...]) -> None:
        for scope in purses:
            self.books.setdefault(scope.id, Books())
            self.limits[scope.id] = scope

    @rule(target=calls, node=nodes, sizes=st.lists(SIZES, min_size=1, max_size=5), turned=st.booleans())
    def reserve(self, node: Node, sizes: list[tuple[int, int]], turned: bool) -> Any:
        """turned: the purses in another order, which makes no difference."""
        purses = tuple(reversed(node.scopes)) if turned else node.scopes
        asked = [Call(f"{self._name(node)}:1", node, purses, PRICES.bound("m", *most), most, calls=1) for most in sizes]
        return multiple(*[call for call in asked if self._runs(node) and self._reserve(call)])

    def _name(self, node: Node) -> str:
        self.count += 1
        return f"{node.key.id}:{node.name}.c{self.count}"

    def _runs(self, node: Node) -> bool:
        return node.key.id in self.queries and self.processes[node.process].alive

    def _reserve(self, call: Call, release: str | None = None) -> bool:
        """release: a last word that is given up in the same transaction."""
        node = call.node
        self.acting.add(node.key.tenant)

        def work(tx: journal.Connection) -> None:
            if release:
                ledger.void(tx, release)
            ledger.reserve(
                tx, call.name, node.key.id, node.name, call.amount, call.scopes,
                calls=call.calls, tokens=call.tokens, children=call.children,
            )  # fmt: skip

        books = {scope.id: replace(self.books[scope.id]) for scope in call.scopes}
        if release:
            for scope in self.open[release].scopes:
                if scope.id in books:
                    books[scope.id].end(self.open[release], 0, 0)
        room = all(books[scope.id].room(scope, call) for scope in call.scopes)
        db = self.processes[node.process].db
        if not room:
            with pytest.raises(NotEnough) as refused:
                db.write_sync(work)
            self._is_right(refused.value, call, books, release)
            return False
        db.write_sync(work)
        if release:
            self._end(self.open[release], 0, 0)
        for scope in call.scopes:
            self.books[scope.id].begin(call)
        self.open[call.name] = call
        return True

    def _is_right(self, refused: NotEnough, call: Call, books: dict[str, Books], release: str | None) -> None:
        assert isinstance(refused.error, BudgetExhausted | BudgetInFlight | RateLimited | CountExceeded)
        limits = {scope.id: scope.limit for scope in call.scopes if scope.limit is not None}
        left = min(limit - books[name].spent - books[name].held for name, limit in limits.items())
        money = isinstance(refused.error, BudgetExhausted | BudgetInFlight)
        assert refused.free == (max(0, left) if money else 0)
        assert not money or call.amount > left
        last = {ledger.set_aside(call.node.key.id, name) for name in above(call.node.name)} - {release}
        kept = [self.open[name] for name in last if name in self.open]
        firm = {name: sum(c.amount for c in kept if name in [s.id for s in c.scopes]) for name in limits}
        for_good = any(books[name].spent + firm[name] + call.amount > limit for name, limit in limits.items())
        assert for_good == isinstance(refused.error, BudgetExhausted)

    @rule(target=ended, call=consumes(calls), share_in=st.integers(0, 100), share_out=st.integers(0, 100))
    def settle(self, call: Call, share_in: int, share_out: int) -> Any:
        if call.name not in self.open or not self._runs(call.node):
            return call if call.name not in self.open else multiple()
        used = Usage(call.most[0] * share_in // 100, call.most[1] * share_out // 100)
        price = PRICES.cost("m", used)
        assert price <= call.amount, "the bound is below the price"
        tokens = used.input_tokens + used.output_tokens
        self._db(call).write_sync(lambda tx: ledger.settle(tx, call.name, price, tokens))
        self._end(call, price, tokens)
        return call

    @rule(target=ended, call=consumes(calls))
    def void(self, call: Call) -> Any:
        if call.name not in self.open or not self._runs(call.node):
            return call if call.name not in self.open else multiple()
        self._db(call).write_sync(lambda tx: ledger.void(tx, call.name))
        self._end(call, 0, 0)
        return call

    def _db(self, call: Call) -> Database:
        return self.processes[call.node.process].db

    def _end(self, call: Call, spent: int, tokens: int) -> None:
        self.acting.add(call.node.key.tenant)
        del self.open[call.name]
        for scope in call.scopes:
            self.books[scope.id].end(call, spent, tokens)

    @rule(call=ended, how=st.sampled_from([lambda tx, name: ledger.settle(tx, name, 0), ledger.void]))
    def end_twice(self, call: Call, how: Any) -> None:
        with pytest.raises(StoreError, match="is not open"):
            self._alive().write_sync(lambda tx: how(tx, call.name))

    def _alive(self) -> Database:
        return next(process.db for process in self.processes if process.alive)

    @rule(target=nodes, node=nodes, share=st.integers(1, 100))
    def slice(self, node: Node, share: int) -> Any:
        """A child query: a purse of its own with a share of what is left, and a last word set aside in it."""
        if not self._runs(node):
            return multiple()
        self.count += 1
        db = self.processes[node.process].db
        left = db.read(lambda tx: ledger.left(tx, node.scopes))
        limits = [(scope.limit, self.books[scope.id]) for scope in node.scopes if scope.limit is not None]
        assert left == min(limit - books.spent - books.held for limit, books in limits)
        name = f"{node.name}.{self.count}"
        purses = (Scope(f"node:{node.key.id}:{name}", left * share // 100), *node.scopes)
        db.write_sync(lambda tx: ledger.open_scopes(tx, purses))
        self._opened(purses)
        child = Node(node.key, name, purses, node.process)
        aside = Call(ledger.set_aside(node.key.id, name), child, purses, 8_000, children=1)
        return child if self._reserve(aside) else multiple()

    @rule(target=calls, node=nodes)
    def last_word(self, node: Node) -> Any:
        aside = ledger.set_aside(node.key.id, node.name)
        if not self._runs(node) or aside not in self.open:
            return multiple()
        most = (self.open[aside].amount // 2_000, self.open[aside].amount // 4_000)
        bound = PRICES.bound("m", *most)
        call = Call(f"{self._name(node)}:1", node, node.scopes, bound, most, calls=1)
        return call if self._reserve(call, release=aside) else multiple()

    @rule(node=nodes)
    def cancel(self, node: Node) -> None:
        if self._runs(node):
            self.processes[node.process].db.write_sync(lambda tx: close_abandoned(tx, node.key, "cancelled"))
            self._closed(node.key)

    def _closed(self, key: QueryKey) -> None:
        """What was in flight may have been answered; last words were not."""
        self.acting.add(key.tenant)
        del self.queries[key.id]
        for call in [call for call in self.open.values() if call.node.key == key]:
            aside = ledger.is_set_aside(call.name)
            self._end(call, 0 if aside else call.amount, 0 if aside else call.tokens)

    @rule(process=st.integers(0, 1))
    def crash(self, process: int) -> None:
        if all(one.alive for one in self.processes):
            self.processes[process].die()

    @rule()
    def sweep(self) -> None:
        db = self._alive()
        dead = {node.key.id: node for node in self.queries.values() if not self.processes[node.process].alive}
        if dead:
            until(db.dead_owners)
        assert recover(db) == len(dead)
        for node in dead.values():
            self._closed(node.key)
        for number, process in enumerate(self.processes):  # another takes its place
            if not process.alive:
                self.processes[number] = Process(self.store.open())

    # What holds at every instant

    def _rows(self) -> dict[str, Books]:
        names = [column.name for column in fields(Books)]
        with_id = [scopes.c.id, *[scopes.c[name] for name in names]]
        found = self._alive().read(lambda tx: tx.execute(sa.select(*with_id)).all())
        return {row[0]: Books(*row[1:]) for row in found}

    @invariant()
    def the_books_agree(self) -> None:
        rows = self._rows()
        assert rows == self.books
        for name, row in rows.items():
            scope = self.limits[name]
            assert row.room(scope, Call("", Node(QueryKey("", "", ""), "", (), 0), (), 0)), (scope, row)
            assert min(vars(row).values()) >= 0
        others = {name for name in self.rows_before if name != PLATFORM.id and self._tenant(name) not in self.acting}
        assert {name: rows[name] for name in others} == {name: self.rows_before[name] for name in others}
        self.rows_before = rows
        self.acting = set()

    @invariant()
    def what_is_held_is_what_is_open(self) -> None:
        columns = (reservations.c.amount, reservations.c.tokens, reservations.c.calls, reservations.c.scopes)
        is_open = sa.select(*columns).where(reservations.c.state == "open")
        found = self._alive().read(lambda tx: tx.execute(is_open).all())
        for name, row in self._rows().items():
            mine = [(amount, tokens, calls) for amount, tokens, calls, names in found if f'"{name}"' in names]
            sums = tuple(map(sum, zip(*mine, strict=True))) or (0, 0, 0)
            assert sums == (row.held, row.tokens_held, row.in_flight)

    @invariant()
    def a_parent_is_the_sum_of_its_children_and_itself(self) -> None:
        """By the rows of reservations, each of which names the node that made it."""
        r = reservations.c
        own = sa.select(
            r.query, r.node,
            sa.func.sum(sa.func.coalesce(r.settled, 0)),
            sa.func.sum(sa.case((r.state == "open", r.amount), else_=0)),
            sa.func.sum(r.calls),
        ).group_by(r.query, r.node)  # fmt: skip
        found = self._alive().read(lambda tx: tx.execute(own).all())
        mine = {node_scope(query, node): tuple(map(int, sums)) for query, node, *sums in found}
        rows = {name: (row.spent, row.held, row.calls) for name, row in self._rows().items()}
        children: dict[str, list[str]] = {name: [] for name in rows}
        for name in rows:
            if parent := self._parent(name):
                children[parent].append(name)
        for name, row in rows.items():
            if not name.startswith("tenant-minute:"):
                sums = [mine.get(name, (0, 0, 0)), *[rows[child] for child in children[name]]]
                assert row == tuple(map(sum, zip(*sums, strict=True))), name

    def _tenant(self, scope: str) -> str:
        kind, _, rest = scope.partition(":")
        return rest.partition(":2026")[0] if kind.startswith("tenant-") else self.tenants[rest.partition(":")[0]]

    def _parent(self, scope: str) -> str | None:
        kind, _, rest = scope.partition(":")
        if kind == "node":
            query, _, node = rest.partition(":")
            return node_scope(query, node.rpartition(".")[0])
        if kind == "query":
            return f"tenant-day:{self.tenants[rest]}:2026-11-25"
        return PLATFORM.id if kind == "tenant-day" else None


def above(node: str) -> list[str]:
    """The node, and those that wait for it."""
    parts = node.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def node_scope(query: str, node: str) -> str:
    return f"query:{query}" if node == "root" else f"node:{query}:{node}"


@contextmanager
def on_sqlite() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        yield Store(Path(folder))


def test_no_order_of_steps_breaks_the_books_on_sqlite():
    few = settings(max_examples=60, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(lambda: Ledger(on_sqlite), settings=few)


def test_no_order_of_steps_breaks_the_books_on_postgresql(postgres: Postgres, template: str):
    @contextmanager
    def on_postgresql() -> Iterator[Store]:
        name = postgres.fresh(template)
        with tempfile.TemporaryDirectory() as folder:
            yield Store(Path(folder), postgres.url(name), postgres)
        postgres.drop(name)

    few = settings(max_examples=8, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(lambda: Ledger(on_postgresql), settings=few)
