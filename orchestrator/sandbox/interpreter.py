"""Which Python runs in the sandbox, and exactly which files of the host it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from orchestrator.core.errors import SandboxUnusable

# Extension modules that only make sense with a terminal, a network, a display or a host database.
_UNUSED = re.compile(
    r"^(_curses|_curses_panel|readline|nis|_dbm|_gdbm|_tkinter|_ssl|ossaudiodev|spwd|_test\w*|xx\w*)\."
)
_PROBE = "import sys, sysconfig; print(sys.version_info[:2], sys.base_prefix, sysconfig.get_path('stdlib'), sep='\\n')"


@dataclass(frozen=True, slots=True)
class Interpreter:
    """binds: (host path, path inside), read-only. executable: path inside."""

    executable: str
    binds: tuple[tuple[str, str], ...]


def candidates() -> list[Path]:
    """Pythons a sandbox could run, best first: the system's of the version that runs Airlock, then the running one."""
    own = Path(os.path.realpath(sys.executable))
    system = Path("/usr/bin") / f"python3.{sys.version_info.minor}"
    return [system, own] if system.exists() else [own]


def find_interpreter(python: Path) -> Interpreter:
    """What `python` needs. An installation outside /usr appears as /usr/local. Raises SandboxUnusable."""
    try:
        probe = _run([str(python), "-I", "-S", "-c", _PROBE]).splitlines()
        prefix, stdlib = Path(probe[1]), Path(os.path.realpath(probe[2]))
        modules = sorted((stdlib / "lib-dynload").glob("*.so"))
        libraries = _libraries([python, *(path for path in modules if not _UNUSED.match(path.name))])
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise SandboxUnusable(f"cannot use {python} in sandboxes: {error}") from None
    executable = f"/usr/{'' if prefix == Path('/usr') else 'local/'}bin/{python.name}"
    inside: dict[str, str] = {str(python): executable, str(stdlib): _inside(stdlib, prefix)}
    for library in libraries:
        inside[str(library)] = _inside(library, prefix)
    return Interpreter(executable, tuple(inside.items()))


def _inside(path: Path, prefix: Path) -> str:
    if prefix != Path("/usr") and path.is_relative_to(prefix):
        return str(PurePosixPath("/usr/local") / path.relative_to(prefix))
    text = str(path)
    # Merged-usr systems: /lib is a link into /usr, inside as outside.
    return f"/usr{text}" if text.startswith("/lib") else text


def _libraries(binaries: list[Path]) -> list[Path]:
    """Every shared library, and the dynamic linker, that `binaries` load, as `ldd` finds them."""
    found: set[Path] = set()
    for line in _run(["ldd", *map(str, binaries)]).splitlines():
        path = line.split("=>")[-1].split("(")[0].strip()
        if path.startswith("/") and not line.rstrip().endswith(":"):
            found.add(Path(path))
    return sorted(found)


def _run(command: list[str]) -> str:
    return subprocess.run(  # noqa: S603  a fixed command over files of the host's own Python
        command, capture_output=True, text=True, check=True, timeout=30, env={"LC_ALL": "C.UTF-8", "PATH": os.defpath}
    ).stdout


def cached_interpreter(python: Path, folder: Path) -> Interpreter:
    """`find_interpreter`, remembered in `folder` until the interpreter changes."""
    status = python.stat()
    key = f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
    path = folder / f"interpreter-{key}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        interpreter = Interpreter(stored["executable"], tuple((a, b) for a, b in stored["binds"]))
        if all(os.path.exists(source) for source, _ in interpreter.binds):  # noqa: PTH110  30 files, on every start
            return interpreter
    except (OSError, ValueError, KeyError, TypeError):
        pass
    interpreter = find_interpreter(python)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"executable": interpreter.executable, "binds": interpreter.binds}))
    temporary.rename(path)
    return interpreter
