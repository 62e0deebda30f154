"""Queries in containers of a real engine, under runc and under gVisor; and what the engine can do to them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import Airlock, until

LOOP = "import os\nos.write(1, b'begun')\nprint(flush=True)\nwhile True: pass"
SCRIPT = """
root: ["```repl\\nfound = context.split()[-1]\\nprint(llm_query(found))\\n```", 'FINAL_VAR(found)']
sub: [{match: ., reply: 'yes'}]
"""
ISOLATION = {"docker": "container", "gvisor": "gvisor"}
pytestmark = pytest.mark.parametrize("backend", ISOLATION)


@pytest.fixture
def contained(airlock: Airlock, image: str, home: Path) -> Iterator[Airlock]:
    shutil.copy(home / "images.json", airlock.home)
    yield airlock
    assert containers(airlock) == []


def containers(airlock: Airlock, *filters: str) -> list[str]:
    label = f"label=airlock.slots={airlock.home / 'slots'}"
    command = ["docker", "ps", "--all", "--quiet", "--filter", label, *filters]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def execute(airlock: Airlock, code: str, backend: str) -> list[object]:
    return ["exec", airlock.file("cell.py", code), "--context", "context.txt", "--backend", backend]


def test_a_query(contained: Airlock, backend: str) -> None:
    model = f"scripted:{contained.file('script.yaml', SCRIPT)}"
    options = ("--context", "context.txt", "--model", model, "--backend", backend, "--json")
    report = contained("run", "What is it?", *options, code=0).json
    assert (report["answer"], report["sub_calls"]) == ("4711", 1)
    assert (report["backend"], report["isolation"]) == (backend, ISOLATION[backend])
    ended = next(record["body"] for record in contained.records() if record["type"] == "sandbox.ended")
    assert ended["peak_memory_bytes"] > 1 << 20
    assert ended["cpu_ms"] > 0


def test_a_policy_that_asks_for_it_gets_it(contained: Airlock, backend: str) -> None:
    policy = contained.policy(sandbox_least_isolation=ISOLATION[backend])
    done = contained(*execute(contained, "print(1)", "auto"), "--policy", policy, code=0)
    assert done.out == "1\n"
    opened = contained.records()[0]["body"]
    assert opened["backend"] == "gvisor"  # the strongest there is


def test_without_an_image(airlock: Airlock, backend: str) -> None:
    done = airlock(*execute(airlock, "print(1)", backend), code=4)
    assert done.said == "killed: sandbox-unusable: the sandbox's image is not built: run `airlock images build`"


def test_an_image_that_is_gone(contained: Airlock, backend: str) -> None:
    record = json.loads((contained.home / "images.json").read_text())
    record["python"]["id"] = "sha256:" + "0" * 64
    (contained.home / "images.json").write_text(json.dumps(record))
    done = contained(*execute(contained, "print(1)", backend), code=4)
    assert done.said == "killed: sandbox-unusable: the sandbox's image is not here: run `airlock images build`"


def test_without_an_engine(contained: Airlock, backend: str) -> None:
    nowhere = replace(contained, env={"DOCKER_HOST": "unix:///nowhere/docker.sock"})
    done = nowhere(*execute(contained, "print(1)", backend), code=4)
    assert "killed: sandbox-unusable: Docker does not answer" in done.said


def test_a_container_that_is_killed_from_outside(contained: Airlock, backend: str) -> None:
    with contained.started(*execute(contained, LOOP, backend)) as query:
        assert query.line() == "begun\n"
        (container,) = containers(contained)
        subprocess.run(["docker", "kill", container], check=True, capture_output=True)  # noqa: S607
        done = query.end()
    assert done.code == 4
    assert done.said == "killed: sandbox-died: the sandbox ended unexpectedly"


def test_ctrl_c(contained: Airlock, backend: str) -> None:
    with contained.started(*execute(contained, LOOP, backend)) as query:
        assert query.line() == "begun\n"
        done = query.interrupt()
    assert done.code == 130
    assert contained.closing()["status"] == "cancelled"


def test_kill_9(contained: Airlock, backend: str) -> None:
    """The container ends with its orchestrator; the next one removes what is left of it, and settles."""
    with contained.started(*execute(contained, LOOP, backend)) as query:
        assert query.line() == "begun\n"
        assert len(containers(contained)) == 1
        query.process.send_signal(signal.SIGKILL)
        query.end()
    until(lambda: not containers(contained, "--filter", "status=running"))
    assert contained(*execute(contained, "print(1)", backend), code=0).out == "1\n"
    assert [status for _, status in contained.rows("SELECT id, status FROM queries ORDER BY opened_at")] == [
        "interrupted",
        "answered",
    ]


def test_doctor(contained: Airlock, backend: str) -> None:
    done = contained("doctor", "--backend", backend, code=0)
    assert f"{backend}: usable, isolation {ISOLATION[backend]}" in done.out
    assert "FAIL" not in done.out
    assert "  ok    promises   " in done.out
    assert ("a signal to process 1" in done.out) == (backend == "gvisor")


def test_doctor_where_the_service_is_in_a_container_itself(contained: Airlock, backend: str) -> None:
    """Process ids of the engine are others than its own there, and its sandboxes' control groups are not to be seen."""
    inside = replace(contained, prefix=["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"])
    done = inside("doctor", "--backend", backend, code=0)
    assert "FAIL" not in done.out
    assert "lack  deviates   what it used is not recorded" in done.out


def test_another_name_for_the_runtime(contained: Airlock, backend: str) -> None:
    """An operator says which of the engine's runtimes is kata; what it is in truth is theirs to know."""
    runtime = {"docker": "runc", "gvisor": "runsc"}[backend]
    (contained.home / "airlock.toml").write_text(f'[runtimes]\nkata = "{runtime}"\n')
    done = contained(*execute(contained, "print(1)", "kata"), code=0)
    assert done.out == "1\n"
    assert contained.records()[0]["body"]["isolation"] == "microvm"
