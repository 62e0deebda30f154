"""python -m tests.benchmarks [--quick] [--peer PYTHON] [--only WORD]: measure, print one table, exit 1 on a miss."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
from rich.console import Console
from rich.table import Table

from tests.benchmarks.calls import calls
from tests.benchmarks.containers import containers
from tests.benchmarks.crowd import crowd, idle
from tests.benchmarks.figures import Figure, missed
from tests.benchmarks.journal import journals
from tests.benchmarks.large import large
from tests.benchmarks.ledger import ledgers
from tests.benchmarks.peers import peer_python
from tests.benchmarks.queries import queries
from tests.benchmarks.redaction import redaction
from tests.benchmarks.sandboxes import cells, start
from tests.benchmarks.service import service

LOOP = {"use_uvloop": True}  # as the command line and `RLM` have it


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a minute, and more noise")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="of an environment with rlms; else one is made")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORD",
        help="one group: cells, start, queries, calls, containers, crowd, large, ledger, journal, service, redaction",
    )
    chosen = parser.parse_args()
    console = Console()
    figures: list[Figure] = []
    home = Path(tempfile.mkdtemp(prefix="airlock-bench-"))
    try:
        for name, measure in groups(home, chosen.peer, chosen.quick):
            if chosen.only in name:
                with console.status(f"measuring: {name}"):
                    figures += measure()
    finally:
        shutil.rmtree(home)
    console.print(table(figures))
    return 1 if missed(figures) else 0


def groups(home: Path, peer: Path | None, quick: bool) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    yield "cells", lambda: anyio.run(cells, home, quick, backend_options=LOOP)
    yield "start", lambda: [anyio.run(start, home, quick, backend_options=LOOP)]
    yield "queries", lambda: queries(home, peer or peer_python(), quick)
    yield "calls", lambda: anyio.run(calls, home, quick, backend_options=LOOP)
    yield "containers", lambda: containers(home, peer or peer_python(), quick)
    yield "crowd", lambda: [*anyio.run(idle, home, backend_options=LOOP), *anyio.run(crowd, home, backend_options=LOOP)]
    yield "large", lambda: large(home, quick)
    yield "ledger", lambda: ledgers(home, quick)
    yield "journal", lambda: journals(home, quick)
    yield "service", lambda: service(home, quick)
    yield "redaction", lambda: redaction(quick)


def table(figures: list[Figure]) -> Table:
    drawn = Table(caption="medians (least to most) of interleaved runs")
    for heading in ("figure", "measured", "beside it", "ratio", "target", ""):
        drawn.add_column(heading, justify="right" if heading == "ratio" else "left")
    for figure in figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        verdict = {True: "ok", False: "[bold red]MISSED[/]", None: ""}[figure.ok]
        drawn.add_row(figure.name, figure.measured, figure.beside, ratio, figure.target, verdict)
    return drawn


if __name__ == "__main__":
    raise SystemExit(main())
