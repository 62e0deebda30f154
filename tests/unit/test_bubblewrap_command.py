"""How bwrap is called, as data: every hardening flag is there, and nothing of the host that is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sandbox.base import Slot
from orchestrator.sandbox.bubblewrap import command
from orchestrator.sandbox.interpreter import candidates, find_interpreter
from tests.sandboxes import MIB, spec_for

BINDS = [(Path("/host/python"), "/usr/bin/python3"), (Path("/home/slot-7"), "/context")]


@pytest.fixture
def arguments() -> list[str]:
    return command(spec_for(Slot(7, Path("/home/slot-7"), 2_000_000_007)), "/usr/bin/python3", BINDS, 11, 12)


def values(arguments: list[str], flag: str, count: int = 1) -> list[list[str]]:
    return [arguments[at + 1 : at + 1 + count] for at, word in enumerate(arguments) if word == flag]


@pytest.mark.parametrize(
    "flag",
    [
        "--unshare-user",
        "--unshare-all",
        "--disable-userns",
        "--new-session",
        "--die-with-parent",
        "--as-pid-1",
        "--clearenv",
    ],
)
def test_isolation(arguments: list[str], flag: str):
    assert arguments.count(flag) == 1


def test_no_namespace_is_shared_and_nothing_is_writable_but_tmp(arguments: list[str]):
    assert not [word for word in arguments if word.startswith("--share")]
    assert not {"--bind", "--bind-try", "--dev", "--proc", "--mqueue", "--cap-add", "--overlay", "--bind-fd"} & {
        *arguments
    }
    assert values(arguments, "--tmpfs") == [["/tmp"]]
    assert values(arguments, "--remount-ro") == [["/"]]
    assert arguments.index("--remount-ro") > max(at for at, word in enumerate(arguments) if word.endswith("bind"))


def test_privileges_and_filter(arguments: list[str]):
    assert values(arguments, "--cap-drop") == [["ALL"]]
    assert values(arguments, "--uid") == values(arguments, "--gid") == [["65532"]]
    assert values(arguments, "--seccomp") == [["11"]]
    assert values(arguments, "--info-fd") == [["12"]]


def test_the_tmpfs_has_a_size(arguments: list[str]):
    at = arguments.index("--size")
    assert arguments[at : at + 4] == ["--size", str(16 * MIB), "--tmpfs", "/tmp"]


def test_the_environment_and_the_devices_are_these(arguments: list[str]):
    assert {name for name, _ in values(arguments, "--setenv", 2)} == {"PATH", "HOME", "LANG"}
    assert {outside for outside, _ in values(arguments, "--dev-bind", 2)} == {
        f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")
    }


def test_what_is_bound_is_bound_read_only(arguments: list[str]):
    assert values(arguments, "--ro-bind", 2) == [[str(source), inside] for source, inside in BINDS]


def test_the_agent_runs_isolated_from_its_environment(arguments: list[str]):
    program = arguments[arguments.index("--") + 1 :]
    assert program[0] == "/usr/bin/python3"
    assert {"-I", "-S", "-B"} <= {*program}
    assert program[-2] == "-c"
    assert "'/agent.pyz'" in program[-1]


def test_a_python_of_its_own_prefix_finds_its_libraries():
    spec = spec_for(Slot(7, Path("/home/slot-7"), None))
    assert ["LD_LIBRARY_PATH", "/usr/local/lib"] in values(
        command(spec, "/usr/local/bin/python3", [], 11, 12), "--setenv", 2
    )


def test_the_interpreters_files_are_its_own():
    interpreter = find_interpreter(candidates()[0])
    assert interpreter.executable in [inside for _, inside in interpreter.binds]
    for source, inside in interpreter.binds:
        assert inside.startswith("/usr/")
        assert Path(source).exists()
        assert inside not in ("/usr", "/usr/lib", "/usr/bin", "/usr/local", "/usr/local/lib")
