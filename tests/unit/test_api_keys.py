"""API keys as texts: what was made is read again, and nothing else is."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.api_keys import EVERYDAY, RANDOM_BYTES, SCOPES, in_order, is_key_id, make_key, parse_key
from orchestrator.core.redact import Redactor
from tests.unit.helpers import quick

KEY = make_key(bytes(range(RANDOM_BYTES)))


def test_what_a_key_looks_like():
    assert KEY.text == "al_aaaqeayeauda_" + KEY.secret + KEY.text[-6:]
    assert (len(KEY.id), len(KEY.secret), len(KEY.text)) == (12, 43, 65)
    assert KEY.secret not in repr(KEY)


@given(st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES))
def test_what_was_made_is_read_again(random: bytes):
    key = make_key(random)
    assert parse_key(key.text) == key
    assert is_key_id(key.id)
    # 60 of the id's bits and all of the secret's are in it.
    assert make_key(bytes([random[0] ^ 1]) + random[1:]).id != key.id
    assert make_key(random[:-1] + bytes([random[-1] ^ 1])).secret != key.secret


def test_the_largest_secret_fits():
    assert parse_key(make_key(b"\xff" * RANDOM_BYTES).text) is not None


@given(st.integers(0, len(KEY.text) - 1), st.characters(codec="utf-8"))
def test_a_key_with_a_slip_in_it_is_none(at: int, other: str):
    slipped = KEY.text[:at] + other + KEY.text[at + 1 :]
    assert parse_key(slipped) is None or slipped == KEY.text


@quick
@given(st.text())
def test_no_other_text_is_one(text: str):
    assert parse_key(text) is None
    assert parse_key(text + KEY.text) is None or text == ""
    assert parse_key(KEY.text + text) is None or text == ""


@pytest.mark.parametrize(
    "text",
    [
        *("", "al_", "al__", KEY.text + "\n", KEY.text.upper(), KEY.text[:-1], KEY.text + "\0", "\ud800" + KEY.text),
        *("al_" + "a" * 10**6, KEY.text.replace("a", "\u0430", 1), KEY.text * 2, f" {KEY.text}"),
    ],
)
def test_hostile_texts(text: str):
    assert parse_key(text) is None


@pytest.mark.parametrize("text", ["", "a" * 11, "a" * 13, "A" * 12, "a" * 11 + "1", "a" * 12 + "\n", "é" * 12])
def test_what_is_no_id(text: str):
    assert not is_key_id(text)


def test_a_key_takes_all_of_its_randomness():
    for count in (0, RANDOM_BYTES - 1, RANDOM_BYTES + 1):
        with pytest.raises(ValueError, match="random bytes"):
            make_key(bytes(count))


def test_every_key_is_taken_out_of_texts():
    """Also of those that do not look random: one in five thousand has too few digits for that."""
    redact = Redactor([]).redact
    plain = make_key(bytes(RANDOM_BYTES))  # all zeros, and so are the digits
    for key in (plain, *(make_key(secrets.token_bytes(RANDOM_BYTES)) for _ in range(500))):
        assert redact(f'{{"key":"{key.text}"}}') == ('{"key":"[redacted: Airlock key]"}', 1)


def test_scopes_have_one_order():
    assert in_order(["admin", "read", "query", "read"]) == ("query", "read", "admin")
    assert in_order(SCOPES) == tuple(SCOPES)
    assert in_order(EVERYDAY) == EVERYDAY


@pytest.mark.parametrize("scopes", [[], ["root"], ["read", "Read"], ["read\n"], ["\0"]])
def test_what_is_no_scope(scopes: list[str]):
    with pytest.raises(ValueError, match=r"take some of query, read, audit, metrics, admin$"):
        in_order(scopes)
