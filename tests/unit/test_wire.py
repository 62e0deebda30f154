"""Frames: whatever a line holds, decoding it gives a frame as agreed or Malformed, and nothing else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.guest import wire
from orchestrator.guest.wire import TO_GUEST, TO_HOST, TO_SUPERVISOR, Malformed, decode, encode
from tests.unit.helpers import quick

DONE = {"type": "done", "cell": 1, "status": "ok", "detail": "", "answer": None, "names": ["x"], "dropped": 0}
CALL = {"type": "call", "id": 1, "op": "llm_query", "prompt": "é", "model": None, "context": None}
FRAMES = [
    (TO_HOST, {"type": "ready", "version": 1, "python": "3.11"}),
    (TO_HOST, {"type": "output", "cell": 1, "stream": "out", "text": "a\n\0€😀"}),
    (TO_HOST, DONE),
    (TO_HOST, CALL),
    (TO_SUPERVISOR, CALL),
    (TO_SUPERVISOR, {"type": "end", "status": "ok", "detail": "", "answer": "a", "names": []}),
    (TO_SUPERVISOR, {"type": "snapshot"}),
    (TO_GUEST, {"type": "hello", "version": 1, "limits": {"pids": 1}}),
    (TO_GUEST, {"type": "run", "id": 1, "code": "x", "timeout_s": 0.5, "context": False}),
    (TO_GUEST, {"type": "reply", "id": 1, "ok": True, "value": {"a": [1]}, "error": None}),
    (TO_GUEST, {"type": "interrupt"}),
    (TO_GUEST, {"type": "bye"}),
]


def malformed(line: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        decode(line, TO_HOST)
    return str(caught.value)


@pytest.mark.parametrize(("table", "frame"), FRAMES)
def test_what_is_encoded_is_decoded(table: wire.Table, frame: wire.Frame):
    line = encode(frame)
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert decode(line[:-1], table) == frame


def test_no_frame_of_one_direction_passes_in_another():
    for _, frame in FRAMES:
        for other in (TO_HOST, TO_GUEST, TO_SUPERVISOR):
            if frame["type"] not in other:
                with pytest.raises(Malformed, match="unknown type"):
                    decode(encode(frame)[:-1], other)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def sound(frame: Any, table: wire.Table) -> None:
    """A frame that came through is exactly what the table says, and text that every encoder takes."""
    fields = table[frame["type"]]
    assert frame.keys() == {"type", *fields}
    for name, types in fields.items():
        assert type(frame[name]) in types
    json.dumps(frame, ensure_ascii=False, allow_nan=False).encode()


@given(st.sampled_from([TO_HOST, TO_SUPERVISOR]), st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@example(TO_HOST, b"")
@example(TO_HOST, b"null")
@example(TO_HOST, b"\xff")
def test_lines_of_any_bytes(table: wire.Table, line: bytes):
    with contextlib.suppress(Malformed):
        sound(decode(line, table), table)


@given(
    st.sampled_from(FRAMES[:6]),
    st.dictionaries(st.sampled_from(["id", "cell", "type", "names", "x", "text", "prompt", "answer"]), values),
)
def test_frames_with_any_values(sample: tuple[wire.Table, wire.Frame], changes: dict[str, Any]):
    table, frame = sample
    with contextlib.suppress(Malformed):
        sound(decode(json.dumps(frame | changes).encode(), table), table)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"type":"ready","version":1,"python":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        json.dumps(CALL).encode().replace(b'"id": 1', b'"id": ' + b"9" * 100_000),
        json.dumps(CALL | {"id": 2**53 + 1}).encode(),
        json.dumps(CALL | {"id": -1}).encode(),
        json.dumps(CALL | {"id": True}).encode(),
        json.dumps(CALL | {"id": 1.0}).encode(),
        json.dumps(CALL | {"id": "1"}).encode(),
        json.dumps(CALL | {"id": None}).encode(),
        json.dumps(CALL | {"prompt": "\ud800"}).encode(),
        json.dumps(CALL | {"prompt": ["x"]}).encode(),
        json.dumps(CALL | {"more": 1}).encode(),
        json.dumps({key: CALL[key] for key in CALL if key != "model"}).encode(),
        json.dumps(CALL | {"type": "interrupt"}).encode(),
        json.dumps(CALL | {"type": ["call"]}).encode(),
        json.dumps(DONE | {"names": ["\udfff"]}).encode(),
        json.dumps(DONE | {"names": ["x" * 257]}).encode(),
        json.dumps(DONE | {"names": [1]}).encode(),
        json.dumps(DONE | {"names": [["x"]]}).encode(),
        json.dumps(DONE | {"dropped": float("nan")}).encode(),
        json.dumps(DONE | {"dropped": float("inf")}).encode(),
        json.dumps(DONE | {"dropped": 1e400}).encode(),
        json.dumps([CALL]).encode(),
        json.dumps(CALL).encode() * 2,
        json.dumps(CALL, ensure_ascii=False).encode(),
        json.dumps(CALL).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(CALL).encode(),
        b" " * (wire.MAX_LINE + 1),
    ],
    ids=lambda line: repr(line[:60]),
)
def test_hostile_lines(line: bytes):
    assert len(malformed(line)) < 100


@pytest.mark.parametrize(
    "junk",
    [
        b"[" + b"[]," * 100_000 + b"0]",
        b"[" * 100_000 + b"]" * 100_000,
        b"{}" + b" " * 10_000,
        b"1" * 10_000,
        b"[" + b'"",' * 10_000 + b'""]',
        rb'["\\",' * 5000 + b'""]',
        rb'["\"",' * 5000 + b'""]',
    ],
)
def test_what_would_be_slow_to_parse_is_not_parsed(junk: bytes):
    """A key may be given twice, so what is checked need not be what is parsed."""
    line = b'{"type":"call","id":1,"op":"budget","model":null,"context":null,"prompt":%s,"prompt":"x"}' % junk
    with pytest.raises(wire.Malformed, match="more than a frame holds"):
        wire.decode(line, TO_HOST)


@quick
@given(st.text(st.sampled_from('\\"[]{},:a\u20ac'), max_size=5000))
def test_any_text_fits_in_a_frame(text: str):
    frame = {"type": "call", "id": 1, "op": "llm_query", "prompt": text, "model": None, "context": None}
    assert wire.decode(wire.encode(dict(frame))[:-1], TO_HOST) == frame


def test_of_a_key_given_twice_the_last_counts_and_is_checked():
    line = json.dumps(CALL).encode()[:-1]
    assert decode(line + b', "id": 2}', TO_HOST)["id"] == 2
    malformed(line + b', "id": "2"}')
    malformed(line + b', "type": "no such"}')


def test_an_error_never_repeats_what_was_sent():
    assert "secret" not in malformed(json.dumps(CALL | {"secret": 1}).encode())
    assert "secret" not in malformed(json.dumps(CALL | {"type": "secret"}).encode())


def test_a_frame_larger_than_a_line_is_not_encoded():
    encode(CALL | {"prompt": "x" * (wire.MAX_LINE - 200)})
    with pytest.raises(ValueError, match="larger than"):
        encode(CALL | {"prompt": "x" * wire.MAX_LINE})
    with pytest.raises(ValueError, match="JSON"):
        encode(CALL | {"id": float("nan")})
