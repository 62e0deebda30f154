"""Backends `docker` (runc) and `gvisor` (runsc): the guest agent in a container, spoken to over attached stdio.

Nothing is ever run in a container but the agent (no exec), nothing is written into one, and the engine is asked for
containers alone: no network, no volume. The engine's API: https://docs.docker.com/reference/api/engine/
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import docker
import docker.errors
import requests.exceptions

from orchestrator.core.errors import SandboxUnusable
from orchestrator.sandbox.attached import API_TIMEOUT_S, AttachedStream, attach
from orchestrator.sandbox.base import UNTOLD, Backend, Finding, Guest, SandboxSpec, Usage
from orchestrator.sandbox.cgroup import Cgroup, group_with
from orchestrator.sandbox.container import request
from orchestrator.sandbox.runtimes import RUNC, Runtime, is_backport, known_faults, why_refused

KILL_S = 10.0
_OUT_OF_SIGHT = "what it used is not recorded: the engine's control groups, which bound it, are out of sight"


class Docker(Backend):
    """image: gives the digest of the image to run. seccomp: the profile's file. engine: its socket."""

    def __init__(
        self, image: Callable[[], str], seccomp: Path, runtime: Runtime, engine: str = "/var/run/docker.sock"
    ) -> None:
        self.name = runtime.backend
        self.isolation = runtime.isolation
        self._runtime = runtime
        self._image = image
        self._seccomp = seccomp
        self._engine = engine
        self._reaped: set[Path] = set()
        self._out_of_sight = False  # known from the first launch on
        self._burials: ThreadPoolExecutor | None = None
        self._api: Any = None  # docker.APIClient, whose types say little

    @property
    def deviations(self) -> Mapping[str, str]:
        return {**self._runtime.deviations, **({UNTOLD: _OUT_OF_SIGHT} if self._out_of_sight else {})}

    async def launch(self, spec: SandboxSpec) -> Guest:
        # Not to be cancelled: a container that is being made has no name here that could be removed.
        with anyio.CancelScope(shield=True):
            return await anyio.to_thread.run_sync(self._launch, spec)
        raise AssertionError("a shielded scope is not cancelled")

    def _launch(self, spec: SandboxSpec) -> Guest:
        api = self._connect()
        self._reap(api, spec.slot.folder.parent)
        image = self._image()
        body = request(spec, self._runtime, image, self._seccomp.read_text(), apparmor=self._apparmor)
        guest: DockerGuest | None = None
        try:
            with _told(self._runtime):
                container = api.create_container_from_config(body, _name(spec))["Id"]
                guest = DockerGuest(api, self._engine, container, partial(self._bury, api))
                guest.image = image
                guest.start()
            self._out_of_sight |= guest.out_of_sight
        except BaseException:
            if guest is not None:
                guest.end()
            raise
        return guest

    def _reap(self, api: Any, slots: Path) -> None:
        """Once: remove what orchestrators that died have left, which ended with them. Running ones are somebody's."""
        if slots in self._reaped:
            return
        self._reaped.add(slots)
        filters = {"label": f"airlock.slots={slots}", "status": ["exited", "dead", "created"]}
        with _told(self._runtime):
            for container in api.containers(all=True, filters=filters):
                if container["State"] == "created" and time.time() - container["Created"] < 2 * API_TIMEOUT_S:
                    continue  # another orchestrator is about to start it
                with contextlib.suppress(docker.errors.APIError):  # another orchestrator was faster
                    api.remove_container(container["Id"], force=True, v=True)

    def _connect(self) -> Any:
        if self._api is None:
            with _told(self._runtime):
                api: Any = docker.APIClient(f"unix://{self._engine}", version="auto", timeout=API_TIMEOUT_S)
                info = api.info()
            self._apparmor = any("apparmor" in option for option in info.get("SecurityOptions") or ())
            why = why_refused(_revision(api, info)) if self._runtime.backend == RUNC.backend else None
            if why:
                api.close()
                raise SandboxUnusable(why)
            self._api = api
        return self._api

    def require_usable(self) -> None:
        self._image()
        api = self._connect()
        with _told(self._runtime):
            if self._runtime.name not in api.info().get("Runtimes", {}):
                raise SandboxUnusable(f"Docker has no runtime {self._runtime.name!r}: see /etc/docker/daemon.json")

    def _bury(self, api: Any, container: str) -> None:
        """Have the engine forget a container that has ended, which takes it a while. `close` waits for that."""
        if self._burials is None:
            self._burials = ThreadPoolExecutor(1, "airlock-burials")
        self._burials.submit(_remove, api, container)

    def close(self) -> None:
        if self._burials is not None:
            self._burials.shutdown()
            self._burials = None
        if self._api is not None:
            self._api.close()
            self._api = None

    async def diagnose(self) -> list[Finding]:
        return await anyio.to_thread.run_sync(self._diagnose)

    def _diagnose(self) -> list[Finding]:
        try:
            api = self._connect()
            version, info = api.version(), api.info()
            self.require_usable()
        except SandboxUnusable as error:
            return [Finding("engine", False, True, str(error))]
        parts = {part["Name"]: part["Version"] for part in version.get("Components") or ()}
        text = f"Docker {version['Version']}, containerd {parts.get('containerd', 'of an unknown version')}"
        lack = "not on this host: the filter of system calls and the capabilities stand without it"
        return [
            Finding("engine", True, True, text),
            *self._diagnose_runtime(api, info),
            Finding("image", True, True, self._image()),
            Finding("AppArmor", self._apparmor, False, "profile docker-default" if self._apparmor else lack),
        ]

    def _diagnose_runtime(self, api: Any, info: dict[str, Any]) -> list[Finding]:
        name = self._runtime.name
        if self._runtime.backend != RUNC.backend:
            return [Finding(name, True, True, _version_of(info["Runtimes"][name].get("path", name)))]
        revision = _revision(api, info)
        mended = ", with CVE-2024-21626 mended by the distribution" if is_backport(revision) else ""
        found = [Finding(name, True, True, f"{revision}{mended}")]
        if faults := known_faults(revision):
            found.append(Finding("known-bad", False, False, faults))
        return found


def _revision(api: Any, info: dict[str, Any]) -> str:
    """Of runc, as far as the engine knows it; a distribution's packages have their own number in it."""
    named = str(info.get("RuncCommit", {}).get("ID", ""))
    if "." in named:
        return named
    parts = api.version().get("Components") or ()
    return next((str(part["Version"]) for part in parts if part["Name"] == "runc"), "")


def _version_of(program: str) -> str:
    """The first line that a runtime's program says of its version; it is on this machine, as its engine is."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "of an unknown version"
    return next(iter(done.stdout.splitlines()), "of an unknown version")


def _remove(api: Any, container: str) -> None:
    # One that stays is in nobody's way: it has ended, and the next orchestrator's first launch removes it.
    with contextlib.suppress(docker.errors.DockerException, requests.exceptions.RequestException):
        api.remove_container(container, force=True, v=True)


class DockerGuest(Guest):
    """container: its id. engine: the engine's socket. What it holds on the host goes with `end` and the stream.

    bury: has the engine forget a container that has ended.
    """

    def __init__(self, api: Any, engine: str, container: str, bury: Callable[[str], None]) -> None:
        self._api = api
        self._bury = bury
        self._engine = engine
        self._container = container
        self._attached: AttachedStream | None = None
        self._first = -1
        self._group: Cgroup | None = None
        self._usage = Usage(None, None, oom=False)
        self._dead = False
        self.out_of_sight = False  # it runs, and its control group is not to be seen from here
        self._killing = anyio.Lock()

    def start(self) -> None:
        """Attach, then start: not a byte of the agent's is lost. Blocks. Raises what `docker` raises."""
        self.stream = self._attached = AttachedStream(attach(self._engine, self._container))
        self._api.start(self._container)
        pid = int(self._api.inspect_container(self._container)["State"]["Pid"])
        if pid:  # 0: it has ended already
            group = group_with(pid)
            # What is in its group is killed with it: it has to be the container's own.
            self._group = group if group and group.is_of(self._container) else None
            self.out_of_sight = self._group is None
            with contextlib.suppress(OSError):
                self._first = os.pidfd_open(pid)

    async def kill(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._killing:
                if not self._dead:
                    self._usage = self._measure()
                    await anyio.to_thread.run_sync(self.end)
                    self._dead = True

    def end(self) -> None:
        """Kill it. Blocks. Root does so itself, the engine there or not; else the engine. Raises SandboxUnusable."""
        if self._attached:  # the engine does not remove a container while it waits for us to read what that has written
            self._attached.cut()
        try:
            if self._group and self._usage.cpu_s is None:  # it has ended by itself, and its group with it
                state = self._api.inspect_container(self._container)["State"]
                self._usage = Usage(None, None, oom=bool(state["OOMKilled"]))
            if self._killed_directly():
                self._bury(self._container)
            else:
                self._api.remove_container(self._container, force=True, v=True)
        except docker.errors.NotFound:
            pass
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise SandboxUnusable(f"container {self._container[:12]} cannot be ended: {error}") from None
        finally:
            if self._first >= 0:
                os.close(self._first)
                self._first = -1

    def _killed_directly(self) -> bool:
        """First the one that could start others: process 1 of the namespace, or gVisor's sentry."""
        if self._first < 0 or not self._group:
            return False
        try:
            signal.pidfd_send_signal(self._first, signal.SIGKILL)
            ended = bool(select.select([self._first], [], [], KILL_S)[0])
        except ProcessLookupError:
            ended = True
        except OSError:
            return False
        return ended and self._group.kill(KILL_S)

    async def usage(self) -> Usage:
        return self._usage if self._dead else self._measure()

    def _measure(self) -> Usage:
        if not self._group:
            return self._usage
        return Usage(self._group.cpu_s(), self._group.peak_memory(), self._group.oom_kills() > 0)

    def last_words(self) -> str:
        text = (self._attached.words if self._attached else b"").decode("utf-8", "replace").strip()
        return text.splitlines()[-1][:300] if text else ""


@contextlib.contextmanager
def engine(path: str) -> Generator[Any]:
    """A client of the engine behind this socket. Raises SandboxUnusable for whatever goes wrong with it."""
    with _told(RUNC):
        api: Any = docker.APIClient(f"unix://{path}", version="auto", timeout=API_TIMEOUT_S)
        try:
            yield api
        finally:
            api.close()


def _name(spec: SandboxSpec) -> str:
    """Of one container alone: the one that had the slot before may still be on the engine's list."""
    return f"airlock-{spec.slot.number}-{secrets.token_hex(6)}"


@contextlib.contextmanager
def _told(runtime: Runtime) -> Generator[None]:
    """Makes of what the engine says one line with the remedy."""
    try:
        yield
    except docker.errors.ImageNotFound:
        raise SandboxUnusable("the sandbox's image is not here: run `airlock images build`") from None
    except docker.errors.APIError as error:
        said = " ".join(str(error.explanation or error).split())[:300]
        if re.search("unknown (or invalid )?runtime", said, re.IGNORECASE):
            raise SandboxUnusable(f"Docker has no runtime {runtime.name!r} ({said})") from None
        raise SandboxUnusable(f"Docker could not make a sandbox: {said}") from None
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise SandboxUnusable(f"Docker does not answer ({said}): start it, and let this user speak to it") from None
