"""The seam that keeps backends small: start the guest agent in isolation, hand back its stream, kill it for certain."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio.abc import ByteStream

from orchestrator.core.policy import Policy

_GIB = 1 << 30


class Isolation(enum.IntEnum):
    """How far a guest is from the host's kernel. Ordered: a policy names the least it accepts."""

    namespace = 1
    container = 2
    gvisor = 3
    microvm = 4


@dataclass(frozen=True, slots=True)
class Slot:
    """What one sandbox has to itself while it lives.

    uid: the user and group id it runs under on the host; None when Airlock is not root and has only its own.
    """

    number: int
    folder: Path
    uid: int | None


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What one sandbox may use. Sizes in bytes, `cpus` in cores. slot.folder is mounted read-only at /context."""

    slot: Slot
    memory_bytes: int
    cpus: float
    pids: int
    tmp_bytes: int
    files: int
    output_bytes: int
    answer_chars: int
    calls_in_flight: int
    batch: int

    @classmethod
    def under(cls, policy: Policy, slot: Slot) -> SandboxSpec:
        """What `policy` grants a sandbox."""
        limits = policy.sandbox
        return cls(
            slot=slot,
            memory_bytes=limits.memory,
            cpus=limits.cpu / 1000,
            pids=limits.pids,
            tmp_bytes=limits.tmp,
            files=limits.files,
            output_bytes=limits.output,
            answer_chars=policy.content.answer_chars,
            # Some more wait at the host, so that a place which comes free there needs no round through the guest.
            calls_in_flight=policy.counts.in_flight * 5 // 4,
            batch=policy.counts.batch,
        )

    def guest_limits(self) -> dict[str, Any]:
        """The part that the guest agent enforces on its workers, as the hello frame carries it."""
        return {
            "memory_bytes": self.memory_bytes,
            "address_bytes": 2 * self.memory_bytes + _GIB,  # and the context's size, which the guest sees
            "pids": self.pids,
            "files": self.files,
            "file_bytes": self.tmp_bytes,
            "output_bytes": self.output_bytes,
            "answer_chars": self.answer_chars,
            "calls_in_flight": self.calls_in_flight,
            "batch": self.batch,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """What a guest used. None where the host has no way to measure. `oom` when the kernel killed for memory."""

    cpu_s: float | None
    peak_memory_bytes: int | None
    oom: bool


class Guest(ABC):
    """A running guest agent. image: the digest of what it runs in; None where that is this machine's own Python."""

    stream: ByteStream
    image: str | None = None

    @abstractmethod
    async def kill(self) -> None:
        """End it and everything it started. Idempotent; returns when nothing of the guest is left."""

    @abstractmethod
    async def usage(self) -> Usage:
        """What it used so far, or in all once it is dead."""

    @abstractmethod
    def last_words(self) -> str:
        """The last line that the launcher or the agent wrote to standard error, for the reason of a failed start."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `airlock doctor`. ok=False on a `needed` finding makes the backend unusable."""

    name: str
    ok: bool
    needed: bool
    text: str


# Names of deviations.
EXHAUSTION = "exhaustion"  # a cell that uses up memory ends the sandbox, not itself alone
SIGNALS = "signals"  # a cell can end its sandbox by a signal to the agent
UNBOUNDED = "unbounded"  # memory and processors of the sandbox as a whole are not bounded
UNTOLD = "untold"  # what a sandbox uses is bounded, and the host cannot learn it
HOST_PATHS = "host paths"  # the guest can learn where the context lies on the host


class Backend(ABC):
    """One way of isolating guests. Constructing it does no I/O."""

    name: str
    isolation: Isolation

    @property
    def deviations(self) -> Mapping[str, str]:
        """Name -> what this backend does otherwise than promised, on this machine; it is held to them as well."""
        return {}

    def require_usable(self) -> None:
        """A quick look, for choosing among backends: raises SandboxUnusable when `launch` would for certain. Blocks."""
        return

    def close(self) -> None:
        """Release what it holds on the host. Idempotent."""
        return

    @abstractmethod
    async def launch(self, spec: SandboxSpec) -> Guest:
        """Start a guest agent.

        Raises SandboxUnusable when this machine cannot isolate as the backend promises, in one line with the remedy.
        """

    @abstractmethod
    async def diagnose(self) -> list[Finding]:
        """What this backend has and lacks on this machine. Starts and ends a real sandbox; raises nothing."""
