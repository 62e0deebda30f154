"""Quantities as people write them in policies, as exact integers: bytes, milliseconds, millicores, nano-USD."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import cast

NANO = 10**9
MOST = 2**62  # of any quantity: sums of two still fit the database's integers

_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_TIMES = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
_CORES = {"core": 1000, "cores": 1000}
_MONEY = {"USD": NANO}
_MONEY_TEXT = re.compile(r"(?:0|[1-9][0-9]{0,12})\.[0-9]{2,9}", re.ASCII)
_QUANTITY = re.compile(r"^\s*(\d{1,19}(?:\.\d{1,9})?)\s*([A-Za-z]+)\s*$", re.ASCII)


def _parse(text: object, units: Mapping[str, int], example: str) -> int:
    match = _QUANTITY.match(text) if isinstance(text, str) else None
    if not match or match[2] not in units:
        raise ValueError(f"needs a number and a unit out of {', '.join(units)}, such as {example!r}")
    exact = Decimal(match[1]) * units[match[2]]
    if exact != int(exact):
        raise ValueError(f"is finer than this quantity can be; write something such as {example!r}")
    if exact > MOST:
        raise ValueError(f"is more than this quantity can be; write something such as {example!r}")
    return int(exact)


def shortest(text: str) -> str:
    """An exact quantity of bytes or milliseconds in the largest unit that has no fraction: '900000 ms' -> '15 min'."""
    match = _QUANTITY.match(text)
    units = next((units for units in (_SIZES, _TIMES) if match and match[2] in units), None)
    if not match or not units or not match[1].isdecimal() or not int(match[1]):
        return text
    amount = int(match[1]) * units[match[2]]
    unit = max((unit for unit in units if amount % units[unit] == 0), key=units.__getitem__)
    return f"{amount // units[unit]} {unit}"


def parse_bytes(text: object) -> int:
    """'512 MiB' -> bytes. Raises ValueError."""
    return _parse(text, _SIZES, "512 MiB")


def parse_ms(text: object) -> int:
    """'90 s' -> milliseconds. Raises ValueError."""
    return _parse(text, _TIMES, "90 s")


def parse_millicores(text: object) -> int:
    """'1.5 cores' -> thousandths of a core. Raises ValueError."""
    return _parse(text, _CORES, "1 core")


def cores(amount: int) -> str:
    """Thousandths of a core as exact text: 1500 -> '1.5 cores'."""
    return f"{Decimal(amount) / 1000:f} cores"


def parse_usd(text: object) -> int:
    """'0.25 USD' -> nano-USD. Raises ValueError."""
    return _parse(text, _MONEY, "0.25 USD")


MOST_PRICE = 1_000_000  # USD per million tokens


def parse_price(text: str) -> tuple[str, tuple[Decimal, Decimal]]:
    """'MODEL=IN,OUT' -> (model, (input, output)) in USD per million tokens. Raises ValueError."""
    model, _, prices = text.rpartition("=")
    try:
        if model:
            return model, price_pair([part.strip() for part in prices.split(",")])
    except ValueError:
        pass
    raise ValueError(f"takes MODEL=IN,OUT in USD per million tokens, such as mine=0.5,1.5; not {text!r}")


def price_pair(pair: object) -> tuple[Decimal, Decimal]:
    """(input, output) in USD per million tokens, as numbers or as text. Raises ValueError."""
    try:
        per_input, per_output = (Decimal(str(part)) for part in cast("Iterable[object]", pair))
        if all(part.is_finite() and 0 <= part <= MOST_PRICE for part in (per_input, per_output)):
            return per_input, per_output
    except (TypeError, ValueError, InvalidOperation):
        pass
    raise ValueError(f"{pair!r} is not a pair of USD per million tokens, in and out, such as (0.5, 1.5)")


def nano(amount: Decimal) -> int:
    """USD as nano-USD, rounded up: what is charged is never below the price."""
    return int((amount * NANO).to_integral_value(ROUND_CEILING))


def usd(amount: int) -> str:
    """nano-USD as exact text in USD with at least two decimals: 1500000000 -> '1.50'."""
    sign, amount = ("-", -amount) if amount < 0 else ("", amount)
    whole, rest = divmod(amount, NANO)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"


def read_usd(text: object) -> int:
    """What `usd` writes, as nano-USD. Raises ValueError."""
    if not isinstance(text, str) or not _MONEY_TEXT.fullmatch(text):
        raise ValueError(f"{str(text)[:40]!r} is no amount of money")
    whole, rest = text.split(".")
    return int(whole) * NANO + int(rest.ljust(9, "0"))
