"""Reach the sandbox of another, beside this one or before it in the same slot; or be told something by it."""

from __future__ import annotations

import uuid

from orchestrator.store.contexts import ContextStore
from tests.sandboxes import BACKENDS
from tests.security import host_view
from tests.security.attacks.channel import HOSTILE
from tests.security.frame import PRELUDE, Attack, Attempt, Stage, attacked, breaches, number
from tests.security.weak import (
    HOST_IPC,
    HOST_NETWORK,
    SHARED_TMP,
    WHOLE,
    WITH_YARD,
    Weak,
    host_config,
    instead,
    without,
)

LEAVE = """
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if folder != '/' or name not in ('proc', 'sys')]
    try:
        with open(folder + '/' + NAME, 'w') as file:
            file.write('left by another')
        os.chmod(folder + '/' + NAME, 0o666)
    except OSError:
        pass
"""
FIND = """
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if folder != '/' or name not in ('proc', 'sys')]
    if NAME in files:
        breach(open(folder + '/' + NAME).read())
"""
MAKE_IPC = """
made = [call(SHMGET, KEY, 4096, 0o1666), call(SEMGET, KEY, 1, 0o1666), call(MSGGET, KEY, 0o1666)]
try:
    os.close(os.open(f'/dev/shm/{KEY}', os.O_CREAT | os.O_WRONLY, 0o666))
except OSError:
    pass
"""
FIND_IPC = """
for what, result in (('shm', call(SHMGET, KEY, 0, 0)), ('sem', call(SEMGET, KEY, 0, 0)), ('msg', call(MSGGET, KEY, 0))):
    if result >= 0:
        breach(what)
if os.path.exists(f'/dev/shm/{KEY}'):
    breach('/dev/shm')
"""
END_IPC = """
for number, id in zip((SHMCTL, SEMCTL, MSGCTL), made):
    if id >= 0:
        call(number, id, 0, 0) if number != SEMCTL else call(number, id, 0, 0, 0)  # IPC_RMID
if os.path.exists(f'/dev/shm/{KEY}'):
    os.unlink(f'/dev/shm/{KEY}')
"""
LISTEN = """
import socket
listener = socket.socket(socket.AF_UNIX)
listener.bind(NAME)
listener.listen()
"""
CONNECT = """
import socket
with socket.socket(socket.AF_UNIX) as stream:
    try:
        stream.connect(NAME)
        breach('another')
    except OSError:
        pass
"""
FILES = """
import fcntl, sys
paths = [*PATHS, *[sys.executable, os.__file__, '/agent.pyz'] * OF_PYTHON]
opened = [os.open(path, os.O_RDONLY) for path in paths if os.path.exists(path)]
"""
LOCK = (
    FILES
    + """
for fd in opened:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass
"""
)
LOCKED = (
    FILES
    + """
for fd in opened:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        breach('lock')
    os.close(fd)
"""
)
# Run by process 1 itself: our agent does not work where it is not.
LOOK = """
import errno
for pid in PIDS:
    try:
        os.kill(pid, 0)
    except OSError as error:
        if error.errno == errno.EPERM:  # it is there, and another user's
            frame(type='output', cell=cell, stream='out', text='BREACH process\\n')
            break
done(cell)
"""


async def residue(stage: Stage) -> list[str]:
    name = f"left-{uuid.uuid4()}"
    async with stage.open() as one:
        await attacked(one, LEAVE, {"NAME": name})
    async with stage.open() as next_one:
        return breaches(await attacked(next_one, FIND, {"NAME": name}))


async def files(stage: Stage) -> list[str]:
    name = f"beside-{uuid.uuid4()}"
    async with stage.open() as one, stage.open() as other:
        await attacked(one, LEAVE, {"NAME": name})
        return breaches(await attacked(other, FIND, {"NAME": name}))


def ipc(*kinds: str) -> Attempt:
    async def attempt(stage: Stage) -> list[str]:
        calls = ("shmget", "semget", "msgget", "shmctl", "semctl", "msgctl")
        given = {name.upper(): number(name) for name in calls} | {"KEY": uuid.uuid4().int >> 100}
        async with stage.open() as one, stage.open() as other:
            await attacked(one, MAKE_IPC, given)
            try:
                return [what for what in breaches(await attacked(other, FIND_IPC, given)) if what in kinds]
            finally:
                await attacked(one, END_IPC, given)

    return attempt


async def abstract_sockets(stage: Stage) -> list[str]:
    name = f"\0airlock-{uuid.uuid4()}"
    async with stage.open() as one, stage.open() as other:
        await attacked(one, LISTEN, {"NAME": name})
        return breaches(await attacked(other, CONNECT, {"NAME": name}))


def locks(*paths: str, of_python: bool) -> Attempt:
    async def attempt(stage: Stage) -> list[str]:
        given = {"PATHS": [*paths, str(stage.yard / "secret")], "OF_PYTHON": of_python}
        context = ContextStore(stage.home / "contexts").ingest_value("of both")
        async with stage.open() as one, stage.open() as other:
            for repl in (one, other):
                repl.sandbox.attach(context)
            await attacked(one, LOCK, given)
            return breaches(await attacked(other, LOCKED, given))

    return attempt


async def processes(stage: Stage) -> list[str]:
    async with stage.stages.open(stage.backend, WHOLE) as other, stage.open(agent=HOSTILE) as repl:
        pids = [*range(2, 1000), *host_view.processes(other)]
        return breaches(await repl.run(f"{PRELUDE}\nPIDS = {pids}\n{LOOK}"))


SHARED_PROCESSES = Weak(
    (
        instead("--unshare-all", "--unshare-ipc", "--unshare-net", "--unshare-uts", "--unshare-cgroup"),
        without("--as-pid-1"),
    ),
    (host_config(PidMode="host"),),
)
GVISOR = ("gvisor",)
SYSTEM_V = ("shm", "sem", "msg")
SIGNAL = "two guests that both want to can signal to each other with locks"
ATTACKS = [
    Attack("tenants", "residue of the slot's last sandbox", residue, SHARED_TMP, frozenset({"left by another"})),
    Attack("tenants", "files beside each other", files, SHARED_TMP, frozenset({"left by another"})),
    Attack("tenants", "System V IPC", ipc(*SYSTEM_V), HOST_IPC, frozenset(SYSTEM_V), GVISOR),
    Attack("tenants", "/dev/shm", ipc("/dev/shm"), HOST_IPC),
    Attack("tenants", "abstract Unix sockets of each other", abstract_sockets, HOST_NETWORK, elsewhere=GVISOR),
    Attack("tenants", "processes of each other", processes, SHARED_PROCESSES, elsewhere=GVISOR),
    Attack(
        "tenants",
        "locks on Python's files",
        locks(of_python=True),
        WITH_YARD,
        elsewhere=GVISOR,
        known={"bubblewrap": SIGNAL},
    ),
    Attack(
        "tenants",
        "locks on one context",
        locks("/context/data", of_python=False),
        WITH_YARD,
        elsewhere=GVISOR,
        known={name: SIGNAL for name in BACKENDS if name != "gvisor"},
    ),
]
