"""Quantities: exact in, exact out, and whatever has no clear unit refused."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.units import (
    NANO,
    cores,
    nano,
    parse_bytes,
    parse_millicores,
    parse_ms,
    parse_price,
    parse_usd,
    usd,
)
from tests.unit.helpers import quick


@quick
@given(st.integers(0, 2**62))
def test_money_survives_being_written(amount: int):
    assert parse_usd(f"{usd(amount)} USD") == amount


@quick
@given(st.integers(0, 10**15))
def test_processors_survive_being_written(amount: int):
    assert parse_millicores(cores(amount)) == amount


@quick
@given(st.decimals(0, 10**6, allow_nan=False, places=14))
def test_money_is_rounded_up_to_the_next_nano(amount: Decimal):
    assert 0 <= nano(amount) - amount * NANO < 1


@pytest.mark.parametrize(
    ("text", "amount"),
    [("512 MiB", 512 << 20), ("1.5KiB", 1536), (" 3 GB ", 3 * 10**9), ("0 B", 0), ("0.5 kB", 500), ("7 MB", 7_000_000)],
)
def test_sizes(text: str, amount: int):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(("text", "amount"), [("90 s", 90_000), ("1.5 min", 90_000), ("2 h", 7_200_000), ("3 ms", 3)])
def test_times(text: str, amount: int):
    assert parse_ms(text) == amount


@pytest.mark.parametrize(("amount", "text"), [(0, "0.00"), (1, "0.000000001"), (NANO, "1.00"), (-NANO // 2, "-0.50")])
def test_money_in_words(amount: int, text: str):
    assert usd(amount) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "MiB",
        "5 mib",
        "5 Mb",
        "-5 MiB",
        "+5 MiB",
        "1e3 B",
        "5 MiB!",
        "5 MiB 3",
        "\u0665 MiB",
        "0x5 B",
        "5,5 B",
        "1 s",
    ],
)
def test_what_is_not_a_size_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match="such as '512 MiB'"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [None, 5, 5.0, True, ["5 B"], {"B": 5}])
def test_a_number_without_a_unit_is_refused(value: object):
    with pytest.raises(ValueError, match="needs a number and a unit"):
        parse_bytes(value)


@pytest.mark.parametrize("parse", [parse_bytes, parse_ms, parse_millicores])
def test_what_is_finer_than_the_quantity_is_refused(parse: object):
    unit = {parse_bytes: "B", parse_ms: "ms", parse_millicores: "core"}[parse]  # pyright: ignore
    with pytest.raises(ValueError, match="finer"):
        parse(f"1.0001 {unit}")  # pyright: ignore


def test_what_no_database_can_hold_is_refused():
    with pytest.raises(ValueError, match="more than this quantity can be"):
        parse_usd("999999999999 USD")


def test_a_price_takes_model_input_and_output():
    assert parse_price("a=b:c=0.5, 1.5") == ("a=b:c", (Decimal("0.5"), Decimal("1.5")))


@pytest.mark.parametrize("text", ["", "m", "m=", "=1,2", "m=1", "m=1,2,3", "m=1,x", "m=-1,2", "m=nan,1", "m=1,inf"])
def test_what_is_not_a_price_is_refused(text: str):
    with pytest.raises(ValueError, match="MODEL=IN,OUT"):
        parse_price(text)
