"""Uploads: what has come is kept, what was not finished goes, and no crowd of them passes a limit."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa

from orchestrator.core.errors import ContextError, CountExceeded, RateLimited, StoreError
from orchestrator.settings import ServerSettings
from orchestrator.store import holdings
from orchestrator.store.contexts import ContextStore
from orchestrator.store.db import Database
from orchestrator.store.schema import uploads as table
from orchestrator.store.uploads import DONE, LIVES, STEP, Busy, Upload, Uploads
from tests.command import until

LIMITS = ServerSettings(upload_bytes=4000, stored_bytes=10_000, uploads=3)


@pytest.fixture
def uploads(db: Database, tmp_path: Path) -> Uploads:
    return Uploads(db, tmp_path, LIMITS)


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Path]:
    """Folder of the files; none may be open at the end of a test."""
    folder = tmp_path / "uploads"
    yield folder
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in opened if path.startswith(str(folder))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def rows(db: Database) -> int:
    return db.look(lambda tx: tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def stored(db: Database, tenant: str = "ann") -> int:
    return db.look(lambda tx: holdings.stored(tx, tenant))


def age(db: Database, by: timedelta = LIVES) -> None:
    at = (datetime.now(UTC) - by).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    db.write_sync(lambda tx: tx.execute(sa.update(table).values(at=at)))


def begun(uploads: Uploads, length: int = 10, tenant: str = "ann") -> Upload:
    return uploads.begin(tenant, "text", "utf-8", "a name", length)


def test_what_comes_in_pieces_is_put_together(uploads: Uploads, db: Database, left: Path, tmp_path: Path):
    upload = begun(uploads)
    assert uploads.find("ann", upload.id) == upload
    assert uploads.find("bob", upload.id) is None
    assert (left / upload.id).stat().st_mode & 0o777 == 0o600
    for piece in (b"hello", b"w", b"orld"):
        with uploads.resumed(upload) as incoming:
            assert incoming.offset == uploads.offset(upload)
            incoming.write(piece)
            incoming.sync()
    with uploads.resumed(upload) as incoming:
        assert incoming.is_complete
        context, held, new = incoming.finish()
    assert context.files["data"].read_bytes() == b"helloworld"
    assert (held.id, held.name, held.bytes, new) == (context.id, "a name", 10, True)
    assert names(left) == []
    found = uploads.find("ann", upload.id)
    assert found is not None
    assert (found.context, uploads.offset(found)) == (context.id, 10)
    assert stored(db) == 10
    assert ContextStore(tmp_path / "contexts").open(context.id) == context


def test_what_comes_whole_leaves_its_context_alone(uploads: Uploads, db: Database, left: Path):
    with uploads.whole("ann", "json", "utf-8", "", None) as incoming:
        incoming.write(b'{"a":')
        assert [name.endswith(".part") for name in names(left)] == [True]
        incoming.write(b"1}")
        context, held, new = incoming.finish()
    assert (context.kind, held.bytes, new, names(left), rows(db), stored(db)) == ("json", 7, True, [], 0, 7)
    with uploads.whole("ann", "json", "utf-8", "", 7) as incoming:
        incoming.write(b'{"a":1}')
        assert incoming.finish()[2] is False
    assert stored(db) == 7


def test_what_is_given_up_leaves_nothing(uploads: Uploads, db: Database, left: Path):
    with suppress(KeyError), uploads.whole("ann", "text", "utf-8", "", None) as incoming:
        incoming.write(b"some")
        raise KeyError
    upload = begun(uploads)
    uploads.drop(upload)
    assert uploads.find("ann", upload.id) is None
    assert (names(left), rows(db), stored(db)) == ([], 0, 0)


def test_what_is_no_context_is_refused(uploads: Uploads, db: Database):
    with uploads.whole("ann", "json", "utf-8", "", None) as incoming:
        incoming.write(b"{")
        with pytest.raises(ContextError, match="not valid JSON"):
            incoming.finish()
    assert (rows(db), stored(db)) == (0, 0)


def test_there_is_one_writer_at_a_time(uploads: Uploads, db: Database, tmp_path: Path):
    upload = begun(uploads)
    other = Uploads(db, tmp_path, LIMITS)
    with uploads.resumed(upload):
        with pytest.raises(Busy), other.resumed(upload):
            pass
        with pytest.raises(Busy):
            other.drop(upload)
        assert other.sweep() == 0
    with other.resumed(upload) as incoming:
        incoming.write(b"x")
    assert uploads.offset(upload) == 1


def test_an_upload_takes_no_more_than_it_said(uploads: Uploads):
    upload = begun(uploads, 5)
    with uploads.resumed(upload) as incoming:
        incoming.write(b"12345")
        with pytest.raises(CountExceeded, match="more bytes than the 5"):
            incoming.write(b"6")
        assert incoming.is_complete
    assert uploads.offset(upload) == 5


def test_limits_are_told_before_anything_comes(uploads: Uploads, db: Database, left: Path):
    with pytest.raises(CountExceeded, match="at most 4,000 bytes"):
        begun(uploads, 4001)
    for _number in range(2):
        begun(uploads, 4000)
    with pytest.raises(CountExceeded, match="2,000 bytes are left of the 10,000"):
        begun(uploads, 2001)
    begun(uploads, 2000)
    with pytest.raises(RateLimited, match="3 uploads are under way"):
        begun(uploads, 0)
    assert len(names(left)) == 3
    begun(uploads, 4000, "bob")
    assert stored(db) == 10_000


def test_what_does_not_say_its_length_takes_room_as_it_comes(uploads: Uploads, db: Database, left: Path):
    with uploads.whole("ann", "text", "utf-8", "", None) as incoming:
        incoming.write(b"x" * 3999)
        assert stored(db) == 3999  # a step is more than there is room for
        with pytest.raises(CountExceeded, match="at most 4,000 bytes"):
            incoming.write(b"xx")
    assert (names(left), stored(db)) == ([], 0)


def test_room_is_taken_in_steps(db: Database, tmp_path: Path):
    uploads = Uploads(db, tmp_path, ServerSettings())
    with uploads.whole("ann", "text", "utf-8", "", None) as incoming:
        incoming.write(b"x")
        assert stored(db) == STEP
        incoming.finish()
    assert stored(db) == 1


def test_a_crowd_does_not_pass_the_limit(db: Database, tmp_path: Path):
    limits = ServerSettings(upload_bytes=4000, stored_bytes=10_000, uploads=100)
    together = Barrier(8, timeout=60)

    def put(number: int) -> bool:
        uploads = Uploads(db, tmp_path, limits)
        try:
            with uploads.whole("ann", "text", "utf-8", "", None) as incoming:
                together.wait()
                for _piece in range(10):
                    incoming.write(f"{number}".encode() * 200)
                assert stored(db) <= 10_000
                incoming.finish()
        except CountExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        kept = sum(pool.map(put, range(8)))
    assert 1 <= kept <= 5
    assert stored(db) == kept * 2000


def test_what_grows_while_it_is_decoded_is_held_to_the_limit(uploads: Uploads, db: Database, tmp_path: Path):
    with uploads.whole("ann", "text", "replace", "", 1000) as incoming:
        incoming.write(b"\xff" * 1000)
        assert incoming.finish()[0].bytes == 3000
    with uploads.whole("ann", "text", "replace", "", 2000) as incoming:
        incoming.write(b"\xff" * 2000)
        with pytest.raises(CountExceeded, match="4,000 bytes"):
            incoming.finish()
    assert stored(db) == 3000
    for number in range(2):
        with uploads.whole("ann", "text", "utf-8", "", 3000) as incoming:
            incoming.write(str(number).encode() * 3000)
            incoming.finish()
    with uploads.whole("ann", "text", "latin-1", "", 900) as incoming:  # there is room for it, and not as UTF-8
        incoming.write(b"\xe9" * 900)
        with pytest.raises(CountExceeded, match="1,000 bytes are left"):
            incoming.finish()
    assert stored(db) == 9000
    until(lambda: len(list((tmp_path / "contexts" / "data").iterdir())) == 3)
    until(lambda: not any((tmp_path / "contexts" / "drafts").iterdir()))


def test_the_old_and_the_dead_are_swept(uploads: Uploads, db: Database, left: Path):
    old, done = begun(uploads, 1), begun(uploads, 1)
    with uploads.resumed(done) as incoming:
        incoming.write(b"x")
        incoming.finish()
    assert uploads.sweep() == 0
    age(db)
    fresh = begun(uploads)
    assert uploads.find("ann", old.id) is None
    assert uploads.sweep() == 1
    assert (names(left), rows(db)) == ([fresh.id], 1)
    (left / fresh.id).unlink()
    (left / ("0" * 32)).touch()
    with pytest.raises(StoreError), uploads.resumed(fresh):
        pass
    assert uploads.sweep() == 1
    assert (names(left), rows(db), stored(db)) == ([], 0, 1)


def test_an_old_one_that_still_comes_is_left_alone(uploads: Uploads, db: Database, left: Path):
    upload = begun(uploads)
    with uploads.resumed(upload) as incoming:
        age(db)
        assert uploads.sweep() == 0
        incoming.write(b"x" * 10)
        incoming.finish()
    assert (names(left), stored(db)) == ([], 10)


def test_one_that_ended_in_mid_finish_can_be_told(uploads: Uploads, db: Database, left: Path):
    """The context is there, and the file still is: the process was killed between the two."""
    upload = begun(uploads, 1)
    with uploads.resumed(upload) as incoming:
        incoming.write(b"x")
        context, *_ = incoming.finish()
        incoming.is_finished = False
    assert names(left) == [upload.id]
    assert uploads.sweep() == 1
    found = uploads.find("ann", upload.id)
    assert found is not None
    assert found.context == context.id


def test_of_what_has_ended_not_all_is_remembered(uploads: Uploads, db: Database):
    row = {
        "tenant": "ann",
        "kind": "text",
        "encoding": "utf-8",
        "name": "",
        "length": 1,
        "context": "0" * 64,
        "at": "2026",
    }
    ended = [{**row, "id": f"{number:032}"} for number in range(DONE + 50)]
    db.write_sync(lambda tx: tx.execute(sa.insert(table), [*ended, {**row, "id": "b", "tenant": "bob"}]))
    begun(uploads)
    assert rows(db) == DONE + 2


_KILLED = """
import sys, signal
from pathlib import Path
from orchestrator.settings import ServerSettings
from orchestrator.store.db import Database
from orchestrator.store.uploads import Uploads
home = Path(sys.argv[1])
uploads = Uploads(Database(home), home, ServerSettings())
with uploads.whole("ann", "text", "utf-8", "", None) as incoming:
    incoming.write(b"x" * 1000)
    print("ready", flush=True)
    signal.pause()
"""


def test_what_a_killed_process_left_is_swept(tmp_path: Path):
    db = Database(tmp_path)
    uploads, folder = Uploads(db, tmp_path, LIMITS), tmp_path / "uploads"
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert uploads.sweep() == 0
        assert len(names(folder)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert stored(db) == STEP
    assert uploads.sweep() == 1
    assert (names(folder), stored(db)) == ([], 0)
    db.close()
