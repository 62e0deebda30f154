"""Images of containers: what a policy chooses, what has changed behind Airlock's back, and the Dockerfile."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from orchestrator.sandbox.agent import agent_bytes
from orchestrator.sandbox.docker import engine
from orchestrator.sandbox.images import id_of_build
from orchestrator.settings import docker_socket
from tests.command import PROJECT, Airlock
from tests.conftest import built

SOURCES = PROJECT / "sandbox_images"
TABLE = """
import numpy, pandas
print(numpy.arange(6).reshape(2, 3).sum(), pandas.DataFrame({"n": [1, 2, 3]}).n.mean())
print(pandas.Timestamp("2024-05-01", tz="Europe/Berlin").utcoffset())
"""


@pytest.fixture
def contained(airlock: Airlock, image: str, home: Path) -> Airlock:
    shutil.copy(home / "images.json", airlock.home)
    return airlock


@pytest.fixture
def api() -> Iterator[Any]:
    with engine(docker_socket()) as client:
        yield client


def execute(airlock: Airlock, code: str, *options: object, code_is: int) -> Any:
    return airlock("exec", airlock.file("cell.py", code), "--context", "context.txt", *options, code=code_is)


def started(airlock: Airlock) -> dict[str, Any]:
    return next(record["body"] for record in airlock.records() if record["type"] == "sandbox.started")


@pytest.mark.parametrize("backend", ["docker", "gvisor"])
def test_the_data_image(airlock: Airlock, backend: str) -> None:
    policy = airlock.policy(sandbox_image="data")
    with built(airlock.home, "data") as made:
        assert execute(airlock, TABLE, "--policy", policy, "--backend", backend, code_is=0).out == "15 2.0\n2:00:00\n"
        assert started(airlock)["image"] == made


def test_the_data_image_is_never_another(contained: Airlock) -> None:
    policy = contained.policy(sandbox_image="data")
    done = execute(contained, "1", "--policy", policy, "--backend", "bubblewrap", code_is=3)
    assert done.said == (
        "the policy asks for image 'data', and backend bubblewrap has this machine's Python: take a container"
    )
    done = execute(contained, "1", "--policy", policy, "--backend", "docker", code_is=4)
    assert done.said == "killed: sandbox-unusable: the image 'data' is not built: run `airlock images build data`"
    done = execute(contained, "1", "--policy", policy, code_is=4)
    assert done.said.startswith("no backend with isolation of at least 'namespace', which the policy asks for: kata: ")
    assert contained("images", "build", "gpu", code=2).said == "there is no image 'gpu'; there are python and data"


def test_the_image_is_on_record(contained: Airlock, image: str) -> None:
    execute(contained, "1", "--backend", "docker", code_is=0)
    assert started(contained)["image"] == image
    execute(contained, "1", "--backend", "bubblewrap", code_is=0)
    assert started(contained)["image"] is None


def test_the_strict_policy_takes_gvisor_or_nothing(contained: Airlock) -> None:
    assert execute(contained, "print(1)", "--policy", "strict", code_is=0).out == "1\n"
    assert started(contained)["isolation"] == "gvisor"
    for weaker in ("bubblewrap", "docker"):
        done = execute(contained, "print(1)", "--policy", "strict", "--backend", weaker, code_is=3)
        assert "the policy asks for isolation of at least 'gvisor', and backend" in done.said
    (contained.home / "airlock.toml").write_text('[runtimes]\ngvisor = "absent"\n')
    done = execute(contained, "print(1)", "--policy", "strict", code_is=4)
    assert "no backend with isolation of at least 'gvisor'" in done.said
    assert "gvisor: Docker has no runtime 'absent'" in done.said


def test_an_image_that_took_the_name_of_ours_is_not_run(contained: Airlock, image: str, api: Any) -> None:
    """Whoever may speak to the engine can move a tag; what runs is named by what is in it."""
    tag = api.inspect_image(image)["RepoTags"]
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("nothing"))
    other = json.loads(api.import_image_from_data(empty.getvalue(), repository="airlock-python", tag="latest"))[
        "status"
    ]
    try:
        assert api.inspect_image("airlock-python")["Id"] == other != image
        assert execute(contained, "print(1)", "--backend", "docker", code_is=0).out == "1\n"
        assert started(contained)["image"] == image
        record = json.loads((contained.home / "images.json").read_text())
        record["python"]["id"] = other  # and one that was put on record is no agent
        (contained.home / "images.json").write_text(json.dumps(record))
        done = execute(contained, "print(1)", "--backend", "docker", code_is=4)
        assert "killed: sandbox-unusable: Docker could not make a sandbox: No command specified" in done.said
    finally:
        api.remove_image(other, force=True)
        if tag:
            api.tag(image, "airlock-python", "latest")


def test_an_image_that_was_rebuilt_after_its_agent_changed_is_refused(contained: Airlock) -> None:
    record = json.loads((contained.home / "images.json").read_text())
    record["python"]["agent"] = "0" * 64
    (contained.home / "images.json").write_text(json.dumps(record))
    done = execute(contained, "print(1)", "--backend", "docker", code_is=4)
    assert done.said == (
        "killed: sandbox-unusable: the sandbox's image is of another version: run `airlock images build`"
    )


# The Dockerfile


def test_every_base_of_the_dockerfile_is_named_by_its_digest() -> None:
    text = (SOURCES / "Dockerfile").read_text()
    assert re.findall(r"(?m)^ARG PYTHON=(.*)$", text) == re.findall(r"python:3\.\d+-slim@sha256:[0-9a-f]{64}", text)
    stages = re.findall(r"(?m)^FROM (\S+) AS (\S+)$", text)
    known = {"scratch", "${PYTHON}"}
    for base, name in stages:
        assert base in known
        known.add(name)
    assert len(stages) == text.count("\nFROM ")
    assert set(re.findall(r"--from=(\S+)", text)) <= known
    pinned = re.findall(
        r"(?m)^([a-z-]+)==\S+ \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n?)+)", (SOURCES / "data.txt").read_text()
    )
    assert {"numpy", "pandas"} <= {name for name, _ in pinned}


# A pip that has no network: it says that the stage runs it as it should, and no more.
PIP = """
import os, sys
assert sys.argv[1:] == "install --require-hashes --only-binary :all: --target /packages -r /data.txt".split()
os.makedirs("/packages")
open("/packages/numpy.py", "w").write("stands_in = True\\n")
"""


def stand_in(image: str, folder: Path, api: Any) -> str:
    """A base like python:3.12-slim, which no registry gives us here, out of the image that we have."""
    tar = folder / "base.tar"
    with tar.open("wb") as file:
        container = api.create_container(image)["Id"]
        file.writelines(api.export(container))
        api.remove_container(container)
    with tarfile.open(tar, "a") as base:
        python = next(Path(name) for name in base.getnames() if re.fullmatch(r"usr/bin/python3\.\d+", name))
        link = tarfile.TarInfo("usr/local/bin/python3.12")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(python), 0o755
        base.addfile(link)
        library = tarfile.TarInfo(f"usr/local/lib/{python.name}")
        library.type, library.linkname = tarfile.SYMTYPE, f"/usr/lib/{python.name}"
        base.addfile(library)
        base.add("/bin/rm", "usr/bin/rm")
        pip = tarfile.TarInfo(f"usr/lib/{python.name}/pip.py")
        pip.size = len(PIP)
        base.addfile(pip, io.BytesIO(PIP.encode()))
    return json.loads(api.import_image_from_file(str(tar), repository="airlock-stand-in"))["status"]


@pytest.mark.parametrize("target", ["python", "data"])
def test_the_dockerfile_builds_an_image_that_runs_the_agent(
    contained: Airlock, image: str, tmp_path: Path, api: Any, target: str
) -> None:
    context = tmp_path / "build"
    context.mkdir()
    for name in ("Dockerfile", "data.txt"):
        shutil.copy(SOURCES / name, context)
    (context / "agent.pyz").write_bytes(agent_bytes())
    base, tag = stand_in(image, tmp_path, api), f"airlock-test-{target}"
    made = [base]
    try:
        options = {"target": target, "tag": tag, "buildargs": {"PYTHON": base}, "forcerm": True}
        lines = list(api.build(path=str(context), decode=True, **options))
        for line in lines:
            made += re.findall(r"---> ([0-9a-f]{12})\n", line.get("stream", ""))
        assert id_of_build(lines) == api.inspect_image(tag)["Id"]
        record = json.loads((contained.home / "images.json").read_text())
        record[target] = {**record["python"], "id": id_of_build(lines)}
        (contained.home / "images.json").write_text(json.dumps(record))
        code = "import os, sys\nprint(sys.executable, os.path.exists('/bin/sh'), os.path.exists('/usr/bin/rm'))"
        code += "\nimport numpy\nprint(numpy.stands_in)" if target == "data" else ""
        policy = contained.policy(sandbox_image=target)
        done = execute(contained, code, "--policy", policy, "--backend", "docker", code_is=0)
        assert done.out.splitlines()[0] == "/usr/local/bin/python3.12 False False"
        assert done.out.splitlines()[1:] == (["True"] if target == "data" else [])
    finally:
        for name in reversed(made):  # the stages between them, too
            with contextlib.suppress(docker.errors.APIError):
                api.remove_image(name, force=True)
