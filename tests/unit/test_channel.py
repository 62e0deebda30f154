"""The host's end of the channel, and Sandbox above it, against guests that break the rules."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream

from orchestrator.core.errors import ChildStopped, NotPermitted, ProtocolViolation, SandboxDied, SandboxUnusable
from orchestrator.guest import wire
from orchestrator.sandbox import channel as channel_module
from orchestrator.sandbox.base import Guest, Slot, Usage
from orchestrator.sandbox.channel import Channel
from orchestrator.sandbox.sandbox import Call, Sandbox
from tests.sandboxes import spec_for

pytestmark = pytest.mark.anyio

CALL = {"type": "call", "id": 1, "op": "llm_query", "prompt": "p", "model": None, "context": None}
DONE = {"type": "done", "cell": 1, "status": "ok", "detail": "", "answer": None, "names": [], "dropped": 0}
OUTPUT = {"type": "output", "cell": 1, "stream": "out", "text": "x"}
READY = {"type": "ready", "version": wire.VERSION, "python": "3.11.2"}


class Scripted(ByteStream):
    """A guest in memory: `answer` gives the bytes that follow on each frame of the host."""

    def __init__(self, answer: Callable[[wire.Frame], bytes]) -> None:
        self._answer = answer
        self._send, self._receive = anyio.create_memory_object_stream[bytes](100_000)
        self.sent: list[wire.Frame] = []

    def push(self, data: bytes) -> None:
        self._send.send_nowait(data)

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        for line in item.splitlines():
            self.sent.append(json.loads(line))
            if data := self._answer(self.sent[-1]):
                self.push(data)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self._receive.receive()

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self._send.close()
        self._receive.close()


class FakeGuest(Guest):
    def __init__(self, stream: Scripted) -> None:
        self.stream = stream
        self.killed = 0

    async def kill(self) -> None:
        self.killed += 1
        await self.stream.aclose()

    async def usage(self) -> Usage:
        return Usage(None, None, oom=False)

    def last_words(self) -> str:
        return "its last words"


def lines(*frames: wire.Frame) -> bytes:
    return b"".join(json.dumps(frame).encode() + b"\n" for frame in frames)


@asynccontextmanager
async def sandbox_of(
    *, ready: bytes = lines(READY), run: bytes = b"", reply: bytes = b""
) -> AsyncGenerator[tuple[Sandbox, FakeGuest]]:
    """A started sandbox whose guest answers a hello, a cell and each reply with these bytes."""
    guest = FakeGuest(Scripted(lambda frame: {"hello": ready, "run": run, "reply": reply}.get(frame["type"], b"")))
    sandbox = Sandbox(guest, spec_for(Slot(0, Path("/nowhere"), None)))
    try:
        await sandbox.start()
        yield sandbox, guest
    finally:
        await sandbox.close()


async def answered(call: Call) -> str:
    return f"to {call.prompt}"


async def violation(run: bytes, **options: Any) -> str:
    async with sandbox_of(run=run, **options) as (sandbox, guest):
        with pytest.raises(ProtocolViolation) as caught:
            await sandbox.run("code", 5.0, answered)
        assert guest.killed
    return str(caught.value)


async def receive(*pieces: bytes) -> wire.Frame:
    stream = Scripted(lambda frame: b"")
    for piece in pieces:
        stream.push(piece)
    channel = Channel(stream)
    try:
        return await channel.receive()
    finally:
        await channel.aclose()


async def test_frames_come_out_of_pieces_of_any_size():
    data = lines(OUTPUT, CALL)
    stream = Scripted(lambda frame: b"")
    for at in range(len(data)):
        stream.push(data[at : at + 1])
    channel = Channel(stream)
    assert [await channel.receive(), await channel.receive()] == [OUTPUT, CALL]
    await channel.aclose()


async def test_a_line_without_an_end_is_cut_off():
    with pytest.raises(ProtocolViolation, match="a line of more than"):
        await receive(*[b" " * (1 << 20)] * 17)


@pytest.mark.parametrize(
    "garbage", [b"\n", b"\0\n", b"\xff\xfe\n", b"{}\n", b"null\n", b"GET / HTTP/1.1\r\n", b"[" * 9999 + b"\n"]
)
async def test_garbage_is_a_violation(garbage: bytes):
    with pytest.raises(ProtocolViolation, match="malformed"):
        await receive(garbage)


async def test_the_end_of_the_stream_is_the_sandboxs_death():
    stream = Scripted(lambda frame: b"")
    await stream._send.aclose()
    channel = Channel(stream)
    with pytest.raises(SandboxDied):
        await channel.receive()
    await channel.aclose()


async def test_a_flood_of_frames_is_slowed_down(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel_module, "FRAMES_PER_SECOND", 100)
    stream = Scripted(lambda frame: b"")
    stream.push(lines(*[OUTPUT] * 150))
    channel = Channel(stream)
    started = time.monotonic()
    for _ in range(150):
        await channel.receive()
    assert time.monotonic() - started >= 0.9
    await channel.aclose()


async def test_a_flood_of_bytes_is_slowed_down(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel_module, "BYTES_PER_SECOND", 3 * len(lines(OUTPUT)))
    stream = Scripted(lambda frame: b"")
    stream.push(lines(*[OUTPUT] * 5))
    channel = Channel(stream)
    started = time.monotonic()
    for _ in range(5):
        await channel.receive()
    assert time.monotonic() - started >= 0.9
    await channel.aclose()


@pytest.mark.parametrize(
    "ready",
    [lines(READY | {"version": 99}), lines(DONE), lines(OUTPUT), b"Traceback (most recent call last):\n"],
)
async def test_a_guest_that_starts_wrongly(ready: bytes):
    with pytest.raises((ProtocolViolation, SandboxUnusable)):
        async with sandbox_of(ready=ready):
            raise AssertionError("it started")


async def test_a_guest_that_dies_at_its_start_leaves_its_last_words():
    stream = Scripted(lambda frame: b"")
    guest = FakeGuest(stream)
    await stream._send.aclose()
    with pytest.raises(SandboxUnusable, match="did not start: its last words; see `airlock doctor`"):
        await Sandbox(guest, spec_for(Slot(0, Path("/nowhere"), None))).start()
    assert guest.killed
    await stream.aclose()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([READY], "does not fit the moment"),
        ([DONE | {"cell": 2}], "does not fit the moment"),
        ([DONE | {"status": "great"}], "does not fit the moment"),
        ([OUTPUT | {"cell": 0}], "does not fit the moment"),
        ([OUTPUT | {"stream": "log"}], "does not fit the moment"),
        ([CALL | {"op": "exec"}], "does not fit the moment"),
        ([CALL, CALL], "reused a call's id"),
        ([CALL | {"id": 5}, CALL | {"id": 4}], "reused a call's id"),
        ([CALL | {"id": number + 1} for number in range(9)], "too many calls in flight"),
        ([OUTPUT | {"text": "x" * 1_000_000}] * 2, "more output than its cap"),
        ([OUTPUT | {"text": ""}], "more output than its cap"),
        ([DONE | {"answer": "x" * 100_001}], "an answer larger than its cap"),
        ([DONE | {"detail": "x" * 2001}], "more of a cell's end"),
        ([DONE | {"names": ["x"] * 65}], "more of a cell's end"),
    ],
)
async def test_frames_that_break_the_rules_of_a_cell(frames: list[wire.Frame], message: str):
    assert message in await violation(lines(*frames))


async def test_a_call_that_was_answered_cannot_be_repeated():
    assert "reused a call's id" in await violation(lines(CALL), reply=lines(CALL))


async def test_a_new_cell_counts_its_calls_from_the_start():
    """A worker that takes over after a crash does not know which ids the dead one used."""
    script = {1: lines(CALL | {"id": 7}), 2: lines(CALL | {"id": 1})}
    cells: list[int] = []

    def answer(frame: wire.Frame) -> bytes:
        if frame["type"] == "run":
            cells.append(frame["id"])
            return script[frame["id"]]
        return lines(READY) if frame["type"] == "hello" else lines(DONE | {"cell": cells[-1]})

    guest = FakeGuest(Scripted(answer))
    sandbox = Sandbox(guest, spec_for(Slot(0, Path("/nowhere"), None)))
    await sandbox.start()
    for _ in range(2):
        assert (await sandbox.run("code", 5.0, answered)).status == "ok"
    await sandbox.close()


async def test_replies_carry_the_answer_or_the_error():
    async def on_call(_call: Call) -> str:
        raise NotPermitted("no", limit="l", asked="a", left="0")

    async with sandbox_of(run=lines(CALL), reply=lines(DONE)) as (sandbox, guest):
        await sandbox.run("code", 5.0, on_call)
        error = {"kind": "not-permitted", "message": "no", "limit": "l", "asked": "a", "left": "0"}
        assert guest.stream.sent[-1] == {"type": "reply", "id": 1, "ok": False, "value": None, "error": error}


async def test_a_partial_answer_that_the_channel_cannot_carry_is_left_out():
    """A hostile child can give one that just fitted its own channel: its parent's has less room for it."""

    async def on_call(_call: Call) -> str:
        raise ChildStopped("too long", partial="x" * wire.MAX_LINE)

    async with sandbox_of(run=lines(CALL), reply=lines(DONE)) as (sandbox, guest):
        assert (await sandbox.run("code", 5.0, on_call)).status == "ok"
        assert guest.stream.sent[-1]["error"]["partial"] is None


async def test_a_guest_that_never_ends_its_cell_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.sandbox.sandbox.OVERTIME_S", 0.1)
    async with sandbox_of(run=lines(OUTPUT)) as (sandbox, guest):
        with pytest.raises(SandboxDied, match="did not end a cell at its time limit"):
            await sandbox.run("code", 0.1, answered)
        assert guest.killed


async def test_a_guest_that_dies_in_a_cell():
    async with sandbox_of(run=lines(OUTPUT)) as (sandbox, guest):
        guest.stream._send.close()
        with pytest.raises(SandboxDied):
            await sandbox.run("code", 5.0, answered)
