"""Files that a person names: what is no regular file is refused at once, and every refusal says why."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from orchestrator.files import MOST_BYTES, Missing, Unreadable, read_text


def why(path: Path) -> str:
    with pytest.raises(Unreadable) as caught:
        read_text(path)
    return str(caught.value)


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path):
    (tmp_path / "a").write_bytes("\ufeffgrüße".encode())
    assert read_text(tmp_path / "a") == "grüße"


def test_what_is_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        assert why(tmp_path / "socket")
    assert why(tmp_path / "pipe") == why(Path("/dev/zero")) == "it is not a regular file"
    assert why(tmp_path) == "it is a folder"


def test_what_cannot_be_read(tmp_path: Path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "large").write_bytes(bytes(MOST_BYTES + 1))
    assert why(tmp_path / "latin") == "it is not UTF-8 text (byte 3)"
    assert why(tmp_path / "large") == "it has more than 16 MiB"
    assert why(tmp_path / "nul\0") == "it is not the name of a file"
    for missing in (tmp_path / "nowhere", tmp_path / "latin" / "below"):
        with pytest.raises(Missing, match="no such file"):
            read_text(missing)
