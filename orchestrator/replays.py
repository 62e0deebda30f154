"""What `airlock audit replay` does: a query's cells run again, and in what they differ from the journal.

It needs no model and no key, and changes neither the ledger nor the journal.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import anyio

from orchestrator.auditing import past_of
from orchestrator.console import counted
from orchestrator.core.errors import RequestError, SandboxUnusable
from orchestrator.loop.past import Past
from orchestrator.loop.replay import Again, Replayed, Stage, replay
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.pool import Pool
from orchestrator.sandbox.registry import make_backend
from orchestrator.sandbox.slots import Slots
from orchestrator.store.contexts import ContextStore
from orchestrator.streams import say


async def report(home: Path, query: str, backend: str | None, *, as_json: bool) -> int:
    """Run the query again and print what comes of it; the exit code: 0 for the same, 1 for another."""
    past = past_of(home, query)
    done = await replay_query(home, past, backend, (lambda _again: None) if as_json else _show)
    if as_json:
        say(sys.stdout, json.dumps(done.report()))
    else:
        for note in done.notes:
            say(sys.stdout, note)
        say(sys.stdout, _summary(done))
    return 0 if done.same else 1


def _show(again: Again) -> None:
    say(sys.stdout, f"{again.node} cell {again.cell}: {again.verdict}" + (f": {_line(again.why)}" if again.why else ""))
    for line in again.diff:
        say(sys.stdout, f"    {_line(line)}")


def _line(text: str) -> str:
    return " / ".join(text.splitlines())


def _summary(done: Replayed) -> str:
    cells = counted(len(done.cells), "cell")
    parts = [f"{done.count('same')} the same", f"{done.count('different')} different"]
    if left := done.count("not compared"):
        parts.append(f"{left} not compared")
    return f"query {done.query_id}, {cells} again in {done.backend} ({done.isolation}): {', '.join(parts)}"


async def replay_query(home: Path, past: Past, backend: str | None, tell: Callable[[Again], object]) -> Replayed:
    """Run its cells again. backend: the one that it ran in, or failing that the strongest usable, when none is named.

    Raises NotKept, NotPermitted, RequestError, SandboxUnusable, StoreError.
    """
    past.require()
    contexts, pool = ContextStore(home / "contexts"), Pool(Slots(home))
    chosen, notes = _backend_for(past, backend, home)
    try:
        return await replay_in(past, chosen, pool, contexts, notes, tell)
    finally:
        with anyio.CancelScope(shield=True):
            await pool.aclose()
        chosen.close()


async def replay_in(
    past: Past,
    backend: Backend,
    pool: Pool,
    contexts: ContextStore,
    notes: Sequence[str] = (),
    tell: Callable[[Again], object] = lambda _again: None,
    most_s: float = math.inf,
) -> Replayed:
    """In sandboxes that are there. most_s: of all of it; what was not run by then is not compared.

    Raises NotKept, SandboxUnusable, StoreError.
    """
    past.require()
    cut = [f"{where}: secrets were taken out, so what follows from it may differ" for _, where in past.redacted]
    replayed = Replayed(past.query, backend.name, backend.isolation.name, notes=[*notes, *cut])

    def take(again: Again) -> None:
        replayed.cells.append(again)
        tell(again)

    with anyio.move_on_after(most_s) as over:
        await replay(past, Stage(partial(pool.open, backend), contexts.open, contexts.verify), take)
    if over.cancelled_caught:
        done = {(again.node, again.cell) for again in replayed.cells}
        for node in past.nodes.values():
            for cell in node.cells:
                if (node.name, cell.number) not in done:
                    take(Again(node.name, cell.number, "not compared", f"the {most_s:g} s for it all were over"))
    return replayed


def _backend_for(past: Past, name: str | None, home: Path) -> tuple[Backend, list[str]]:
    """And what is to be said of it."""
    limits = past.rules.sandbox
    if name is None:
        name, notes = past.backend, list[str]()
        try:
            backend = make_backend(name, least=limits.least_isolation, image=limits.image, home=home)
            backend.require_usable()
            return backend, notes
        except (SandboxUnusable, RequestError) as error:
            notes.append(f"it ran in {past.backend}, which is not to be had here: {error}")
            name = "auto"
        return make_backend(name, least=limits.least_isolation, image=limits.image, home=home), notes
    notes = [] if name == past.backend else [f"it ran in {past.backend}"]
    return make_backend(name, least=limits.least_isolation, image=limits.image, home=home), notes
