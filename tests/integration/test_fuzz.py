"""The host's parsers under a coverage-guided fuzzer, for a bounded number of runs; `make fuzz` goes on for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[1] / "fuzz"
RUNS = 15_000


def test_what_the_host_parses_of_a_guest(tmp_path: Path) -> None:
    found, corpus = tmp_path / "found", FUZZ / "corpus"
    found.mkdir()
    command = [sys.executable, "-m", "tests.fuzz.channel", f"-runs={RUNS}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*command, str(found), str(corpus)], cwd=FUZZ.parents[1], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {RUNS} runs" in done.stderr
    assert len(list(found.iterdir())) > 10  # it learns from the corpus: coverage is really measured
