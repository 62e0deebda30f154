"""Coverage-guided fuzzing (atheris) of what the host parses of a guest: lines, frames, an engine's stream.

    python -m tests.fuzz.channel [libFuzzer's options] FOLDER...     the first folder takes what is new

Anything but the errors that these parsers promise is a finding, and so is a frame that is not what its table says.
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports():
    from orchestrator.guest import wire
    from orchestrator.sandbox.attached import Demultiplexer


def one(data: bytes) -> None:
    for line in data.split(b"\n"):
        for table in (wire.TO_HOST, wire.TO_SUPERVISOR, wire.TO_GUEST):
            _frame(line, table)
    _stream(data)


def _frame(line: bytes, table: wire.Table) -> None:
    try:
        frame = wire.decode(line, table)
    except wire.Malformed:
        return
    kind = frame["type"]
    assert frame.keys() == {"type", *table[kind]}
    for name, types in table[kind].items():
        assert type(frame[name]) in types
    assert wire.decode(wire.encode(dict(frame))[:-1], table) == frame
    json.dumps(frame, ensure_ascii=False).encode()  # all of it is text


def _stream(data: bytes) -> None:
    """However a stream is cut, the same comes out of it."""
    at = len(data) // 2
    whole, halves = Demultiplexer(), Demultiplexer()
    assert whole.feed(data) == halves.feed(data[:at]) + halves.feed(data[at:])
    assert whole.words == halves.words


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
