"""Eight processes spend one tenant's money through the real proxy, and are killed at any moment: nothing is overspent.

The provider is a real server. Whenever a request comes in, it looks into the database, as anybody else could, for the
hold and the intent that have to be there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401  here, so that what is forked has it: it takes a tenth of a second
import anyio
import pytest
import sqlalchemy as sa

from orchestrator.core.errors import BudgetExhausted, BudgetInFlight, ProviderBusy
from orchestrator.lm.base import LM, Reply, Request, Usage
from orchestrator.lm.openai import OpenAILM
from orchestrator.loop.recovery import recover, sweep
from orchestrator.proxy.prices import Prices
from orchestrator.proxy.proxy import Proxy
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.schema import queries, records, reservations, scopes
from tests.fakes.provider import Provider, Say, Seen
from tests.postgres import Postgres
from tests.unit.helpers import Query, Store, fill, keeper, policy, user

PROCESSES, CALLS, AT_ONCE, OUTPUT = 8, 64, 8, 20
KILLED = 0.02  # of all steps; a call has four
PRICES = Prices({"sub": (Decimal(1), Decimal(2))})
DAY = "tenant-day:d"
LIMIT = PROCESSES * CALLS * PRICES.cost("sub", Usage(20, OUTPUT)) * 2 // 3  # does not pay for all of it
RULES = policy(money={"query": LIMIT, "tenant_day": LIMIT}, models={"output_tokens": OUTPUT, "output_floor": OUTPUT})


class Doomed(LM):
    """The real client of a process that may be killed within the next few milliseconds of any step."""

    def __init__(self, url: str, seed: int) -> None:
        self._lm = OpenAILM(url, "none")
        self._random = random.Random(seed)  # noqa: S311

    def step(self) -> None:
        if self._random.random() < KILLED:
            kill = threading.Timer(self._random.random() * 0.01, os.kill, (os.getpid(), signal.SIGKILL))
            kill.daemon = True
            kill.start()

    async def ask(self, request: Request) -> Reply:
        self.step()
        reply = await self._lm.ask(request)
        self.step()
        return reply

    async def aclose(self) -> None:
        await self._lm.aclose()


async def spend(store: Store, url: str, number: int, begun: Any) -> None:
    """Make the calls that are still to be made. begun: how many were, by those before us too."""
    db = store.open()
    recover(db)
    lm = Doomed(url, number)
    proxy = Proxy(PRICES, lambda name: (lm, name))
    query = Query(db, RULES, number)

    async def call(text: str) -> None:
        lm.step()
        for _ in range(3):
            try:
                await proxy.ask(query.node, "sub", "sub", [user(text)], OUTPUT)
                break
            except BudgetInFlight:
                await sweep(db)
            except (BudgetExhausted, ProviderBusy):
                break
        lm.step()

    while begun.value < CALLS:
        async with anyio.create_task_group() as tasks:
            for _ in range(min(AT_ONCE, CALLS - begun.value)):
                begun.value += 1
                tasks.start_soon(call, f"{query.key.id}/{begun.value:02}")
    await lm.aclose()
    db.close()


def keep_going(store: Store, worker: int, begun: Any, kills: Any, orders: Connection) -> None:
    """One of the eight: a process, and another in its place for as long as they are killed."""
    url = orders.recv()
    for number in range(worker * 1000, worker * 1000 + 1000):  # of its query, and of its luck
        child = os.fork()
        if not child:
            try:
                anyio.run(spend, store, url, number, begun)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            os._exit(status)
        kills.value += 1


class Witness:
    """What the provider sees in the database at the moment a request reaches it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.without_hold: list[str] = []

    def answer(self, seen: Seen) -> Say:
        if not self._db.read(lambda tx: self._held(tx, seen.text)):
            self.without_hold.append(seen.text)
        used = random.Random(seen.text)  # noqa: S311
        return Say("yes", usage=(used.randint(1, 20), used.randint(1, OUTPUT)))

    def _held(self, tx: journal.Connection, text: str) -> bool:
        """An intent with this very prompt, and its reservation open."""
        query = text.partition("/")[0]
        prompts = [row for row in journal.kept_payloads(tx, query) if row[1] == "prompt"]
        opened = [(seq, keeper(query).open(seq, name, sealed)) for seq, name, sealed in prompts]
        found = [seq for seq, both in opened if both and text.encode() in both[1]]
        intent = sa.select(records.c.record).where(records.c.query == query, records.c.seq.in_(found))
        bodies = [json.loads(record)["body"] for record in tx.execute(intent).scalars()]
        intents = {f"{query}:{body['call']}:{body['attempt']}" for body in bodies}
        return any(name in intents and amount > 0 for name, _node, amount in ledger.open_reservations(tx, query))


class Sampler:
    """Looks at the tenant's purse all the time."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.samples = 0
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.002):  # the provider is in this process, too
            self.most = max(self.most, sum(self._db.read(lambda tx: ledger.balance(tx, DAY))))
            self.samples += 1


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        fill(tmp_path)
        yield Store(tmp_path)
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.fresh()
    made = Store(tmp_path, server.url(name), server)
    made.open().close()
    yield made
    server.drop(name)


@contextmanager
def eight(store: Store, kills: list[Any]) -> Iterator[list[Connection]]:
    """They start before this process opens anything that they would share; each waits for the provider's address."""
    context = multiprocessing.get_context("fork")
    pipes, keepers = list[Connection](), list[Any]()
    begun = [context.Value("i", 0, lock=False) for _ in range(PROCESSES)]
    kills += [context.Value("i", 0, lock=False) for _ in range(PROCESSES)]
    for worker in range(PROCESSES):
        theirs, mine = context.Pipe(duplex=False)
        keepers.append(context.Process(target=keep_going, args=(store, worker, begun[worker], kills[worker], theirs)))
        keepers[-1].start()
        pipes.append(mine)
        theirs.close()
    try:
        yield pipes
        for keeper in keepers:
            keeper.join()
        assert [keeper.exitcode for keeper in keepers] == [0] * PROCESSES
        assert [value.value for value in begun] == [CALLS] * PROCESSES
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.join()
        for pipe in pipes:
            pipe.close()


def test_nothing_is_overspent_and_nothing_is_sent_without_a_hold(store: Store) -> None:
    kills: list[Any] = []
    with eight(store, kills) as pipes:
        db = store.open()
        witness = Witness(db)
        with Provider() as provider, Sampler(db) as sampler:
            provider.answer = witness.answer
            for pipe in pipes:
                pipe.send(provider.url)
            for child in multiprocessing.active_children():
                child.join()
    recover(db)

    assert sum(kill.value for kill in kills) >= 10, "hardly anybody was killed"
    assert witness.without_hold == []
    assert sampler.samples > 100
    assert sampler.most <= LIMIT
    spent, held = db.read(lambda tx: ledger.balance(tx, DAY))
    assert held == 0
    used = sum(PRICES.cost("sub", Usage(*tokens)) for tokens in provider.used)
    assert len(provider.requests) > PROCESSES * CALLS // 4
    assert used <= spent <= LIMIT
    assert spent > LIMIT // 2  # it was about money, not about nothing

    def look(tx: journal.Connection) -> tuple[int, list[int], set[str]]:
        settled = sa.select(sa.func.sum(reservations.c.settled))
        counters = sa.select(scopes.c.in_flight, scopes.c.tokens_held).where(scopes.c.id == DAY)
        states = set(tx.execute(sa.select(reservations.c.state)).scalars())
        return int(tx.execute(settled).scalar_one()), list(tx.execute(counters).one()), states

    assert db.read(look) == (spent, [0, 0], {"settled"})
    for query in db.read(lambda tx: tx.execute(sa.select(queries.c.id)).scalars().all()):
        chain = db.read(lambda tx, query=query: journal.chain(tx, query))
        assert journal.fault(chain, [], closed=True) is None
    db.close()
