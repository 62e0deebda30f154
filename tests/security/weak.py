"""Sandboxes with a defence taken away: bwrap's arguments, a container's body, the agent's source or a limit, edited."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.sandbox import agent, bubblewrap, docker
from orchestrator.sandbox.base import Backend, Finding, Guest, SandboxSpec
from tests.sandboxes import Repl, open_repl


@dataclass(frozen=True, slots=True)
class Scene:
    """What an edit may use. yard: a folder of the host's, open to every user. reach: a path as bwrap can take it."""

    spec: SandboxSpec
    yard: Path
    reach: Callable[[Path], Path]

    def words(self, words: tuple[str, ...]) -> list[str]:
        """YARD and SLOTS stand for the folders."""
        slots = str(self.reach(self.spec.slot.folder.parent / "x").parent)
        return [word.replace("YARD", str(self.yard)).replace("SLOTS", slots) for word in words]


Argv = Callable[[list[str], Scene], list[str]]
Body = Callable[[dict[str, Any], Scene], None]


@dataclass(frozen=True, slots=True)
class Weak:
    """One way of taking a defence away; the same on every backend.

    argv: edits of bwrap's arguments. body: edits of what the engine is asked for. agent: code at the end of the
    agent's supervisor. own_uid=False: root's. changes: to the spec. host: what is patched on the host meanwhile.
    """

    argv: tuple[Argv, ...] = ()
    body: tuple[Body, ...] = ()
    agent: str = ""
    own_uid: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    host: Callable[[pytest.MonkeyPatch], None] | None = None

    def __or__(self, other: Weak) -> Weak:
        return Weak(
            self.argv + other.argv,
            self.body + other.body,
            f"{self.agent}\n{other.agent}".strip(),
            self.own_uid and other.own_uid,
            {**self.changes, **other.changes},
            other.host or self.host,
        )


class Weakened(Backend):
    """`inner`, which launches what `weak` makes of it."""

    _launching = anyio.Lock()  # one patch at a time

    def __init__(self, inner: Backend, weak: Weak, yard: Path, cache: Path) -> None:
        self.name, self.isolation = inner.name, inner.isolation
        self._inner, self._weak, self._yard, self._cache = inner, weak, yard, cache

    async def launch(self, spec: SandboxSpec) -> Guest:
        weak = self._weak
        launcher = getattr(self._inner, "_launcher", None)
        scene = Scene(spec, self._yard, launcher.reach if launcher and spec.slot.uid is not None else Path)

        def edited_command(*arguments: Any) -> list[str]:
            made = command(*arguments)
            for edit in weak.argv:
                made = edit(made, scene)
            return made

        def edited_request(*arguments: Any, **options: Any) -> dict[str, Any]:
            body = request(*arguments, **options)
            if not weak.own_uid:
                body["User"] = "0:0"
            for edit in weak.body:
                edit(body, scene)
            if weak.agent:
                mount(body, _agent_with(weak.agent, self._cache), "/agent.pyz")
            return body

        async with self._launching:
            command, request = bubblewrap.command, docker.request
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bubblewrap, "command", edited_command)
                patch.setattr(docker, "request", edited_request)
                if weak.agent:
                    patch.setattr(bubblewrap, "agent_file", lambda folder: _agent_with(weak.agent, folder))
                return await self._inner.launch(spec)

    async def diagnose(self) -> list[Finding]:
        return await self._inner.diagnose()


@asynccontextmanager
async def open_weak(inner: Backend, home: Path, yard: Path, weak: Weak, **changes: Any) -> AsyncGenerator[Repl]:
    backend = Weakened(inner, weak, yard, home / "cache")
    async with open_repl(backend, home, own_uid=weak.own_uid, **(changes | dict(weak.changes))) as repl:
        yield repl


def _agent_with(code: str, folder: Path) -> Path:
    """The agent with `code` at the end of its supervisor, which every boot imports."""
    path = folder / f"weak-{hashlib.sha256((agent.agent_version() + code).encode()).hexdigest()[:16]}.pyz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for source in Path(bubblewrap.__file__).parents[1].joinpath("guest").glob("*.py"):
                added = code if source.stem == "supervisor" else ""
                archive.writestr(f"agent/{source.name}", f"{source.read_text()}\n{added}")
        path.chmod(0o444)
    return path


# Edits of bwrap's arguments


def without(flag: str, values: int = 0) -> Argv:
    """The last use of a flag, and its values, left out."""

    def edit(arguments: list[str], _scene: Scene) -> list[str]:
        at = len(arguments) - 1 - arguments[::-1].index(flag)
        return arguments[:at] + arguments[at + 1 + values :]

    return edit


def instead(flag: str, *others: str) -> Argv:
    def edit(arguments: list[str], _scene: Scene) -> list[str]:
        at = arguments.index(flag)
        return [*arguments[:at], *others, *arguments[at + 1 :]]

    return edit


def with_more(*more: str) -> Argv:
    """More arguments, while the root can still be written."""

    def edit(arguments: list[str], scene: Scene) -> list[str]:
        at = arguments.index("--perms")
        return [*arguments[:at], *scene.words(more), *arguments[at:]]

    return edit


def after_all(*more: str) -> Argv:
    """More arguments, after everything is mounted."""

    def edit(arguments: list[str], scene: Scene) -> list[str]:
        at = arguments.index("--remount-ro")
        return [*arguments[:at], *scene.words(more), *arguments[at:]]

    return edit


# Edits of a container's body


def host_config(**settings: Any) -> Body:
    return lambda body, _scene: body["HostConfig"].update(settings)


def body_with(**settings: Any) -> Body:
    return lambda body, _scene: body.update(settings)


def mount(body: dict[str, Any], source: Path, target: str, *, writable: bool = False) -> None:
    mounts = [each for each in body["HostConfig"]["Mounts"] if each["Target"] != target]
    body["HostConfig"]["Mounts"] = [
        *mounts,
        {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": not writable},
    ]


def _open_context(body: dict[str, Any], scene: Scene) -> None:
    mount(body, scene.spec.slot.folder, "/context", writable=True)


def _open_context_argv(arguments: list[str], _scene: Scene) -> list[str]:
    at = arguments.index("/context") - 2
    return [*arguments[:at], "--bind", *arguments[at + 1 :]]


def _shared_tmp(body: dict[str, Any], scene: Scene) -> None:
    body["HostConfig"]["Tmpfs"] = {}
    mount(body, scene.yard / "shared", "/tmp", writable=True)


def _uncovered(body: dict[str, Any], _scene: Scene) -> None:
    body["HostConfig"]["MaskedPaths"] = body["HostConfig"]["ReadonlyPaths"] = []
    tmpfs = body["HostConfig"]["Tmpfs"]
    body["HostConfig"]["Tmpfs"] = {folder: options for folder, options in tmpfs.items() if folder == "/tmp"}


# Not all: no engine can give what it has not got itself.
_CAPABILITIES = [
    "SYS_ADMIN",
    "SYS_CHROOT",
    "SYS_NICE",
    "SETUID",
    "SETGID",
    "SETPCAP",
    "CHOWN",
    "MKNOD",
]
_SOME = ("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup")

WHOLE = Weak()
UNFILTERED = Weak(
    (without("--seccomp", 1), without("--disable-userns")),
    (host_config(SecurityOpt=["no-new-privileges", "seccomp=unconfined"]),),
)
NO_FILTER = Weak((without("--seccomp", 1),), UNFILTERED.body)
USER_NAMESPACES = Weak((without("--disable-userns"),))
PRIVILEGED = UNFILTERED | Weak(
    (without("--cap-drop", 1), with_more("--cap-add", "ALL")),
    (host_config(SecurityOpt=["seccomp=unconfined"], CapAdd=_CAPABILITIES), body_with(User="0:0")),
)
FILTERED_NETWORK = Weak(
    (instead("--unshare-all", *_SOME),), (host_config(NetworkMode="host"), body_with(NetworkDisabled=False))
)
HOST_NETWORK = UNFILTERED | FILTERED_NETWORK
BRIDGE = UNFILTERED | Weak(
    (instead("--unshare-all", *_SOME),), (host_config(NetworkMode="bridge"), body_with(NetworkDisabled=False))
)
HOST_IPC = UNFILTERED | Weak(
    (instead("--unshare-all", *_SOME[1:], "--unshare-net"), with_more("--bind", "/dev/shm", "/dev/shm")),
    (host_config(IpcMode="host"),),
)
WRITABLE_ROOT = Weak((without("--remount-ro", 1),), (host_config(ReadonlyRootfs=False), body_with(User="0:0")))
WITH_YARD = Weak(
    (with_more("--ro-bind", "YARD", "YARD"),), (lambda body, scene: mount(body, scene.yard, str(scene.yard)),)
)
WITH_SLOTS = Weak(
    (with_more("--ro-bind", "SLOTS", "/slots"),),
    (lambda body, scene: mount(body, scene.spec.slot.folder.parent, "/slots"),),
)
SHARED_TMP = Weak((after_all("--bind", "YARD/shared", "/tmp"),), (_shared_tmp,))
OPEN_CONTEXT = Weak((_open_context_argv,), (_open_context,), own_uid=False)
OPEN_PROC = Weak((with_more("--proc", "/proc", "--ro-bind", "/sys", "/sys"),), (_uncovered,))
WRITABLE_PROC = Weak((with_more("--bind", "/proc", "/proc"),), (_uncovered,), own_uid=False)
