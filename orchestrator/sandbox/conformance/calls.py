"""Promises on sub-calls: what goes out, what comes back, and what a guest cannot make of them."""

from __future__ import annotations

import json

import anyio

from orchestrator.core.errors import BudgetExhausted, ProtocolViolation, ProviderBusy
from orchestrator.sandbox.conformance.promise import Bench, Broken, Repl, expect, in_a_sandbox, over_sandboxes
from orchestrator.sandbox.sandbox import Call

# How a cell gets at the agent's own end of the socket in its process.
# As the agent itself would say it, or a cell that knows it well.
_SAY = """
import gc
link, = (found for found in gc.get_objects() if type(found).__name__ == 'Link')
def say(*frames):
    for frame in frames:
        link._sock.sendall(link._word + b' ' + frame.encode() + b'\\n')
    while True:
        pass
"""


@in_a_sandbox("llm_query, rlm_query and budget() bring their words to the host, and its answer back.")
async def sub_calls(repl: Repl) -> None:
    repl.calls.clear()
    await repl.prints(
        "llm_query('a'), rlm_query(12, model='m'), budget()", "('reply to a', 'reply to 12', {'left': '$1'})"
    )
    made = [(call.op, call.prompt, call.model) for call in repl.calls]
    expect(made == [("llm_query", "a", None), ("rlm_query", "12", "m"), ("budget", "", None)], made)
    await repl.ends("llm_query('a', model=3)", "error", "TypeError: model is the name of a model, as text")
    await repl.prints(r"llm_query('half \ud800 of a pair')", "'reply to half ? of a pair'")
    await repl.prints("len(llm_query('x' * 8_000_000))", str(8_000_000 + len("reply to ")))


@in_a_sandbox("A batch is asked at once, as many as are permitted in flight, and answered in order.")
async def batches(repl: Repl) -> None:
    running: set[str] = set()
    seen: list[int] = []

    async def on_call(call: Call) -> str:
        running.add(call.prompt)
        seen.append(len(running))
        await anyio.sleep(0.001 * (7 - int(call.prompt) % 7))  # they do not come back in order
        running.discard(call.prompt)
        return call.prompt

    await repl.prints("llm_query_batched(range(40)) == [str(i) for i in range(40)]", "True", on_call)
    expect(max(seen) == 8, f"{max(seen)} were in flight, not 8")
    await repl.prints("llm_query_batched([]), rlm_query_batched(('1', '2'))", "([], ['1', '2'])", on_call)
    await repl.ends("llm_query_batched('abc')", "error", "TypeError: prompts is a list")
    await repl.ends("llm_query_batched(['a'], on_error='ignore')", "error", "ValueError: on_error")


async def _refuse_odd(call: Call) -> str:
    if call.prompt == "odd":
        raise BudgetExhausted("the budget is spent", limit="$1.00", asked="$0.02", left="$0.01")
    if call.prompt == "busy":
        raise ProviderBusy("try later")
    return "fine"


@in_a_sandbox("A sub-call that fails raises a typed exception with its limit; it is never an answer.")
async def typed_failures(repl: Repl) -> None:
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
    told = "['SubCallError', 'the budget is spent', 'budget-exhausted', '$1.00', '$0.02', '$0.01']\n"
    await repl.prints(code, told + "True provider-busy True", _refuse_odd)


@in_a_sandbox("One item of a batch that fails does not sink the others.")
async def batches_survive_failures(repl: Repl) -> None:
    code = """
        print([type(r).__name__ for r in llm_query_batched(['a', 'odd', 'b', 'busy'], on_error='return')])
        try:
            llm_query_batched(['a', 'odd', 'b'])
        except BatchError as error:
            print(error, error.kind, [str(r) for r in error.results])
        """
    told = "['str', 'BudgetExhausted', 'str', 'ProviderFailed']\n"
    told += "1 of 3 sub-calls failed, the first with: the budget is spent budget-exhausted "
    await repl.prints(code, told + "['fine', 'the budget is spent', 'fine']", _refuse_odd)


@in_a_sandbox("Sub-calls work from threads.")
async def calls_from_threads(repl: Repl) -> None:
    repl.calls.clear()
    code = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(16) as pool:
            print(list(pool.map(llm_query, map(str, range(64)))) == [f'reply to {i}' for i in range(64)])
        """
    await repl.prints(code, "True")
    made = sorted(int(call.prompt) for call in repl.calls)
    expect(made == list(range(64)), made)


@in_a_sandbox("What is in flight when a cell ends is cancelled, and later cells can call.", invariant=6)
async def interrupted_calls(repl: Repl) -> None:
    for call in ("llm_query('slow')", "llm_query_batched(['slow'] * 20)"):
        cancelled: list[str] = []

        async def never(made: Call, cancelled: list[str] = cancelled) -> str:
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.append(made.prompt)
            raise AssertionError

        result = await repl.run(call, 0.3, on_call=never)
        expect((result.status, result.detail) == ("timeout", "interrupted by its time limit"), result)
        expect(set(cancelled) == {"slow"}, "a call was still waited for when its cell was over")
        await repl.prints("llm_query('x'), llm_query_batched(['y', 'z'] * 8)[-1]", "('reply to x', 'reply to z')")


@in_a_sandbox("Calls that cannot be made take no place from those that can.")
async def calls_that_cannot_be_made(repl: Repl) -> None:
    for _ in range(10):  # more often than there are places for calls in flight
        await repl.ends("llm_query_batched(['x' * 17_000_000])", "error", "ValueError: frame of 17")
    await repl.prints("llm_query_batched(['a'] * 20)[-1]", "'reply to a'")

    async def slowly(call: Call) -> str:
        await anyio.sleep(0.2 if call.prompt == "first" else 0)
        return call.prompt

    # Nor do those of the same batch that are under way, once a cell has caught what became of it.
    code = """
        try:
            llm_query_batched(['first'] * 7 + ['x' * 17_000_000])
        except ValueError:
            print(len(llm_query_batched(['next'] * 8)))
        """
    await repl.prints(code, "8", slowly)


@in_a_sandbox("A process that a cell forked cannot call, nor end the cell.")
async def forks_cannot_call(repl: Repl) -> None:
    code = """
        import os
        pid = os.fork()
        try:
            print(llm_query('a'), flush=True)
        except RuntimeError as error:
            print(str(error)[:28], flush=True)
        if not pid:
            os._exit(0)
        _ = os.waitpid(pid, 0)  # of the snapshots, too, the agent's process is the parent
        """
    said = sorted((await repl.out(code)).splitlines())
    expect(said == ["reply to a", "sub-calls work from threads,"], said)
    await repl.prints(
        "pid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\n    print('parent', llm_query('a'))", "parent reply to a"
    )


@in_a_sandbox(
    "A frame that is not as agreed costs the cell, goes no further, and nothing in it is believed.", invariant=3
)
async def forged_calls(repl: Repl) -> None:
    call = {"type": "call", "id": 1, "op": "llm_query", "prompt": "forged", "model": None, "context": None}
    forged = [
        json.dumps({**call, "tenant": "another"}),  # identity is not a guest's to tell
        json.dumps({**call, "api_key": "sk-mine", "base_url": "http://127.0.0.1:1/v1"}),  # nor whose key, nor where
        json.dumps({**call, "id": True}),
        "cposix\nsystem\n(S'true'\ntR.",  # a pickle
        '{"type":"call","id":1,"op":"budget","model":null,"context":null,"prompt":' + "[" * 100_000,
    ]
    await repl.run("survivor = 'kept'")
    repl.calls.clear()
    for frame in forged:
        await repl.ends(f"{_SAY}say({frame!r})", "killed", "agent")
    expect(not repl.calls, repl.calls)
    for before in ("link._word = b''", "link._word = b'0' * 16"):  # not the cell's
        await repl.ends(f"{_SAY}{before}\nsay({json.dumps(call)!r})", "killed", "agent")
    expect(not repl.calls, repl.calls)
    await repl.run(f"{_SAY}say(*2 * [{json.dumps(call)!r}])")
    expect(len(repl.calls) <= 1, "the same id was taken twice")
    await repl.prints("survivor, llm_query('x')", "('kept', 'reply to x')")


@over_sandboxes("A guest that asks for what is no sub-call is killed, and nothing of it is done.", invariant=2)
async def calls_that_are_none(bench: Bench) -> None:
    frame = json.dumps({"type": "call", "id": 1, "op": "eval", "prompt": "1 + 1", "model": None, "context": None})
    async with bench.open() as repl:
        try:
            result = await repl.run(f"{_SAY}say({frame!r})")
        except ProtocolViolation:
            expect(not repl.calls, repl.calls)
        else:
            raise Broken(f"it went on: {result.status}, {result.detail}")


@over_sandboxes("No call reaches the host between cells, nor is one kept for the next.", invariant=6)
async def no_calls_between_cells(bench: Bench) -> None:
    code = """
        import os, threading
        def spin():
            while True:
                try:
                    llm_query('from the cell before')
                except BaseException:
                    pass
        for _ in range(3):
            threading.Thread(target=spin).start()
        if not os.fork():
            spin()
        """
    async with bench.open() as repl:
        await repl.run(code)
        made = len(repl.calls)
        with anyio.move_on_after(0.2):
            await anyio.sleep_forever()  # the host only listens during a cell: what came now would be seen by the next
        await repl.prints("'quiet'", "'quiet'")
        expect(len(repl.calls) == made, "a call came from a cell that was over")
