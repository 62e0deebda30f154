"""What a promise is, and what it is tried on: sandboxes with small limits, and short ways to use them."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.core.context import Context, ContextKind
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Call, CellResult, OnCall, OnOutput, Sandbox, open_sandbox
from orchestrator.sandbox.slots import Slots

MIB = 1 << 20
CELL_S = 20.0
_SAID = 300  # characters of what was seen that are told


class Broken(Exception):
    """A promise is not kept. `str()` is one line: what was seen."""


def expect(kept: bool, saw: object) -> None:
    """Not `assert`, which an optimised Python leaves out. Raises Broken."""
    if not kept:
        raise Broken(" ".join(str(saw).split())[:_SAID] or "nothing was seen")


def small_spec(slot: Slot, **changes: Any) -> SandboxSpec:
    """Limits that are quickly used up."""
    spec = SandboxSpec(
        slot,
        memory_bytes=256 * MIB,
        cpus=2.0,
        pids=64,
        tmp_bytes=16 * MIB,
        files=256,
        output_bytes=MIB,
        answer_chars=100_000,
        calls_in_flight=8,
        batch=100,
    )
    return replace(spec, **changes)


class Repl:
    """A sandbox with short ways to run a cell, and the slot it lives in. calls: what its cells asked for."""

    def __init__(self, sandbox: Sandbox, slot: Slot) -> None:
        self.sandbox = sandbox
        self.slot = slot
        self.calls: list[Call] = []

    async def on_call(self, call: Call) -> str | dict[str, Any]:
        self.calls.append(call)
        return {"left": "$1"} if call.op == "budget" else f"reply to {call.prompt}"

    async def run(
        self, code: str, timeout_s: float = CELL_S, on_call: OnCall | None = None, on_output: OnOutput | None = None
    ) -> CellResult:
        return await self.sandbox.run(textwrap.dedent(code), timeout_s, on_call or self.on_call, on_output)

    async def out(self, code: str, on_call: OnCall | None = None, on_output: OnOutput | None = None) -> str:
        """What a cell prints that has to end well. Raises Broken."""
        result = await self.run(code, CELL_S, on_call, on_output)
        expect((result.status, result.text("err")) == ("ok", ""), result)
        return result.text("out").removesuffix("\n")

    async def prints(self, code: str, expected: str, on_call: OnCall | None = None) -> None:
        """Raises Broken when a cell prints anything else."""
        printed = await self.out(code, on_call)
        expect(printed == expected, f"{printed[:_SAID]!r} was printed, not {expected[:_SAID]!r}")

    async def ends(self, code: str, status: str, detail: str, timeout_s: float = CELL_S) -> CellResult:
        """Raises Broken when a cell ends otherwise. detail: a part of what is said of it."""
        result = await self.run(code, timeout_s)
        expect(result.status == status and detail in result.detail, f"{code!r}: {result.status}, {result.detail}")
        return result

    def attach(self, value: object, kind: ContextKind = "text") -> list[Path]:
        """Attach a text, a JSON value, lines, or documents as {path: text}; the host's own links to what it sees."""
        data, facts = _encoded(value, kind)
        facts |= {"kind": kind, "bytes": len(data), "chars": len(data.decode()), "index": None, "stride": 1 << 16}
        # Beside the slot's folder: a hard link does not leave its file system.
        with tempfile.TemporaryDirectory(prefix=".conformance-", dir=self.slot.folder.parent) as folder:
            files: dict[str, Path] = {}
            for name, content in (("data", data), ("manifest.json", json.dumps(facts).encode())):
                files[name] = Path(folder, name)
                files[name].write_bytes(content)
                files[name].chmod(0o444)
            self.sandbox.attach(Context("", "", kind, len(data), facts["chars"], facts["items"], files))
        return [self.slot.folder / name for name in files]


def _encoded(value: Any, kind: ContextKind) -> tuple[bytes, dict[str, Any]]:
    """The two files that `guest.context` reads: the data, and of the manifest what depends on the kind."""
    if kind == "text":
        return value.encode(), {"items": None}
    if kind == "json":
        return json.dumps(value).encode(), {"items": None}
    if kind == "jsonl":
        lines = "".join(json.dumps(item) + "\n" for item in value)
        return lines.encode(), {"items": len(value), "blocks": [[0], [0]]}
    documents: list[tuple[str, int, int, int, None]] = []
    data = b""
    for path, text in value.items():
        documents.append((path, len(data), len(text.encode()), len(text), None))
        data += text.encode()
    return data, {"items": len(documents), "documents": documents}


@dataclass(frozen=True, slots=True)
class Bench:
    """A backend, and slots for its sandboxes."""

    backend: Backend
    slots: Slots

    @asynccontextmanager
    async def open(self, **changes: Any) -> AsyncGenerator[Repl]:
        """A started sandbox with `small_spec`, changed. Raises SandboxUnusable."""
        taken: list[Slot] = []

        def spec(slot: Slot) -> SandboxSpec:
            taken.append(slot)
            return small_spec(slot, **changes)

        async with open_sandbox(self.backend, self.slots, spec) as sandbox:
            yield Repl(sandbox, taken[0])


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that every backend keeps.

    name: for people and reports. text: one sentence. invariant: of the design's, which this one shows a part of.
    opens: the check gets a Bench and opens sandboxes of its own; else a Repl, which is to be as good afterwards.
    unless: the name of a deviation that a backend may have -> the one way in which the check fails then.
    """

    name: str
    text: str
    check: Callable[[Any], Awaitable[None]]
    opens: bool
    invariant: int | None = None
    unless: Mapping[str, type[Exception]] = field(default_factory=dict[str, type[Exception]])


def in_a_sandbox(
    text: str, *, invariant: int | None = None, unless: Mapping[str, type[Exception]] | None = None
) -> Callable[[Callable[[Repl], Awaitable[None]]], Promise]:
    """Makes a promise of a check. It is named as the function is."""
    return lambda check: Promise(_name(check), text, check, False, invariant, unless or {})


def over_sandboxes(
    text: str, *, invariant: int | None = None, unless: Mapping[str, type[Exception]] | None = None
) -> Callable[[Callable[[Bench], Awaitable[None]]], Promise]:
    """The same for a check that opens sandboxes itself."""
    return lambda check: Promise(_name(check), text, check, True, invariant, unless or {})


def _name(check: Callable[..., Any]) -> str:
    return check.__name__.replace("_", " ")


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status; empty when there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def processes_of(uid: int | None) -> set[int]:
    """Process ids, on the host, of a user id; when None, of our own, in a process id namespace of their own."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        status = status_of(int(entry.name)) if entry.name.isdecimal() else {}
        if (
            not status
            or status["State"].startswith("Z")
            or int(status["Uid"].split()[0]) != (os.geteuid() if uid is None else uid)
        ):
            continue
        if uid is not None or len(status["NSpid"].split()) > 1:
            found.add(int(entry.name))
    return found
