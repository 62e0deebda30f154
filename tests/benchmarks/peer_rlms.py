"""Runs in the peer's environment: one whole query of `rlms` for every line on standard input.

    python peer_rlms.py BASE_URL [IMAGE]    reads the number of characters of context, prints the seconds it took

With an image it is its environment `docker`; without, `local`, which isolates nothing.

From making the client to closing it. The imports come before, and the context too.
"""

import sys
import time

from rlm import RLM


def run(base_url: str, context: str, image: str = "") -> float:
    started = time.perf_counter()
    model = {"model_name": "fake", "base_url": base_url, "api_key": "none"}
    where = {"environment": "docker", "environment_kwargs": {"image": image}} if image else {"environment": "local"}
    rlm = RLM(backend="openai", backend_kwargs=model, max_iterations=10, **where)
    done = rlm.completion(context, root_prompt="What is the magic number?")
    rlm.close()
    seconds = time.perf_counter() - started
    assert "42" in done.response, done.response
    return seconds


filler = "filler line of text number\n"
for line in sys.stdin:
    chars = int(line)
    print(run(sys.argv[1], filler * (chars // len(filler)) + "the magic number is 42\n", *sys.argv[2:]), flush=True)
