"""Compiles `policies/seccomp.json`, Docker's form of a seccomp profile, to the BPF program that bubblewrap loads.

Form: https://docs.docker.com/engine/security/seccomp/ (names, action, errnoRet, args). libseccomp also kills system
calls of any other architecture, which closes the i386 and x32 ABIs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, cast

from orchestrator.core.errors import SandboxUnusable

_OPERATORS = {"SCMP_CMP_EQ": "EQ", "SCMP_CMP_NE": "NE", "SCMP_CMP_MASKED_EQ": "MASKED_EQ"}


def compile_profile(profile: dict[str, Any]) -> bytes:
    """The BPF program for this machine's architecture.

    Names the kernel's architecture does not have are passed over; the default action covers them.
    Raises SandboxUnusable when libseccomp is missing, ValueError on a profile that is not of the form.
    """
    try:
        import pyseccomp  # pyright: ignore[reportMissingTypeStubs]  needs libseccomp2, a system package
    except (ImportError, OSError, RuntimeError) as error:
        raise SandboxUnusable(f"libseccomp cannot be loaded ({error}); install the package libseccomp2") from None

    def action(entry: dict[str, Any], key: str, errno_key: str) -> int:
        if entry[key] == "SCMP_ACT_ALLOW":
            return pyseccomp.ALLOW
        if entry[key] == "SCMP_ACT_ERRNO":
            return pyseccomp.ERRNO(int(entry.get(errno_key, 1)))
        raise ValueError(f"seccomp profile: unknown action {entry[key]}")

    default = action(profile, "defaultAction", "defaultErrnoRet")
    program = pyseccomp.SyscallFilter(default)
    for rule in profile["syscalls"]:
        arguments = [
            pyseccomp.Arg(
                arg["index"], getattr(pyseccomp, _OPERATORS[arg["op"]]), arg["value"], int(arg.get("valueTwo", 0))
            )
            for arg in rule.get("args", ())
        ]
        what = action(rule, "action", "errnoRet")
        if what == default and not arguments:
            continue
        for name in rule["names"]:
            try:
                number = cast("int", pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))  # pyright: ignore
            except (ValueError, OSError):
                continue
            if number >= 0:
                program.add_rule(what, number, *arguments)
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def compiled_profile(source: Path, folder: Path) -> Path:
    """The program of the profile at `source`, compiled once into `folder`."""
    text = source.read_bytes()
    path = folder / f"seccomp-{os.uname().machine}-{hashlib.sha256(text).hexdigest()[:16]}.bpf"
    if not path.exists():
        program = compile_profile(json.loads(text))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(program)
        temporary.rename(path)
    return path
