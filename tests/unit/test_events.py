"""Records and their chain: one canonical form, and what was changed shows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.events import GENESIS, Event, Sealed, canonical, chain_fault, commitment, seal
from orchestrator.core.merkle import leaf_hash
from tests.unit.helpers import quick

Chain = list[tuple[bytes, str]]
bodies = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


def sealed(body: Any, seq: int = 0, prev: str = GENESIS, kind: Any = "cell.ended") -> Sealed:
    return seal(Event(kind, "root", body), query="q", tenant="t", policy="p", seq=seq, at="now", prev=prev, payloads={})


def chain(length: int, *, closed: bool = True) -> Chain:
    links: Chain = []
    prev = GENESIS
    for seq in range(length):
        last = closed and seq == length - 1
        kind, body = ("query.closed", {"records": length}) if last else ("cell.ended", {"cell": seq})
        link = sealed(body, seq, prev, kind)
        prev = link.hash
        links.append((link.record, link.hash))
    return links


@quick
@given(bodies)
def test_a_record_is_canonical_json(body: Any):
    record = sealed({"body": body}).record
    assert json.loads(record)["body"] == {"body": body}
    assert record == sealed({"body": body}).record


def test_the_order_of_keys_does_not_matter():
    assert sealed({"a": 1, "b": 2}) == sealed({"b": 2, "a": 1})


def test_the_form_does_not_move():
    # Every journal that was ever written depends on these bytes.
    assert sealed({"é": "€", "a": 1}).record == (
        b'{"at":"now","body":{"a":1,"\xc3\xa9":"\xe2\x82\xac"},"node":"root","payloads":{},"policy":"p",'
        b'"prev":"' + b"0" * 64 + b'","query":"q","seq":0,"tenant":"t","type":"cell.ended","v":1}'
    )


@pytest.mark.parametrize("value", [0.5, 1.0, float("nan"), [0.5], {"a": {"b": 0.5}}, [[1, {"a": 0.5}]], (0.5,)])
def test_floats_are_refused(value: Any):
    with pytest.raises(ValueError, match="no floats"):
        sealed({"value": value})


@pytest.mark.parametrize("value", [2**53, -(2**60)])
def test_what_canonical_json_cannot_hold_is_refused(value: Any):
    with pytest.raises(ValueError):  # noqa: PT011  the library's own words
        sealed({"value": value})


def test_half_a_surrogate_pair_is_recorded_as_a_question_mark():
    assert json.loads(sealed({"value": "a\ud800b"}).record)["body"] == {"value": "a?b"}


def test_a_commitment_depends_on_salt_and_payload():
    assert commitment(b"salt", b"text") == hashlib.sha256(b"salttext").hexdigest()
    assert len({commitment(b"a", b"b"), commitment(b"b", b"b"), commitment(b"a", b"c")}) == 3


@quick
@given(st.integers(0, 6), st.booleans())
def test_a_whole_chain_has_no_fault(length: int, closed: bool):
    assert chain_fault(chain(length, closed=closed)) is None


@quick
@given(st.integers(0, 4), st.data())
def test_a_flipped_bit_shows(number: int, data: st.DataObject):
    links = chain(5)
    record, digest = links[number]
    bit = data.draw(st.integers(0, len(record) * 8 - 1))
    flipped = bytearray(record)
    flipped[bit // 8] ^= 1 << bit % 8
    links[number] = (bytes(flipped), digest)
    assert chain_fault(links) == f"record {number} does not match its hash"


@pytest.mark.parametrize("number", range(4))
def test_a_removed_record_shows(number: int):
    links = chain(5)
    del links[number]
    assert chain_fault(links) == f"record {number} does not follow the one before it"


@pytest.mark.parametrize("number", range(4))
def test_swapped_records_show(number: int):
    links = chain(5)
    links[number : number + 2] = reversed(links[number : number + 2])
    assert chain_fault(links) == f"record {number} does not follow the one before it"


def test_records_cut_off_before_the_closing_one_show():
    links = chain(5)
    last = sealed({"records": 5}, 3, links[2][1], "query.closed")
    assert (
        chain_fault([*links[:3], (last.record, last.hash)]) == "the closing record does not match the number of records"
    )


def test_a_record_after_the_closing_one_shows():
    links = chain(5)
    more = sealed({}, 5, links[-1][1])
    assert "closing record" in str(chain_fault([*links, (more.record, more.hash)]))


@quick
@given(st.integers(0, 5))
def test_a_tail_that_was_cut_off_does_not_show_in_the_chain_alone(length: int):
    # An honest limit: such a chain looks like that of a query which is still open. Whoever knows its head can tell.
    links = chain(5)
    assert chain_fault(links[:length]) is None


@quick
@given(st.one_of(st.binary(), bodies.map(lambda body: json.dumps(body).encode())))
def test_bytes_that_are_no_record_are_told_and_not_tripped_over(record: bytes):
    assert chain_fault([(record, leaf_hash(record).hex())]) == "record 0 is not a record"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcXYZ_.0"), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text("abcXYZ_.0"), plain))
def test_canonical_is_what_the_rfc_asks_for(fields: dict[str, object]):
    assert canonical(fields) == rfc8785.dumps(fields)  # pyright: ignore[reportArgumentType]
