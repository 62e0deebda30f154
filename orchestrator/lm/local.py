"""A language model on this machine: a GGUF file, run by llama.cpp in a process of its own (see `llama.py`)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx2

from orchestrator.core.errors import ModelError, OutcomeUnknown, ProviderBusy, ProviderRefused
from orchestrator.files import Unreadable, open_regular
from orchestrator.lm import weights
from orchestrator.lm.base import LM, Reply, Request, Usage

LOAD_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 5.0
_CONTROL = re.compile(r"<\|([^\s|<>]{1,64})\|>")


class LocalLM(LM):
    """path: the GGUF file. window: tokens, prompt and output together, of one request. slots: requests at once.

    The process is started by the first `ask` (loading 1.5 GB takes seconds, outside that request's `timeout_s`), again
    after it has died, and ends with `aclose` or with this process. Four slots answer a batch of sub-calls up to four
    times as fast as one, as the weights are read once for all; 8,192 tokens are more than two cores read in
    three minutes.
    Memory: the file, as much again for the copy that is laid out for the CPU, and window x slots of attention state
    (0.9 GB for a 1.5B model). `Request.model` is not looked at: there is one model here.

    Raises ModelError where there is no such file, and without llama.cpp.
    """

    def __init__(self, path: Path, *, window: int = 8192, slots: int = 4) -> None:
        _require_loadable(path)
        self._path = path
        self._window = window
        self._slots = slots
        self._free = anyio.Semaphore(slots)
        self._starting = anyio.Lock()
        self._process: anyio.abc.Process | None = None
        self._client: httpx2.AsyncClient | None = None

    async def ask(self, request: Request) -> Reply:
        """Ask once; greedy (temperature 0), so that the same prompt gives the same reply on the same machine.

        Raises, besides what `LM.ask` does:
            ModelError: the file is gone, or cannot be loaded.
        """
        client = await self._ready()
        body = {
            "messages": [{**message, "content": _plain(message["content"])} for message in request.messages],
            "max_tokens": request.max_output_tokens,
            "temperature": 0,
            "cache_prompt": True,
        }
        try:
            # Waiting for a slot is not the model's time: a batch may be far larger than there are slots.
            async with self._free:
                with anyio.fail_after(request.timeout_s):
                    # Leaving early closes the connection, and the server drops the request with the batch in hand.
                    response = await client.post("/v1/chat/completions", content=json.dumps(body))
        except TimeoutError as error:
            raise OutcomeUnknown(f"the local model did not answer within {request.timeout_s:g} s") from error
        except httpx2.ConnectError as error:
            raise ProviderBusy("the local model does not take connections; try again") from error
        except httpx2.TransportError as error:
            raise OutcomeUnknown(f"the local model broke off ({type(error).__name__})") from error
        if response.status_code != 200:
            raise _refusal(response)
        return _reply(response)

    async def aclose(self) -> None:
        """End the process, requests in flight included."""
        client, process, self._client, self._process = self._client, self._process, None, None
        with anyio.CancelScope(shield=True):
            if client is not None:
                await client.aclose()
            if process is not None:
                await _stop(process)

    async def _ready(self) -> httpx2.AsyncClient:
        async with self._starting:
            if self._client is not None and self._process is not None and self._process.returncode is None:
                return self._client
            await self.aclose()
            _require_loadable(self._path)
            key = secrets.token_urlsafe(32)
            self._process = await anyio.open_process(
                [sys.executable, "-P", str(Path(__file__).with_name("llama.py"))],
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is the host's to handle
            )
            try:
                address = await self._load(self._process, key)
            except BaseException:  # cancelled while loading, too: no half-started process stays behind
                await self.aclose()
                raise
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            self._client = httpx2.AsyncClient(base_url=address, headers=headers, timeout=None, trust_env=False)
            return self._client

    async def _load(self, process: anyio.abc.Process, key: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"path": str(self._path), "key": key, "window": self._window, "slots": self._slots}
        order["threads"] = len(os.sched_getaffinity(0))
        line = b""
        try:
            with anyio.fail_after(LOAD_TIMEOUT_S):
                await process.stdin.send(json.dumps(order).encode() + b"\n")
                while not line.endswith(b"\n"):
                    line += await process.stdout.receive()
        except TimeoutError as error:
            raise ModelError(f"{self._path.name} was not loaded within {LOAD_TIMEOUT_S:g} s") from error
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            raise ModelError(f"llama.cpp died while loading {self._path.name}: too little memory, perhaps") from error
        said: dict[str, str] = json.loads(line)
        if "error" in said:
            raise ModelError(f"llama.cpp cannot load {self._path.name}: damaged, too large, or of an unknown kind")
        return said["address"]


def _plain(text: str) -> str:
    """`text` with no control token in it: llama.cpp reads `<|im_end|>` as the end of a message, whoever wrote it."""
    return _CONTROL.sub(r"<| \1 |>", text)


def _environment() -> dict[str, str]:
    """What the process sees: the way to xllamacpp, and no key of ours, for the prompts it parses are hostile.

    Passive waiting: threads that spin at each barrier starve the sandboxes, and themselves where cores are short.
    """
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_WAIT_POLICY": "passive"}


def find(name: str, folder: Path) -> Path:
    """The file of `local:NAME`: NAME itself when it is a path, else the model of this name in the folder.

    Raises ModelError where the folder has no such model.
    """
    if "/" in name or name.endswith(".gguf"):
        return Path(name)
    if name in weights.installed(folder):
        return weights.path_of(folder, name)
    if name in weights.KNOWN:
        raise ModelError(f"{name} is not on this machine yet: fetch it with `airlock models pull {name}`")
    raise ModelError(
        f"there is no local model {name!r}: `airlock models list` says what there is; a file is local:/path/to.gguf"
    )


def _require_loadable(path: Path) -> None:
    """Raises ModelError, with the remedy, where llama.cpp has nothing to load, or is not there."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ModelError("local models need llama.cpp: pip install 'airlock[local]'")
    try:
        with open_regular(path) as file:
            magic = file.read(4)
    except Unreadable as why:
        raise ModelError(
            f"cannot read the model {path}: {why}; name a GGUF file, or fetch one with `airlock models pull`"
        ) from None
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file, which is what llama.cpp loads")


def _reply(response: httpx2.Response) -> Reply:
    try:
        body: Any = response.json()
        choice, usage = body["choices"][0], body["usage"]
        return Reply(
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            usage=Usage(usage["prompt_tokens"], usage["completion_tokens"]),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise OutcomeUnknown("the local model's answer is not of the known form") from error


def _refusal(response: httpx2.Response) -> ProviderBusy | ProviderRefused:
    try:
        error: dict[str, Any] = response.json()["error"]
    except (ValueError, LookupError):
        error = {}
    if error.get("type") == "exceed_context_size_error":
        asked, window = error["n_prompt_tokens"], error["n_ctx"]
        return ProviderRefused(f"the prompt is {asked:,} tokens; the local model's window is {window:,}")
    said = " ".join(str(error.get("message", "no reason given")).split())[:300]
    if response.status_code >= 500:
        return ProviderBusy(f"the local model failed: {said}")
    return ProviderRefused(f"the local model refused: {said}")


async def _stop(process: anyio.abc.Process) -> None:
    """End `process` and release its pipes."""
    if process.returncode is None:
        process.kill()  # nothing to save
    with anyio.move_on_after(STOP_TIMEOUT_S):
        await process.wait()
    await process.aclose()
