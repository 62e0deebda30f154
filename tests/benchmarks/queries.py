"""Figures of a whole query through `RLM`: the field notes' script, 6 root turns, 72 sub-calls, an instant LM.

Timed from making the `RLM` to its `close`, sandbox, ledger, journal and final check of the context included; imports
and making the context are outside, for both sides.
"""

from __future__ import annotations

import time
from pathlib import Path

from orchestrator import RLM
from tests.benchmarks.fake_lm import BATCH, NEEDLE, REQUESTS, SINGLE, fake_lm
from tests.benchmarks.figures import Figure, interleaved, versus
from tests.benchmarks.peers import BareClient, requests_since, rlms

SIZES = {"100 kB": 100_000, "10 MB": 10_000_000}
PEER_RATIO, CLIENT_RATIO = 0.5, 2.0
_FILLER = "filler line of text number\n"


def queries(home: Path, python: Path, quick: bool) -> list[Figure]:
    """python: of an environment that has the peer."""
    figures: list[Figure] = []
    with fake_lm() as base_url, rlms(python, base_url) as peer:
        for label, chars in SIZES.items():
            context = text_of(chars)
            airlock(home, base_url, context)
            requests_since(base_url)
            airlock(home, base_url, context)
            client = BareClient(base_url, requests_since(base_url))
            ours, theirs, bare = interleaved(
                5 if quick else 15,
                lambda text=context: airlock(home, base_url, text),
                lambda chars=chars: peer(chars),
                client.measure,
            )
            figures.append(versus(f"query, {label}, {REQUESTS} requests", ours, "rlms local", theirs, PEER_RATIO))
            figures.append(versus(f"query, {label}, {REQUESTS} requests", ours, "AsyncOpenAI", bare, CLIENT_RATIO))
    return figures


def text_of(chars: int) -> str:
    return _FILLER * (chars // len(_FILLER)) + NEEDLE + "\n"


def airlock(home: Path, base_url: str, context: str) -> float:
    """Seconds of one query."""
    started = time.perf_counter()
    rlm = RLM(model="fake", base_url=base_url, api_key="none", prices={"fake": (0.01, 0.01)}, home=home)
    done = rlm.completion("What is the magic number?", context)
    rlm.close()
    seconds = time.perf_counter() - started
    assert done.response == NEEDLE, done
    assert done.sub_calls == BATCH + SINGLE, done
    return seconds
