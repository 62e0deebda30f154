"""What is expected of every sandbox beside the promises of the conformance suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.core.errors import SandboxDied, StoreError
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.sandbox import Call
from tests.sandboxes import MIB, Repl, open_repl

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        (
            "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass",
            "was interrupted by its time limit and went on and was killed",
        ),
        ("import os\nos.kill(os.getpid(), 19)", "time limit"),
    ],
    ids=["ignores the interrupt", "stops itself"],
)
async def test_state_survives_a_cell_that(repl: Repl, code: str, detail: str):
    await repl.run("kept = ['kept']")
    result = await repl.run(code, 0.5)
    assert (result.status, detail in result.detail) == ("timeout", True), result
    assert 0.5 <= result.duration_s < 8  # the interrupt, then two seconds of grace
    assert await repl.out("kept, llm_query('still')") == "(['kept'], 'reply to still')"


async def test_state_is_kept_of_a_cell_that_answered_too(repl: Repl):
    """Its snapshot is made only if another cell comes."""
    await repl.run("kept = ['kept']\nFINAL('early')")
    repl.attach("context")
    assert (await repl.run("kept.append(context)\nimport os\nos.kill(os.getpid(), 9)")).status == "killed"
    assert await repl.out("kept, context") == "(['kept'], 'context')"


async def test_cells_that_follow_at_once_are_each_undone_alone(repl: Repl):
    """Whether or not it is known yet that the snapshot is there: by the time of the crash, or of the cell's end."""
    for number in range(5):
        await repl.run(f"kept = {number}")
        assert (await repl.run("kept = None\nimport os\nos.kill(os.getpid(), 9)")).status == "killed"
        assert await repl.out("kept") == str(number)


async def test_state_from_before_a_cell_that_leaves_no_descriptor_is_kept(repl: Repl):
    """No snapshot can be made of it, nor does its process go on; the one before is better than none."""
    await repl.run("kept = ['kept']")
    code = """
        import os
        held, lost = [], 1
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                break
        """
    assert (await repl.run(code)).status == "ok"
    result = await repl.run("1")  # which may have been handed over before it was known
    assert "variables of the last cells are gone" in result.detail + result.text("err"), result
    assert await repl.out("kept, 'lost' in globals()") == "(['kept'], False)"


async def test_many_threads_fit_into_a_small_sandbox(backend: Backend, home: Path):
    code = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(40) as pool:
            print(len({*pool.map(llm_query, range(200))}))
        """
    async with open_repl(backend, home, memory_bytes=128 * MIB) as repl:
        assert await repl.out(code) == "200"


async def test_a_machine_fault_in_a_call_ends_the_sandbox(repl: Repl):
    async def broken(_call: Call) -> str:
        raise StoreError("the journal cannot be written")

    with pytest.raises(StoreError, match="journal"):
        await repl.run("llm_query('x')", on_call=broken)
    with pytest.raises(SandboxDied):
        await repl.run("1")
