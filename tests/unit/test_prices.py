"""What a call can cost at most is never less than what it did cost, and never nothing for want of a price."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import PriceUnknown, RequestError
from orchestrator.lm.base import Usage
from orchestrator.proxy.prices import Prices
from tests.unit.helpers import quick

LISTED = [
    "gpt-5-mini",
    "gpt-4.1",
    "o3",  # its price changed on a day
    "claude-sonnet-4-5",  # dearer above 200,000 tokens; writing its cache costs more than input
    "claude-haiku-4-5",
    "gemini-2.5-pro",  # dearer above 200,000 tokens
    "gemini-2.5-flash",
    "deepseek-chat",  # dearer by day
    "deepseek-v4-flash",  # both
    "mistral-large-latest",
]
NONE = Prices({})
tokens = st.one_of(st.integers(0, 2_000), st.integers(0, 2_000_000))


@quick
@given(st.sampled_from(LISTED), tokens, tokens, st.data())
def test_no_usage_within_the_bounds_costs_more_than_the_bound(
    model: str, most_in: int, most_out: int, data: st.DataObject
):
    usage = Usage(data.draw(st.integers(0, most_in)), data.draw(st.integers(0, most_out)))
    assert 0 <= NONE.cost(model, usage) <= NONE.bound(model, most_in, most_out)


@quick
@given(st.decimals(0, 10**4, places=6), st.decimals(0, 10**4, places=6), tokens, tokens)
def test_the_operators_price_is_exact_and_rounded_up(per_input: Decimal, per_output: Decimal, read: int, written: int):
    prices = Prices({"mine": (per_input, per_output)})
    exact = (per_input * read + per_output * written) * 1000
    assert 0 <= prices.cost("mine", Usage(read, written)) - exact < 1
    assert prices.bound("mine", read, written) == prices.cost("mine", Usage(read, written))


@pytest.mark.parametrize("model", LISTED)
def test_a_listed_model_costs_something(model: str):
    assert NONE.bound(model, 1, 0) > 0
    assert NONE.bound(model, 0, 1) > 0
    assert NONE.bound(model, 0, 0) == 0


def test_a_listed_price_is_what_the_list_says():
    assert NONE.cost("gpt-4.1", Usage(1_000_000, 1_000_000)) == 10 * 10**9


def test_the_bound_is_on_the_dearer_tier():
    low, high = (NONE.bound("gemini-2.5-pro", size, 0) for size in (200_000, 200_001))
    assert high > 1.9 * low


def test_the_bound_reckons_with_the_dear_hours_of_a_day():
    dear = Decimal("0.27") * 1_000_000 + Decimal("1.10") * 1_000_000
    assert NONE.bound("deepseek-chat", 1_000_000, 1_000_000) == dear * 1000


def test_the_bound_reckons_with_a_cache_that_is_written():
    assert NONE.bound("claude-haiku-4-5", 1000, 0) > NONE.cost("claude-haiku-4-5", Usage(1000, 0))


def test_the_operators_list_wins():
    prices = Prices({"gpt-5-mini": (Decimal(7), Decimal(9)), "local:x": (Decimal(1), Decimal(1))})
    assert prices.cost("gpt-5-mini", Usage(1_000_000, 0)) == 7 * 10**9
    assert prices.bound("local:x", 1_000_000, 0) == 10**9


@pytest.mark.parametrize("model", ["local:x", "local:/a/b.gguf", "scripted:x.yaml"])
def test_models_of_this_machine_cost_nothing(model: str):
    assert NONE.bound(model, 10**9, 10**9) == NONE.cost(model, Usage(10**9, 10**9)) == 0


@pytest.mark.parametrize(
    "model",
    [
        "",
        "no-such-model-7",
        "localx",
        "whisper-1",  # listed, but by the minute of sound
        "gemini-embedding-001",  # listed, but without a price for output
    ],
)
def test_a_model_without_a_price_is_refused_with_the_remedy(model: str):
    with pytest.raises(PriceUnknown, match=r"add --price .*=IN,OUT"):
        NONE.bound(model, 1, 1)
    with pytest.raises(PriceUnknown):
        NONE.cost(model, Usage(1, 1))


@pytest.mark.parametrize("price", [Decimal(-1), Decimal("nan"), Decimal("inf")])
def test_a_price_below_zero_would_be_money_for_the_guest(price: Decimal):
    with pytest.raises(RequestError, match="the price of m"):
        Prices({"m": (Decimal(1), price)})
