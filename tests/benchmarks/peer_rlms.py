"""Runs in the peer's environment: one whole query of `rlms` (local, no isolation) for every line on standard input.

    python peer_rlms.py BASE_URL        reads the number of characters of context, prints the seconds it took

From making the client to closing it. The imports come before, and the context too.
"""

import sys
import time

from rlm import RLM


def run(base_url: str, context: str) -> float:
    started = time.perf_counter()
    model = {"model_name": "fake", "base_url": base_url, "api_key": "none"}
    rlm = RLM(backend="openai", backend_kwargs=model, environment="local", max_iterations=10)
    done = rlm.completion(context, root_prompt="What is the magic number?")
    rlm.close()
    seconds = time.perf_counter() - started
    assert "42" in done.response, done.response
    return seconds


filler = "filler line of text number\n"
for line in sys.stdin:
    chars = int(line)
    print(run(sys.argv[1], filler * (chars // len(filler)) + "the magic number is 42\n"), flush=True)
