"""Queries to be exported: real ones, of a provider on a real socket and real sandboxes, and random ones."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from hypothesis import strategies as st

from orchestrator import RLM, auditing
from orchestrator.core.events import EventType, Recorded
from tests.command import Airlock
from tests.fakes.provider import Behaviour, Fail, Provider, Say, Seen

QUESTION = "Which ship carried the pepper?"
CONTEXT = "the pepper came in with the Santa Rosa"
ANSWER = "the Santa Rosa"
SMILE = "\N{GRINNING FACE}\u2028\u202e"  # two units in UTF-16, the end of a line to some, and reordered text


@dataclass(frozen=True)
class Ran:
    """A query that ran. seen: what its LMs were asked, in order."""

    history: list[Recorded]
    seen: list[Seen]

    @property
    def id(self) -> str:
        return self.history[0].query

    def of(self, kind: str, node: str | None = None) -> list[Recorded]:
        return [record for record in self.history if record.type == kind and node in (None, record.node)]

    def erased(self, *names: str, seqs: Sequence[int] | None = None) -> list[Recorded]:
        """Without payloads of these names, or of all; only in these records, if any are said."""

        def kept(record: Recorded) -> dict[str, str]:
            here = seqs is None or record.seq in seqs
            return {n: text for n, text in record.payloads.items() if not (here and (not names or n in names))}

        return [replace(record, payloads=kept(record)) for record in self.history]


def repl(*cells: str) -> str:
    return "I look.\n" + "\n".join(f"```repl\n{textwrap.dedent(cell)}\n```" for cell in cells)


def voyage() -> dict[str, list[Behaviour]]:
    """All there is in one query: turns that are cut and turns without code, cells that fail, calls of every kind."""
    first = repl("print(len(context), llm_query('one'))")
    return {
        QUESTION: [
            Say(first[:20], usage=(100, 10), finish="length"),
            Say(first[20:], usage=(110, 10)),
            Say(repl("print(llm_query_batched(['two', 'three', 'flaky']))", "1 / 0"), usage=(200, 20)),
            Say(f"Nothing to run here {SMILE}", usage=(250, 20)),
            Say(
                repl("""
                    try:
                        llm_query("five", model="anything")
                    except NotPermitted as error:
                        print(error)
                    print(rlm_query("Child, what is it?", context[:10]), llm_query("one"))
                    ship = "the Santa Rosa"
                """),
                usage=(300, 30),
            ),
            Say("FINAL_VAR(ship)", usage=(400, 5)),
        ],
        "Child, what is it?": [Say(repl("FINAL(llm_query('four') + '!')"), usage=(50, 5))],
        "flaky": [Fail(503, {"retry-after": "0"}), Say("at last", usage=(7, 3))],
    }


def endless() -> dict[str, list[Behaviour]]:
    """Turns until there are none left, and a last word."""
    return {QUESTION: [Say(repl("print(1)")), Say(repl("print(2)")), Say("FINAL(perhaps)")]}


def run(provider: Provider, home: Airlock, script: dict[str, list[Behaviour]], **changes: str) -> Ran:
    def answer(seen: Seen) -> Behaviour:
        question = seen.text
        if seen.role == "root":
            question = str(seen.body["messages"][1]["content"]).split("Question: ", 1)[1].split("\n", 1)[0]
        return script[question].pop(0) if question in script else Say(f"plain {question}", usage=(11, 2))

    provider.answer = answer
    before = len(provider.requests)
    options: dict[str, Any] = {"model": "top", "sub_model": "mid", "base_url": provider.url, "api_key": "key"}
    prices = dict.fromkeys(("top", "mid"), (1, 2))
    policy = home.policy("development", **changes)
    with RLM(**options, prices=prices, backend="bubblewrap", policy=str(policy), home=home.home) as rlm:
        done = rlm.completion(QUESTION, CONTEXT)
    return Ran(read(home.home, done.query_id), provider.requests[before:])


def alone(home: Airlock) -> Ran:
    """A cell that no LM wrote, of `airlock exec`."""
    script = home.file("cell.py", "print(len(context))\nFINAL(context[:3])\n")
    context = home.file("context.txt", CONTEXT)
    home("exec", script, "--context", context, "--backend", "bubblewrap", code=0)
    ((query,),) = home.rows("SELECT id FROM queries ORDER BY opened_at DESC LIMIT 1")
    return Ran(read(home.home, query), [])


def read(home: Path, query: str) -> list[Recorded]:
    with auditing.open_books(home) as books:
        return next(auditing.histories(books, query))


def ran(folder: Path) -> Iterator[dict[str, Ran]]:
    home = Airlock(folder / "home", folder)
    with Provider() as provider:
        yield {
            "voyage": run(provider, home, voyage(), models_dedupe="true"),
            "endless": run(provider, home, endless(), counts_iterations="2"),
            "alone": alone(home),
        }
    home.nothing_left()


# Random ones

_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_nodes = st.sampled_from(["root", "root.1", "root.1.1", "root.2", "", ".", "root.9.9", "\ud800"])
_texts = st.sampled_from(["answered", "length", "ok", "stop", "root.c1", "root.c2", "unknown: x", "0.5", "NaN", SMILE])
_bodies = st.fixed_dictionaries(
    {},
    optional={
        "call": st.sampled_from(["root.c1", "root.c2", "root.1.c1"]),
        "role": st.sampled_from(["root", "sub"]),
        "shared": st.integers(-2, 5) | st.just(2**53 - 1),
        "messages": st.integers(-2, 5) | st.just(2**53 - 1),
        "usage": st.none() | st.fixed_dictionaries({}, optional={"input_tokens": st.integers(0, 9)}),
        **dict.fromkeys(("outcome", "detail", "status", "reason", "finish", "model", "cost_usd"), _texts | _plain),
        **dict.fromkeys(
            ("cell", "names", "policy", "answered", "sub_models", "duration_ms", "new field \ud800"), _plain
        ),
    },
)
_prompts = st.sampled_from(['[{"role":"user","content":"\\ud800"}]', "[]", "[1]", "no JSON", "{}", "[" * 5000])
_payloads = st.dictionaries(
    st.sampled_from(["code", "prompt", "completion", "stdout", "answer", "question"]), st.text(max_size=9) | _prompts
)
kinds = st.sampled_from([*get_args(EventType), "query.resumed", "cell.replayed", "payload.erased", "quite.new"])


@st.composite
def histories(draw: st.DrawFn) -> list[Recorded]:
    """Well-formed records, in any order and with anything in them."""
    found: list[Recorded] = []
    for seq in range(draw(st.integers(0, 12))):
        payloads = draw(_payloads)
        committed = {name: {"commitment": "c", "bytes": len(text)} for name, text in payloads.items()}
        kept = payloads if draw(st.booleans()) else {}
        at = draw(st.datetimes()).isoformat(timespec="milliseconds") + "Z"
        body = draw(_bodies)
        found.append(Recorded("q\ud800", seq, at, draw(kinds), draw(_nodes), body, kept, committed, "t", "p"))
    return found
