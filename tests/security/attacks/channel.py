"""Break the host, or another cell, by what is said over the channel: by an agent that is not ours, and by cells."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from orchestrator.core.errors import ProtocolViolation, SandboxDied
from orchestrator.guest import wire
from orchestrator.sandbox import channel, sandbox
from orchestrator.sandbox.sandbox import Call, Sandbox
from tests.sandboxes import MIB
from tests.security.attacks.resources import NO_END, NO_SNAPSHOT
from tests.security.frame import Attack, Attempt, Stage, attacked, survives
from tests.security.weak import OPEN_PROC, Weak

# In place of our agent: runs what it is sent as process 1, with the channel in its hands.
HOSTILE = """
def main():
    import json
    def raw(data):
        left = memoryview(data)
        while left:
            left = left[os.write(1, left):]
    def frame(**fields):
        raw(json.dumps(fields).encode() + b"\\n")
    def done(cell):
        frame(type="done", cell=cell, status="ok", detail="", answer=None, names=[], dropped=0)
    os.read(0, 1 << 16)
    frame(type="ready", version=wire.VERSION, python="3")
    order = json.loads(os.read(0, 1 << 20))
    exec(order["code"], {"raw": raw, "frame": frame, "done": done, "cell": order["id"], "os": os})
    while True:
        signal.pause()
from signal import pause
signal.pause = pause
"""
GARBAGE = {
    "not JSON": "raw(b'garbage\\n')",
    "not ASCII": 'raw(\'{"type":"output","cell":1,"stream":"out","text":"\\xe4"}\\n\'.encode(\'latin-1\'))',
    "deep": "raw(b'[' * 100_000 + b'\\n')",
    "a field too many": "frame(type='output', cell=cell, stream='out', text='x', more=1)",
    "a wrong type": "frame(type='output', cell=cell, stream='out', text=[1])",
    "no Unicode": (
        'raw(b\'{"type":"call","id":1,"op":"llm_query","model":null,"context":null,"prompt":"\\\\ud800"}\\n\')'
    ),
}
FORGED = {
    "another cell's end": "done(cell + 1)",
    "another cell's output": "frame(type='output', cell=cell + 1, stream='out', text='x')\ndone(cell)",
    "a second start": "frame(type='ready', version=1, python='3')\ndone(cell)",
    "an unknown call": "frame(type='call', id=1, op='delete', prompt='', model=None, context=None)\ndone(cell)",
    "an unknown status": "frame(type='done', cell=cell, status='paid', detail='', answer=None, names=[], dropped=0)",
    "a huge answer": "frame(type='done', cell=cell, status='ok', detail='', answer='x' * 200_000, names=[], dropped=0)",
    "many names": "frame(type='done', cell=cell, status='ok', detail='', answer=None, names=['x'] * 100, dropped=0)",
    "much output": "for _ in range(40): frame(type='output', cell=cell, stream='out', text='x' * 32768)\ndone(cell)",
    "empty output": "frame(type='output', cell=cell, stream='out', text='')\ndone(cell)",
}
CALLS = "for id in {}:\n    frame(type='call', id=id, op='llm_query', prompt='', model=None, context=None)\n"
REPLAYED = {
    "an id used again": CALLS.format((1, 1)) + "done(cell)",
    "an older id": CALLS.format((2, 1)) + "done(cell)",
    "too many at once": CALLS.format(range(1, 20)) + "done(cell)",
}
WAITING = {
    "never ends": "",
    "closes its descriptors": "os.closerange(0, 3)",
    "never reads": CALLS.format(range(1, 9)).replace("prompt=''", "prompt='long'"),
}
OVERSIZED = "frame(type='call', id=1, op='llm_query', prompt='x' * (20 << 20), model=None, context=None)\ndone(cell)"
WITHOUT_AN_END = "for _ in range(40):\n    raw(b'x' * (1 << 20))\n"
SLOW = (
    'raw(b\'{"type":"call","id":1,"op":"budget","model":null,"context":null,"prompt":[\''
    " + b'[],' * 500_000 + b'0]}\\n')"
)
FLOOD = "while True:\n    frame(type='output', cell=cell, stream='out', text='x')"
TO_EVERY_DESCRIPTOR = """
import stat
forged = b'{"type":"call","id":99,"op":"llm_query","prompt":"forged","model":null,"context":null}\\n'
for fd in range(256):
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode) or fd == 200:  # its own to the supervisor is another attack
            os.write(fd, forged)
    except OSError:
        pass
for folder in ('/proc/1/fd', '/proc/self/fd'):
    for name in os.listdir(folder) if os.path.exists(folder) else ():
        try:
            os.write(os.open(f'{folder}/{name}', os.O_WRONLY | os.O_NONBLOCK), forged)
        except OSError:
            pass
import time
time.sleep(0.1)  # the host answers in this cell, or never
"""
TO_THE_SUPERVISOR = """
import gc
link, = (found for found in gc.get_objects() if type(found).__name__ == 'Link')
end = b'{"type":"end","status":"ok","detail":"","answer":null,"names":["forged"],"more":1}'
link._sock.sendall(link._word + b' ' + end + b'\\n')
while True: pass
"""
CALLING_ON = """
import gc, time
link, = (found for found in gc.get_objects() if type(found).__name__ == 'Link')
def send_on(frame, send=link.send):
    send(frame)
    for number in range(1000, 1004) if frame['type'] == 'end' else ():  # the agent stops it in the middle of this
        time.sleep(0.005)
        send({'type': 'call', 'id': number, 'op': 'llm_query', 'prompt': 'late', 'model': None, 'context': None})
link.send = send_on
"""


async def answer(call: Call) -> str:
    await anyio.sleep(0.05)  # calls are in flight together
    return "x" * MIB if call.prompt == "long" else ""


async def said(stage: Stage, code: str, timeout_s: float = 0.5) -> list[str]:
    """What becomes of the host when a hostile agent does this in its first cell."""
    async with stage.open(agent=HOSTILE) as repl:
        try:
            await repl.sandbox.run(code, timeout_s, answer)
        except ProtocolViolation:
            return []
        except SandboxDied as error:
            return [f"not refused: {error}"]
        except Exception as error:  # whatever the host falls over
            return [f"the host fell over: {type(error).__name__}"]
        return ["taken"]


def each(cases: dict[str, str]) -> Attempt:
    async def attempt(stage: Stage) -> list[str]:
        found: list[str] = []

        async def one(name: str, code: str) -> None:
            found.extend(f"{name}: {what}" for what in await said(stage, code))

        async with anyio.create_task_group() as group:
            for name, code in cases.items():
                group.start_soon(one, name, code)
        return found

    return attempt


async def oversized(stage: Stage) -> list[str]:
    return await said(stage, OVERSIZED, 5.0)


async def without_an_end(stage: Stage) -> list[str]:
    async with stage.open(agent=HOSTILE) as repl:
        with pytest.raises(SandboxDied):
            await repl.run(WITHOUT_AN_END, 1.0)
        kept = len(repl.sandbox._channel._buffer)  # pyright: ignore[reportPrivateUsage]
    return ["memory"] if kept > 16 * MIB + (1 << 16) else []


async def slow_to_parse(stage: Stage) -> list[str]:
    parsed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        loads = wire.loads
        patch.setattr(wire, "loads", lambda text: parsed.append(len(text)) or loads(text))
        await said(stage, SLOW)
    return ["parsed" for size in parsed if size > MIB]


async def flood(stage: Stage) -> list[str]:
    frames = 0

    def count(_stream: str, _text: str) -> None:
        nonlocal frames
        frames += 1

    async with stage.open(agent=HOSTILE) as repl:
        # A host that takes them all may come to the cap of output before the second is over.
        with anyio.move_on_after(1.1), contextlib.suppress(ProtocolViolation):
            await repl.sandbox.run(FLOOD, 60.0, answer, count)
    return ["frames"] if frames > 2 * channel_limit + 100 else []


async def keeps_waiting(stage: Stage) -> list[str]:
    """The host ends a sandbox that does not end its cell, whatever it does not do."""
    found: list[str] = []

    async def one(name: str, code: str) -> None:
        async with stage.open(agent=HOSTILE) as repl:
            with anyio.move_on_after(1.2) as patience, contextlib.suppress(SandboxDied):
                await repl.sandbox.run(code, 0.2, answer)
                found.append(f"{name}: taken")
            if patience.cancelled_caught:
                found.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "OVERTIME_S", sandbox.OVERTIME_S / 20)
        async with anyio.create_task_group() as group:
            for name, code in WAITING.items():
                group.start_soon(one, name, code)
    return found


def called(code: str, then: str = "", prompt: str = "forged") -> Attempt:
    """Calls that no `llm_query` made, or none of the running cell."""

    async def attempt(stage: Stage) -> list[str]:
        async with stage.open() as repl:
            try:
                await attacked(repl, code)
            except ProtocolViolation:  # so it did reach the channel
                return [prompt]
            if then:
                repl.calls.clear()
                await attacked(repl, then)
            return sorted({call.prompt for call in repl.calls if call.prompt == prompt})

    return attempt


async def to_the_supervisor(stage: Stage) -> list[str]:
    """A cell may end itself with it; what cells before it made is kept, and its end is not as it says."""
    async with stage.open() as repl:
        await repl.run("kept = 'kept'")
        try:
            result = await attacked(repl, TO_THE_SUPERVISOR)
        except SandboxDied as error:
            return [str(error)]
        if result.status == "ok":
            return ["taken"]
        return [] if (await repl.run("kept")).text("out") == "'kept'\n" else ["variables"]


async def closed_by_a_cell(stage: Stage) -> list[str]:
    async with stage.open() as repl:
        return await survives(repl, "os.closerange(0, 256)")


async def credulous(self: Any, result: Any, on_output: Callable[[str, str], None] | None) -> Any:
    """`Sandbox._until_call` as it would be without a check."""
    while (frame := await self._channel.receive())["type"] != "done":
        if frame["type"] == "call":
            return frame
    result.status, result.detail, result.answer = frame["status"], frame["detail"], frame["answer"]
    return None


def unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wire, "decode", lambda line, _table: json.loads(line))
    patch.setattr(sandbox, "OVERTIME_S", 0.5)


def large_lines(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wire, "MAX_LINE", 1 << 30)
    patch.setattr(sandbox, "OVERTIME_S", 0.5)


def patient(patch: pytest.MonkeyPatch) -> None:
    async def receive(self: Any) -> Any:
        try:
            return await real(self)
        except SandboxDied:
            await anyio.sleep_forever()

    real = channel.Channel.receive
    patch.setattr(channel.Channel, "receive", receive)
    patch.setattr(sandbox, "OVERTIME_S", 1000.0)


channel_limit = channel.FRAMES_PER_SECOND
UNCHECKED = Weak(host=unchecked)
CREDULOUS = Weak(host=lambda patch: patch.setattr(Sandbox, "_until_call", credulous))
LARGE_LINES = Weak(host=large_lines)
ANY_FORM = Weak(host=lambda patch: patch.setattr(wire, "_is_small_outside_of_strings", lambda _line: True))
UNBOUNDED = Weak(host=lambda patch: patch.setattr(channel, "FRAMES_PER_SECOND", 10**9))
PATIENT = Weak(host=patient)
SHARED_CHANNEL = OPEN_PROC | Weak(
    agent="be_worker = Supervisor._be_worker\n"
    "def keep(self, fds):\n    self._out = os.dup2(self._out, 200)\n    be_worker(self, fds)\n"
    "os_close, os.close = os.close, lambda fd: fd == 200 or os_close(fd)\n"
    "Supervisor._be_worker = keep"
)
TRUSTING = Weak(agent="wire.decode = lambda line, table: wire.loads(line.decode())")
ATTACKS = [
    Attack("channel", "garbage", each(GARBAGE), UNCHECKED),
    Attack("channel", "forged frames", each(FORGED), CREDULOUS, frozenset(f"{name}: taken" for name in FORGED)),
    Attack(
        "channel", "replayed ids of calls", each(REPLAYED), CREDULOUS, frozenset(f"{name}: taken" for name in REPLAYED)
    ),
    Attack("channel", "an oversized line", oversized, LARGE_LINES, frozenset({"taken"})),
    Attack("channel", "a line without an end", without_an_end, LARGE_LINES),
    Attack("channel", "a frame that is slow to parse", slow_to_parse, ANY_FORM),
    Attack("channel", "floods of frames", flood, UNBOUNDED),
    Attack("channel", "an agent that keeps the host waiting", keeps_waiting, PATIENT, frozenset(WAITING)),
    Attack("channel", "a cell that writes to every descriptor", called(TO_EVERY_DESCRIPTOR), SHARED_CHANNEL),
    Attack("channel", "a cell that forges its own end", to_the_supervisor, TRUSTING),
    Attack("channel", "a cell that closes its descriptors", closed_by_a_cell, NO_SNAPSHOT),
    Attack(
        "channel",
        "calls after the end of a cell",
        called(CALLING_ON, "import time\ntime.sleep(0.1)", "late"),
        NO_END,
    ),
]
