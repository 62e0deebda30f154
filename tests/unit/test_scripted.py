"""The scripted model: replies in order, rules for sub-calls, and a clear word on a file that is no script."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.core.errors import ModelError, OutcomeUnknown
from orchestrator.lm.base import Message, Request
from orchestrator.lm.scripted import ScriptedLM
from tests.unit.helpers import user

pytestmark = pytest.mark.anyio

SYSTEM: Message = {"role": "system", "content": "s"}
REPLY: Message = {"role": "assistant", "content": "r"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.yaml"
    path.write_text(
        "root: [one, two, 'three with more words']\n"
        "sub:\n"
        "- {match: 'capital of (?P<land>\\w+)', reply: '\\g<land>: \\1ville'}\n"
        "- {match: 'a.b', reply: dot}\n"
    )
    return path


async def say(path: Path, *messages: Message, most: int = 100, timeout_s: float = 5.0) -> str:
    return (await ScriptedLM(path).ask(Request("m", messages, most, timeout_s))).text


@pytest.mark.parametrize(
    ("replies", "text"), [(0, "one"), (1, "two"), (2, "three with more words"), (9, "three with more words")]
)
async def test_a_conversation_gets_the_replies_in_order(script: Path, replies: int, text: str):
    assert await say(script, SYSTEM, user("q"), *[REPLY, user("out")] * replies) == text


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("the capital of France?", "France: Franceville"), ("a\nb", "dot"), ("other", "The script has no reply to this.")],
)
async def test_sub_calls_are_answered_by_rules(script: Path, prompt: str, text: str):
    assert await say(script, user(prompt)) == text


async def test_a_reply_is_cut_at_the_cap(script: Path):
    messages = (SYSTEM, user("q"), *[REPLY, user("out")] * 2)
    reply = await ScriptedLM(script).ask(Request("m", messages, 2, 5.0))
    assert (reply.text, reply.finish_reason) == ("three wi", "length")
    assert reply.usage is not None
    assert reply.usage.output_tokens == 3


async def test_it_can_be_slow(tmp_path: Path):
    path = tmp_path / "slow.yaml"
    path.write_text("root: [late]\ndelay_s: 9\n")
    with pytest.raises(OutcomeUnknown, match="did not answer within"):
        await say(path, SYSTEM, timeout_s=0.01)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "root: []",
        "root: text",
        "root: [a]\nmore: 1",
        "root: [a]\nsub: [{match: '('}]",
        "{",
        "root: [a]\nsub: 3",
        "root: [a]\nsub: [{match: '(', reply: a}]",
        "root: [a]\ndelay_s: .nan",
        "root: [a]\ndelay_s: -1",
        "[" * 10_000,
    ],
)
async def test_what_is_no_script(tmp_path: Path, text: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ModelError, match="is not a script for a model") as caught:
        ScriptedLM(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("root: [a, 1]", "root.1: Input should be a valid string"),
        ("text", "its top: Input should be"),
        ("root:\n  - [", "line 2: "),
    ],
)
async def test_a_fault_of_a_script_is_told_with_its_place(tmp_path: Path, text: str, says: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        ScriptedLM(path)
    assert f"{path} is not a script for a model: {says}" in str(caught.value)
    assert "pydantic" not in str(caught.value)


async def test_a_script_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ModelError, match=r"cannot read the script .*: no such file"):
        ScriptedLM(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelError, match="it is not UTF-8 text"):
        ScriptedLM(tmp_path / "bytes.yaml")


async def test_a_reply_that_names_a_group_that_is_not_there(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("root: [a]\nsub: [{match: a, reply: '\\2'}]")
    with pytest.raises(ModelError, match="is not a script"):
        ScriptedLM(path)
