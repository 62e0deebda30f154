"""What a reply means: cells come from fenced blocks alone, answers from FINAL at the start of a line."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.loop.parse import Step, parse
from tests.unit.helpers import quick

FENCE = "```repl\nx = 1\n```"


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        (FENCE, ("x = 1",)),
        ("Let me look.\n\n```python\nx\n```\nand then\n```py\ny\n```\n", ("x", "y")),
        ("```REPL\nx\n```", ("x",)),
        ("``` repl\nx\n```  ", ("x",)),
        ("  ```repl\n  x\n  ```", ("  x",)),
        ("```repl title=a\nx\n```", ("x",)),
        ("~~~repl\nx = '```'\n~~~", ("x = '```'",)),
        ("````repl\nx = '''\n```\n'''\n````", ("x = '''\n```\n'''",)),
        ("```repl\nprint('''\n```json\n''')\n```", ("print('''\n```json\n''')",)),
        ("```repl\r\nx = 1\r\ny\r\n```\r\n", ("x = 1\ny",)),
        ("```repl\nx = 1\ny", ("x = 1\ny",)),
        ("```repl\na = '\x0c\u2028\x1c'\n```", ("a = '\x0c\u2028\x1c'",)),
        ("```\nx\n```", ()),
        ("```json\n{}\n```", ()),
        ("```repl\n\n  \n```", ()),
        ("```repl", ()),
        ("use `x = 1` here", ()),
        ("    x = 1", ()),
        ("", ()),
    ],
)
def test_cells(text: str, cells: tuple[str, ...]):
    assert parse(text) == Step(cells)


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("FINAL(42)", "42"),
        ("I know.\nFINAL(42)\nBye.", "42"),
        ("  FINAL ( 42 ) ", "42"),
        ("**FINAL(42)**", "42"),
        ("> FINAL(42)", "42"),
        ("**FINAL**(42)", "42"),
        ("FINAL(f(x), (a, b))", "f(x), (a, b)"),
        ("FINAL(smile :) there)", "smile :) there"),
        ("FINAL(42) (I checked it)", "42"),
        ("FINAL(42). See (a).", "42"),
        ("FINAL(42", "42"),
        ("FINAL(one\ntwo (2)\nthree)", "one\ntwo (2)\nthree"),
        ("FINAL(\nCode:\n```python\nf(x)\n```\n)", "Code:\n```python\nf(x)\n```"),
        ('FINAL("42")', "42"),
        ("FINAL('42')", "42"),
        ('FINAL("""a\nb""")', "a\nb"),
        ('FINAL("a" and "b")', '"a" and "b"'),
        (r'FINAL("say \"a\"")', r"say \"a\""),
        ("FINAL(it's)", "it's"),
        ("FINAL(')", "'"),
        ("FINAL()", ""),
        ("FINAL(a)\nNo:\nFINAL(b)", "b"),
        ("```\nFINAL(42)\n```", "42"),
        ("FINAL(a\r\nb)", "a\nb"),
        ("FINAL(😀 é)", "😀 é"),
    ],
)
def test_answers(text: str, final: str):
    assert parse(text) == Step((), final)


@pytest.mark.parametrize("name", ["x", "_long_name2", "'x'", '"x"', " x ", '"""x"""'])
def test_answers_that_are_variables(name: str):
    assert parse(f"Done.\nFINAL_VAR({name})") == Step((), None, "x" if "x" in name else name)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a[0]", "f()", "2a", "'a' + 'b'"])
def test_what_is_no_name_is_no_variable(name: str):
    assert parse(f"FINAL_VAR({name})") == Step(())


@pytest.mark.parametrize(
    "text",
    [
        "I will say FINAL(42) later.",
        "When done, use FINAL(answer) or FINAL_VAR(name).",
        "`FINAL(42)` is how it ends",
        "FINAL answer: 42",
        "FINALLY(42)",
        "final(42)",
        "FINAL",
        "```json\n{}\n```",
        "```text\nsay FINAL(42)\n```",
    ],
)
def test_to_speak_of_it_is_not_to_end(text: str):
    assert parse(text) == Step(())


def test_code_that_calls_final_is_code():
    assert parse("```repl\nFINAL(x)\n```") == Step(("FINAL(x)",))


def test_code_and_answer_in_one_reply_are_both_told():
    assert parse(f"{FENCE}\nFINAL(42)") == Step(("x = 1",), "42")
    assert parse(f"{FENCE}\nFINAL_VAR(x)") == Step(("x = 1",), None, "x")


tokens = st.sampled_from(
    ["```", "~~~", "````", "repl", "python", "\n", "\r\n", "FINAL", "_VAR", "(", ")", '"', "'", " ", "x", "*", ">", "€"]
)


@quick
@given(st.one_of(st.text(), st.lists(tokens).map("".join)))
def test_no_reply_trips_it(text: str):
    step = parse(text)
    assert not step.cells or "```" in text or "~~~" in text
    assert step.final is None or step.final_var is None
    assert all(cell.strip() for cell in step.cells)


plain = st.text(st.characters(codec="utf-8", exclude_characters="`~\r"), min_size=1).filter(str.strip)


@quick
@given(st.lists(plain, max_size=4), st.sampled_from(["\n", "\n\nFINAL is near.\n\n"]))
def test_fenced_code_comes_back_as_it_was(blocks: list[str], between: str):
    text = between.join(f"```repl\n{block}\n```" for block in blocks)
    assert parse(text).cells == tuple(blocks)


@pytest.mark.parametrize(
    "piece",
    [
        "*",
        "> ",
        " ",
        "\t",
        "`",
        "```\n",
        "~",
        "FINAL(",
        "FINAL_VAR(a)\n",
        "(",
        ")",
        "FINAL(\n",
        "\r",
        "x",
        '"',
        "FINAL(a) )",
    ],
)
def test_long_replies_take_time_in_proportion(piece: str):
    def seconds(size: int) -> float:
        text = "FINAL(" + piece * (size // len(piece))
        started = time.process_time()
        parse(text), parse(text[6:])
        return time.process_time() - started

    assert seconds(200_000) < 1.0  # one that is quadratic takes minutes
