"""What commands print: the answer alone on standard output, JSON with the promised fields; every kind of context."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.command import Airlock
from tests.fakes.provider import Provider, Say

PRICED = ("--price", "mine=1,2")
FIELDS = [
    *("query_id", "status", "answer", "reason", "cost_usd", "usage", "iterations", "sub_calls"),
    *("duration_s", "backend", "isolation", "journal_head", "checkpoint"),
]

SCRIPT = r"""
root:
  - "```repl\nfound = context[context.find('number is ') + 10:].split()[0]\nprint(found, llm_query('Is it?'))\n```"
  - "FINAL_VAR(found)"
sub:
  - {match: "Is it", reply: "yes"}
"""


def scripted(airlock: Airlock, script: str = SCRIPT) -> list[str]:
    return ["--context", "context.txt", "--model", f"scripted:{airlock.file('script.yaml', script)}"]


def test_the_answer_alone_goes_to_standard_output(airlock: Airlock) -> None:
    done = airlock("run", "What is the magic number?", *scripted(airlock), code=0)
    assert done.out == "4711\n"
    assert all(re.fullmatch(r"\[ *\d+\.\d\d s\] .*", line) for line in done.lines)
    assert [re.sub(r"\[.*?\] ", "", line, count=1).split()[0] for line in done.lines] == [
        *("query", "sandbox", "asking", "cell", "cell", "asking", "cell", "cell", "answered:"),
    ]


def test_run_prints_one_json_object(airlock: Airlock) -> None:
    done = airlock("run", "What is the magic number?", *scripted(airlock), "--json", code=0)
    report = done.json
    assert list(report) == FIELDS
    varies = ("query_id", "duration_s", "journal_head", "checkpoint", "usage")
    fixed = {name: report[name] for name in FIELDS if name not in varies}
    assert fixed == {
        "status": "answered",
        "answer": "4711",
        "reason": "",
        "cost_usd": "0.00",
        "iterations": 2,
        "sub_calls": 1,
        "backend": "bubblewrap",
        "isolation": "namespace",
    }
    ((model, usage),) = report["usage"].items()
    assert model.startswith("scripted:")
    assert list(usage) == ["calls", "input_tokens", "output_tokens", "cost_usd"]
    assert usage["calls"] == 3
    assert 0 < report["duration_s"] < 60
    head = airlock.rows("SELECT hash FROM records WHERE query=? ORDER BY seq DESC LIMIT 1", report["query_id"])
    assert report["journal_head"] == head[0][0]
    origin, size, _root = report["checkpoint"].splitlines()[:3]
    assert origin.endswith("/tenants/default")
    assert int(size) == airlock.rows("SELECT count(*) FROM records WHERE log = 'tenants/default'")[0][0]


def test_a_refused_query_has_the_same_fields(airlock: Airlock) -> None:
    with Provider() as provider:
        options = ["--context", "context.txt", "--model", "mine", "--base-url", provider.url, *PRICED, "--budget", "0"]
        done = airlock("run", "What?", *options, "--json", code=3)
    assert list(done.json) == FIELDS
    assert (done.json["usage"], done.json["iterations"]) == ({}, 0)


def test_hostile_text_goes_untouched_into_a_pipe(airlock: Airlock) -> None:
    code = r"print('\x1b[31mred\x1b]0;title\x07')\nFINAL('\x1b[2J')"
    file = airlock.file("cell.py", code.replace("\\n", "\n"))
    done = airlock("exec", file, "--context", "context.txt", code=0)
    assert done.out == "\x1b[31mred\x1b]0;title\x07\n\x1b[2J\n"


CONTEXTS: list[tuple[str, Any, str, str]] = [
    ("text.txt", "one\ntwo\n", "print(type(context).__name__, len(context), context.splitlines()[1])", "str 8 two"),
    ("no-suffix", "one", "print(repr(context))", "'one'"),
    ("value.json", {"a": [1, 2, {"b": None}]}, "print(type(context).__name__, context['a'][2])", "dict {'b': None}"),
    ("list.json", [1, 2, 3], "print(type(context).__name__, sum(context))", "list 6"),
    ("rows.jsonl", '{"n": 1}\n\n{"n": 41}\n', "print(len(context), sum(row['n'] for row in context))", "2 42"),
    ("unicode.txt", "a\u00e9\u4e2d\U0001f600z", "print(len(context), ascii(context[3]))", r"5 '\U0001f600'"),
]


@pytest.mark.parametrize(("name", "content", "code", "prints"), CONTEXTS, ids=[row[0] for row in CONTEXTS])
def test_a_cell_uses_its_context(airlock: Airlock, name: str, content: Any, code: str, prints: str) -> None:
    path = airlock.file(name, content if isinstance(content, str) else json.dumps(content))
    assert airlock("exec", airlock.file("cell.py", code), "--context", path, code=0).out == prints + "\n"


def test_a_cell_uses_a_folder_of_documents(airlock: Airlock) -> None:
    airlock.file("docs/b.txt", "second")
    airlock.file("docs/sub/c.md", "third")
    airlock.file("docs/a.txt", "first")
    airlock.file("docs/.hidden", "no")
    airlock.file("docs/image.png", b"\x89PNG\0\0")
    (airlock.folder / "docs/link.txt").symlink_to("/etc/passwd")
    code = "for document in context: print(document['path'], document['text'])"
    done = airlock("exec", airlock.file("cell.py", code), "--context", "docs", code=0)
    assert done.out == "a.txt first\nb.txt second\nsub/c.md third\n"


def test_a_context_comes_from_standard_input(airlock: Airlock) -> None:
    cell = airlock.file("cell.py", "print(len(context), context[-5:])")
    text = ("line\n" * 500_000 + "end.").encode()
    assert airlock("exec", cell, "--context", "-", stdin=text, code=0).out == f"{len(text)} \nend.\n"


def test_a_context_is_kept_once_and_checked_at_the_end(airlock: Airlock) -> None:
    cell = airlock.file("cell.py", "pass")
    airlock("exec", cell, "--context", "context.txt", code=0)
    airlock("exec", cell, "--context", airlock.file("copy.txt", (airlock.folder / "context.txt").read_text()), code=0)
    assert len(list(airlock.home.glob("contexts/data/*"))) == 1
    (record,) = (r for r in airlock.records() if r["type"] == "context.verified")
    assert record["body"]["unchanged"] is True


def test_the_root_lm_is_told_the_shape_and_never_the_text(airlock: Airlock) -> None:
    airlock.file("docs/a.txt", "secret words")
    with Provider(root=[Say("FINAL(ok)")]) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED]
        airlock("run", "What does it say?", "--context", "docs", *options, code=0)
    (request,) = provider.requests
    sent = json.dumps(request.body)
    assert "What does it say?" in sent
    assert "documents 1" in sent
    assert "secret" not in sent
    assert "a.txt" not in sent


SCHEMA = {
    "type": "object",
    "required": ["number"],
    "additionalProperties": False,
    "properties": {"number": {"type": "integer"}},
}


def test_an_answer_has_to_fit_its_schema(airlock: Airlock) -> None:
    schema = airlock.file("schema.json", json.dumps(SCHEMA))
    replies = [
        Say("FINAL(forty-two)"),
        Say('FINAL({"number": "42"})'),
        Say("```repl\nfound = {'number': 42, 'more': 1}\nFINAL_VAR('found')\n```"),
        Say("```repl\nfound = {'number': 42}\n```\nFINAL_VAR(found)"),
    ]
    with Provider(root=replies) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED, "--answer-schema", schema]
        done = airlock("run", "What?", "--context", "context.txt", *options, "--json", code=0)
    assert (json.loads(done.json["answer"]), done.json["iterations"]) == ({"number": 42}, 4)
    told = [request.text for request in provider.requests[1:]]
    assert [("not accepted" in text) for text in told] == [True, True, True]
    assert "it has to be JSON alone" in told[0]
    assert "is not of type 'integer' at $.number" in told[1]
    assert "'more' was unexpected" in told[2]


def test_an_answer_that_never_fits_is_not_passed_off_as_one(airlock: Airlock) -> None:
    schema = airlock.file("schema.json", json.dumps(SCHEMA))
    with Provider(root=[Say("FINAL(forty-two)")]) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED, "--answer-schema", schema]
        policy = airlock.policy(counts_iterations="2")
        done = airlock("run", "What?", "--context", "context.txt", *options, "--policy", policy, "--json", code=3)
    assert (done.json["status"], done.json["answer"]) == ("limit", "forty-two")
    assert done.json["reason"].startswith(
        "count-exceeded: all 2 turns are used; the partial answer was not accepted: it does not fit the schema: "
    )
    assert len(provider.requests) == 3  # two turns and the last word
