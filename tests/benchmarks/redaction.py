"""Figures of redaction: what it costs on texts that hold no secret, which is nearly all of them.

They are ASCII. Other text takes up to 0.2 ms more, all of it for UTF-8, which the journal needs in any case.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from orchestrator.core.redact import Redactor
from tests.benchmarks.figures import Figure, at_most

PROJECT = Path(__file__).parents[2]
SIZE, MOST_S = 100_000, 0.0003
ROUNDS, QUICK_ROUNDS = 200, 50


def redaction(quick: bool) -> list[Figure]:
    redactor = Redactor(["sk-of-this-process-and-secret", "password of the database"])
    return [
        at_most(f"redaction, 100 kB of {name}", measure(redactor, text, QUICK_ROUNDS if quick else ROUNDS), MOST_S)
        for name, text in texts().items()
    ]


def texts() -> dict[str, str]:
    prose = "".join((PROJECT / name).read_text() for name in ("ARCHITECTURE.md", "README.md", "SECURITY.md"))
    code = "".join(path.read_text() for path in sorted((PROJECT / "orchestrator").glob("*/*.py")))
    row = {"at": "2026-11-25T10:00:00Z", "id": "3f2b8c1e-6d4a-4f0b-9a57-c2e1d8b7a690", "amount": 12, "ok": True}
    table = json.dumps([{**row, "number": number, "text": "what it is about"} for number in range(1000)])
    found = {"prose": prose, "JSON": table, "code": code}
    return {name: (text * 9).encode("ascii", "ignore").decode()[:SIZE] for name, text in found.items()}


def measure(redactor: Redactor, text: str, rounds: int) -> list[float]:
    taken: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        _redacted, _count = redactor.redact(text)
        taken.append(time.perf_counter() - started)
    return taken
