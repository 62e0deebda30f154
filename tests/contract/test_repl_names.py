"""What a cell is promised: the sub-calls, the answer, and the names that are always there."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from orchestrator.core.errors import BudgetExhausted, ProviderBusy, SandboxDied, StoreError
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.sandbox import Call
from tests.sandboxes import MIB, Repl, open_repl

pytestmark = pytest.mark.anyio

# Sub-calls


async def test_calls_and_their_arguments(repl: Repl):
    assert await repl.out("llm_query('a'), rlm_query(12, model='m'), budget()") == (
        "('reply to a', 'reply to 12', {'left': '$1'})"
    )
    assert [(c.op, c.prompt, c.model) for c in repl.calls] == [
        ("llm_query", "a", None),
        ("rlm_query", "12", "m"),
        ("budget", "", None),
    ]
    assert (await repl.run("llm_query('a', model=3)")).detail == "TypeError: model is the name of a model, as text"
    assert await repl.out(r"llm_query('half \ud800 of a pair')") == "'reply to half ? of a pair'"
    assert await repl.out("len(llm_query('x' * 8_000_000))") == str(8_000_000 + len("reply to "))
    assert (await repl.run("llm_query('x' * 17_000_000)")).detail.startswith("ValueError: frame of 17")


async def test_a_batch_runs_at_once_and_answers_in_order(repl: Repl):
    running, most = 0, 0

    async def on_call(call: Call) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001 * (7 - int(call.prompt) % 7))
        running -= 1
        return call.prompt

    assert await repl.out("llm_query_batched(range(40)) == [str(i) for i in range(40)]", on_call=on_call) == "True"
    assert most == 8
    assert await repl.out("llm_query_batched([]), rlm_query_batched(('1', '2'))", on_call=on_call) == "([], ['1', '2'])"
    assert (await repl.run("llm_query_batched('abc')")).detail.startswith("TypeError: prompts is a list")
    assert (await repl.run("llm_query_batched(['a'], on_error='ignore')")).detail.startswith("ValueError: on_error")


async def refuse_odd(call: Call) -> str:
    if call.prompt == "odd":
        raise BudgetExhausted("the budget is spent", limit="$1.00", asked="$0.02", left="$0.01")
    if call.prompt == "busy":
        raise ProviderBusy("try later")
    return "fine"


async def test_a_failed_call_raises_a_typed_exception(repl: Repl):
    code = """
        try:
            llm_query('odd')
        except BudgetExhausted as error:
            print([type(error).__mro__[1].__name__, str(error), error.kind, error.limit, error.asked, error.left])
        try:
            llm_query('busy')
        except ProviderFailed as error:
            print(isinstance(error, SubCallError), error.kind, error.limit == '')
        """
    assert await repl.out(code, on_call=refuse_odd) == (
        "['SubCallError', 'the budget is spent', 'budget-exhausted', '$1.00', '$0.02', '$0.01']\n"
        "True provider-busy True"
    )


async def test_a_failed_item_does_not_sink_its_batch(repl: Repl):
    code = """
        print([type(r).__name__ for r in llm_query_batched(['a', 'odd', 'b', 'busy'], on_error='return')])
        try:
            llm_query_batched(['a', 'odd', 'b'])
        except BatchError as error:
            print(error, error.kind, [str(r) for r in error.results])
        """
    assert await repl.out(code, on_call=refuse_odd) == (
        "['str', 'BudgetExhausted', 'str', 'ProviderFailed']\n"
        "1 of 3 sub-calls failed, the first with: the budget is spent budget-exhausted "
        "['fine', 'the budget is spent', 'fine']"
    )


async def test_threads_may_call(repl: Repl):
    code = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(16) as pool:
            print(list(pool.map(llm_query, map(str, range(64)))) == [f'reply to {i}' for i in range(64)])
        """
    assert await repl.out(code) == "True"
    assert sorted(int(call.prompt) for call in repl.calls) == list(range(64))


@pytest.mark.parametrize("call", ["llm_query('slow')", "llm_query_batched(['slow'] * 20)"])
async def test_an_interrupt_while_calls_are_in_flight_leaves_calls_working(repl: Repl, call: str):
    cancelled: list[str] = []

    async def never(made: Call) -> str:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(made.prompt)
        raise AssertionError

    result = await repl.run(f"kept = 'kept'\n{call}", 0.3, on_call=never)
    assert (result.status, result.detail) == ("timeout", "interrupted by its time limit")
    assert set(cancelled) == {"slow"}  # before `run` returned: nothing is asked on behalf of a cell that is over
    assert await repl.out("kept, llm_query('x'), llm_query_batched(['y', 'z'] * 8)[-1]") == (
        "('kept', 'reply to x', 'reply to z')"
    )


async def test_many_threads_fit_into_a_small_sandbox(backend: Backend, home: Path):
    code = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(40) as pool:
            print(len({*pool.map(llm_query, range(200))}))
        """
    async with open_repl(backend, home, memory_bytes=128 * MIB) as repl:
        assert await repl.out(code) == "200"


async def test_calls_that_cannot_be_made_leave_calls_working(repl: Repl):
    for _ in range(10):  # more often than there are places for calls in flight
        assert (await repl.run("llm_query_batched(['x' * 17_000_000])")).detail.startswith("ValueError: frame of 17")
    assert await repl.out("llm_query_batched(['a'] * 20)[-1]") == "'reply to a'"


async def test_a_forked_process_may_not_call(repl: Repl):
    code = """
        import os
        pid = os.fork()
        try:
            print(llm_query('a'), flush=True)
        except RuntimeError as error:
            print(str(error)[:28], flush=True)
        if not pid:
            os._exit(0)
        os.wait()
        print(llm_query('b'))
        """
    assert sorted((await repl.out(code)).splitlines()) == ["reply to a", "reply to b", "sub-calls work from threads,"]


async def test_a_forked_process_that_comes_to_the_cells_end_does_not_end_the_cell(repl: Repl):
    code = """
        import os
        if os.fork():
            os.wait()
            print('parent', llm_query('a'))
        """
    assert await repl.out(code) == "parent reply to a"
    assert await repl.out("os.getpid() > 0") == "True"


async def test_a_call_against_the_agents_rules_costs_the_cell_and_not_the_sandbox(repl: Repl):
    await repl.run("kept = 'kept'")
    forged = json.dumps({"type": "call", "id": 7, "op": "llm_query", "prompt": "forged", "model": None}) + "\n"
    result = await repl.run(
        f"""
        import gc
        (link,) = [o for o in gc.get_objects() if type(o).__name__ == 'Link']
        link._sock.sendall({forged!r}.encode() * 2)
        while True:
            pass
        """
    )
    assert (result.status, "sub-calls against the agent's rules" in result.detail) == ("killed", True)
    assert len(repl.calls) <= 1
    assert await repl.out("kept, llm_query('x')") == "('kept', 'reply to x')"


async def test_a_machine_fault_in_a_call_ends_the_sandbox(repl: Repl):
    async def broken(_call: Call) -> str:
        raise StoreError("the journal cannot be written")

    with pytest.raises(StoreError, match="journal"):
        await repl.run("llm_query('x')", on_call=broken)
    with pytest.raises(SandboxDied):
        await repl.run("1")


# The names of the REPL


async def test_scaffold_names_come_back(repl: Repl):
    names = ["llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched", "budget", "SubCallError", "BatchError"]
    names += ["FINAL", "FINAL_VAR", "SHOW_VARS", "answer"]
    assert (await repl.run(f"for name in {names}: globals()[name] = None\ncontext = 'mine'")).status == "ok"
    assert await repl.out(f"[name for name in {names} if globals()[name] is None], context") == "([], None)"
    assert (await repl.run(f"for name in {names}: del globals()[name]")).status == "ok"
    assert await repl.out(f"[name for name in {names} if name not in globals()]") == "[]"
    await repl.run("globals().clear()")
    assert await repl.out("llm_query('x')") == "'reply to x'"


async def test_show_vars(repl: Repl):
    await repl.run("a = [1]\n_hidden = 2\ndef f(): pass")
    assert await repl.out("SHOW_VARS()") == "{'a': 'list', 'f': 'function'}"


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("FINAL('done')", "done"),
        ("FINAL({'a': [1, None, 'é']})", '{"a": [1, null, "é"]}'),
        ("FINAL({1, 2} - {2})", "{1}"),
        (r"FINAL('half \ud800')", "half ?"),
        ("x = 'value'\nFINAL_VAR('x')", "value"),
        ("x = 12\nFINAL_VAR(x)", "12"),
        ("FINAL_VAR('not a name')", "not a name"),
        ("answer['content'] = 'kept'", None),
        ("answer['content'] = 'kept'\nanswer['ready'] = True", "kept"),
        ("answer = {'content': 'other', 'ready': True}", "other"),
        ("answer = 'nothing of the kind'", None),
        ("FINAL('before')\nFINAL('after')", "after"),
        ("FINAL('a' * 100_000)", "a" * 100_000),
    ],
)
async def test_answers(repl: Repl, code: str, answer: str | None):
    result = await repl.run(code)
    assert (result.status, result.answer) == ("ok", answer)
    assert (await repl.run("1")).answer is None  # an answer is given once


async def test_answers_that_cannot_be_taken(repl: Repl):
    large = await repl.run("FINAL('a' * 100_001)")
    assert (large.status, large.answer) == ("error", None)
    assert large.detail == "ValueError: the answer has 100001 characters, the limit is 100000: give a shorter one"
    assert (await repl.run("FINAL_VAR('missing')")).detail.startswith(
        "NameError: FINAL_VAR: there is no variable 'missing'"
    )
    evil = await repl.run("class E:\n    def __str__(self): raise SystemExit\nFINAL(E())")
    assert evil.status in ("ok", "error")
    failed = await repl.run("FINAL('given')\n1 / 0")
    assert (failed.status, failed.answer) == ("error", "given")
