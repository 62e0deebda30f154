"""Attack: get a packet, or a byte, out to anything that listens on the host or beyond it."""

from __future__ import annotations

import socket
import uuid

import pytest

from tests.sandboxes import Repl
from tests.security.attacks import Weak, breaches, shared_network

pytestmark = pytest.mark.anyio

FAMILIES = """
for family in range(64):
    if family != 1:
        for kind in (1, 2, 3, 5):
            for call in (SOCKET, SOCKETPAIR):
                pair = (ctypes.c_int * 2)()
                if syscall(call, family, kind, 0, pair) == 0:
                    breach(family)
"""
REACH = """
import socket
for host, port in TARGETS:
    try:
        socket.create_connection((host, port), timeout=2).close()
        breach(host)
    except OSError:
        pass
for name in ('example.com', 'localhost'):
    try:
        socket.getaddrinfo(name, 53, type=socket.SOCK_STREAM)
        if name != 'localhost':
            breach('DNS')
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            datagram.sendto(b'x', TARGETS[0])
            breach('datagram')
    except OSError:
        pass
"""
ABSTRACT = """
import socket
with socket.socket(socket.AF_UNIX) as stream:
    try:
        stream.connect(NAME)
        breach('host')
    except OSError:
        pass
"""


@pytest.fixture
def calls() -> dict[str, int]:
    from tests.security.attacks import number

    return {"SOCKET": number("socket"), "SOCKETPAIR": number("socketpair")}


@pytest.fixture
def targets():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield [("127.0.0.1", listener.getsockname()[1]), ("169.254.169.254", 80), ("1.1.1.1", 53)]


async def test_sockets_of_every_family(repl: Repl, weak: Weak, calls: dict[str, int]):
    assert await breaches(repl, FAMILIES, **calls) == []
    async with weak.open(filtered=False) as unfiltered:
        assert {"2", "16"} <= set(await breaches(unfiltered, FAMILIES, **calls))


async def test_addresses_on_the_host_and_beyond(repl: Repl, weak: Weak, targets: list[tuple[str, int]]):
    assert await breaches(repl, REACH, TARGETS=targets) == []
    async with weak.open(shared_network) as filter_only:
        assert await breaches(filter_only, REACH, TARGETS=targets) == []
    async with weak.open(filtered=False) as namespace_only:
        assert await breaches(namespace_only, REACH, TARGETS=targets) == []
    async with weak.open(shared_network, filtered=False) as neither:
        assert "127.0.0.1" in await breaches(neither, REACH, TARGETS=targets[:1])


async def test_abstract_unix_sockets_of_the_host(repl: Repl, weak: Weak):
    name = f"\0airlock-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        assert await breaches(repl, ABSTRACT, NAME=name) == []
        async with weak.open(shared_network) as shared:
            assert await breaches(shared, ABSTRACT, NAME=name) == ["host"]
