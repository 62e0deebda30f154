"""The process that holds one local model. `local.py` runs this file as a script; it imports nothing of Airlock.

A process of its own, because llama.cpp ends its process when an assertion of its own fails, which a prompt may bring
about, and because loading holds the interpreter lock for seconds. Its whole life hangs on standard input: the host's
first line is the order, and when the host closes the pipe, or dies in any way, this process ends.

    in   {"path", "key", "window", "slots", "threads"}
    out  {"address": "http://127.0.0.1:PORT"} or {"error": "..."}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

BATCH = 128  # tokens between two looks at whether the caller is still there: 4 s at 35 tokens/s, no slower than 512
PROMPT_CACHE_MIB = 512  # for conversations that sub-calls have pushed out of their slot; the default is 8 GiB


def params_of(xllamacpp: Any, order: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [order["key"]]  # the port is open to every local user
    params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    params.n_parallel = order["slots"]
    params.n_ctx = order["window"] * order["slots"]
    params.kv_unified = False  # each slot keeps a window of its own, so a prompt that fits does so whatever else runs
    params.n_batch = params.n_ubatch = BATCH
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
    params.cache_prompt = True
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.verbosity = -1
    return params


def main() -> None:
    order = json.loads(sys.stdin.readline())
    xllamacpp: Any = importlib.import_module("xllamacpp")  # no type stubs
    try:
        server = xllamacpp.Server(params_of(xllamacpp, order))
    except (RuntimeError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()
    os._exit(0)  # at once: there is nothing to save, and tearing down would wait for the batch in hand


if __name__ == "__main__":
    main()
