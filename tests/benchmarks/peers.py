"""What a query is compared with: the reference library in an environment of its own, and the bare LM client."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.fake_lm import BATCH, REQUESTS, SINGLE, TURNS

PEER = "rlms==0.1.3"
PEER_IMAGE = "airlock-bench-rlms"


def peer_python() -> Path:
    """The Python of an environment with the peer in it, made once below the system's temp folder."""
    folder = Path(tempfile.gettempdir()) / f"airlock-bench-{PEER.replace('==', '-')}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-input", PEER], check=True)
        done.touch()
    return python


def peer_image(python: Path, base: str) -> str:
    """An image as the peer's environment `docker` wants it: Python with dill and requests, and `tail`.

    base: image to build it on. pip is left out of it, so that the peer's own installation step costs it nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [python, "-m", "pip", "install", "--quiet", "--no-input", "--target", folder / "site"]
        subprocess.run([*command, "dill", "requests"], check=True)
        (folder / "bin").mkdir()
        shutil.copy("/usr/bin/tail", folder / "bin")
        (folder / "bin" / "python").symlink_to(python_of(base))
        lines = [f"FROM {base}", "USER 0", "COPY bin /usr/bin/", "COPY site /site", "ENV PYTHONPATH=/site"]
        lines += ["ENTRYPOINT []", "WORKDIR /"]
        (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
        build = ["docker", "build", "--quiet", "--tag", PEER_IMAGE, name]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "DOCKER_BUILDKIT": "0"})
    return PEER_IMAGE


def python_of(image: str) -> str:
    """The path of the interpreter in one of our images."""
    command = ["docker", "image", "inspect", "--format", "{{index .Config.Entrypoint 0}}", image]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def rlms(python: Path, base_url: str, image: str = "") -> Iterator[Callable[[int], float]]:
    """Yields a function: characters of context -> seconds of one whole query, in a process that is already up.

    image: to run in a container of this image; else in that process, which isolates nothing.
    """
    script = Path(__file__).with_name("peer_rlms.py")
    with tempfile.TemporaryDirectory() as workspace:
        process = subprocess.Popen(
            [python, script, base_url, *([image] if image else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "RLM_DOCKER_WORKSPACE_DIR": workspace},
        )
        with _measured_by(process) as measure:
            yield measure


@contextmanager
def _measured_by(process: subprocess.Popen[str]) -> Iterator[Callable[[int], float]]:
    assert process.stdin
    assert process.stdout
    into, out = process.stdin, process.stdout

    def measure(chars: int) -> float:
        into.write(f"{chars}\n")
        into.flush()
        return float(out.readline())

    try:
        yield measure
    finally:
        into.close()
        process.wait(10)
        out.close()


def requests_since(base_url: str) -> list[dict[str, Any]]:
    """The bodies of the requests that the fake LM has had since this was last asked."""
    with urllib.request.urlopen(base_url + "/requests") as response:  # noqa: S310  our own server
        return [json.loads(text) for text in json.load(response)]


class BareClient:
    """The requests of one query, sent by `AsyncOpenAI` alone: roots and single ones in turn, the batch at once.

    Each is asked for whole, which is the least that it can cost: a stream that nobody reads would not be an answer.
    """

    def __init__(self, base_url: str, bodies: list[dict[str, Any]]) -> None:
        self._base_url = base_url
        plain = [{name: body[name] for name in body if not name.startswith("stream")} for body in bodies]
        roots = [body for body in plain if len(body["messages"]) > 1]
        subs = [body for body in plain if len(body["messages"]) == 1]
        assert (len(roots), len(subs)) == (len(TURNS), BATCH + SINGLE), (len(roots), len(subs), REQUESTS)
        self._in_turn, self._at_once = roots + subs[BATCH:], subs[:BATCH]

    def measure(self) -> float:
        """Seconds, from making the client to closing it."""
        started = time.perf_counter()
        asyncio.run(self._send())
        return time.perf_counter() - started

    async def _send(self) -> None:
        import openai

        async with openai.AsyncOpenAI(api_key="none", base_url=self._base_url, max_retries=0) as client:
            for body in self._in_turn:
                await client.chat.completions.create(**body)
            await asyncio.gather(*(client.chat.completions.create(**body) for body in self._at_once))
