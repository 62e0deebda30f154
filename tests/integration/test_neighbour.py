"""A guest does not reach a neighbour: a container with a listening service, on a network beside its sandbox."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_docker.plugin import Services

from orchestrator.sandbox import docker as docker_backend
from orchestrator.sandbox.base import Backend
from orchestrator.sandbox.docker import engine
from orchestrator.sandbox.registry import make_backend
from orchestrator.settings import docker_socket
from tests.sandboxes import open_repl

pytestmark = pytest.mark.anyio

REACH = """
import socket
reached = []
for place in PLACES:
    try:
        socket.create_connection(place, timeout=2).close()
        reached.append(place[0])
    except OSError:
        pass
print(*reached)
"""


@pytest.fixture(scope="session")
def docker_compose_command() -> str:
    return "docker-compose"


@pytest.fixture(scope="session")
def docker_setup() -> str:
    return "up --detach"


@pytest.fixture(scope="session")
def docker_compose_file(image: str) -> Iterator[str]:
    with engine(docker_socket()) as api, pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGE", image)
        patch.setenv("PYTHON", api.inspect_image(image)["Config"]["Entrypoint"][0])
        yield str(Path(__file__).with_name("neighbour.yaml"))


@pytest.fixture(scope="module")
def street(docker_services: Services, docker_compose_project_name: str) -> tuple[str, str]:
    """The network, and the neighbour's address in it, once its service answers."""
    with engine(docker_socket()) as api:
        label = f"com.docker.compose.project={docker_compose_project_name}"
        (container,) = api.containers(filters={"label": label})
        ((network, how),) = container["NetworkSettings"]["Networks"].items()
    address = how["IPAddress"]
    docker_services.wait_until_responsive(lambda: answers(address), timeout=20, pause=0.05)
    return network, address


def answers(address: str) -> bool:
    try:
        socket.create_connection((address, 8000), timeout=1).close()
    except OSError:
        return False
    return True


async def reached(backend: Backend, home: Path, address: str) -> list[str]:
    places = [(address, 8000), ("neighbour", 8000)]
    async with open_repl(backend, home) as repl:
        return (await repl.out(f"PLACES = {places!r}\n{REACH}")).split()


async def test_a_guest_does_not_reach_its_neighbour(backend: Backend, home: Path, street: tuple[str, str]):
    _, address = street
    assert await reached(backend, home, address) == []
    assert answers(address)


async def test_a_container_on_the_neighbours_network_would(
    home: Path, street: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    network, address = street
    whole = docker_backend.request

    def request(*arguments: Any, **options: Any) -> dict[str, Any]:
        body = whole(*arguments, **options)
        open_to_all = {"NetworkMode": network, "SecurityOpt": ["seccomp=unconfined"]}
        return {**body, "NetworkDisabled": False, "HostConfig": {**body["HostConfig"], **open_to_all}}

    monkeypatch.setattr(docker_backend, "request", request)
    backend = make_backend("docker", least="namespace", home=home)
    assert await reached(backend, home, address) == [address, "neighbour"]
    backend.close()
