"""What works on this machine, what does not, and why: tried out, not looked up."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import click

from orchestrator.core.errors import AirlockError, SandboxUnusable
from orchestrator.core.policy import Policy
from orchestrator.data_folder import open_database
from orchestrator.named_policy import load_policy
from orchestrator.sandbox.base import Backend, Finding, SandboxSpec
from orchestrator.sandbox.conformance import PROMISES, Verdict, conform
from orchestrator.sandbox.conformance.promise import Bench
from orchestrator.sandbox.registry import NAMES, make_backend
from orchestrator.sandbox.sandbox import Call, open_sandbox
from orchestrator.sandbox.slots import Slots

_ROUND_TRIPS = 50
_PAUSE_S = 0.03  # between two of them, for the snapshot that the agent takes while a model thinks
_MACHINE = "machine"  # the section that is no backend's
_INDENT = 19  # columns of a finding's mark and name
_ALG = "no odd sockets"  # the promise on which the answer to CVE-2026-31431 rests


@dataclass(slots=True)
class Section:
    """What was found of the machine (no isolation then), or of one backend. figures: milliseconds and counts."""

    name: str
    isolation: str | None
    findings: list[Finding] = field(default_factory=list[Finding])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def usable(self) -> bool:
        return all(finding.ok for finding in self.findings if finding.needed)


async def report(home: Path, backend_name: str | None, *, as_json: bool) -> int:
    """Print what is found, as it is found; the exit code. 0: the backend asked for is usable, or at least one is."""
    sections: list[Section] = []
    quiet = as_json or not sys.stderr.isatty()
    async for section in examine(home, backend_name, (lambda _text: None) if quiet else _show_progress):
        sections.append(section)
        if not as_json:
            if not quiet:
                _show_progress("")
            _show(section)
    usable = [section.name for section in sections[1:] if section.usable]
    if as_json:
        click.echo(
            json.dumps({"usable": bool(usable), **_plain(sections[0]), "backends": [*map(_plain, sections[1:])]})
        )
    else:
        click.echo(f"usable: {', '.join(usable)}" if usable else "not usable", err=True)
    return 0 if usable else SandboxUnusable.exit_code


def _plain(section: Section) -> dict[str, Any]:
    """For JSON."""
    rows = [{"name": f.name, "ok": f.ok, "needed": f.needed, "text": f.text} for f in section.findings]
    of_backend = {"name": section.name, "isolation": section.isolation, "usable": section.usable}
    return ({} if section.name == _MACHINE else of_backend) | {"findings": rows, **section.figures}


def _show(section: Section) -> None:
    title = click.style(section.name, bold=True)
    if section.name != _MACHINE:
        title += f": usable, isolation {section.isolation}" if section.usable else ": not usable"
    click.echo(title)
    # On a terminal long lines are broken where the text begins; elsewhere a finding is one line.
    width = max(60, shutil.get_terminal_size().columns - 1) if sys.stdout.isatty() else 1_000_000
    for finding in section.findings:
        mark, colour = ("ok", "green") if finding.ok else ("FAIL", "red") if finding.needed else ("lack", "yellow")
        first, *rest = textwrap.wrap(finding.text, width - _INDENT, break_on_hyphens=False) or [""]
        click.echo(f"  {click.style(f'{mark:<4}', fg=colour)}  {finding.name:<11}{first}")
        for line in rest:
            click.echo(" " * _INDENT + line)


def _show_progress(text: str) -> None:
    click.echo(f"\r\033[K{text}", nl=False, err=True)


async def examine(home: Path, backend_name: str | None, trying: Callable[[str], None]) -> AsyncGenerator[Section]:
    """The machine's section, then one for each backend. backend_name: one alone; None for all that there are.

    trying: told what is about to be tried, for it takes its time. Raises RequestError for an unknown backend.
    """
    backends: list[Backend] = []
    unloaded: list[Section] = []
    for name in (backend_name,) if backend_name else NAMES:
        try:
            backends.append(make_backend(name, least="namespace", home=home))
        except SandboxUnusable as error:
            unloaded.append(Section(name, None, [Finding("backend", False, True, str(error))]))
    machine = Section(_MACHINE, None, [_system(), _store(home)])
    if machine.usable:
        cleared = Slots(home).clear_dead()
        left = f"removed what {cleared} dead sandboxes had left" if cleared else "nothing was left by dead sandboxes"
        machine.findings.append(Finding("leftovers", True, False, left))
    machine.findings.append(_models(home))
    yield machine
    for backend in backends if machine.usable else []:
        yield await _examined(backend, home, trying)
        backend.close()
    for section in unloaded:
        yield section


async def _examined(backend: Backend, home: Path, trying: Callable[[str], None]) -> Section:
    trying(f"{backend.name}: looking at it")
    section = Section(backend.name, backend.isolation.name, await backend.diagnose())
    if not section.usable:
        return section
    try:
        trying(f"{backend.name}: measuring")
        await _measure(backend, home, load_policy("default"), section)
        trying(f"{backend.name}: trying {len(PROMISES)} promises, for some seconds")
        verdicts = await conform(Bench(backend, Slots(home)))
    except AirlockError as error:
        section.findings.append(Finding("sandbox", False, True, str(error)))
        return section
    section.findings += _judged(verdicts, backend)
    kept = [verdict for verdict in verdicts if verdict.state == "kept"]
    section.figures |= {
        "promises": len(verdicts),
        "kept": len(kept),
        "deviations": {v.promise.name: v.text for v in verdicts if v.state == "deviates"},
        "broken": {v.promise.name: v.text for v in verdicts if v.state == "broken"},
    }
    return section


async def _measure(backend: Backend, home: Path, policy: Policy, section: Section) -> None:
    trips: list[float] = []
    started = time.perf_counter()
    async with open_sandbox(backend, Slots(home), partial(SandboxSpec.under, policy)) as sandbox:
        await sandbox.run("pass", 10, _no_calls)
        first = (time.perf_counter() - started) * 1000
        for _ in range(_ROUND_TRIPS):
            await anyio.sleep(_PAUSE_S)
            started = time.perf_counter()
            await sandbox.run("pass", 10, _no_calls)
            trips.append((time.perf_counter() - started) * 1000)
    trip = statistics.median(trips)
    section.figures |= {"first_cell_ms": round(first, 1), "round_trip_p50_ms": round(trip, 2)}
    text = f"Python {sandbox.python}, first cell after {first:.0f} ms, round trip {trip:.1f} ms (p50 of {len(trips)})"
    section.findings.append(Finding("sandbox", True, True, text))


async def _no_calls(_call: Call) -> str:
    return ""


def _judged(verdicts: list[Verdict], backend: Backend) -> list[Finding]:
    """How many promises are kept, each that is broken, and each deviation with what it costs."""
    broken = [verdict for verdict in verdicts if verdict.state == "broken"]
    kept = sum(verdict.state == "kept" for verdict in verdicts)
    findings = [Finding("promises", not broken, True, f"{kept} of {len(verdicts)} kept")]
    findings += [Finding("broken", False, True, f"{v.promise.name}: {v.text}") for v in broken]
    for name, text in backend.deviations.items():
        count = sum(verdict.state == "deviates" and name in verdict.promise.unless for verdict in verdicts)
        findings.append(Finding("deviates", False, False, f"{text} ({count} of the promises)"))
    out_of_reach = all(verdict.state == "kept" for verdict in verdicts if verdict.promise.name == _ALG)
    text = "CVE-2026-31431 needs a socket of AF_ALG, which a guest " + ("cannot" if out_of_reach else "can") + " make"
    return [*findings, Finding("kernel", out_of_reach, False, text)]


def _system() -> Finding:
    user = "root" if os.geteuid() == 0 else f"user id {os.geteuid()}"
    machine = f"{platform.system()} {platform.release()}, {platform.machine()}"
    text = f"Python {platform.python_version()} on {machine}, as {user}"
    return Finding("system", sys.platform == "linux", True, text)


def _store(home: Path) -> Finding:
    try:
        open_database(home).close()
        free = shutil.disk_usage(home).free
    except (AirlockError, OSError) as error:
        return Finding("store", False, True, str(error))
    return Finding("store", True, True, f"{home}, {free / 2**30:.1f} GiB free")


def _models(home: Path) -> Finding:
    from orchestrator.lm import weights

    names = [f"local:{name}" for name in weights.installed(home / "models")]
    text = ", ".join(names) or "none here; `airlock models pull` fetches one"
    return Finding("models", bool(names), False, text)
