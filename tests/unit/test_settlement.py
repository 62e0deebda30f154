"""The table of what a request costs: the code's, the documentation's, and what they say of each ending."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.core.errors import OutcomeUnknown, ProviderBusy, ProviderRefused, StoreError
from orchestrator.lm.base import Reply, Usage
from orchestrator.proxy.settlement import SETTLEMENTS, charged, settlement

ROOT = Path(__file__).parents[2]
USED = Reply("x", "stop", Usage(1, 1))
BOUND = 100


def test_the_documentation_has_the_same_table():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text.split("| how it ended | in the journal | charged |\n", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| (.+?) \| (\w+) \| (.+?) \|$", table, re.MULTILINE)
    assert rows == [(how, *settled) for how, settled in SETTLEMENTS.items()]


@pytest.mark.parametrize(
    ("reply", "error", "price", "cost"),
    [
        (USED, None, 40, 40),
        (USED, None, BOUND + 1, BOUND),
        (USED, None, 0, 0),
        (Reply("x", "stop", None), None, None, BOUND),
        (None, ProviderRefused("401"), None, 0),
        (None, ProviderBusy("503"), None, 0),
        (None, OutcomeUnknown("cut off"), None, BOUND),
        (None, StoreError("gone"), None, BOUND),
        (None, None, None, BOUND),
    ],
)
def test_what_is_charged(reply: Reply | None, error: Exception | None, price: int | None, cost: int):
    assert charged(settlement(reply, error), BOUND, price) == cost
