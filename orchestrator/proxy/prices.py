"""What a call can cost at most, and what it did cost. Exact decimals in, nano-USD out, always rounded up.

Prices come from the operator's own list and, for models it does not name, from the library genai-prices (pinned by the
lock file; its updater is never called). A model without a price is refused: what cannot be bounded is not sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

from orchestrator.core.errors import PriceUnknown, RequestError
from orchestrator.core.units import nano
from orchestrator.lm.base import Usage

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

FREE = ("local:", "scripted:")  # run on this machine; cost nothing unless the operator prices them
_MILLION = Decimal(1_000_000)
# They search as often as they like, each time for a fee, and have no parameter that would stop them.
_SEARCHERS = re.compile(r"sonar|-search|deep-research|-online")
# Never what is sent: other media; and a cache entry for an hour has to be asked for, where one for minutes has not.
_NOT_TEXT = re.compile(r"audio|image|video|_1h")


class Prices:
    """own: model -> (input, output) in USD per million tokens; wins over the library. Raises RequestError."""

    def __init__(self, own: Mapping[str, tuple[Decimal, Decimal]]) -> None:
        for model, pair in own.items():
            if not all(part.is_finite() and part >= 0 for part in pair):
                raise RequestError(f"the price of {model} is a pair of USD per million tokens, neither below zero")
        self._own = own

    def bound(self, model: str, input_tokens: int, output_tokens: int) -> int:
        """The most that such a call can cost. Raises PriceUnknown."""
        return self._price(model, input_tokens, output_tokens, worst=True)

    def cost(self, model: str, usage: Usage) -> int:
        """The price of what was used. Raises PriceUnknown."""
        return self._price(model, usage.input_tokens, usage.output_tokens, worst=False)

    def _price(self, model: str, input_tokens: int, output_tokens: int, *, worst: bool) -> int:
        if model in self._own:
            per_input, per_output = self._own[model]
            return nano((per_input * input_tokens + per_output * output_tokens) / _MILLION)
        if model.startswith(FREE):
            return 0
        return nano(_listed(model, input_tokens, output_tokens, worst=worst))


def _listed(model: str, input_tokens: int, output_tokens: int, *, worst: bool) -> Decimal:
    import genai_prices  # not needed where the operator's list or a free model is used

    used = genai_prices.Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    try:
        found = genai_prices.calc_price(used, model_ref=model)
    except LookupError:
        raise _unknown(model) from None
    rates = _rates_of_a_day(found.model) if worst else [found.model_price]
    # A rate that is not listed would count as nothing: what the library knows by the hour or page cannot be bounded.
    if any(getattr(rate, unit, None) is None for rate in rates for unit in ("input_mtok", "output_mtok")):
        raise _unknown(model)
    if _SEARCHERS.search(model) and any(getattr(rate, "requests_kcount", None) is None for rate in rates):
        raise _unknown(model)
    return max(_worst(rate, input_tokens, output_tokens) for rate in rates) if worst else Decimal(found.total_price)


def _worst(rate: ModelPrice, input_tokens: int, output_tokens: int) -> Decimal:
    """With every token at the dearest rate that one of its kind can have.

    It is the provider that decides what is read from its cache or written to it, and what of the output is reasoning
    or, of a model that can, speech or pictures.
    """
    listed = {name: price for name, price in vars(rate).items() if price is not None}
    read = [
        price
        for name, price in listed.items()
        if name.startswith(("input_", "cache_")) and name.endswith("_mtok") and not _NOT_TEXT.search(name)
    ]
    written = [price for name, price in listed.items() if name.startswith("output_") and name.endswith("_mtok")]
    fee = listed.get("requests_kcount", Decimal(0))
    tokens = _dearest(read, input_tokens) * input_tokens + _dearest(written, input_tokens) * output_tokens
    return tokens / _MILLION + _dearest([fee], input_tokens) / 1000


def _dearest(prices: Iterable[Decimal | TieredPrices], input_tokens: int) -> Decimal:
    """Of all tiers that up to so many tokens can reach: the highest need not be the dearest."""
    rates: list[Decimal] = []
    for price in prices:
        if isinstance(price, Decimal):
            rates.append(price)
        else:
            rates += [price.base, *(tier.price for tier in price.tiers if tier.start < input_tokens)]
    return max(rates)


def _rates_of_a_day(model: ModelInfo) -> list[ModelPrice]:
    """The rates that can be in force when a request that is sent now has ended: some change by the hour."""
    now = datetime.now(UTC)
    rates = [model.get_prices(now + timedelta(hours=hours)) for hours in range(25)]
    return list({id(rate): rate for rate in rates}.values())


def _unknown(model: str) -> PriceUnknown:
    return PriceUnknown(
        f"the price of model {model!r} is not known, so its cost cannot be bounded: "
        f"add --price {model}=IN,OUT (USD per million tokens), or to [prices] in airlock.toml"
    )
