"""Promises on the REPL: state, output, names, answers and the context, as a cell's author sees them."""

from __future__ import annotations

import anyio

from orchestrator.guest import wire
from orchestrator.sandbox.conformance.promise import MIB, Bench, Repl, expect, in_a_sandbox, over_sandboxes
from orchestrator.sandbox.sandbox import Call

SCAFFOLD = (
    *("llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched", "budget", "SubCallError", "BatchError"),
    *("FINAL", "FINAL_VAR", "SHOW_VARS", "answer"),
)


@in_a_sandbox("What a cell defines is there in the next one, and the value of its last line is printed.")
async def state_between_cells(repl: Repl) -> None:
    await repl.prints("ours = 20\nours + 1", "21")
    await repl.prints("def twice():\n    return ours * 2\nNone", "")
    await repl.prints("print('a'); twice()", "a\n40")
    await repl.prints("ours = 'new'\n'déjà vu €😀'", "'déjà vu €😀'")


@in_a_sandbox("The end of a cell names what its code newly defined, and nothing of the REPL's own.")
async def new_names(repl: Repl) -> None:
    expect((first := await repl.run("n_a = 1\n_n = 2\nanswer = {}\ncontext = 3\nFINAL = 4")).names == ("n_a",), first)
    expect((second := await repl.run("n_a = 2\nn_c = 3")).names == ("n_c",), second)
    many = await repl.run("for n_i in range(200): globals()[f'n_v{n_i:03}'] = n_i")
    expect(many.names[:2] == ("n_i", "n_v000") and len(many.names) == wire.MAX_NAMES, many.names)
    await repl.prints("{k: v for k, v in SHOW_VARS().items() if k in ('n_a', '_n', 'budget')}", "{'n_a': 'int'}")


@in_a_sandbox("An exception ends its cell alone; the traceback names the cell's lines, and nothing of the agent.")
async def exceptions(repl: Repl) -> None:
    await repl.run("def divide(a):\n    b = 0\n    return a / b")
    trace = (await repl.ends("dividend = 1\n\ndivide(dividend)", "error", "ZeroDivisionError: division by zero")).text(
        "err"
    )
    expect(", line 3, in <module>\n    divide(dividend)" in trace and "agent" not in trace, trace)
    expect(", line 3, in divide\n    return a / b" in trace, trace)
    expect("line 2" in (await repl.ends("x = 1\nx = = 2", "error", "SyntaxError")).text("err"), "a line is not named")
    await repl.ends("def f(): f()\nf()", "error", "RecursionError")
    await repl.ends("import sys; sys.exit(3)", "error", "SystemExit: 3")
    await repl.ends("class E:\n    def __str__(self): 1 / 0\nraise SystemExit(E())", "error", "SystemExit: E")
    await repl.ends("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "error", "E")
    await repl.prints("dividend", "1")


@in_a_sandbox("Output is told while the cell runs, in the order in which it was written.")
async def output_in_order(repl: Repl) -> None:
    seen: list[tuple[str, str]] = []
    came = anyio.Event()

    def on_output(stream: str, text: str) -> None:
        nonlocal came
        seen.append((stream, text))
        came.set()
        came = anyio.Event()

    async def arrived(call: Call) -> str:  # the streams are two pipes: which was first is known if there is a pause
        while len(seen) < int(call.prompt):
            await came.wait()
        return ""

    code = """
        import sys
        for i in range(3):
            print("out", i, flush=True)
            llm_query(2 * i + 1)
            print("err", i, file=sys.stderr, flush=True)
            llm_query(2 * i + 2)
        """
    result = await repl.run(code, on_call=arrived, on_output=on_output)
    expect(result.output == seen == [(s, f"{s} {i}\n") for i in range(3) for s in ("out", "err")], result)


@in_a_sandbox("Of a cell's output, what is beyond the cap is dropped and counted, however it is written.")
async def output_is_capped(repl: Repl) -> None:
    floods = {
        "for _ in range(20_000): print('y' * 99)": 2_000_000,
        "print('z' * (32 << 20), end='')": 32 * MIB,
        "import os\nfor _ in range(64): os.write(2, b'e' * 65536)": 64 * 65536,
    }
    for code, written in floods.items():
        result = await repl.run(code)
        shown = sum(len(text) for _, text in result.output)
        expect((result.status, shown, result.dropped) == ("ok", MIB, written - MIB), (code, shown, result.dropped))


@in_a_sandbox("Bytes that are no text are text by the time they are output.")
async def output_is_text(repl: Repl) -> None:
    result = await repl.run("import os\nos.write(1, bytes(range(256)) * 4 + b'\\xe2\\x82')")
    expect(result.text("out").count("\ufffd") >= 4 and "\0" in result.text("out"), result)
    await repl.prints("import os, time\nos.write(1, b'\\xe2\\x82'); time.sleep(0.05); os.write(1, b'\\xac')", "€1")


@in_a_sandbox("The names of the REPL are there in every cell, whatever the one before did to them.")
async def names_come_back(repl: Repl) -> None:
    names = list(SCAFFOLD)
    await repl.prints(f"for name in {names}: globals()[name] = None\ncontext = 'mine'", "")
    await repl.prints(f"[name for name in {names} if globals()[name] is None], context == 'mine'", "([], False)")
    await repl.prints(f"for name in {names}: del globals()[name]", "")
    await repl.prints(f"[name for name in {names} if name not in globals()]", "[]")
    await repl.run("globals().clear()")
    await repl.prints("llm_query('x')", "'reply to x'")


ANSWERS: dict[str, str | None] = {
    "FINAL('done')": "done",
    "FINAL({'a': [1, None, 'é']})": '{"a": [1, null, "é"]}',
    "FINAL({1, 2} - {2})": "{1}",
    r"FINAL('half \ud800')": "half ?",
    "named = 'value'\nFINAL_VAR('named')": "value",
    "named = 12\nFINAL_VAR(named)": "12",
    "FINAL_VAR('not a name')": "not a name",
    "answer['content'] = 'kept'": None,
    "answer['content'] = 'kept'\nanswer['ready'] = True": "kept",
    "answer = {'content': 'other', 'ready': True}": "other",
    "answer = 'nothing of the kind'": None,
    "FINAL('before')\nFINAL('after')": "after",
    "FINAL('a' * 100_000)": "a" * 100_000,
}


@in_a_sandbox("An answer is taken from FINAL, FINAL_VAR or `answer`, and once.")
async def answers(repl: Repl) -> None:
    for code, answer in ANSWERS.items():
        result = await repl.run(code)
        expect((result.status, result.answer) == ("ok", answer), (code, result))
        expect((await repl.run("1")).answer is None, f"{code}: the answer came twice")
    failed = await repl.run("FINAL('given')\n1 / 0")
    expect((failed.status, failed.answer) == ("error", "given"), failed)


@in_a_sandbox("An answer that is too large, or is not there, is an error that says so.")
async def answers_that_cannot_be_taken(repl: Repl) -> None:
    large = "ValueError: the answer has 100001 characters, the limit is 100000: give a shorter one"
    expect((await repl.ends("FINAL('a' * 100_001)", "error", large)).answer is None, "it was taken")
    missing = await repl.ends("FINAL_VAR('missing')", "error", "NameError: FINAL_VAR: there is no variable 'missing'")
    expect(missing.answer is None, "it was taken")
    evil = await repl.run("class E:\n    def __str__(self): raise SystemExit\nFINAL(E())")
    expect(evil.status in ("ok", "error"), evil)


@over_sandboxes("A context is a str, a list or a JSON value, as its kind says.")
async def contexts(bench: Bench) -> None:
    kinds: list[tuple[object, str, str]] = [
        ("text é", "text", "'text é'"),
        (
            {"a.txt": "first", "sub/b.txt": "second é"},
            "documents",
            "[{'path': 'a.txt', 'text': 'first'}, {'path': 'sub/b.txt', 'text': 'second é'}]",
        ),
        ([{"n": 1}, [2]], "jsonl", "[{'n': 1}, [2]]"),
        ({"k": [1, 2]}, "json", "{'k': [1, 2]}"),
    ]
    for value, kind, shown in kinds:
        async with bench.open() as repl:
            repl.attach(value, kind)  # pyright: ignore[reportArgumentType]
            await repl.prints("context", shown)


@over_sandboxes("A context that is large for the sandbox's memory is a view that decodes what is touched.")
async def large_contexts_are_lazy(bench: Bench) -> None:
    text = "0123456789" * (2 * MIB) + "needle" + "e" * 100
    async with bench.open(memory_bytes=64 * MIB) as repl:
        repl.attach(text)
        facts = f"('LazyText', {len(text)}, {20 * MIB}, 'needle')"
        await repl.prints("type(context).__name__, len(context), context.find('needle'), context[-106:-100]", facts)
        await repl.prints("context.search('ne+dle').group()", "'needle'")
        peak = (await repl.sandbox.usage()).peak_memory_bytes
        expect(peak is None or peak < 64 * MIB, f"it took {peak} bytes")


@over_sandboxes("A context is attached to a sandbox that runs already, and is still there after a crash.")
async def contexts_are_hot(bench: Bench) -> None:
    async with bench.open() as repl:
        await repl.prints("x = 1\nprint(context)", "None")
        repl.attach("hot")
        await repl.run("import os\nos._exit(1)")  # the cell that would have been the first to see it
        await repl.prints("context, x", "('hot', 1)")
        await repl.run("context = 'overwritten'\nimport os\nos._exit(1)")
        await repl.prints("context, x", "('hot', 1)")
