"""Get a packet, or a byte, out to anything that listens on the host, beyond it, or beside the sandbox."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.security import host_view
from tests.security.frame import Attack, Stage, attacked, breaches, cell, number, seen
from tests.security.weak import BRIDGE, FILTERED_NETWORK, HOST_NETWORK, NO_FILTER, UNFILTERED

FAMILIES = """
held = []
for family in range(64):
    made = [call(SOCKET, family, kind, 0) for kind in (1, 2, 3, 5)] if family in TRIED else []
    pair = (ctypes.c_int * 2)()
    if family in TRIED and call(SOCKETPAIR, family, 1, 0, pair) == 0:
        made += pair
    made = [fd for fd in made if fd >= 0]
    if made:
        breach(family)
    held += made
llm_query('look')
for fd in held:
    os.close(fd)
"""
CONNECT = """
import socket
for host, port in TARGETS:
    try:
        socket.create_connection((host, port), timeout=2).close()
        breach(host)
    except OSError:
        pass
"""
ROUTE = """
import socket
for host in ('169.254.169.254', '169.254.170.2', '1.1.1.1', 'fd00:ec2::254'):
    try:
        with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            datagram.connect((host, 80))  # sends nothing: it asks the kernel for a route
            breach(host)
    except OSError:
        pass
"""
DNS = """
import socket
query = b'AB\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x07example\\x03com\\x00\\x00\\x01\\x00\\x01'
for server in SERVERS:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            datagram.settimeout(0.5)
            datagram.sendto(query, tuple(server))
            datagram.recv(512)
            breach(server[0])
    except OSError:
        pass
try:
    socket.getaddrinfo('example.com', 80)
    breach('resolver')
except OSError:
    pass
"""
LISTEN = """
import socket
try:
    listener = socket.create_server(('0.0.0.0', PORT))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        datagram.connect(('10.255.255.254', 9))
        print(datagram.getsockname()[0])
except OSError:
    print('127.0.0.1')
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


def of_the_host(*tried: int) -> frozenset[str]:
    """The families of sockets that this machine's kernel has at all."""
    found: set[str] = set()
    for family in tried:
        for kind in (1, 2, 3, 5):
            with contextlib.suppress(OSError):
                socket.socket(family, kind).close()
                found.add(str(family))
    return frozenset(found)


def families(*tried: int) -> dict[str, object]:
    return {"SOCKET": number("socket"), "SOCKETPAIR": number("socketpair"), "TRIED": tried}


ANY = tuple(family for family in range(64) if family != socket.AF_UNIX)
KERNELS = (38, 40)  # AF_ALG, AF_VSOCK


async def to_the_host(stage: Stage) -> list[str]:
    with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104  for the time of the attack
        port = listener.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            datagram.connect(("1.1.1.1", 9))
            targets = [("127.0.0.1", port), (datagram.getsockname()[0], port), ("172.17.0.1", port)]
        return await cell(CONNECT, TARGETS=targets)(stage)


@contextmanager
def name_server() -> Iterator[int]:
    """Answers every datagram; its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(20)

        def answer() -> None:
            with contextlib.suppress(OSError):
                while data := server.recvfrom(512):
                    if not data[0]:
                        return
                    server.sendto(data[0], data[1])

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.sendto(b"", server.getsockname())
            thread.join()


async def name_resolution(stage: Stage) -> list[str]:
    lines = Path("/etc/resolv.conf").read_text().splitlines() if Path("/etc/resolv.conf").exists() else []
    servers = [(line.split()[1], 53) for line in lines if line.startswith("nameserver ") and ":" not in line]
    with name_server() as port:
        return await cell(DNS, SERVERS=[("127.0.0.1", port), ("127.0.0.11", 53), *servers])(stage)


async def neighbours(stage: Stage) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with stage.open() as one, stage.open() as other:
        address = (await attacked(one, LISTEN, {"PORT": port})).text("out").strip()
        found = breaches(await attacked(other, CONNECT, {"TARGETS": [(address, port)]}))
    return ["neighbour" for _ in found]


async def abstract_sockets(stage: Stage) -> list[str]:
    name = f"\0airlock-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        return await cell(ABSTRACT, NAME=name)(stage)


GVISOR = ("gvisor",)  # its runtime is configured without the host's network, whatever a container asks for
WALLS = dict.fromkeys(("bubblewrap", "docker"), (NO_FILTER, FILTERED_NETWORK))
ATTACKS = [
    Attack(
        "network",
        "sockets of every family",
        seen(FAMILIES, host_view.sockets, **families(*ANY)),
        UNFILTERED,
        lambda: of_the_host(*ANY) - {str(socket.AF_PACKET), "44"},  # for root alone
        GVISOR,
    ),
    Attack(
        "network",
        "AF_ALG and AF_VSOCK",
        seen(FAMILIES, host_view.sockets, **families(*KERNELS)),
        UNFILTERED,
        lambda: of_the_host(*KERNELS),
        GVISOR,
    ),
    Attack(
        "network", "addresses of the host", to_the_host, HOST_NETWORK, frozenset({"127.0.0.1"}), GVISOR, walls=WALLS
    ),
    Attack(
        "network", "metadata addresses and the internet", cell(ROUTE), BRIDGE, frozenset({"169.254.169.254"}), GVISOR
    ),
    Attack("network", "DNS", name_resolution, HOST_NETWORK, frozenset({"127.0.0.1"}), GVISOR),
    Attack("network", "neighbours", neighbours, BRIDGE, frozenset({"neighbour"}), GVISOR),
    Attack("network", "abstract Unix sockets of the host", abstract_sockets, HOST_NETWORK, frozenset({"host"}), GVISOR),
]
