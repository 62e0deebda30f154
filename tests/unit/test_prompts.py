"""What the root LM is told, and that it always fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.lm.base import Message
from orchestrator.loop import prompts
from orchestrator.loop.prompts import LAST_WORD_BYTES, RootLimits
from tests.unit.helpers import quick

Conversation = list[Message]


def size(messages: Conversation) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def roles(messages: Conversation) -> list[str]:
    return [message["role"] for message in messages]


def talk(*contents: str) -> Conversation:
    """System, question, then replies and outputs in turn."""
    names = ["system", "user", *["assistant", "user"] * len(contents)]
    return [{"role": role, "content": text} for role, text in zip(names, contents, strict=False)]  # pyright: ignore


def opened(
    query: str = "Who?", style: str = "standard", lazy: str = "", sub_calls: int = 7, children: int = 0
) -> Conversation:
    limits = RootLimits(10_000, 100, 500, style)  # pyright: ignore
    shape = {"type": "str", "characters": "10,000,000"}
    return prompts.opening(
        query,
        shape,
        lazy,
        limits,
        iterations=9,
        sub_calls=sub_calls,
        children=children,
        in_flight=3,
        sub_prompt_bytes=99,
    )


texts = st.builds(
    lambda piece, times: piece * times,
    st.sampled_from(["a", "é", "€", "😀", "a😀\n", "\n"]),
    st.integers(0, 2000),
)
conversations = st.lists(st.tuples(texts, texts), min_size=1, max_size=6).map(lambda turns: talk(*sum(turns, ())))


@pytest.mark.parametrize("style", ["standard", "small"])
@pytest.mark.parametrize("lazy", ["", "text", "list"])
@pytest.mark.parametrize("sub_calls", [0, 7])
def test_the_opening_tells_question_and_shape(style: str, lazy: str, sub_calls: int):
    messages = opened("Who {is} it?", style, lazy, sub_calls)
    assert roles(messages) == ["system", "user"]
    assert "Who {is} it?" in messages[1]["content"]
    assert "10,000,000" in messages[1]["content"]
    assert "{shown" not in messages[0]["content"]


def test_the_opening_grows_with_the_question_alone():
    # Nothing but question, shape and limits goes in, so there is no way for the context's text to get here.
    assert size(opened("x" * 1000)) - size(opened("x")) == 999


def test_functions_that_are_not_permitted_are_not_offered():
    assert "llm_query_batched" in opened(sub_calls=7)[0]["content"]
    assert "llm_query_batched" not in opened(sub_calls=0)[0]["content"]
    assert "rlm_query(question, context)" in opened(children=5)[0]["content"]
    for nobody in (opened(children=0), opened(sub_calls=0, children=5)):
        assert "rlm_query" not in nobody[0]["content"]


def test_a_lazy_context_is_said_to_be_one():
    assert "iter_lines()" in opened(lazy="text")[1]["content"]
    assert "iter_lines()" not in opened()[1]["content"]


@pytest.mark.parametrize("most", [0, 1, 4, 7, 100])
def test_cut_keeps_head_and_tail_and_counts_the_rest(most: int):
    text = "".join(chr(0x100 + number) for number in range(101))
    cut = prompts.cut(text, most)
    assert cut.startswith(text[: most * 3 // 4])
    assert cut.endswith(text[len(text) - (most - most * 3 // 4) :])
    assert f"[{101 - most} characters left out]" in cut


@quick
@given(st.text(max_size=50))
def test_cut_leaves_alone_what_fits(text: str):
    assert prompts.cut(text, len(text)) == text


def test_a_report_of_a_cell():
    assert prompts.cell_report(3, "a\n", "ok", "", ["x", "y"], 0, 100) == "Output of cell 3:\na\n[new variables: x, y]"
    assert prompts.cell_report(1, "", "ok", "", [], 0, 9) == "Output of cell 1:\n(nothing was printed)"
    killed = prompts.cell_report(2, "a" * 50, "killed", "out of memory", [], 1234, 10)
    assert "[40 characters left out]" in killed
    assert killed.endswith("[1,234 bytes of output were dropped at the limit]\n[out of memory]")


@quick
@given(conversations, st.integers(0, 20_000))
def test_what_is_fitted_fits(messages: Conversation, most: int):
    fitted = prompts.fit(messages, most)
    assert size(fitted) <= most
    assert fitted == messages or size(messages) > most
    assert roles(fitted[:2]) == ["system", "user"]
    assert roles(fitted[-1:]) == roles(messages[-1:])


@quick
@given(conversations)
def test_opening_and_latest_turn_stay_whole_when_they_can(messages: Conversation):
    ends = [*messages[:2], *messages[2:][-2:]]
    fitted = prompts.fit(messages, size(ends))
    assert all(mine == theirs for mine, theirs in zip([*fitted[:2], *fitted[2:][-2:]], ends, strict=True))


def test_old_outputs_give_way_before_old_replies():
    messages = talk("s", "q", "reply 1", "out" * 100, "reply 2", "out 2")
    fitted = prompts.fit(messages, size(messages) - 100)
    assert [message["content"] for message in fitted] == ["s", "q", "reply 1", prompts._LEFT_OUT, "reply 2", "out 2"]


def test_old_turns_go_in_pairs():
    messages = talk("s", "q", "a" * 500, "b", "c" * 500, "d")
    assert [message["content"][:1] for message in prompts.fit(messages, 600)] == ["s", "q", "c", "d"]


def test_what_is_cut_keeps_its_ends_and_tells_so():
    latest = prompts.fit(talk("system", "question", "reply", "head" + "€" * 5000 + "tail"), 1000)[-1]["content"]
    assert latest.startswith("head€")
    assert latest.endswith("€tail")
    assert "bytes left out]" in latest


@quick
@given(conversations, texts, st.integers(1500, LAST_WORD_BYTES))
def test_the_last_word_fits_what_was_set_aside(messages: Conversation, reason: str, most: int):
    asked = prompts.last_word(messages, reason, most)
    assert size(asked) + 16 * len(asked) <= most + 16
    assert roles(asked[:2]) == ["system", "user"]
    assert roles(asked[2:-1]) == roles(messages[2:])[len(messages) - len(asked) + 1 :]
    assert asked[-1]["content"].startswith("This is the last turn: ")
    assert "FINAL(your answer)" in asked[-1]["content"] or most < 4000


@quick
@given(conversations.filter(lambda messages: len(messages) > 3))
def test_the_latest_output_has_a_place_in_the_last_word(messages: Conversation):
    latest, asked = messages[-1]["content"], prompts.last_word(messages, "no money")
    assert asked[-2]["content"][:20] == latest[:20]
    assert asked[-2]["content"][-20:] == latest[-20:]


def test_a_short_conversation_is_whole_in_the_last_word():
    messages = talk("s", "q", "reply", "out")
    assert prompts.last_word(messages, "no time")[:-1] == messages
