"""Slots: one sandbox each, whoever takes them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.core.errors import StoreError
from orchestrator.sandbox import slots as slots_module
from orchestrator.sandbox.slots import UID_BASE, Slots

HOLD = """
import sys
from pathlib import Path
from orchestrator.sandbox.slots import Slots
with Slots(Path(sys.argv[1])).take() as slot:
    (slot.folder / "left").write_text("x")
    print(slot.number, flush=True)
    sys.stdin.read()
"""


def test_a_slot_has_an_empty_folder_that_goes_with_it(tmp_path: Path):
    with Slots(tmp_path).take() as slot:
        assert slot.uid == (UID_BASE + slot.number if os.geteuid() == 0 else None)
        assert list(slot.folder.iterdir()) == []
        (slot.folder / "file").touch()
    assert not slot.folder.exists()


def test_slots_are_taken_once(tmp_path: Path):
    slots = Slots(tmp_path)
    with slots.take() as one, slots.take() as two, Slots(tmp_path / "other").take() as three:
        assert one.number != two.number
        assert os.geteuid() != 0 or three.number not in (one.number, two.number)
        assert one.folder != two.folder != three.folder


def test_another_processs_slot_is_taken_until_it_dies_and_then_cleared(tmp_path: Path):
    slots = Slots(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as process:
        assert process.stdout
        number = int(process.stdout.readline())
        with slots.take() as slot:
            assert slot.number != number
        assert slots.clear_dead() == 0
        process.kill()
        process.communicate()
    assert (tmp_path / "slots" / f"slot-{number}" / "left").exists()
    assert slots.clear_dead() == 1
    assert not (tmp_path / "slots" / f"slot-{number}").exists()


def test_an_error_inside_is_the_callers_own(tmp_path: Path):
    with pytest.raises(PermissionError, match="mine"), Slots(tmp_path).take() as slot:
        raise PermissionError("mine")
    assert not slot.folder.exists()
    with Slots(tmp_path).take() as again:
        assert again.folder.exists()


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot make the slot folders"), Slots(tmp_path / "file").take():
        raise AssertionError


def test_after_a_restart_of_the_machine_the_locks_are_gone_and_the_folders_are_not(tmp_path: Path):
    (tmp_path / "slots" / "slot-0").mkdir(parents=True)
    slots = Slots(tmp_path)
    slots._locks = tmp_path / "run"  # as /run, which is empty then
    assert slots.clear_dead() == 1
    assert list((tmp_path / "slots").iterdir()) == []


def shared(tmp_path: Path, name: str) -> Slots:
    """Of a data folder of this name, with locks that all of them share, as root's are."""
    slots = Slots(tmp_path / name)
    slots._locks, slots._root = tmp_path / "run", True
    return slots


def test_a_dead_ones_slot_that_another_data_folder_has_taken_since(tmp_path: Path):
    """The folder that the dead one left is cleared, the other's is not touched."""
    dead, other = shared(tmp_path, "dead"), shared(tmp_path, "other")
    left = tmp_path / "dead" / "slots" / "slot-0"
    left.mkdir(parents=True)
    with other.take() as slot:
        assert slot.number == 0
        assert dead.clear_dead() == 1
        assert not left.exists()
        assert slot.folder.exists()
        assert other.clear_dead() == 0  # its own, which lives
        assert slot.folder.exists()


@pytest.mark.parametrize("mark", [b"", b"taken\n"])
def test_a_slot_that_is_held_and_does_not_say_by_whom_is_left_alone(tmp_path: Path, mark: bytes):
    slots = shared(tmp_path, "home")
    with slots.take() as slot:
        (tmp_path / "run" / f"{slot.number}.lock").write_bytes(mark)
        assert slots.clear_dead() == 0
        assert slot.folder.exists()


def test_no_slot_is_taken_while_one_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Given back by another data folder and taken by a process of this one, just after its mark was read."""
    dead, other, again = (shared(tmp_path, name) for name in ("dead", "other", "dead"))
    (tmp_path / "dead" / "slots" / "slot-0").mkdir(parents=True)
    taken = threading.Event()

    def take() -> None:
        with again.take() as slot:
            taken.set()
            found.append(slot.folder.exists())

    found: list[bool] = []
    thread = threading.Thread(target=take)
    with ExitStack() as others:
        others.enter_context(other.take())
        whole = slots_module.mark_of

        def mark_of(folders: Path) -> bytes:
            if not thread.ident and folders == dead._folders:
                others.close()
                thread.start()
                assert not taken.wait(0.2)
            return whole(folders)

        monkeypatch.setattr(slots_module, "mark_of", mark_of)
        assert dead.clear_dead() == 1
    thread.join(10)
    assert found == [True]
