"""The images that containers run: built here, addressed by digest, and refused when they are not what was built.

An image is Python, the shared libraries it needs and the guest agent. Which one a backend runs is on record in the data
folder: its id (the digest of all that is in it) and the agent it was built with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import SandboxUnusable
from orchestrator.sandbox.agent import agent_bytes, agent_version

NAME = "airlock-python"
# Not `python agent.pyz`: that goes through runpy, whose imports cost 8 ms.
BOOT = 'from sys import path; path.insert(0, "/agent.pyz"); from agent.supervisor import main; main()'
FLAGS = ("-I", "-S", "-B", "-X", "utf8", "-c")
_LEFT_OUT = ("usr/share", "etc", "usr/sbin", "sbin")
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Package:
    """A line of versions.lock."""

    name: str
    version: str
    architecture: str
    sha256: str


class Images:
    """record: a file of the data folder. sources: the folder `sandbox_images`."""

    def __init__(self, record: Path, sources: Path) -> None:
        self._record = record
        self._sources = sources

    def expected(self) -> str:
        """The id of the image to run. Raises SandboxUnusable when there is none, or one of another version."""
        try:
            built = json.loads(self._record.read_text(encoding="utf-8"))
            image, agent = str(built["id"]), built["agent"]
        except FileNotFoundError:
            raise SandboxUnusable("the sandbox's image is not built: run `airlock images build`") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SandboxUnusable(f"cannot read {self._record} ({error}): run `airlock images build`") from None
        if agent != agent_version():
            raise SandboxUnusable("the sandbox's image is of another version: run `airlock images build`")
        return image

    def build(self, api: Any, *, offline: bool, say: Callable[[str], None]) -> str:
        """Build it with the engine behind `api` (docker.APIClient), and put it on record; its id."""
        with tempfile.TemporaryDirectory(prefix="airlock-image-") as folder:
            made = self._from_debian if offline else self._from_registry
            image = made(api, Path(folder), say)
        text = json.dumps({"id": image, "agent": agent_version(), "offline": offline})
        draft = self._record.with_suffix(f".{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._record)
        return image

    def packages(self) -> list[Package]:
        lines = (self._sources / "versions.lock").read_text(encoding="utf-8").splitlines()
        return [Package(*line.split()) for line in lines if line and not line.startswith("#")]

    def lock(self, folder: Path) -> str:
        """Take the newest versions of the packages; the new text of versions.lock. folder: an empty one."""
        wanted = self.packages()
        _run(["apt-get", "--quiet", "download", *(package.name for package in wanted)], folder)
        comments = [line for line in (self._sources / "versions.lock").read_text().splitlines() if line.startswith("#")]
        found = sorted(folder.glob("*.deb"))
        fields = (_run(["dpkg-deb", "-f", str(file), "Package", "Version", "Architecture"], folder) for file in found)
        lines = [
            " ".join([*(line.partition(": ")[2] for line in text.splitlines()), _sha256(file)])
            for file, text in zip(found, fields, strict=True)
        ]
        return "\n".join([*comments, *lines]) + "\n"

    def _from_registry(self, api: Any, folder: Path, say: Callable[[str], None]) -> str:
        shutil.copy(self._sources / "Dockerfile", folder)
        (folder / "agent.pyz").write_bytes(agent_bytes())
        say("building from the Dockerfile")
        for line in api.build(path=str(folder), tag=NAME, rm=True, decode=True):
            if "error" in line:
                why = " ".join(str(line["error"]).split())
                raise SandboxUnusable(f"the image cannot be built ({why}); where no registry is reached: --offline")
        return str(api.inspect_image(NAME)["Id"])

    def _from_debian(self, api: Any, folder: Path, say: Callable[[str], None]) -> str:
        packages, debs, root = self.packages(), folder / "debs", folder / "root"
        debs.mkdir()
        say(f"fetching {len(packages)} Debian packages")
        fetch = ["apt-get", "--quiet", "download", *(f"{package.name}={package.version}" for package in packages)]
        try:
            _run(fetch, debs)
        except SandboxUnusable:  # most often the package lists are old, or absent; renewing them takes root
            say("renewing the package lists")
            _run(["apt-get", "--quiet", "update"], debs)
            _run(fetch, debs)
        found = {_sha256(file): file for file in debs.glob("*.deb")}
        for package in packages:
            if package.sha256 not in found:
                raise SandboxUnusable(f"{package.name} {package.version} has another SHA-256 than versions.lock says")
            _run(["dpkg-deb", "--extract", str(found[package.sha256]), str(root)], folder)
        say("making the image")
        (python,) = (root / "usr/bin").glob("python3.*")
        for name in _LEFT_OUT:
            shutil.rmtree(root / name, ignore_errors=True)
        for name in ("tmp", "context", "dev", "proc", "sys", "etc"):
            (root / name).mkdir()
        (root / "agent.pyz").write_bytes(agent_bytes())
        archive = folder / "root.tar"
        with tarfile.open(archive, "w") as tar:
            for path in sorted(root.rglob("*")):
                tar.add(path, str(path.relative_to(root)), recursive=False, filter=_plain)
        entrypoint = json.dumps([f"/usr/bin/{python.name}", *FLAGS, BOOT])
        changes = ["USER 65532:65532", "WORKDIR /tmp", f"ENTRYPOINT {entrypoint}"]
        api.import_image_from_file(str(archive), repository=NAME, tag="latest", changes=changes)
        return str(api.inspect_image(NAME)["Id"])


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Root's, without a date, readable by all, and neither set-uid nor set-gid."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o1777 if entry.name == "tmp" else 0o755 if entry.isdir() or entry.mode & 0o111 else 0o644
    return entry


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _run(command: list[str], folder: Path) -> str:
    """Standard output. Raises SandboxUnusable with the command's last line."""
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except FileNotFoundError:
        raise SandboxUnusable(f"building the image offline needs {command[0]}, of Debian") from None
    except subprocess.TimeoutExpired:
        raise SandboxUnusable(f"{command[0]} took more than {_TIMEOUT_S} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SandboxUnusable(f"{command[0]} failed: {last}") from None
    return done.stdout
