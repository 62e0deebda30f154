"""What a call can cost at most is never less than what it did cost, and never nothing for want of a price."""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal
from typing import Any

import genai_prices
import pytest
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelPrice, Tier, TieredPrices
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import PriceUnknown, RequestError
from orchestrator.core.units import nano
from orchestrator.lm.base import Usage
from orchestrator.proxy.prices import Prices, _worst
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


def known() -> list[str]:
    """Every model that the library can price, and that we can bound."""
    names = {model.id for provider in get_snapshot().providers for model in provider.models}
    found: list[str] = []
    for name in sorted(names):
        with suppress(PriceUnknown):
            NONE.bound(name, 1, 1)
            found.append(name)
    return found


KNOWN = known()


@settings(quick, max_examples=300)
@given(st.sampled_from(KNOWN), tokens, tokens, st.data())
def test_however_the_provider_splits_what_was_used(model: str, most_in: int, most_out: int, data: st.DataObject):
    """Into what was cached before or is now, and into what was thought and what was said."""
    read, written = data.draw(st.integers(0, most_in)), data.draw(st.integers(0, most_out))
    from_cache = data.draw(st.integers(0, read))
    split: dict[str, int] = {"cache_read_tokens": from_cache}
    split["cache_write_tokens"] = data.draw(st.integers(0, read - from_cache))
    split["output_reasoning_tokens"] = data.draw(st.integers(0, written))
    usage = genai_prices.Usage(input_tokens=read, output_tokens=written, **split)
    price = genai_prices.calc_price(usage, model_ref=model).total_price
    assert nano(price) <= NONE.bound(model, most_in, most_out)


def test_that_these_are_many():
    assert len(KNOWN) > 300


PLAIN = {"input_mtok": Decimal(2), "output_mtok": Decimal(10)}


@pytest.mark.parametrize(
    ("rates", "worst"),
    [
        ({}, 12),
        ({"output_reasoning_mtok": Decimal(30)}, 32),
        ({"output_reasoning_mtok": Decimal(3)}, 12),
        ({"cache_write_mtok": Decimal(3)}, 13),
        ({"cache_read_mtok": Decimal(5)}, 15),
        (
            {"cache_write_1h_mtok": Decimal(9), "cache_write_mtok": Decimal(2)},
            12,
        ),  # never asked for
        ({"input_audio_mtok": Decimal(9)}, 12),
        ({"output_image_mtok": Decimal(40)}, 42),
        ({"requests_kcount": Decimal(5)}, 12 + 5),
        ({"input_mtok": TieredPrices(Decimal(2), [Tier(999, Decimal(4))])}, 14),
        ({"input_mtok": TieredPrices(Decimal(2), [Tier(1000, Decimal(4))])}, 12),  # not reached
        ({"output_mtok": TieredPrices(Decimal(10), [Tier(10, Decimal(70)), Tier(20, Decimal(1))])}, 72),
        ({"input_mtok": TieredPrices(Decimal(6), [Tier(10, Decimal(1))])}, 16),  # few tokens at the base are dearer
    ],
)
def test_the_dearest_that_a_call_could_reach(rates: dict[str, Any], worst: int):
    """Of 1,000 tokens in and out, in thousandths of a USD."""
    rate = ModelPrice(**PLAIN | rates)
    assert _worst(rate, 1000, 1000) * 1000 == worst
    assert rate.calc_price(genai_prices.Usage(input_tokens=1000, output_tokens=1000))["total_price"] * 1000 <= worst


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
        "gpt-4o-search-preview",  # they search for a fee of its own, as often as they like
        "o3-deep-research",
        "sonar-deep-research",
        "sonar",
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
