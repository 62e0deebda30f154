"""Child queries over real sandboxes and a provider on a real socket: a tree of loops under one budget and one clock."""

from __future__ import annotations

import errno
import gc
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from orchestrator import RLM, AsyncRLM, Completion
from orchestrator.loop.handed import Given
from orchestrator.sandbox.base import Guest, SandboxSpec
from orchestrator.sandbox.bubblewrap import Bubblewrap
from tests.command import Airlock
from tests.fakes.provider import Behaviour, Hang, Provider, Say, Seen

pytestmark = pytest.mark.anyio
PRICES = dict.fromkeys(("top", "mid", "deep"), (1, 2))
USED = (100, 50)
PRICE = Decimal("0.0002")  # of one call that used as much


def cell(code: str, usage: Any = USED) -> Say:
    return Say(f"```repl\n{textwrap.dedent(code)}\n```", usage=usage)


def question(seen: Seen) -> str:
    """What the loop that asks was asked itself; of a plain call, its whole prompt."""
    if seen.role == "sub":
        return seen.text
    return str(seen.body["messages"][1]["content"]).split("Question: ", 1)[1].split("\n", 1)[0]


class Script:
    """What each loop says, by the question that it was given: its turns in order, the last one again and again."""

    def __init__(self, **loops: list[Behaviour]) -> None:
        self.loops = loops

    def __call__(self, seen: Seen) -> Behaviour:
        if seen.role == "sub":
            return Say(f"plain {seen.text[:60]}", usage=USED)
        turns = self.loops[question(seen).split()[0]]
        turn = sum(message["role"] == "assistant" for message in seen.body["messages"])
        return turns[min(turn, len(turns) - 1)]


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


@pytest.fixture
def home(fresh: Airlock) -> Iterator[Path]:
    yield fresh.home
    fresh.nothing_left()


Ask = Callable[..., Completion]


@pytest.fixture
def ask(provider: Provider, home: Path, fresh: Airlock) -> Ask:
    """One query with a script, over `context`, under the development policy with some keys changed."""

    def run(script: Callable[[Seen], Behaviour], context: Any = "some context", **changes: str) -> Completion:
        provider.answer = script
        with RLM(**options(provider, fresh, **changes)) as rlm:
            return rlm.completion("root?", context)

    return run


def options(provider: Provider, fresh: Airlock, **changes: str) -> dict[str, Any]:
    return {
        "model": "top",
        "sub_model": ["mid", "deep"],
        "base_url": provider.url,
        "api_key": "key",
        "prices": PRICES,
        "backend": "bubblewrap",
        "policy": fresh.policy("development", **changes),
        "home": fresh.home,
    }


def nodes(fresh: Airlock, kind: str) -> dict[str, dict[str, Any]]:
    return {record["node"]: record["body"] for record in fresh.records() if record["type"] == kind}


def spent(fresh: Airlock, node: str) -> Decimal:
    """What the calls of a node and of all below it cost."""
    return sum(
        (
            Decimal(record["body"]["cost_usd"])
            for record in fresh.records()
            if record["type"] == "call.result" and f"{record['node']}.".startswith(f"{node}.")
        ),
        Decimal(0),
    )


def test_three_levels_with_contexts_of_every_kind(ask: Ask, provider: Provider, fresh: Airlock) -> None:
    script = Script(
        **{
            "root?": [
                cell("""
                    texts = rlm_query_batched(["text? A", "text? B"], [context[:4], "ß" * 3_000_000])
                    items = rlm_query("list?", [1, {"b": "ü"}, None])
                    FINAL([texts, items, rlm_query("own?"), rlm_query("own?", context)])
                """)
            ],
            "text?": [cell("FINAL(f'{type(context).__name__} {len(context)} ' + rlm_query('below?', context[:2]))")],
            "list?": [cell("FINAL(repr(list(context)))")],
            "own?": [cell("FINAL(context)")],
            "below?": [cell("FINAL(context + ' ' + rlm_query('last', 'of all') + ' ' + llm_query('too'))")],
        }
    )
    done = ask(script)
    below = "plain last\n\nof all plain too"
    texts = [f"str 4 so {below}", f"str 3000000 ßß {below}"]
    assert json.loads(done.response or "") == [texts, "[1, {'b': 'ü'}, None]", "some context", "some context"]
    opened, closed = nodes(fresh, "node.opened"), nodes(fresh, "node.closed")
    assert set(opened) == set(closed) == {f"root.{n}" for n in range(1, 6)} | {"root.1.1", "root.2.1"}
    assert {body["model"] for name, body in opened.items() if body["depth"] == 1} == {"mid"}
    assert {body["model"] for name, body in opened.items() if body["depth"] == 2} == {"deep"}
    # The models by depth: the root, two loops below it, and the plain calls of the last level.
    asked = {(seen.role, question(seen).split()[0], seen.body["model"]) for seen in provider.requests}
    assert asked == {
        ("root", "root?", "top"),
        *(("root", name, "mid") for name in ("text?", "list?", "own?")),
        ("root", "below?", "deep"),
        ("sub", "last", "deep"),
        ("sub", "too", "deep"),
    }
    assert nodes(fresh, "query.closed")["root"]["children"] == 7
    # Every node's cost is that of its own calls and of its children's; the query's is that of all.
    for name, body in closed.items():
        assert Decimal(body["cost_usd"]) == spent(fresh, name) > 0
    assert Decimal(done.cost_usd) == spent(fresh, "root") == PRICE * len(provider.requests)
    rows = dict(fresh.rows("SELECT id, spent FROM scopes WHERE id LIKE 'node:%' OR id LIKE 'query:%'"))
    by_node = {name.split(":")[2]: Decimal(nano) / 10**9 for name, nano in rows.items() if name.startswith("node:")}
    assert by_node == {name: Decimal(body["cost_usd"]) for name, body in closed.items()}
    assert all(body["unchanged"] for body in nodes(fresh, "context.verified").values())
    # Those that work on their parent's context leave it to the parent.
    assert {"root", *opened} - set(nodes(fresh, "context.verified")) == {"root.4", "root.5"}


@pytest.mark.parametrize(
    ("depth", "expected"), [(0, "NotPermitted: rlm_query is not permitted by policy"), (1, "plain why?\n\nbecause")]
)
def test_where_there_are_no_child_queries(ask: Ask, fresh: Airlock, depth: int, expected: str) -> None:
    script = Script(
        **{
            "root?": [
                cell("""
                    try:
                        FINAL(rlm_query("why?", "because"))
                    except SubCallError as error:
                        FINAL(f"{type(error).__name__}: {error}")
                """)
            ]
        }
    )
    assert ask(script, counts_depth=str(depth)).response == expected
    assert nodes(fresh, "node.opened") == {}
    refused = [record["body"]["kind"] for record in fresh.records() if record["type"] == "call.refused"]
    assert refused == (["not-permitted"] if depth == 0 else [])


def test_a_refusal_on_the_last_level_is_recorded_once(ask: Ask, fresh: Airlock) -> None:
    code = """
        try:
            rlm_query("why?", "because", model="anything")
        except NotPermitted as error:
            FINAL(type(error).__name__)
    """
    assert ask(Script(**{"root?": [cell(code)]}), counts_depth="1").response == "NotPermitted"
    assert sum(record["type"] == "call.refused" for record in fresh.records()) == 1


SPENDER = cell("print([llm_query('x' * 1000) for _ in range(100)])")
TELL = """
    try:
        FINAL(rlm_query("spend?", "x"))
    except ChildStopped as error:
        FINAL([type(error).__name__, error.kind, str(error), error.partial])
"""


def test_a_child_cannot_spend_more_than_its_share(ask: Ask, fresh: Airlock, provider: Provider) -> None:
    """Weakness 4 of the reference library: what children spend is lost to its budget."""
    script = Script(**{"root?": [cell(TELL)], "spend?": [SPENDER]})

    def answer(seen: Seen) -> Behaviour:
        if "last turn" in seen.text:
            return Say("FINAL(what I have)", usage=USED)
        return script(seen) if seen.role == "root" else Say("much", usage="most")

    done = ask(answer, money_query="0.4 USD", money_child_share="25", models_output_tokens="1000")
    assert done.status == "answered"
    kind, name, text, partial = json.loads(done.response or "")
    assert (kind, name, partial) == ("ChildStopped", "child-stopped", "what I have")
    assert text.startswith("child query root.1 ended without an answer: budget-exhausted: this call could cost ")
    refused = [record["node"] for record in fresh.records() if record["type"] == "call.refused"]
    assert set(refused) == {"root.1"}  # the child's own calls: that it ended is on record as its end
    limit = Decimal(nodes(fresh, "node.opened")["root.1"]["limit_usd"])
    closed = nodes(fresh, "node.closed")["root.1"]
    assert closed["status"] == "limit"
    # A quarter of what was left once the root had its first turn and its last word put by.
    assert Decimal("0.06") < limit < Decimal("0.1")
    assert limit / 2 < Decimal(closed["cost_usd"]) == spent(fresh, "root.1") <= limit
    assert Decimal(done.cost_usd) == spent(fresh, "root") < Decimal("0.12")


def test_a_share_too_small_for_a_child_is_said_so(ask: Ask, fresh: Airlock) -> None:
    script = Script(**{"root?": [cell(TELL)], "spend?": [SPENDER]})
    script.loops["root?"] = [
        cell(TELL.replace("ChildStopped", "BudgetExhausted").replace("error.partial", "error.asked"))
    ]
    done = ask(script, money_query="0.05 USD", money_child_share="1")
    assert "the child query's share of 0.000" in str(done.response)
    # Nothing was begun for it, and its context was not stored.
    assert nodes(fresh, "node.opened") == {}
    assert len(list((fresh.home / "contexts" / "data").iterdir())) == 1


def test_children_are_counted_over_the_whole_tree(ask: Ask, fresh: Airlock) -> None:
    script = Script(
        **{
            "root?": [cell("FINAL([str(item) for item in rlm_query_batched(['one?'] * 4, on_error='return')])")],
            "one?": [cell("FINAL(str(rlm_query_batched(['two?'] * 2, on_error='return')))")],
            "two?": [Say("FINAL(x)")],
        }
    )
    done = ask(script, counts_children="5", counts_children_in_flight="1")
    assert len(nodes(fresh, "node.opened")) == 5 == nodes(fresh, "query.closed")["root"]["children"]
    assert "child queries are used up" in str(done.response)
    refused = [record["body"] for record in fresh.records() if record["type"] == "call.refused"]
    assert {(body["kind"], body["limit"], body["left"]) for body in refused} == {("count-exceeded", "5", "0")}


async def test_children_at_once_are_bounded(provider: Provider, home: Path, fresh: Airlock) -> None:
    script = Script(**{"root?": [cell("FINAL(rlm_query_batched(['one?'] * 6))")], "one?": [Hang()]})
    provider.answer = script
    async with AsyncRLM(**options(provider, fresh, counts_children_in_flight="2")) as rlm:  # noqa: SIM117
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rlm.completion, "root?", "text")
            await anyio.to_thread.run_sync(provider.wait, "root", 3)
            started = [record["node"] for record in fresh.records() if record["type"] == "sandbox.started"]
            assert sorted(started) == ["root", "root.1", "root.2"]
            tasks.cancel_scope.cancel()
    assert len(provider.of("root")) == 3
    closed = nodes(fresh, "node.closed")
    assert {body["status"] for body in closed.values()} == {"cancelled"}
    assert set(closed) == set(nodes(fresh, "node.opened"))
    assert fresh.closing()["status"] == "cancelled"
    # What was under way may have been billed.
    assert Decimal(fresh.closing()["cost_usd"]) == spent(fresh, "root") > 0


async def test_the_host_holds_no_context_for_a_child_that_runs(provider: Provider, home: Path, fresh: Airlock) -> None:
    """It is in the store by then. A cell may begin as many children as it likes to, each with a large context."""
    code = "FINAL(rlm_query_batched(['one?'] * 2, ['x' * 2_000_000] * 2))"
    provider.answer = Script(**{"root?": [cell(code)], "one?": [Hang()]})
    async with AsyncRLM(**options(provider, fresh)) as rlm:  # noqa: SIM117
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rlm.completion, "root?", "text")
            await anyio.to_thread.run_sync(provider.wait, "root", 3)  # both children are running
            held = [found for found in gc.get_objects() if type(found) is Given and found.pieces]
            assert [len(found.pieces) for found in held] == []
            tasks.cancel_scope.cancel()


def test_a_cell_that_ends_ends_its_children(ask: Ask, provider: Provider, fresh: Airlock) -> None:
    script = Script(**{"root?": [cell("rlm_query('hang?')"), Say("FINAL(went on)")], "hang?": [Hang()]})
    done = ask(script, time_cell="1500 ms")
    assert (done.status, done.response) == ("answered", "went on")
    assert nodes(fresh, "node.closed")["root.1"]["status"] == "cancelled"
    ended = [record["node"] for record in fresh.records() if record["type"] == "sandbox.ended"]
    assert ended == ["root.1", "root"]


def test_children_end_with_the_querys_time(ask: Ask, fresh: Airlock) -> None:
    script = Script(**{"root?": [cell("rlm_query('spin?')")], "spin?": [cell("while True: pass")]})
    began = time.monotonic()
    done = ask(script, time_query="3 s")
    assert time.monotonic() - began < 10
    assert (done.status, done.reason.split(":")[0]) == ("limit", "time-exceeded")
    assert nodes(fresh, "node.closed")["root.1"]["status"] in ("limit", "cancelled")


def test_a_childs_sandbox_that_dies_is_not_its_parents_end(ask: Ask, fresh: Airlock) -> None:
    forge = cell(
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'junk\\n' * 10000)\n    except OSError: pass"
    )
    script = Script(**{"root?": [cell(TELL)], "spend?": [forge, Say("FINAL(alive)")]})
    done = ask(script)
    assert done.status == "answered"
    assert fresh.closing()["status"] == "answered"
    assert set(nodes(fresh, "node.closed")) == {"root.1"}


def test_a_childs_sandbox_that_cannot_be_started_is_not_its_parents_end(
    ask: Ask, fresh: Airlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, launched = Bubblewrap.launch, list[SandboxSpec]()

    async def short_of_files(self: Bubblewrap, spec: SandboxSpec) -> Guest:
        launched.append(spec)
        if len(launched) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await launch(self, spec)

    monkeypatch.setattr(Bubblewrap, "launch", short_of_files)
    done = ask(Script(**{"root?": [cell(TELL)], "spend?": [Say("FINAL(x)")]}))
    assert "sandbox-unusable: a sandbox cannot be started now: Too many open files" in str(done.response)
    assert nodes(fresh, "node.closed")["root.1"]["status"] == "failed"


def test_a_question_with_its_material_in_it(ask: Ask, fresh: Airlock) -> None:
    """As users of the reference library write them: all in one text, longer than a question may be."""
    script = Script(
        **{
            "root?": [cell("FINAL(rlm_query('Count the x: ' + 'x' * 40_000))")],
            "The": [cell("FINAL(str(context.count('x')) + context[:9])")],
        }
    )
    assert ask(script).response == "40001Count the"
    assert nodes(fresh, "node.opened")["root.1"]["context"]["chars"] == 40_013


HOSTILE = {
    "a context that was not begun": "calls()._exchange('rlm_query', 'q', None, 7)",
    "a context that was used": "n = calls()._hand_over('x'); calls()._exchange('rlm_query', 'child?', None, n); "
    "calls()._exchange('rlm_query', 'child?', None, n)",
    "more of a context that was not begun": "calls()._exchange('context_more', 'x', None, 3)",
    "a context without a number": "calls()._exchange('context_more', 'x', None, None)",
    "a context that is too large": "rlm_query('child?', 'x' * 3_000_000)",
    "contexts that are too large together": "[calls()._hand_over('x' * 900_000) for _ in range(3)]",
    "a context of nothing but pieces": "n = calls()._hand_over('x')\nwhile True: calls()._exchange('context_more', '', "
    "None, n)",
    "an unknown model": "rlm_query('child?', 'x', model='local:/etc/passwd')",
    "a question whose material is too large": "rlm_query('q' * 3_000_000)",
    "a question that is too long": "rlm_query('q' * 40_000, 'x')",
    "a batch that is too large": "rlm_query_batched(['child?'] * 101)",
    "plain calls in a batch that is too large": "llm_query_batched(['child?'] * 101)",
}
FOUND = "calls = llm_query.__closure__[0].cell_contents"


@pytest.mark.parametrize("attack", HOSTILE)
def test_what_a_hostile_cell_says_of_contexts_is_refused(ask: Ask, fresh: Airlock, attack: str) -> None:
    code = f"{FOUND}\ntry:\n{textwrap.indent(HOSTILE[attack], '    ')}\nexcept SubCallError as error:\n"
    code += "    FINAL(type(error).__name__ + ': ' + str(error))"
    script = Script(**{"root?": [cell(code), Say("FINAL(nothing was refused)")], "child?": [Say("FINAL(x)")]})
    done = ask(script, content_child_context="2 MB", counts_batch="100")
    assert done.status == "answered"
    kind = (done.response or "").split(":")[0]
    assert kind == ("NotPermitted" if "not begun" in done.response + attack or "used" in attack else kind)  # pyright: ignore
    assert kind in ("NotPermitted", "CountExceeded"), done.response
    assert "\n" not in (done.response or "")


def test_contexts_that_cannot_be_handed_over_are_faults_of_the_cell(ask: Ask) -> None:
    code = """
        said = []
        for made in (5, {"a": 1}, [object()], [float("nan")], b"bytes"):
            try:
                rlm_query("child?", made)
            except (TypeError, ValueError) as error:
                said.append(type(error).__name__)
        for contexts in ([], ["a", "b"]):
            try:
                rlm_query_batched(["child?"], contexts)
            except ValueError as error:
                said.append(str(error))
        FINAL(said)
    """
    script = Script(**{"root?": [cell(code)], "child?": [Say("FINAL(x)")]})
    told = ask(script).response
    assert told == (
        '["TypeError", "TypeError", "TypeError", "ValueError", "TypeError", '
        '"1 queries and 0 contexts: there has to be one for each", '
        '"1 queries and 2 contexts: there has to be one for each"]'
    )


def test_contexts_that_the_store_refuses_are_no_fault_of_the_providers(ask: Ask) -> None:
    code = """
        said = [rlm_query("child?", [])]
        nested = []
        for _ in range(300):
            nested = [nested]
        try:
            rlm_query("child?", nested)
        except SubCallError as error:
            said.append([type(error).__name__, error.kind])
        FINAL(said)
    """
    script = Script(**{"root?": [cell(code)], "child?": [cell("FINAL(repr(context))")]})
    assert ask(script).response == '["[]", ["SubCallError", "bad-context"]]'


def test_a_document_that_is_too_large_to_be_a_str_can_be_a_childs_context(ask: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large.txt").write_text("ab" * 20_000_000)
    code = """
        text = context[0]["text"]
        FINAL([type(text).__name__, rlm_query("child?", text)])
    """
    script = Script(**{"root?": [cell(code)], "child?": [cell("FINAL(len(context))")]})
    done = ask(script, folder, sandbox_memory="128 MiB")
    assert done.response == '["LazyText", "40000000"]'


def test_arguments_that_make_no_sense(ask: Ask, provider: Provider) -> None:
    """What is no text is asked as the text that it prints as; what is no model or no list is a fault of the cell."""
    code = """
        said = [llm_query(float("nan")), llm_query(-1), llm_query(None)]
        wrong = [
            lambda: llm_query("x", model=-1),
            lambda: llm_query("x", model=float("nan")),
            lambda: rlm_query("x", "context", model=["mid"]),
            lambda: llm_query_batched("one text"),
            lambda: llm_query_batched(5),
            lambda: llm_query_batched(["x"], on_error="ignore"),
            lambda: rlm_query_batched(["x"], 5),
        ]
        for call in wrong:
            try:
                call()
                said.append("nothing")
            except (TypeError, ValueError) as error:
                said.append(type(error).__name__)
        FINAL(said)
    """
    told = json.loads(ask(Script(**{"root?": [cell(code)]})).response or "")
    assert told[:3] == ["plain nan", "plain -1", "plain None"]
    assert told[3:] == ["TypeError"] * 5 + ["ValueError", "TypeError"]
    assert len(provider.of("sub")) == 3
