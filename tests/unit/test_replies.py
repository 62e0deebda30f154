"""What a server sent is a reply, or an unknown outcome, whatever it was; and a stream has an end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import OutcomeUnknown
from orchestrator.lm import replies
from orchestrator.lm.base import Reply, Usage
from tests.unit.helpers import quick

CAP = 8
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def event(content: Any = None, finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


END = event(finish="stop")
COUNTED = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\ndata: [DONE]\n\n"


def fed(pieces: Iterable[bytes], cap: int = CAP) -> replies.Stream:
    stream = replies.Stream(cap)
    for piece in pieces:
        stream.feed(piece)
        if stream.over or stream.done:
            break
    return stream


def reply(*pieces: bytes, cap: int = CAP) -> Reply:
    return fed(pieces, cap).reply()


@quick
@given(st.lists(st.integers(0, 400)), st.sampled_from([b"\n", b"\r\n"]))
def test_how_the_bytes_are_cut_does_not_matter(cuts: list[int], newline: bytes):
    said = b": hello\n\nevent: x\n" + event("4") + b"data:" + event("\u00e4\U0001f600")[6:] + END + COUNTED
    said = said.replace(b"\n", newline)
    edges = [0, *sorted(cut for cut in cuts if cut < len(said)), len(said)]
    assert reply(*(said[a:b] for a, b in itertools.pairwise(edges))) == Reply("4\u00e4\U0001f600", "stop", Usage(3, 2))


def test_data_of_several_lines_is_one_event():
    assert reply(b'data: {"choices":\ndata: [{"delta": {"content": "42"}, "finish_reason": "stop"}]}\n\n').text == "42"


def test_halves_of_a_character_that_meet_are_one():
    assert reply(event("a\ud83d"), event("\ude00b"), END).text == "a\U0001f600b"
    assert reply(event("a\ud83d"), event("b"), END).text == "a?b"


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b": waiting\n\n",),
        (event("42"),),
        (b"data: [DONE]\n\n",),  # of nothing at all
        (event("42", "stop")[:-1],),  # an event that did not end
        (b"data: {nonsense\n\n",),
        (b"data: " + b"[" * 100_000 + b"\n\n",),
        (b"data: []\n\n",),
        (event(42), END),
        (event(["4"]), END),
    ],
)
def test_what_is_no_whole_answer_may_have_been_billed(pieces: tuple[bytes, ...]):
    with pytest.raises(OutcomeUnknown):
        reply(*pieces)


def test_an_end_without_a_reason_is_one():
    assert reply(event("42"), b"data: [DONE]\n\n") == Reply("42", "stop", None)


def test_of_several_reports_the_last_one_counts():
    early = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\n'
    none = b'data: {"choices": [], "usage": null}\n\n'
    assert reply(early, event("42", "stop"), none, COUNTED).usage == Usage(3, 2)


ENDLESS = {
    "content": event("word "),
    "letters": event("w"),
    "reasoning": event(reasoning_content="hm "),
    "reasoning, by its other name": event(reasoning="hm "),
}


@pytest.mark.parametrize("piece", ENDLESS.values(), ids=ENDLESS)
def test_a_stream_without_end_ends_in_a_reply(piece: bytes):
    said = fed(itertools.repeat(piece, 100_000))
    assert said.over
    found = said.reply()
    assert (found.finish_reason, found.usage) == ("length", None)
    assert len(found.text) <= CAP * replies.BYTES_A_TOKEN


@pytest.mark.parametrize("piece", [b": still here\n\n", event(), event(""), b"data: {}\n\n", b"x: y\n", b"x" * 4096])
def test_a_stream_of_nothing_without_end_is_given_up(piece: bytes):
    with pytest.raises(OutcomeUnknown, match="without end"):
        fed(itertools.repeat(piece, 100_000)).reply()


def test_the_tail_after_the_end_is_bounded_too():
    assert fed(itertools.chain([event("42", "stop")], itertools.repeat(b": bye\n\n", 100_000))).over


def test_all_at_once_is_held_to_the_same_length():
    huge = "x" * (CAP * replies.BYTES_A_TOKEN + 1)
    assert reply(event(huge), END) == replies.whole(body(huge, USAGE), CAP) == Reply(huge[:-1], "length", None)


def tokens(cap: int) -> Iterator[bytes]:
    """The most that an honest server sends: the longest tokens there are, spelt out in eight, or one a character."""
    for number in range(cap):
        text = " " * 128 if number % 2 else "abcdefgh"
        yield from (event(part) for part in ([text[i : i + 16] for i in range(0, len(text), 16)] or [text]))
        yield from (event(letter) for letter in "word")


@pytest.mark.parametrize("cap", [1, 64, 4096])
def test_an_honest_stream_is_not_cut(cap: int):
    said = fed(itertools.chain(tokens(cap), [event(finish="length"), COUNTED]), cap)
    assert (said.over, said.done) == (False, True)
    assert said.reply().finish_reason == "length"


def body(text: str, usage: Any, **message: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


LIES = {
    "nothing": None,
    "no object": 5,
    "a list": [3, 2],
    "a word": "many",
    "empty": {},
    "half of it": {"prompt_tokens": 3},
    "null": {"prompt_tokens": None, "completion_tokens": 2},
    "text": {"prompt_tokens": "3", "completion_tokens": 2},
    "a fraction": {"prompt_tokens": 3.0, "completion_tokens": 2},
    "a truth": {"prompt_tokens": True, "completion_tokens": True},
    "below zero": {"prompt_tokens": -3, "completion_tokens": 2},
    "written below zero": {"prompt_tokens": 3, "completion_tokens": -2},
    "absurd": {"prompt_tokens": 10**12, "completion_tokens": 2},
    "more absurd": {"prompt_tokens": 3, "completion_tokens": 10**30},
    "nothing read": {"prompt_tokens": 0, "completion_tokens": 2},
    "nothing written": {"prompt_tokens": 3, "completion_tokens": 0},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_usage_that_cannot_be_is_none(lie: Any):
    told = b"data: " + json.dumps({"choices": [], "usage": lie}).encode() + b"\n\n"
    assert replies.whole(body("42", lie), CAP) == Reply("42", "stop", None)
    assert reply(event("42", "stop"), told) == Reply("42", "stop", None)


def test_less_than_such_a_text_takes_is_none():
    least = 3 * replies.BYTES_A_TOKEN
    usages = [replies.whole(body("x" * size, USAGE), CAP).usage for size in (least - 256, least - 255)]
    assert usages == [Usage(3, 2), None]


def test_thoughts_are_output_too():
    unspoken = {"prompt_tokens": 3, "completion_tokens": 0}
    assert replies.whole(body("", unspoken), CAP).usage == Usage(3, 0)
    assert replies.whole(body("", unspoken, reasoning_content="hm"), CAP).usage is None
    assert replies.whole(body("", unspoken, reasoning="hm"), CAP).usage is None


def test_more_than_the_bound_is_passed_on():
    assert replies.whole(body("42", {"prompt_tokens": 10**9, "completion_tokens": 10**9}), CAP).usage == Usage(
        10**9, 10**9
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "delta", "content", "reasoning", "usage", "finish_reason", "error", "message"]),
            inner,
        )
    ),
    max_leaves=12,
)


@quick
@given(st.lists(values | st.fixed_dictionaries({"choices": st.lists(values, max_size=2)}), max_size=4))
def test_any_events_are_a_reply_or_an_unknown_outcome(bodies: list[Any]):
    try:
        found = reply(*(b"data: " + json.dumps(said).encode() + b"\n\n" for said in bodies))
    except OutcomeUnknown:
        return
    found.text.encode()
    assert isinstance(found.finish_reason, str)
