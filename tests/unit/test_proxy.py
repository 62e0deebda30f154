"""The proxy with fake LMs on a real ledger: nothing is asked that is not paid for, and what is asked is on record."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.core.asked import fingerprint
from orchestrator.core.errors import (
    AirlockError,
    BudgetExhausted,
    BudgetInFlight,
    CountExceeded,
    LimitError,
    NotPermitted,
    OutcomeUnknown,
    PriceUnknown,
    ProviderBusy,
    ProviderRefused,
    RateLimited,
    TimeExceeded,
)
from orchestrator.core.policy import Policy
from orchestrator.core.redact import Redactor
from orchestrator.core.turns import Turns
from orchestrator.lm.base import LM, Message, Reply, Request, Usage
from orchestrator.proxy import booking, circuit
from orchestrator.proxy.account import Aside
from orchestrator.proxy.booking import put_aside
from orchestrator.proxy.prices import Prices
from orchestrator.proxy.proxy import MESSAGE_TOKENS, RECORDED, REQUEST_TOKENS, Proxy
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.vault import Keeper
from tests.unit.helpers import DEFAULT, FakeLM, HangingLM, Query, database, policy, said, user

pytestmark = pytest.mark.anyio

USED = Usage(30, 10)
NANO_A_TOKEN = 1000  # a dollar a million tokens, in and out
OVERHEAD = MESSAGE_TOKENS + REQUEST_TOKENS
NOW = ProviderBusy("busy", retry_after=0.0)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = database(tmp_path)
    yield made
    made.close()


@dataclass
class Desk:
    """A proxy, and a query that asks through it."""

    proxy: Proxy
    query: Query

    async def root(self, *texts: str, tokens: int = 100, aside: Aside | None = None) -> Reply:
        messages: list[Message] = [user(text) for text in texts or ("hi",)]
        return await self.proxy.ask(self.query.node, "root", "root", messages, tokens, aside)

    async def sub(self, prompt: str = "hi", model: str | None = None) -> str:
        return await self.proxy.sub_call(self.query.node, prompt, model)

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        return [record["body"] for record in self.query.records(kind)]


def desk(db: Database, lm: LM, rules: Policy = DEFAULT, price: str = "1", **others: LM) -> Desk:
    """others: the LMs behind some names of models; all other names stand for `lm`."""

    def find(name: str) -> tuple[LM, str]:
        return others.get(name, lm), f"provider's {name}"

    prices = Prices({name: (Decimal(price), Decimal(price)) for name in ("root", "sub", "other", "third")})
    return Desk(Proxy(prices, find), Query(db, rules, sub_models=("sub", "other")))


def bound(text: str, tokens: int) -> int:
    return (len(text.encode()) + OVERHEAD + tokens) * NANO_A_TOKEN


@pytest.mark.parametrize(
    ("answer", "outcome", "share"),
    [
        (said("yes", usage=USED), "answered", 40 * NANO_A_TOKEN),
        (said("yes"), "answered", "bound"),
        (said("cut", "length", USED), "answered", 40 * NANO_A_TOKEN),
        (said("nothing", usage=Usage(0, 0)), "answered", 0),
        (said("much", usage=Usage(10**6, 10**6)), "answered", "bound"),
        (ProviderRefused("401"), "void", 0),
        (ProviderBusy("503", retry_after=999), "void", 0),
        (OutcomeUnknown("time-out"), "unknown", "bound"),
        (RuntimeError("a fault of our own"), "unknown", "bound"),
    ],
)
async def test_how_a_request_ends_decides_what_it_costs(db: Database, answer: Any, outcome: str, share: Any):
    at = desk(db, FakeLM(answer))
    if isinstance(answer, Exception):
        with pytest.raises(type(answer)):
            await at.root("hi")
    else:
        assert await at.root("hi") == answer
    cost = bound("hi", 100) if share == "bound" else share
    assert at.query.balance() == at.query.balance(1) == (cost, 0)
    assert [body["outcome"] for body in at.bodies("call.result")] == [outcome]
    assert Decimal(at.bodies("call.result")[0]["cost_usd"]) * 10**9 == cost == at.query.account.spent


async def test_half_a_key_is_not_recorded_of_an_error(db: Database):
    token = "sk-proj-" + "a1B2c3D4" * 8
    at = desk(db, FakeLM(ProviderRefused("x" * 479 + " " + token)))
    account = at.query.account
    account.key = replace(account.key, keeper=Keeper(bytes(32), account.key.id, (), Redactor().redact))
    with pytest.raises(ProviderRefused):
        await at.root("hi")
    (detail,) = [body["detail"] for body in at.bodies("call.result")]
    assert detail == "x" * 479 + " [redacted: API key]"


async def test_a_request_that_is_cancelled_may_have_been_billed(db: Database):
    lm = HangingLM()
    at = desk(db, lm)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(at.root)
        await lm.asked.wait()
        assert at.query.account.running == 1
        assert at.query.balance() == (0, bound("hi", 100))
        tasks.cancel_scope.cancel()
    assert at.query.balance() == (bound("hi", 100), 0)
    assert at.bodies("call.result")[0]["detail"] == "cancelled"
    assert at.query.account.running == 0


async def test_money_and_intent_are_committed_before_the_lm_is_asked(db: Database, tmp_path: Path):
    seen: list[tuple[int, list[str]]] = []

    def look() -> None:  # as another process would see it
        other = Database(tmp_path)
        held = other.read(lambda tx: ledger.balance(tx, "query:q1"))[1]
        kinds = [json.loads(record)["type"] for record, _ in other.read(lambda tx: journal.chain(tx, "q1"))]
        seen.append((held, kinds))
        other.close()

    at = desk(db, FakeLM(said("yes"), before=look))
    await at.root("hi")
    assert seen == [(bound("hi", 100), ["query.opened", "call.intent"])]


async def test_nothing_is_asked_when_the_intent_cannot_be_written(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm)
    await db.write(lambda tx: tx.exec_driver_sql("PRAGMA query_only=ON"))
    with pytest.raises(AirlockError, match="readonly"):
        await at.root()
    assert lm.requests == []


async def test_each_attempt_is_a_reservation_of_its_own(db: Database):
    at = desk(db, FakeLM(NOW, NOW, said("yes", usage=USED)))
    assert (await at.root()).text == "yes"
    assert [body["attempt"] for body in at.bodies("call.intent")] == [1, 2, 3]
    assert [body["outcome"] for body in at.bodies("call.result")] == ["void", "void", "answered"]
    states = db.read(lambda tx: tx.exec_driver_sql("SELECT id, state FROM reservations ORDER BY id").all())
    assert states == [("q1:root.c1:1", "void"), ("q1:root.c1:2", "void"), ("q1:root.c1:3", "settled")]


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_retries_end_where_the_policy_says(db: Database, retries: int):
    lm = FakeLM(NOW)
    at = desk(db, lm, policy(counts={"retries": retries}))
    with pytest.raises(ProviderBusy):
        await at.root()
    assert len(lm.requests) == 1 + retries


@pytest.mark.parametrize("error", [ProviderRefused("401"), OutcomeUnknown("time-out")])
async def test_only_a_busy_provider_is_asked_again(db: Database, error: AirlockError):
    lm = FakeLM(error)
    with pytest.raises(type(error)):
        await desk(db, lm).root()
    assert len(lm.requests) == 1


async def test_retry_after_is_waited_for(db: Database):
    at = desk(db, FakeLM(ProviderBusy("busy", retry_after=0.2), said("yes")))
    before = anyio.current_time()
    await at.root()
    assert anyio.current_time() - before >= 0.2


async def test_a_wait_that_outlasts_the_query_is_not_begun(db: Database):
    at = desk(db, FakeLM(ProviderBusy("busy", retry_after=61)))
    with anyio.fail_after(10), pytest.raises(ProviderBusy):
        await at.root()


async def test_a_call_that_takes_the_rest_of_the_querys_time_ends_as_the_query_does(db: Database):
    """Its own time-out is over at the same moment; what it may have cost is charged all the same."""

    class TooSlow(FakeLM):
        async def ask(self, request: Request) -> Reply:
            await anyio.sleep(request.timeout_s)
            raise OutcomeUnknown("no answer in time")

    at = desk(db, TooSlow(), policy(time={"query": 200}))
    with pytest.raises(TimeExceeded, match="time is over"):
        await at.root("hi")
    assert at.query.balance() == (bound("hi", 100), 0)
    assert [body["outcome"] for body in at.bodies("call.result")] == ["unknown"]


async def test_the_output_is_cut_to_what_can_be_paid(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm, policy(money={"query": bound("hi", 400)}))
    await at.root("hi", tokens=1000)
    assert lm.requests[0].max_output_tokens == 400 == at.bodies("call.intent")[0]["output_tokens"]
    assert at.query.balance() == (bound("hi", 400), 0)


async def test_below_the_floor_nothing_is_asked(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm, policy(money={"query": bound("hi", 255)}, models={"output_floor": 256}))
    with pytest.raises(BudgetExhausted):
        await at.root("hi", tokens=1000)
    assert (lm.requests, at.query.balance(), at.bodies("call.")) == ([], (0, 0), [])


@pytest.mark.parametrize("money", [0, 1])
async def test_a_budget_of_nothing_buys_nothing(db: Database, money: int):
    with pytest.raises(BudgetExhausted):
        await desk(db, FakeLM(said("yes")), policy(money={"query": money})).root()


async def test_money_that_is_held_is_told_from_money_that_is_spent(db: Database):
    lm = HangingLM()
    at = desk(db, lm, policy(money={"query": bound("hi", 100) + 1}))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(at.root)
        await lm.asked.wait()
        with pytest.raises(BudgetInFlight):
            await at.root()
        tasks.cancel_scope.cancel()
    with pytest.raises(BudgetExhausted):
        await at.root()


async def test_64_sub_calls_at_once_cannot_overshoot(db: Database):
    rules = policy(money={"query": 10 * bound("hi", 256)}, models={"output_tokens": 256})
    at = desk(db, FakeLM(said("yes")), rules)
    refused: list[LimitError] = []

    async def call() -> None:
        try:
            await at.sub("hi")
        except LimitError as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(64):
            tasks.start_soon(call)
    assert len(refused) == 54
    assert at.query.balance() == (rules.money.query, 0)
    assert journal.fault(*db.read(lambda tx: (journal.chain(tx, "q1"), []))) is None


async def put_by(at: Desk, nano: int) -> Aside:
    """Money for the last word of the query."""
    aside = Aside(ledger.set_aside("q1"), nano)
    await at.query.db.write(lambda tx: put_aside(tx, at.query.node, aside.reservation, nano))
    at.query.node.count(held=nano)
    return aside


async def test_the_last_word_takes_what_was_set_aside(db: Database):
    rules = policy(money={"query": bound("hi", 300)})
    at = desk(db, FakeLM(said("yes")), rules)
    aside = await put_by(at, rules.money.query)
    with pytest.raises(LimitError):
        await at.root("hi", tokens=300)
    assert at.query.balance() == (0, rules.money.query)
    await at.root("hi", tokens=300, aside=aside)
    assert at.query.balance() == (rules.money.query, 0) == (at.query.node.spent, at.query.node.held)


async def test_a_last_word_that_cost_nothing_can_be_asked_for_again(db: Database):
    """What it was promised is held between its attempts: nobody else can take it."""
    rules = policy(money={"query": bound("hi", 300)}, counts={"retries": 2})
    between: list[tuple[int, int]] = []
    lm = FakeLM(NOW, NOW, NOW, said("yes"), before=lambda: between.append((at.query.node.spent, at.query.node.held)))
    at = desk(db, lm, rules)
    aside = await put_by(at, rules.money.query)
    with pytest.raises(ProviderBusy):
        await at.root("hi", tokens=300, aside=aside)
    assert at.query.balance() == (0, rules.money.query) == (at.query.node.spent, at.query.node.held)
    with pytest.raises(LimitError):
        await at.root("hi", tokens=300)
    assert (await at.root("hi", tokens=300, aside=aside)).text == "yes"
    assert between == [(0, rules.money.query)] * 4
    assert at.query.balance() == (rules.money.query, 0)
    ended = db.read(lambda tx: tx.exec_driver_sql("SELECT state, count(*) FROM reservations GROUP BY state").all())
    assert sorted(ended) == [("settled", 1), ("void", 7)]


async def test_a_last_word_that_asks_for_less_leaves_the_rest_to_nobody(db: Database):
    """A child's, say, while its siblings spend the query's money: what it was promised is still there afterwards."""
    rules = policy(money={"query": bound("hi", 300)}, counts={"retries": 1})
    taken: list[str] = []

    async def take() -> None:
        with contextlib.suppress(ledger.NotEnough):
            rest = bound("hi", 300) - bound("hi", 100)
            await db.write(lambda tx: ledger.reserve(tx, "other", "q2", "root", rest, at.query.scopes))
            taken.append("the rest")

    class Greedy(FakeLM):
        async def ask(self, request: Request) -> Reply:
            if not self.requests:
                await take()
            return await super().ask(request)

    at = desk(db, Greedy(NOW, said("yes", usage=USED)), rules)
    aside = await put_by(at, rules.money.query)
    assert (await at.root("hi", tokens=100, aside=aside)).text == "yes"
    assert taken == []
    assert at.query.balance() == (40 * NANO_A_TOKEN, 0) == (at.query.node.spent, at.query.node.held)
    assert [body["outcome"] for body in at.bodies("call.result")] == ["void", "answered"]


async def test_a_report_above_the_bound_is_charged_at_the_bound_and_recorded(db: Database):
    at = desk(db, FakeLM(said("yes", usage=Usage(10**6, 1))))
    await at.root("hi")
    result = at.bodies("call.result")[0]
    assert Decimal(result["cost_usd"]) * 10**9 == bound("hi", 100)
    assert result["reported_usd"] == "1.000001"
    assert result["usage"] == {"input_tokens": 10**6, "output_tokens": 1}


@pytest.mark.parametrize("text", ["", "hi", "€" * 500, "\ud800", "\x00"])
async def test_the_bound_has_a_token_for_every_byte(db: Database, text: str):
    at = desk(db, FakeLM(said("yes")))
    await at.root(text, text)
    size = 2 * len(text.encode("utf-8", "replace")) + 2 * MESSAGE_TOKENS + REQUEST_TOKENS
    assert at.query.balance() == ((size + 100) * NANO_A_TOKEN, 0)


async def test_a_model_that_a_guest_names_only_selects(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm)
    for name in ("root", "local:/etc/passwd", "scripted:/etc/shadow", "gpt-5", "", "x" * 10_000):
        if name:
            with pytest.raises(NotPermitted, match="sub-calls can ask sub, other"):
                await at.sub(model=name)
    assert lm.requests == []
    assert [len(body["model"]) for body in at.bodies("call.refused")][-1] == 200
    assert await at.sub(model="other") == "yes"
    assert lm.requests[0].model == "provider's other"


async def test_refusals_do_not_fill_the_journal(db: Database):
    at = desk(db, FakeLM(said("yes")))
    for _ in range(RECORDED + 5):
        with pytest.raises(NotPermitted):
            await at.sub(model="nobody")
    assert len(at.bodies("call.refused")) == RECORDED
    assert at.query.account.refused == RECORDED + 5


async def test_what_a_cell_asked_for_is_one_number_in_all_its_records(db: Database):
    """However often it is tried, whoever answers; and a refusal that came before it has none."""
    rules = policy(models={"fallbacks": ("other",), "dedupe": True}, counts={"retries": 0})
    at = desk(db, FakeLM(ProviderBusy("503", retry_after=0)), rules, other=FakeLM(said("yes", "length", USED)))
    assert await at.sub("one") == await at.sub("one", "sub") == "yes"
    with pytest.raises(NotPermitted):
        await at.sub("two", "nobody")
    with pytest.raises(CountExceeded):
        await at.sub("x" * 10**6)
    intents = [(body["call"], body["model"], body["sub_call"], body["asked"]) for body in at.bodies("call.intent")]
    assert intents == [("root.c1", "sub", 1, None), ("root.c2", "other", 1, None)]
    assert [(body["sub_call"], body["asked"]) for body in at.bodies("call.repeated")] == [(2, "sub")]
    refused = at.query.records("call.refused")
    assert [record["body"]["sub_call"] for record in refused] == [None, 3]
    kept = {(seq, name): data.decode() for seq, name, _salt, data in at.query.payloads()}
    asked = [kept[record["seq"], "asked"] for record in refused]
    assert asked == [fingerprint("llm_query", "two", "nobody"), fingerprint("llm_query", "x" * 10**6, None)]
    assert [body["finish"] for body in at.bodies("call.result")] == [None, "length"]


async def test_budgets_that_are_told_do_not_fill_the_journal(db: Database):
    at = desk(db, FakeLM(said("yes")))
    shown = [at.proxy.budget(at.query.node) for _ in range(RECORDED + 5)]
    assert at.bodies("budget.told") == shown[:RECORDED]
    assert [list(one) for one in shown] == [sorted(one) for one in shown]


async def test_a_model_that_the_policy_leaves_out_is_refused(db: Database):
    at = desk(db, FakeLM(said("yes")), policy(models={"sub": (("other",),), "root": (("x",),)}))
    with pytest.raises(NotPermitted):
        await at.root()
    with pytest.raises(NotPermitted):
        await at.sub()
    assert await at.sub(model="other") == "yes"


async def test_sub_calls_are_counted_failed_ones_too(db: Database):
    at = desk(db, FakeLM(ProviderRefused("no")), policy(counts={"sub_calls": 2}))
    for expected in (ProviderRefused, ProviderRefused, CountExceeded, CountExceeded):
        with pytest.raises(expected):
            await at.sub()
    assert at.query.account.sub_calls == 2
    assert [body["kind"] for body in at.bodies("call.refused")] == ["provider-refused"] * 2 + ["count-exceeded"] * 2


async def test_a_prompt_that_is_too_large_is_refused(db: Database):
    at = desk(db, FakeLM(said("yes")), policy(models={"prompt": 10}))
    with pytest.raises(CountExceeded, match="the prompt has 12 bytes, the policy permits 10"):
        await at.sub("€€€€")
    assert await at.sub("€€€.") == "yes"


async def test_a_prompt_that_is_too_large_is_not_kept_waiting(db: Database):
    """Each can have the 16 MiB of a frame, or a context's size: nobody may have the host hold as many as can wait."""
    lm = HangingLM()
    at = desk(db, lm, policy(models={"prompt": 10}, counts={"in_flight": 1}))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(at.sub)
        await lm.asked.wait()
        with anyio.fail_after(5), pytest.raises(CountExceeded, match="the prompt has 11 bytes"):
            await at.sub("x" * 11)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("role", ["root", "sub"])
async def test_calls_in_flight_are_bounded(db: Database, role: str):
    """Those of loops, too: child queries have theirs at the same time."""
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, at.query.account.running)

    at = desk(db, FakeLM(said("yes"), before=look), policy(counts={"in_flight": 3}))
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(at.root if role == "root" else at.sub)
    assert 1 <= most <= 3


async def test_a_model_without_a_price_is_not_asked(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm)
    with pytest.raises(PriceUnknown):
        await at.proxy.ask(at.query.node, "root", "dear-unknown", [user("hi")], 10)
    assert lm.requests == []
    with pytest.raises(PriceUnknown):
        at.proxy.bound("dear-unknown", 1, 1)


async def test_after_the_querys_time_nothing_is_asked(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm)
    at.query.node.deadline = 0
    with pytest.raises(TimeExceeded):
        await at.root()
    assert lm.requests == []


async def test_a_request_may_take_no_longer_than_policy_and_query(db: Database):
    lm = FakeLM(said("yes"))
    await desk(db, lm, policy(time={"idle": 1500})).root()
    assert lm.requests[0].timeout_s == 1.5


def turns(count: int) -> list[list[Message]]:
    """The messages of each request of a conversation that grows."""
    said_so_far = [user("system"), user("question")]
    requests = []
    for number in range(count):
        requests.append(list(said_so_far))
        said_so_far += [user(f"reply {number} " + "r" * 1000), user(f"output {number} " + "o" * 1000)]
    return requests


def whole(query: Query) -> Iterator[list[Message]]:
    """What was asked at each turn, put together again from the journal."""
    prompts = {seq: json.loads(data) for seq, name, _salt, data in query.payloads() if name == "prompt"}
    before: list[Message] = []
    for record in query.records("call.intent"):
        if record["body"]["role"] == "root":
            before = [*before[: record["body"]["shared"]], *prompts[record["seq"]]]
            assert len(before) == record["body"]["messages"]
            yield before


async def test_a_conversation_is_stored_once_and_can_be_put_together_again(db: Database):
    at = desk(db, FakeLM(said("yes")))
    requests = turns(20)
    for messages in requests:
        await at.proxy.ask(at.query.node, "root", "root", messages, 10)
        await at.sub("an aside")
    assert list(whole(at.query)) == requests
    stored = sum(len(data) for _seq, name, _salt, data in at.query.payloads() if name == "prompt")
    assert stored < 1.2 * len(json.dumps(requests[-1])) + 20 * 100


async def test_a_conversation_that_was_cut_in_its_middle_is_stored_from_there(db: Database):
    at = desk(db, FakeLM(said("yes")))
    requests = turns(3)
    requests.append([*requests[2][:3], user("[left out]"), *requests[2][4:]])
    requests.append([user("another")])
    for messages in requests:
        await at.proxy.ask(at.query.node, "root", "root", messages, 10)
    assert list(whole(at.query)) == requests


async def test_a_call_that_is_refused_does_not_count_as_said(db: Database):
    at = desk(db, FakeLM(said("yes")), policy(models={"prompt": 5000}))
    requests = turns(4)
    for messages in requests:
        try:
            await at.proxy.ask(at.query.node, "root", "root", messages, 10)
        except CountExceeded:
            assert messages is requests[3]
    assert list(whole(at.query)) == requests[:3]


async def test_a_budget_shows_what_is_left_of_the_query_alone(db: Database):
    at = desk(db, FakeLM(said("yes", usage=USED)), policy(money={"query": 10**9}, counts={"sub_calls": 5}))
    await at.sub()
    left = at.proxy.budget(at.query.node)
    assert left.pop("seconds_left") in ("59", "60")
    assert left == {"usd_left": "0.99996", "usd_limit": "1.00", "usd_spent": "0.00004"} | {
        "sub_calls_left": 4,
        "children_left": 0,
        "depth_left": 1,
    }


async def test_usage_is_summed_for_each_model(db: Database):
    at = desk(db, FakeLM(said("yes", usage=USED), said("yes", usage=USED), said("yes")))
    await at.sub()
    await at.sub()
    await at.sub(model="other")
    usage = at.query.account.usage
    assert (usage["sub"].calls, usage["sub"].input_tokens, usage["sub"].output_tokens) == (2, 60, 20)
    assert (usage["other"].calls, usage["other"].input_tokens) == (1, 0)
    assert at.query.account.spent == at.query.balance()[0]


# Providers that fail


async def test_fallbacks_are_asked_in_the_policys_order(db: Database):
    first, second, third = FakeLM(ProviderBusy("down")), FakeLM(ProviderBusy("down, too")), FakeLM(said("yes"))
    rules = policy(models={"fallbacks": ("other", "third")}, counts={"retries": 0})
    at = desk(db, third, rules, sub=first, other=second)
    assert await at.sub() == "yes"
    assert [len(lm.requests) for lm in (first, second, third)] == [1, 1, 1]
    assert [(body["model"], body["call"]) for body in at.bodies("call.intent")] == [
        ("sub", "root.c1"),
        ("other", "root.c2"),
        ("third", "root.c3"),
    ]
    assert at.query.account.sub_calls == 1


async def test_a_fallback_has_to_be_permitted(db: Database):
    lm, other = FakeLM(ProviderBusy("down")), FakeLM(said("yes"))
    rules = policy(models={"fallbacks": ("other",), "sub": (("sub",),)}, counts={"retries": 0})
    at = desk(db, lm, rules, other=other)
    with pytest.raises(ProviderBusy, match="down"):
        await at.sub()
    assert other.requests == []


@pytest.mark.parametrize("error", [ProviderRefused("401"), OutcomeUnknown("cut off")])
async def test_nobody_else_is_asked_when_the_provider_said_no_or_may_have_billed(db: Database, error: AirlockError):
    other = FakeLM(said("yes"))
    at = desk(db, FakeLM(error), policy(models={"fallbacks": ("other",)}), other=other)
    with pytest.raises(type(error)):
        await at.sub()
    assert other.requests == []


async def test_when_all_fail_it_is_the_first_that_is_told_of(db: Database):
    rules = policy(models={"fallbacks": ("other",)}, counts={"retries": 0})
    at = desk(db, FakeLM(ProviderBusy("the first")), rules, other=FakeLM(ProviderBusy("the other")))
    with pytest.raises(ProviderBusy, match="the first"):
        await at.sub()
    assert at.query.balance() == (0, 0)


async def test_a_provider_that_fails_again_and_again_is_left_alone(db: Database):
    lm = FakeLM(ProviderBusy("down"))
    at = desk(db, lm, policy(counts={"retries": 0}))
    for _ in range(20):
        with pytest.raises(ProviderBusy):
            await at.sub()
    assert len(lm.requests) == circuit.FAILURES
    assert len(at.bodies("call.intent")) == circuit.FAILURES  # a call that is not sent holds nothing
    with pytest.raises(ProviderBusy, match="left alone for 2 s"):
        await at.sub()
    with pytest.raises(ProviderBusy, match="down"):  # another model of it is another matter
        await at.sub(model="other")
    # Nor can a tenant close a model to others: what it asks may be what makes the provider fail.
    quiet = Desk(at.proxy, Query(db, policy(counts={"retries": 0}), number=2, tenant="quiet"))
    with pytest.raises(ProviderBusy, match="down"):
        await quiet.sub()


async def test_an_open_circuit_is_passed_over_at_once(db: Database):
    lm, other = FakeLM(ProviderBusy("down")), FakeLM(said("yes"))
    rules = policy(models={"fallbacks": ("other",)}, counts={"retries": 0})
    at = desk(db, lm, rules, other=other)
    for _ in range(2 * circuit.FAILURES):
        assert await at.sub() == "yes"
    assert len(lm.requests) == circuit.FAILURES
    assert len(other.requests) == 2 * circuit.FAILURES


@pytest.mark.parametrize("error", [ProviderRefused("401"), OutcomeUnknown("timed out")])
async def test_refusals_and_short_time_outs_open_no_circuit(db: Database, error: AirlockError):
    lm = FakeLM(error)
    at = desk(db, lm)
    for _ in range(2 * circuit.FAILURES):
        with pytest.raises(type(error)):
            await at.root()
    assert len(lm.requests) == 2 * circuit.FAILURES


# Identical calls


class Slow(FakeLM):
    """Answers when `go` is set. waiting: how many were asked."""

    def __init__(self, *answers: Reply | Exception) -> None:
        super().__init__(*answers)
        self.go = anyio.Event()
        self.waiting = 0

    async def ask(self, request: Request) -> Reply:
        self.waiting += 1
        await self.go.wait()
        return await super().ask(request)


async def test_identical_calls_are_answered_once_where_the_policy_says_so(db: Database):
    lm = Slow(said("one", usage=USED), said("two", usage=USED))
    at = desk(db, lm, policy(models={"dedupe": True}))
    answers: dict[str, list[str]] = {"a": [], "b": []}

    async def call(prompt: str) -> None:
        answers[prompt].append(await at.sub(prompt))

    async with anyio.create_task_group() as tasks:
        for prompt in ("a", "a", "a", "b"):
            tasks.start_soon(call, prompt)
        while lm.waiting < 2:
            await anyio.lowlevel.checkpoint()
        lm.go.set()
    await call("a")
    assert len(lm.requests) == 2
    assert [len(answers["a"]), len(set(answers["a"])), len(answers["b"])] == [4, 1, 1]
    assert {body["of"] for body in at.bodies("call.repeated")} < {"root.c1", "root.c2"}
    assert len(at.bodies("call.repeated")) == 3
    assert at.query.account.sub_calls == 5
    assert at.query.balance() == (2 * 40 * NANO_A_TOKEN, 0)
    await at.sub("a", model="other")
    assert len(lm.requests) == 3


async def test_a_repeated_call_names_the_one_that_brought_the_answer(db: Database):
    rules = policy(models={"dedupe": True, "fallbacks": ("other",)}, counts={"retries": 0})
    at = desk(db, FakeLM(ProviderBusy("down")), rules, other=FakeLM(said("yes")))
    assert [await at.sub("a"), await at.sub("a")] == ["yes", "yes"]
    answered = [body["call"] for body in at.bodies("call.result") if body["outcome"] == "answered"]
    assert [body["of"] for body in at.bodies("call.repeated")] == answered


async def test_what_is_kept_to_answer_repeated_calls_does_not_grow_with_their_prompts(db: Database):
    at = desk(db, FakeLM(said("yes")), policy(models={"dedupe": True}))
    for letter in "abc":
        assert await at.sub(letter * 100_000) == "yes"
    assert max(sys.getsizeof(part) for key in at.query.account.answers for part in key) < 1000


async def test_a_call_that_failed_answers_nobody_else(db: Database):
    lm = Slow(ProviderRefused("no"), said("yes"))
    at = desk(db, lm, policy(models={"dedupe": True}))
    seen: list[str] = []

    async def call() -> None:
        try:
            seen.append(await at.sub("a"))
        except ProviderRefused:
            seen.append("refused")

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(call)
        lm.go.set()
    assert sorted(seen) == ["refused", "yes", "yes"]
    assert len(lm.requests) == 2


async def test_by_default_every_call_is_asked(db: Database):
    lm = FakeLM(said("yes"))
    at = desk(db, lm)
    assert [await at.sub("a"), await at.sub("a")] == ["yes", "yes"]
    assert len(lm.requests) == 2


# Rates


@pytest.fixture
def within_a_minute(monkeypatch: pytest.MonkeyPatch):
    """No minute ends while the test runs: the one that comes begins early where this one is about to end."""
    now = datetime.now(UTC)
    moment = now + timedelta(seconds=10 if now.second > 50 else 0)
    monkeypatch.setattr(booking, "datetime", type("Standing", (), {"now": staticmethod(lambda _zone: moment)}))


@pytest.mark.parametrize(
    ("limits", "what"), [({"requests_minute": 2}, "requests"), ({"tokens_minute": 2 * (2 + OVERHEAD + 4096)}, "tokens")]
)
async def test_a_minutes_requests_and_tokens_are_bounded(
    db: Database, limits: dict[str, int], what: str, within_a_minute: None
):
    lm = FakeLM(said("yes"))  # reports no usage, so all the tokens that were held stay counted
    at = desk(db, lm, policy(tenant=limits))
    at.query.node.deadline = time.monotonic() + 0.5  # no time to wait for the next minute
    await at.sub()
    await at.sub()
    with pytest.raises(RateLimited, match=f"{what} of this minute") as caught:
        await at.sub()
    assert 0 < caught.value.retry_after <= 70
    assert "come back in" in str(caught.value)
    assert len(lm.requests) == 2
    assert at.bodies("call.refused")[0]["kind"] == "rate-limited"


async def test_a_call_waits_for_the_next_minute_where_it_has_the_time(
    db: Database, monkeypatch: pytest.MonkeyPatch, within_a_minute: None
):
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await at.query.db.write(lambda tx: tx.exec_driver_sql("UPDATE scopes SET calls = 0"))

    at = desk(db, FakeLM(said("yes")), policy(tenant={"requests_minute": 1}))
    monkeypatch.setattr(anyio, "sleep", sleep)
    at.query.node.deadline = time.monotonic() + 600
    assert [await at.sub(), await at.sub()] == ["yes", "yes"]
    assert [0 < seconds <= 70 for seconds in waited] == [True]


@pytest.mark.parametrize("limits", [{"requests_minute": 1}, {"tokens_minute": 3 * 4096}])
async def test_what_no_money_buys_is_not_asked_for_in_smaller_parts(
    db: Database, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    """A model that costs nothing could have every output cap, and none of them is room in a minute."""
    at = desk(db, FakeLM(said("yes")), policy(tenant=limits), price="0")
    at.query.node.deadline = time.monotonic() + 0.5
    for _ in range(2):
        with contextlib.suppress(RateLimited):
            await at.sub("x" * 5000)
    tried: list[int] = []
    reserve = ledger.reserve

    def counting(*args: Any, **more: Any) -> None:
        tried.append(more["tokens"])
        reserve(*args, **more)

    monkeypatch.setattr(ledger, "reserve", counting)
    at.query.node.deadline = time.monotonic() + 0.5
    with pytest.raises(RateLimited):
        await at.sub("x" * 5000)
    assert len(set(tried)) == 1, f"{len(set(tried))} sizes were tried"


async def test_a_call_that_no_minute_has_room_for_is_refused_for_good(db: Database):
    with pytest.raises(CountExceeded, match="tokens"):
        await desk(db, FakeLM(said("yes")), policy(tenant={"tokens_minute": 100})).sub()


async def test_the_last_word_waits_for_no_minute(db: Database, within_a_minute: None):
    at = desk(db, FakeLM(said("yes")), policy(tenant={"requests_minute": 1}))
    aside = await put_by(at, 10**8)
    await at.root()
    at.query.node.deadline = time.monotonic() + 0.5
    with pytest.raises(RateLimited):
        await at.root()
    assert (await at.root(aside=aside)).text == "yes"


# Turns


async def test_who_asks_much_does_not_keep_others_waiting(db: Database, tmp_path: Path):
    """A tenant with 1,000 queued calls cannot delay another's single call beyond its share."""
    order: list[str] = []

    class Noting(FakeLM):
        async def ask(self, request: Request) -> Reply:
            order.append(str(request.messages[0]["content"]))
            return await super().ask(request)

    rules = policy(counts={"in_flight": 1000})
    greedy = desk(db, Noting(said("yes")), rules)
    greedy.proxy._turns = Turns(4)  # pyright: ignore[reportPrivateUsage]
    quiet = Desk(greedy.proxy, Query(db, rules, number=2, sub_models=("sub",), tenant="quiet"))
    async with anyio.create_task_group() as tasks:
        for _ in range(1000):
            tasks.start_soon(greedy.sub, "greedy")
        while len(order) < 20:
            await anyio.lowlevel.checkpoint()
        asked = len(order)
        assert await quiet.sub("quiet") == "yes"
        assert order.index("quiet") - asked <= 8  # those under way, and its turn
        tasks.cancel_scope.cancel()


# Dead holders


async def test_what_a_dead_process_holds_is_swept_before_a_call_is_refused(db: Database):
    swept: list[bool] = []
    limit = bound("hi", 100)
    at = desk(db, FakeLM(said("yes")), policy(money={"query": limit}))
    held = "dead:root.c1:1"
    await db.write(lambda tx: ledger.reserve(tx, held, "dead", "root", limit, at.query.scopes))

    async def sweep() -> int:
        swept.append(True)
        await db.write(lambda tx: ledger.void(tx, held))
        return 1

    at.proxy._booking._sweep = sweep  # pyright: ignore[reportPrivateUsage]
    assert (await at.root()).text == "yes"
    assert swept == [True]
