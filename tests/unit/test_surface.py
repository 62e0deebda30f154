"""The public surface: what `from orchestrator import ...` gives, and that it costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import orchestrator
from orchestrator.core import errors

HEAVY = ("aiohttp", "sqlalchemy", "alembic", "genai_prices", "jsonschema", "rich", "httpx2", "tenacity", "xllamacpp")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_all_is_sorted_and_there():
    assert list(orchestrator.__all__) == sorted(orchestrator.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(orchestrator, name) for name in orchestrator.__all__)


def test_nothing_else_is_public():
    code = "import orchestrator, types\nfor name, what in vars(orchestrator).items():\n"
    code += "    if name[0] != '_' and not isinstance(what, types.ModuleType): print(name)"
    assert sorted(run(code).split()) == sorted(orchestrator.__all__)


def test_importing_it_loads_nothing_heavy():
    loaded = run(f"import sys, orchestrator; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert loaded == ""


def test_importing_it_starts_no_thread_and_writes_no_file():
    code = (
        "import sys; seen = []\n"
        "names = ('socket.connect', 'subprocess.Popen', 'os.mkdir', '_thread.start_new_thread')\n"
        "def audit(name, args):\n"
        "    writes = name == 'open' and isinstance(args[1], str) and args[1][0] in 'wax'\n"
        "    if name in names or writes: seen.append((name, args))\n"
        "sys.dont_write_bytecode = True\n"
        "sys.addaudithook(audit)\n"
        "import orchestrator\n"
        "print(*seen)"
    )
    assert run(code) == ""


def test_the_tree_of_errors_is_the_one_that_is_drawn():
    drawn = str(errors.__doc__)
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AirlockError)]
    assert all(f" {kind.__name__}" in drawn for kind in tree)
    assert len({kind.kind for kind in tree}) == len(tree)
    branches = {errors.RequestError: 2, errors.LimitError: 3, errors.MachineError: 4, errors.ProviderError: 5}
    for branch, code in branches.items():
        assert all(kind.exit_code == code for kind in tree if issubclass(kind, branch))
