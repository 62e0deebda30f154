"""Figures of containers and of the pool: warm and cold starts, a cell's round trip, a whole query beside the peers."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path

import anyio

from orchestrator import RLM
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.pool import Pool, machine_memory
from orchestrator.sandbox.registry import build_image, images, make_backend
from orchestrator.sandbox.sandbox import Sandbox
from orchestrator.sandbox.slots import Slots
from orchestrator.store.contexts import ContextStore
from tests.benchmarks.fake_lm import BATCH, NEEDLE, SINGLE, fake_lm
from tests.benchmarks.figures import Figure, at_most, interleaved, ms, versus
from tests.benchmarks.peers import peer_image, python_of, rlms
from tests.benchmarks.queries import SIZES, text_of
from tests.benchmarks.sandboxes import answer, no_calls, opened, spec_for

BACKENDS = ("bubblewrap", "docker", "gvisor")
RUNTIMES = {"docker": "runc", "gvisor": "runsc"}
WARM_P50_S = 0.010
COLD_RATIO = 1.3
CELL_P50_S = {"docker": 0.001, "gvisor": 0.002}
# Between cells, for the snapshot to be made: an LM thinks longer than this.
THOUGHT_S = {"docker": 0.010, "gvisor": 0.050}
LOCAL_RATIO = 1.0
DOCKER_RATIOS = {"100 kB": 1 / 8, "10 MB": 1 / 15}


def make(home: Path, name: str) -> Backend:
    return make_backend(name, least="namespace", home=home)


async def warm(home: Path, quick: bool) -> list[Figure]:
    """From asking the pool to the answer of the first cell, which uses a context of 100 kB."""
    context = ContextStore(home / "contexts").ingest_value("hay\n" * 25_000)
    figures: list[Figure] = []
    for name in BACKENDS:
        backend, pool = make(home, name), Pool(Slots(home), machine_memory() // 4)
        pool.keep(backend, spec_for, 2)
        (shelf,) = pool.figures()
        taken: list[float] = []
        for _ in range(10 if quick else 40):
            while shelf.ready < 2:  # noqa: ASYNC110  full again, so that only what is measured goes on
                await anyio.sleep(0.02)
            started = time.perf_counter()
            async with pool.open(backend, spec_for) as sandbox:
                sandbox.attach(context)
                result = await sandbox.run("len(context)", 60.0, no_calls)
                taken.append(time.perf_counter() - started)
                assert (result.text("out"), sandbox.cold_because) == ("100000\n", "")
        await pool.aclose()
        backend.close()
        figures.append(at_most(f"{name}: warm sandbox, context attached, first cell", taken, WARM_P50_S))
    return figures


async def cells(home: Path, quick: bool) -> list[Figure]:
    figures: list[Figure] = []
    for name, most in CELL_P50_S.items():
        backend = make(home, name)
        async with opened(backend, home) as sandbox:
            taken = [await _cell(sandbox, THOUGHT_S[name]) for _ in range(60 if quick else 300)]
        backend.close()
        what = f"{name}: cell `pass`, {ms(THOUGHT_S[name])} after the one before"
        figures.append(at_most(what, taken[20:], most))
    return figures


async def _cell(sandbox: Sandbox, pause: float) -> float:
    await anyio.sleep(pause)
    started = time.perf_counter()
    await answer(sandbox, "pass")
    return time.perf_counter() - started


def cold(home: Path, quick: bool) -> list[Figure]:
    """From nothing to the first cell's answer; beside it `docker run -i` of the image to Python's first output."""
    figures: list[Figure] = []
    for name, runtime in RUNTIMES.items():
        backend = make(home, name)

        async def first(backend: Backend = backend) -> float:
            started = time.perf_counter()
            async with opened(backend, home) as sandbox:
                await answer(sandbox, "print('x')")
                return time.perf_counter() - started

        ours, theirs = interleaved(
            5 if quick else 20,
            lambda first=first: anyio.run(first, backend_options={"use_uvloop": True}),
            partial(_docker_run, images(home).expected("python"), runtime),
        )
        backend.close()
        figures.append(versus(f"{name}: cold sandbox to first cell", ours, "docker run -i", theirs, COLD_RATIO))
    return figures


def _docker_run(image: str, runtime: str) -> float:
    options = ["--rm", "-i", f"--runtime={runtime}", "--network=none", f"--entrypoint={python_of(image)}"]
    command = ["docker", "run", *options, image, "-I", "-S", "-c", "print('x', flush=True); input()"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"x\n"
        seconds = time.perf_counter() - started
        process.stdin.write(b"\n")
    return seconds


def scripts(home: Path, python: Path, quick: bool) -> list[Figure]:
    """A query in a gVisor container from a warm pool; the peers from making their object to closing it."""
    figures: list[Figure] = []
    rounds = 3 if quick else 7
    with (
        fake_lm() as base_url,
        rlms(python, base_url) as local,
        rlms(python, base_url, peer_image(python, images(home).expected("python"))) as docker,
        RLM(
            "gvisor", model="fake", base_url=base_url, api_key="none", prices={"fake": (0, 0)}, home=home, pool=2
        ) as rlm,
    ):
        for label, chars in SIZES.items():
            ours, theirs, contained = interleaved(
                rounds, partial(query, rlm, text_of(chars)), partial(local, chars), partial(docker, chars)
            )
            what = f"gvisor, warm: query, {label}"
            figures.append(versus(what, ours, "rlms local", theirs, LOCAL_RATIO))
            figures.append(versus(what, ours, "rlms docker", contained, DOCKER_RATIOS[label]))
    return figures


def query(rlm: RLM, context: str) -> float:
    """Seconds of one query, once the pool is full."""
    warm_up(rlm)
    started = time.perf_counter()
    done = rlm.completion("What is the magic number?", context)
    seconds = time.perf_counter() - started
    assert (done.response, done.sub_calls) == (NEEDLE, BATCH + SINGLE), done
    return seconds


def warm_up(rlm: RLM) -> None:
    platform = rlm._rlm._platform  # pyright: ignore
    while platform is not None and platform.pool.figures()[0].ready < 2:
        time.sleep(0.02)


def containers(home: Path, python: Path, quick: bool) -> list[Figure]:
    """python: of an environment that has the peer. home: where the image is on record, too."""
    build_image(home, offline=True, say=lambda _text: None)
    run = partial(anyio.run, backend_options={"use_uvloop": True})
    return [*run(warm, home, quick), *run(cells, home, quick), *cold(home, quick), *scripts(home, python, quick)]
