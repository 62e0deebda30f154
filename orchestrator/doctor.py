"""What works on this machine, what does not, and why: tried out, not looked up."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from orchestrator.core.errors import AirlockError
from orchestrator.core.policy import Policy
from orchestrator.sandbox.base import Backend, Finding, SandboxSpec
from orchestrator.sandbox.registry import make_backend
from orchestrator.sandbox.sandbox import Call, Sandbox, open_sandbox
from orchestrator.sandbox.slots import Slots
from orchestrator.store.db import Database
from orchestrator.wiring import load_policy

# What a cell sees of the world outside, for the line that says how it is isolated.
_PROBE = """
import os, socket
def attempt(what):
    try:
        what()
    except OSError as error:
        return error.strerror
    return "POSSIBLE"
def reach():
    with socket.socket(socket.AF_INET) as sock:
        sock.settimeout(1)
        sock.connect(("169.254.169.254", 80))
print("network:", attempt(reach))
print("write to /usr:", attempt(lambda: open("/usr/x", "w")))
print("read /etc/passwd:", attempt(lambda: open("/etc/passwd")))
print("environment:", sorted(os.environ))
"""


async def examine(home: Path, backend_name: str) -> list[Finding]:
    """Every finding, the needed ones first. Raises RequestError for an unknown backend."""
    backend = make_backend(backend_name, least="namespace", home=home)
    findings = [_system(), _store(home)]
    if findings[-1].ok:
        cleared = Slots(home).clear_dead()
        findings += await _sandbox(backend, home, load_policy("default"))
        left = f"removed what {cleared} dead sandboxes had left" if cleared else "nothing was left by dead sandboxes"
        findings.append(Finding("leftovers", True, False, left))
    findings += [Finding("otherwise", True, False, text) for text in backend.deviations.values()]
    findings += await backend.diagnose()
    backend.close()
    findings.append(_models(home))
    return findings


def _system() -> Finding:
    user = "root" if os.geteuid() == 0 else f"user id {os.geteuid()}"
    machine = f"{platform.system()} {platform.release()}, {platform.machine()}"
    text = f"Python {platform.python_version()} on {machine}, as {user}"
    return Finding("system", sys.platform == "linux", True, text)


def _store(home: Path) -> Finding:
    try:
        Database(home).close()
        free = shutil.disk_usage(home).free
    except (AirlockError, OSError) as error:
        return Finding("store", False, True, str(error))
    return Finding("store", True, True, f"{home}, {free / 2**30:.1f} GiB free")


async def _sandbox(backend: Backend, home: Path, policy: Policy) -> list[Finding]:
    started = time.perf_counter()
    try:
        async with open_sandbox(backend, Slots(home), partial(SandboxSpec.under, policy)) as sandbox:
            result = await sandbox.run(_PROBE, 10, _no_calls)
            first = (time.perf_counter() - started) * 1000
            trip = await _round_trip(sandbox)
    except AirlockError as error:
        return [Finding(f"sandbox {backend.name}", False, True, str(error))]
    text = f"isolation {backend.isolation.name}, Python {sandbox.python}"
    text += f", first cell after {first:.0f} ms, then {trip:.1f} ms"
    held = result.status == "ok" and "POSSIBLE" not in result.text("out")
    seen = "; ".join(result.text("out").splitlines()) or result.detail
    return [Finding(f"sandbox {backend.name}", True, True, text), Finding("containment", held, True, seen)]


async def _round_trip(sandbox: Sandbox) -> float:
    started = time.perf_counter()
    await sandbox.run("pass", 10, _no_calls)
    return (time.perf_counter() - started) * 1000


async def _no_calls(_call: Call) -> str:
    return ""


def _models(home: Path) -> Finding:
    from orchestrator.lm import weights

    names = [f"local:{name}" for name in weights.installed(home / "models")]
    text = ", ".join(names) or "none here; `airlock models pull` fetches one"
    return Finding("local models", bool(names), False, text)
