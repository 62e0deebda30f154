"""What a call can cost at most, and what it did cost. Exact decimals in, nano-USD out, always rounded up.

Prices come from the operator's own list and, for models it does not name, from the library genai-prices (pinned by the
lock file; its updater is never called). A model without a price is refused: what cannot be bounded is not sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from orchestrator.core.errors import PriceUnknown
from orchestrator.core.units import nano
from orchestrator.lm.base import Usage

FREE = ("local:", "scripted:")  # run on this machine; cost nothing unless the operator prices them
_MILLION = Decimal(1_000_000)


class Prices:
    """own: model -> (input, output) in USD per million tokens; wins over the library."""

    def __init__(self, own: Mapping[str, tuple[Decimal, Decimal]]) -> None:
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

    def price(**extra: int) -> Decimal:
        usage = genai_prices.Usage(input_tokens=input_tokens, output_tokens=output_tokens, **extra)
        return Decimal(genai_prices.calc_price(usage, model_ref=model).total_price)

    try:
        plain = price()
    except LookupError:
        raise PriceUnknown(
            f"the price of model {model!r} is not known, so its cost cannot be bounded: "
            f"add --price {model}=IN,OUT (USD per million tokens), or to [prices] in airlock.toml"
        ) from None
    # Writing the provider's prompt cache can cost more than plain input; it is the provider that decides to.
    return max(plain, price(cache_write_tokens=input_tokens)) if worst else plain
