"""A file is there whole or not at all, and says how many lines could not be made."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.core.errors import RequestError
from orchestrator.core.events import Recorded
from orchestrator.exports.records import clean, line
from orchestrator.exports.writing import FORMATS, Format, Options, Written, draft, send, write
from tests.unit.exported import Ran

MANY = 10_000


@pytest.fixture
def voyage(exported: dict[str, Ran]) -> Ran:
    return exported["voyage"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_each_format(voyage: Ran, tmp_path: Path, name: Format):
    path = tmp_path / "out.jsonl"
    with draft(path) as out:
        done = write(name, [voyage.history], out)
    written = path.read_bytes().decode()
    assert done == Written(queries=1, lines=written.count("\n"), left_out=0)
    assert [json.loads(text) for text in written.splitlines()]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_left_out_is_counted(voyage: Ran):
    out = io.StringIO()
    unknown = [replace(voyage.history[0], type="quite.new"), *voyage.history[1:]]
    assert write("chat", [voyage.erased("completion"), voyage.history], out) == Written(2, 6, 6)
    assert write("ocsf", [unknown], out) == Written(1, len(voyage.history) - 1, 1)


def test_only_what_is_wanted(exported: dict[str, Ran]):
    histories = [exported["voyage"].history, exported["endless"].history]
    scores = {exported["voyage"].id: Decimal("0.4"), exported["endless"].id: Decimal("0.9")}
    assert write("chat", histories, io.StringIO(), Options(status="answered")).lines == 6
    assert write("chat", histories, io.StringIO(), Options(scores=scores, least=Decimal("0.5"))).lines == 3


def test_one_trace_holds_one_query(exported: dict[str, Ran], tmp_path: Path):
    histories = [exported["voyage"].history, exported["endless"].history]
    with pytest.raises(RequestError, match="one query"), draft(tmp_path / "out") as out:
        write("rlms", histories, out)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_is_replaced_only_by_a_whole_one(tmp_path: Path):
    path = tmp_path / "out"
    path.write_text("before")

    def break_off() -> None:
        with draft(path) as out:
            out.write("half")
            out.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with draft(path) as out:
        out.write("after\ud800")
    assert path.read_text() == "after?"


@pytest.mark.parametrize("name", ["missing/out", ".", "x" * 300, "nul\0"])
def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path, name: str):
    with pytest.raises(RequestError, match="cannot write ") as refused, draft(tmp_path / name) as out:
        out.write("x")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path):
    """/dev/full is one; a draft stands beside its file, so what it is written to is put in its place."""

    def fill() -> None:
        with draft(tmp_path / "out") as out, Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), out.fileno())
            out.write("x" * 100_000)

    with pytest.raises(RequestError, match="no space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install():
    """In a process whose Python has no OpenTelemetry."""
    code = """
import io, sys
sys.modules["opentelemetry"] = None
from orchestrator.core.errors import RequestError
from orchestrator.exports.writing import send, write
assert write("ocsf", [], io.StringIO()).lines == 0
for ask in (lambda: write("otlp", [], io.StringIO()), lambda: send([], "http://127.0.0.1:1")):
    try:
        ask()
    except RequestError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("with the extra `otel`") == 2, done


def test_sending_is_passed_on(voyage: Ran):
    with pytest.raises(RequestError, match="has to be an address"):
        send([voyage.history], "nowhere")


def test_a_line_is_one_line_to_everybody():
    every = "".join(map(chr, range(0x3000)))
    text = line({"text": every + "\ud800"})
    assert text.splitlines() == [text[:-1]]
    assert json.loads(text) == {"text": every + "?"}
    assert clean("a\udfffb") == "a?b"


def long(voyage: Ran) -> list[Recorded]:
    """A query of MANY records: of the cell with the batch, again and again."""
    first, last = voyage.of("cell.started")[1].seq, voyage.of("cell.ended")[1].seq
    part = voyage.history[first : last + 1]
    end = voyage.history[-1]
    found = voyage.history[:first]
    while len(found) < MANY - 1:
        again = len(found)
        for record in part[: MANY - 1 - again]:
            body = dict(record.body)
            if "call" in body:
                body["call"] = f"{body['call']}x{again}"
            found.append(replace(record, body=body, seq=len(found)))
    return [*found, replace(end, seq=len(found))]


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_records_are_exported_in_time(voyage: Ran, tmp_path: Path, name: Format, content: bool):
    history = long(voyage)
    assert len(history) == MANY
    started = time.process_time()
    with draft(tmp_path / "out") as out:
        write(name, [history], out, Options(content=content))
    spent = time.process_time() - started
    print(f"{name} content={content}: {spent:.2f} s, {(tmp_path / 'out').stat().st_size:,} bytes")
    assert spent < 5
