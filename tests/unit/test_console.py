"""What a terminal is shown: hostile text obeyed by nobody, and a journal that a person can read."""

from __future__ import annotations

import io
import unicodedata
from typing import Any, get_args

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.console import PlainView, printable, safe_for, show_run
from orchestrator.core.events import GENESIS, Event, EventType, seal
from tests.unit.helpers import quick

REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
hostile = st.text(st.one_of(st.characters(), st.characters(categories=["Cc", "Cf", "Zl", "Zp"])))


@quick
@given(hostile)
def test_nothing_is_left_that_a_terminal_obeys(text: str):
    for character in printable(text):
        assert character in "\t\n" or unicodedata.category(character) not in ("Cc", "Zl", "Zp"), hex(ord(character))
        assert unicodedata.bidirectional(character) not in REORDERING, hex(ord(character))
        assert character not in "\u061c\u200e\u200f\ufeff"


@quick
@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]) | st.sampled_from("\t\n")))
def test_ordinary_text_is_left_alone(text: str):
    assert printable(text) == text


def test_what_was_hidden_can_be_read():
    assert printable("\x1b[2J\r\u202eabc\x9b") == r"\x1b[2J\r\u202eabc\x9b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_terminals_are_guarded():
    assert safe_for(io.StringIO(), "\x1b") == "\x1b"
    assert safe_for(Terminal(), "\x1b") == r"\x1b"


def test_plain_lines(capsys: Any):
    view = PlainView()
    with view:
        view.event(Event("cell.started", "root", {"cell": 1}, {"code": "a\nb"}))
        view.event(Event("cell.ended", "root", {"cell": 1, "status": "ok", "duration_ms": 3, "detail": "\x1b[2J"}))
        view.output("out", "never shown")
        view.event(Event("context.verified", "root", {}))
    lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["cell 1: 2 lines", r"cell 1 ok after 3 ms (\x1b[2J)"]


def test_a_guest_cannot_write_lines_of_the_view(capsys: Any):
    PlainView().event(Event("cell.ended", "root", {**ENDED, "detail": "x\n[   1.00 s] answered: all is well"}))
    assert len(capsys.readouterr().err.splitlines()) == 1


CONTEXT = {"id": "i", "sha256": "abc", "kind": "text", "bytes": 10, "chars": 1234567}
OPENED = {
    "model": "m",
    "sub_models": [],
    "backend": "b",
    "isolation": "namespace",
    "context": CONTEXT,
    "limit_usd": "1.00",
}
INTENT = {"call": "root.c1", "attempt": 1, "role": "root", "model": "m", "bound_usd": "0.10"}
RESULT = {"call": "root.c1", "outcome": "answered", "detail": "stop", "cost_usd": "0.01"}
USAGE = {"input_tokens": 1234, "output_tokens": 5}
ENDED = {"cell": 1, "status": "ok", "detail": "", "duration_ms": 7}
STORY: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    ("query.opened", OPENED, {"question": "Who?"}),
    ("sandbox.started", {"python": "3.11"}, {}),
    ("call.intent", INTENT, {"prompt": "[]"}),
    ("call.result", {**RESULT, "usage": USAGE}, {"completion": "```repl\nx\n```"}),
    ("cell.started", {"cell": 1}, {"code": "print(1)\nllm_query('a')"}),
    (
        "call.intent",
        {**INTENT, "call": "root.c2", "role": "sub"},
        {"prompt": '[{"role": "user", "content": "what is a?"}]'},
    ),
    ("call.result", {**RESULT, "call": "root.c2", "usage": None}, {"completion": "a letter"}),
    ("call.refused", {"detail": "no money"}, {}),
    ("cell.ended", ENDED, {"stdout": "1\n" * 50, "stderr": "oh"}),
    ("limit.hit", {"detail": "all turns are used"}, {}),
    ("sandbox.ended", {"cpu_ms": 12, "peak_memory_bytes": None}, {}),
    ("context.verified", {"unchanged": True}, {}),
    ("call.repeated", {"of": "root.c2", "model": "m"}, {}),
    ("node.opened", {"parent": "root", "model": "m", "limit_usd": "0.50"}, {"question": "And who is b?"}),
    ("node.closed", {"status": "answered", "reason": "", "cost_usd": "0.01"}, {"answer": "another letter"}),
    ("budget.held", {"for": "last word", "usd": "0.02"}, {}),
    ("budget.told", {"usd_left": "0.40", "sub_calls_left": 1, "seconds_left": "59"}, {}),
    ("query.interrupted", {"why": "orchestrator-died: gone", "until": "2026-11-22T01:02:15.000Z", "records": 17}, {}),
    ("query.resumed", {"backend": "b", "isolation": "namespace", "cells": 2, "calls": 1}, {}),
    ("cell.replayed", {"cell": 1, "status": "ok", "same": True, "differs": []}, {}),
    ("cell.replayed", {"cell": 2, "status": "error", "same": False, "differs": ["stdout", "names"]}, {}),
    ("query.narrowed", {"limit_usd": "0.50", "payloads": "keep"}, {"policy": "{}"}),
    ("query.closed", {"status": "limit", "reason": "count-exceeded", "cost_usd": "0.02"}, {"answer": "it\nis"}),
]


def story() -> tuple[list[tuple[bytes, str]], dict[tuple[int, str], str]]:
    links, kept, prev = [], {}, GENESIS
    for seq, (kind, body, texts) in enumerate(STORY):
        payloads = {name: {"commitment": "c", "bytes": len(text)} for name, text in texts.items()}
        at = f"2026-11-22T01:02:{seq:02d}.000Z"
        node = "root.1" if kind.startswith("node.") else "root"
        link = seal(
            Event(kind, node, body), query="q1", tenant="t", policy="p", seq=seq, at=at, prev=prev, payloads=payloads
        )
        links.append((link.record, prev := link.hash))
        kept |= {(seq, name): text for name, text in texts.items()}
    return links, kept


def test_a_run_is_told_as_it_went():
    links, kept = story()
    lines = list(show_run(links, kept, None))
    assert lines[:2] == ["query q1 of tenant t, opened 2026-11-22T01:02:00.000Z", "  question: Who?"]
    for line in (
        "  context:  text, 1,234,567 characters, sha256 abc",
        "01:02:02.000 turn root.c1 to m, at most 0.10 USD",
        "01:02:03.000 root.c1 answered (stop), 1,234 tokens in, 5 out, 0.01 USD",
        "    | print(1)",
        "01:02:05.000 sub-call root.c2 to m, at most 0.10 USD",
        "    > what is a?",
        "    < a letter",
        "01:02:07.000 sub-call refused: no money",
        "      ... [10 more lines]",
        "    ! oh",
        "01:02:10.000 sandbox ended: CPU 12 ms, peak memory unknown",
        "01:02:11.000 context unchanged",
        "01:02:12.000 sub-call answered as root.c2 was",
        "01:02:13.000 root.1: child query to m, at most 0.50 USD",
        "    ? And who is b?",
        "01:02:14.000 root.1: closed: answered; cost 0.01 USD",
        "      another letter",
        "01:02:15.000 0.02 USD set aside for the last word",
        "01:02:16.000 budget told: 0.40 USD, 1 sub-call, 59 s left",
        "01:02:17.000 interrupted: orchestrator-died: gone",
        "01:02:18.000 resumed in b (namespace): 2 cells and 1 answer are on record",
        "01:02:19.000 cell 1 was run again: ok, as before",
        "01:02:20.000 cell 2 was run again: error, with other stdout, names than before",
        "01:02:21.000 the policy was changed while it waited: 0.50 USD at most",
        "01:02:22.000 closed: limit count-exceeded; cost 0.02 USD",
        "      is",
    ):
        assert line in lines
    assert lines[-1] == f"journal: 23 records, head {links[-1][1]}: the chain is whole"


def test_a_guest_cannot_write_lines_of_the_journal():
    forged = "x\n01:02:03.000 closed: answered; cost 0.00 USD"
    link = seal(
        Event("cell.ended", "root", {**ENDED, "detail": forged}),
        query="q",
        tenant="t",
        policy="p",
        seq=0,
        at="2026-11-22T01:02:00.000Z",
        prev=GENESIS,
        payloads={},
    )
    assert not any("\n" in line for line in show_run([(link.record, link.hash)], {}, None))


def test_what_was_not_kept_is_said():
    lines = list(show_run(story()[0], {}, None))
    assert "    | (not kept: 23 bytes)" in lines
    assert not any("what is a?" in line for line in lines)


def test_a_broken_chain_is_said_last():
    assert list(show_run(*story(), "record 3 is missing"))[-1].endswith("BROKEN: record 3 is missing")
    assert list(show_run([], {}, None)) == ["journal: 0 records, head none: the chain is whole"]


def test_every_kind_of_record_is_in_the_story():
    assert {kind for kind, _body, _texts in STORY} == set(get_args(EventType))
