"""The images that containers run: built here, addressed by digest, and refused when they are not what was built.

`python` is Python, the shared libraries it needs and the guest agent; `data` has numpy and pandas as well. Which one
runs is the policy's to say, and what it is stands on record in the data folder: its id (the digest of all that is in
it) and the agent it was built with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import RequestError, SandboxUnusable
from orchestrator.core.policy import IMAGES
from orchestrator.files import alone
from orchestrator.sandbox.agent import agent_bytes, agent_version

TAG = "airlock-{}"  # for people who list their images; nothing is run by it
# Not `python agent.pyz`: that goes through runpy, whose imports cost 8 ms.
BOOT = 'from sys import path; path.insert(0, "/agent.pyz"); {}from agent.supervisor import main; main()'
FLAGS = ("-I", "-S", "-B", "-X", "utf8", "-c")
_PACKAGES = "/usr/lib/python3/dist-packages"
_LEFT_OUT = ("etc", "usr/sbin", "sbin", "usr/include")
_KEPT_OF_SHARE = "zoneinfo"
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Package:
    """A line of versions.lock."""

    name: str
    version: str
    architecture: str
    sha256: str


class Images:
    """record: a file of the data folder. sources: the folder `sandbox_images`. name: one of IMAGES, everywhere."""

    def __init__(self, record: Path, sources: Path) -> None:
        self._record = record
        self._sources = sources

    def expected(self, name: str) -> str:
        """The id of the image to run. Raises SandboxUnusable when there is none, or one of another version."""
        remedy = f"run `airlock images build{'' if name == IMAGES[0] else ' ' + name}`"
        try:
            built = self._built()[name]
            image, agent = str(built["id"]), built["agent"]
        except (FileNotFoundError, KeyError):
            what = "the sandbox's image" if name == IMAGES[0] else f"the image {name!r}"
            raise SandboxUnusable(f"{what} is not built: {remedy}") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SandboxUnusable(f"cannot read {self._record} ({error}): {remedy}") from None
        if agent != agent_version():
            raise SandboxUnusable(f"the sandbox's image is of another version: {remedy}")
        return image

    def _built(self) -> dict[str, Any]:
        return json.loads(self._record.read_text(encoding="utf-8"))

    def build(self, api: Any, name: str, *, offline: bool, say: Callable[[str], None]) -> str:
        """Build it with the engine behind `api` (docker.APIClient), and put it on record; its id.

        Raises RequestError for an unknown name, SandboxUnusable.
        """
        if name not in IMAGES:
            raise RequestError(f"there is no image {name!r}; there are {' and '.join(IMAGES)}")
        with tempfile.TemporaryDirectory(prefix="airlock-image-") as folder:
            made = self._from_debian if offline else self._from_registry
            image = made(api, name, Path(folder), say)
        self._put(name, {"id": image, "agent": agent_version(), "offline": offline})
        return image

    def _put(self, name: str, entry: dict[str, Any]) -> None:
        """Beside what is on record already, and what another build puts there at the same time."""
        with alone(self._record.with_suffix(".lock")):
            try:
                built = dict(self._built())
            except (OSError, ValueError, TypeError):  # none yet, or none that can be read: this one is
                built = {}
            draft = self._record.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(built | {name: entry}), encoding="utf-8")
            draft.replace(self._record)

    def packages(self, name: str) -> list[Package]:
        """Debian's, for the offline build: those of the first image, and what this one has besides."""
        sections = self._sections()
        return [package for section in dict.fromkeys((IMAGES[0], name)) for package in sections[section]]

    def _sections(self) -> dict[str, list[Package]]:
        found: dict[str, list[Package]] = {}
        for line in (self._sources / "versions.lock").read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                found[line.strip("[]")] = []
            elif line and not line.startswith("#"):
                found[next(reversed(found))].append(Package(*line.split()))
        return found

    def lock(self, folder: Path) -> str:
        """Take the newest versions of the packages; the new text of versions.lock. folder: an empty one."""
        sections = self._sections()
        wanted = [package.name for packages in sections.values() for package in packages]
        _run(["apt-get", "--quiet", "download", *wanted], folder)
        lines: dict[str, str] = {}
        for file in folder.glob("*.deb"):
            fields = _run(["dpkg-deb", "-f", str(file), "Package", "Version", "Architecture"], folder).splitlines()
            line = " ".join([*(field.partition(": ")[2] for field in fields), _sha256(file)])
            lines[line.partition(" ")[0]] = line
        text = (self._sources / "versions.lock").read_text(encoding="utf-8")
        written = [line for line in text.splitlines() if line.startswith("#")]
        for name, packages in sections.items():
            written += [f"[{name}]", *sorted(lines[package.name] for package in packages)]
        return "\n".join(written) + "\n"

    def _from_registry(self, api: Any, name: str, folder: Path, say: Callable[[str], None]) -> str:
        for source in ("Dockerfile", "data.txt"):
            shutil.copy(self._sources / source, folder)
        (folder / "agent.pyz").write_bytes(agent_bytes())
        say("building from the Dockerfile")
        return id_of_build(api.build(path=str(folder), target=name, tag=TAG.format(name), rm=True, decode=True))

    def _from_debian(self, api: Any, name: str, folder: Path, say: Callable[[str], None]) -> str:
        packages, debs, root = self.packages(name), folder / "debs", folder / "root"
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
        python = _prepare(root)
        archive = folder / "root.tar"
        with tarfile.open(archive, "w") as tar:
            for path in sorted(root.rglob("*")):
                tar.add(path, str(path.relative_to(root)), recursive=False, filter=_plain)
        more = "" if name == IMAGES[0] else f'path.append("{_PACKAGES}"); '
        entrypoint = json.dumps([f"/usr/bin/{python}", *FLAGS, BOOT.format(more)])
        changes = ["USER 65532:65532", "WORKDIR /tmp", f"ENTRYPOINT {entrypoint}"]
        answer = api.import_image_from_file(str(archive), repository=TAG.format(name), tag="latest", changes=changes)
        return str(json.loads(answer)["status"])


def id_of_build(lines: Iterable[dict[str, Any]]) -> str:
    """The id of what the engine builds, by what it says meanwhile: the tag may be another build's already.

    Raises SandboxUnusable.
    """
    image = ""
    for line in lines:
        if "error" in line:
            why = " ".join(str(line["error"]).split())
            raise SandboxUnusable(f"the image cannot be built ({why}); where no registry is reached: --offline")
        image = line.get("aux", {}).get("ID", image)
    return image


def _prepare(root: Path) -> str:
    """Make of extracted packages what a sandbox needs, and no more. The name of Python's program."""
    (python,) = (root / "usr/bin").glob("python3.*")
    for path in (*(root / "usr/share").glob("*"), *(root / "usr/bin").glob("*")):
        if path.name not in (_KEPT_OF_SHARE, python.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in _LEFT_OUT:
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("tmp", "context", "dev", "proc", "sys", "etc"):
        (root / name).mkdir()
    for library in root.glob("usr/lib/*/*/lib*.so.3"):  # a choice that Debian's own installer makes by such links
        (library.parents[1] / library.name).symlink_to(library.relative_to(library.parents[1]))
    (root / "agent.pyz").write_bytes(agent_bytes())
    _compile(root, python)
    return python.name


def _compile(root: Path, python: Path) -> None:
    """Every module, by the image's own Python, run from where it lies: a read-only image can never be given them."""
    (loader,) = (root / "lib64").glob("ld-linux-*")
    libraries = ":".join(str(folder) for part in ("lib", "usr/lib") for folder in (root / part).glob("*-linux-gnu"))
    where = [str(folder) for folder in (root / "usr/lib").glob("python3*")]
    compiled = [
        "-m",
        "compileall",
        "-q",
        "-j",
        "0",
        "--invalidation-mode",
        "unchecked-hash",
        "-s",
        str(root),
        "-p",
        "/",
    ]
    home = ["env", f"PYTHONHOME={root / 'usr'}"]
    _run([*home, str(loader), "--library-path", libraries, str(python), *compiled, *where], root)


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
