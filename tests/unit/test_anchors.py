"""Anchors: a folder, a bucket of a real server of S3's protocol, and a timestamping authority made with openssl."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from moto.server import ThreadedMotoServer
from rfc3161_client import decode_timestamp_response

from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.notes import NoteError
from orchestrator.store.anchors import (
    MOST_BYTES,
    Anchor,
    FolderAnchor,
    S3Anchor,
    TimestampAnchor,
    anchor,
    check_timestamp,
)

OPENSSL = shutil.which("openssl") or "openssl"
LOG = "tenants/default"
NOTE = "airlock/tenants/default\n7\nAAAA\n\n— airlock ö\n".encode()


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# Addresses


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        ("file:/anchors/of airlock", FolderAnchor, "file:/anchors/of airlock"),
        ("s3://bucket/a/b/?days=30", S3Anchor, "s3://bucket/a/b"),
        ("s3://bucket?days=30&endpoint=http://127.0.0.1:1&region=eu-west-1", S3Anchor, "s3://bucket/"),
        ("rfc3161+https://tsa.example/tsr", TimestampAnchor, "rfc3161+https://tsa.example/tsr"),
    ],
)
def test_addresses(text: str, kind: type[Anchor], where: str) -> None:
    made = anchor(text)
    assert type(made) is kind
    assert made.where == where


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/anchors",
            "file:anchors",
            "file://host/anchors",
            "http://x",
            "s3:///prefix?days=1",
            "s3://[",
            "ftp://a/b",
        ),
        *("rfc3161+ftp://x", "rfc3161+", "rfc3161:https://x"),
        *(
            "s3://b/p",
            "s3://b/p?days=",
            "s3://b/p?days=0",
            "s3://b/p?days=-1",
            "s3://b/p?days=9999999",
            "s3://b/p?days=x",
        ),
        *("s3://b/p?days=1&unknown=2", "s3://b/p?days=1&endpoint=nonsense", "s3://b/p?days=1&region=a b"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(RequestError) as error:
        anchor(text)
    one_line(error)


@pytest.mark.parametrize("text", ["s3://b/p?days=1", "rfc3161+https://tsa.example"])
def test_what_is_not_installed_is_told_with_the_remedy(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("boto3", "rfc3161_client"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=r"pip install 'airlock\[anchors\]'") as error:
        anchor(text)
    one_line(error)


# A folder


@pytest.fixture
def folder(tmp_path: Path) -> FolderAnchor:
    return FolderAnchor(tmp_path)


def check_place(place: Anchor) -> None:
    """What a place that can be read back has to do."""
    assert place.latest(LOG) is None
    for size in (9, 10, 1000, 7):
        receipt = place.put(LOG, size, b"%d" % size + NOTE)
        assert receipt.where.startswith(place.where)
        assert receipt.proof
        assert place.put(LOG, size, b"%d" % size + NOTE) == receipt
    assert place.latest(LOG) == b"1000" + NOTE
    with pytest.raises(StoreError, match="another checkpoint of log tenants/default at 10 entries") as error:
        place.put(LOG, 10, NOTE)
    one_line(error)
    assert place.latest("tenants/defaul") is None
    assert place.latest("platform") is None
    for log in ("platform", "..", "../../etc", "tenants/a b\n/ü*?[x]", "tenants/default@00"):
        place.put(log, 2**53, log.encode())
        assert place.latest(log) == log.encode()
    assert place.latest(LOG) == b"1000" + NOTE
    for wrong in (b"", b"x" * (MOST_BYTES + 1)):
        with pytest.raises(StoreError, match="a checkpoint has 1 to 4096 bytes"):
            place.put(LOG, 2000, wrong)
    place.put(LOG, 2000, b"x" * MOST_BYTES)
    assert place.latest(LOG) == b"x" * MOST_BYTES


def test_a_folder(folder: FolderAnchor, tmp_path: Path) -> None:
    check_place(folder)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "tenants%2Fdefault@00000000000000000009" in names
    assert len(names) == 10
    assert not any("draft" in name for name in names)
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in tmp_path.iterdir())


def test_of_many_that_put_one_checkpoint_at_once_one_is_kept(tmp_path: Path) -> None:
    told: list[str] = []
    ready = threading.Barrier(8)

    def put(number: int) -> None:
        ready.wait()
        try:
            FolderAnchor(tmp_path).put(LOG, 7, b"note %d" % (number % 2))
            told.append(f"note {number % 2}")
        except StoreError:
            told.append("refused")

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = FolderAnchor(tmp_path).latest(LOG)
    assert kept
    assert sorted(told) == sorted([kept.decode()] * 4 + ["refused"] * 4)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path / "absent", "No such file"), (tmp_path / "file", "Not a directory")):
        for use in (lambda place: place.put(LOG, 1, NOTE), lambda place: place.latest(LOG)):
            with pytest.raises(StoreError, match=why) as error:
                use(FolderAnchor(path))
            one_line(error, str(path))
    assert not (tmp_path / "absent").exists()


def test_a_link_in_the_folder_is_not_followed(folder: FolderAnchor, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(NOTE)
    (tmp_path / "tenants%2Fdefault@00000000000000000007").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic links"):
        folder.put(LOG, 7, NOTE)
    with pytest.raises(StoreError, match="symbolic links"):
        folder.latest(LOG)


# A bucket


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Where the server is."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@dataclass
class Bucket:
    """A bucket, and a client that may do anything."""

    name: str
    endpoint: str
    client: Any

    @property
    def address(self) -> str:
        return f"s3://{self.name}/airlock?days=30&endpoint={self.endpoint}&region=us-east-1"


@pytest.fixture
def make_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bucket]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client: Any = boto3.session.Session().client("s3", endpoint_url=s3, region_name="us-east-1")

    def make(name: str, *, lock: bool = True) -> Bucket:
        client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=lock)
        return Bucket(name, s3, client)

    return make


def test_a_bucket(make_bucket: Callable[..., Bucket]) -> None:
    bucket = make_bucket("anchors")
    check_place(anchor(bucket.address))
    other = anchor(bucket.address)
    assert other.latest(LOG) == b"x" * MOST_BYTES
    receipt = other.put(LOG, 7, b"7" + NOTE)
    proof = json.loads(receipt.proof)
    assert (
        receipt.where == "s3://anchors/" + proof["key"] == "s3://anchors/airlock/tenants%2Fdefault@00000000000000000007"
    )
    head = bucket.client.head_object(Bucket="anchors", Key=proof["key"], VersionId=proof["version"])
    assert head["ObjectLockMode"] == "COMPLIANCE"
    left = head["ObjectLockRetainUntilDate"] - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left < timedelta(days=30, hours=1)


def test_what_is_anchored_in_a_bucket_cannot_be_deleted(make_bucket: Callable[..., Bucket]) -> None:
    bucket = make_bucket("locked")
    place = anchor(bucket.address)
    proof = json.loads(place.put(LOG, 7, NOTE).proof)
    for bypass in ({}, {"BypassGovernanceRetention": True}):
        with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
            bucket.client.delete_object(Bucket="locked", Key=proof["key"], VersionId=proof["version"], **bypass)
    # A marker can be put over it, which hides it from those who do not look for versions.
    bucket.client.delete_object(Bucket="locked", Key=proof["key"])
    assert "Contents" not in bucket.client.list_objects_v2(Bucket="locked")
    assert place.latest(LOG) == NOTE
    assert json.loads(place.put(LOG, 7, NOTE).proof) == proof
    with pytest.raises(StoreError, match="another checkpoint"):
        place.put(LOG, 7, b"forged" + NOTE)


def test_a_version_that_somebody_else_has_put_over_it_shows(make_bucket: Callable[..., Bucket]) -> None:
    bucket = make_bucket("forked")
    place = anchor(bucket.address)
    proof = json.loads(place.put(LOG, 7, NOTE).proof)
    bucket.client.put_object(Bucket="forked", Key=proof["key"], Body=b"forged")
    for use in (lambda: place.put(LOG, 7, NOTE), lambda: place.latest(LOG)):
        with pytest.raises(StoreError, match="another checkpoint of log tenants/default at 7 entries"):
            use()


@pytest.mark.parametrize("theirs", [NOTE, b"another"])
def test_of_two_that_put_at_once_one_is_kept(
    make_bucket: Callable[..., Bucket], monkeypatch: pytest.MonkeyPatch, theirs: bytes
) -> None:
    bucket = make_bucket(f"race-{len(theirs)}")
    looked, same = list[str](), S3Anchor._same

    def late(self: S3Anchor, key: str, *rest: Any) -> Any:
        """Between the look and the put of one, another one puts."""
        found = same(self, key, *rest)
        if not looked:
            bucket.client.put_object(Bucket=bucket.name, Key=key, Body=theirs)
        looked.append(key)
        return found

    monkeypatch.setattr(S3Anchor, "_same", late)
    place = anchor(bucket.address)
    if theirs == NOTE:
        assert place.put(LOG, 7, NOTE).proof
    else:
        with pytest.raises(StoreError, match="another checkpoint"):
            place.put(LOG, 7, NOTE)
    assert place.latest(LOG) == theirs
    assert len(bucket.client.list_object_versions(Bucket=bucket.name)["Versions"]) == 1


def test_buckets_that_cannot_be_used(make_bucket: Callable[..., Bucket], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = make_bucket("without-lock", lock=False)
    address = bucket.address
    for text, why in (
        (address, "bucket without-lock has no object lock"),
        (address.replace("without-lock", "absent"), "NoSuchBucket"),
        (address.replace(bucket.endpoint, "http://127.0.0.1:1"), "Could not connect"),
    ):
        for use in (lambda place: place.put(LOG, 1, NOTE), lambda place: place.latest(LOG)):
            with pytest.raises(StoreError, match=why) as error:
                use(anchor(text))
            one_line(error)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="credentials") as error:
        anchor(address).put(LOG, 1, NOTE)
    one_line(error)


# A timestamping authority


def openssl(*arguments: object, **options: Any) -> bytes:
    done = subprocess.run([OPENSSL, *map(str, arguments)], capture_output=True, **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@dataclass
class Authority:
    """RFC 3161 over HTTP. answer: what it replies to a request. seen: (content type, request)."""

    folder: Path
    answer: Callable[[bytes], bytes]
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    status: int = 200
    url: str = ""

    @property
    def root(self) -> bytes:
        return (self.folder / "root.pem").read_bytes()

    def stamp(self, request: bytes) -> bytes:
        query = self.folder / f"{hashlib.sha256(request).hexdigest()}.tsq"
        query.write_bytes(request)
        command = ("ts", "-reply", "-config", self.folder / "tsa.cnf", "-section", "tsa", "-queryfile", query)
        return openssl(*command, cwd=self.folder)


CONFIG = """
[tsa]
serial = serial
signer_cert = tsa.pem
certs = tsa.pem
signer_key = tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha512
ess_cert_id_chain = no
ess_cert_id_alg = sha256
[stamping]
extendedKeyUsage = critical, timeStamping
keyUsage = critical, digitalSignature
basicConstraints = critical, CA:FALSE
authorityKeyIdentifier = keyid
subjectKeyIdentifier = hash
"""


@pytest.fixture(scope="module")
def authorities_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tsa")
    (folder / "tsa.cnf").write_text(CONFIG)
    (folder / "serial").write_text("01\n")
    new = ("req", "-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl(*new, "root.key", "-x509", "-days", 30, "-subj", "/CN=root", "-out", "root.pem", cwd=folder)
    openssl(*new, "other.key", "-x509", "-days", 30, "-subj", "/CN=other", "-out", "other.pem", cwd=folder)
    openssl(*new, "tsa.key", "-subj", "/CN=tsa", "-out", "tsa.csr", cwd=folder)
    sign = ("x509", "-req", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-days", 30)
    openssl(*sign, "-in", "tsa.csr", "-out", "tsa.pem", "-extfile", "tsa.cnf", "-extensions", "stamping", cwd=folder)
    return folder


@pytest.fixture
def authority(authorities_folder: Path) -> Iterator[Authority]:
    made = Authority(authorities_folder, lambda _request: b"")
    made.answer = made.stamp

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = self.rfile.read(int(self.headers["Content-Length"]))
            made.seen.append((self.headers["Content-Type"], request))
            reply = made.answer(request)
            self.send_response(made.status)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_args: Any) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}/tsr"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def test_a_timestamp(authority: Authority, tmp_path: Path) -> None:
    place = anchor(f"rfc3161+{authority.url}")
    before = datetime.now(UTC).replace(microsecond=0)
    receipt = place.put(LOG, 7, NOTE)
    assert receipt.where == place.where == f"rfc3161+{authority.url}"
    assert place.latest(LOG) is None
    assert [kind for kind, _ in authority.seen] == ["application/timestamp-query"]
    assert before <= check_timestamp(receipt.proof, NOTE, [authority.root]) <= datetime.now(UTC)
    # What we have is what others verify, too.
    (tmp_path / "reply").write_bytes(receipt.proof)
    (tmp_path / "note").write_bytes(NOTE)
    verify = ("ts", "-verify", "-data", tmp_path / "note", "-in", tmp_path / "reply")
    assert b"OK" in openssl(*verify, "-CAfile", authority.folder / "root.pem")


def test_a_timestamp_that_does_not_verify(authority: Authority) -> None:
    proof = anchor(f"rfc3161+{authority.url}").put(LOG, 7, NOTE).proof
    other = (authority.folder / "other.pem").read_bytes()
    assert check_timestamp(proof, NOTE, [other, authority.root])
    flipped = proof[:-20] + bytes([proof[-20] ^ 1]) + proof[-19:]
    for reply, note, roots, why in (
        (proof, NOTE + b"x", [authority.root], "Mismatch"),
        (proof, NOTE, [other], "does not verify"),
        (flipped, NOTE, [authority.root], "does not verify"),
        (proof, NOTE, [], "cannot be read"),
        (proof, NOTE, [b"no certificate"], "cannot be read"),
        (proof[:-1], NOTE, [authority.root], "no timestamp"),
        (b"", NOTE, [authority.root], "no timestamp"),
        (os.urandom(500), NOTE, [authority.root], "no timestamp"),
    ):
        with pytest.raises(NoteError, match=why) as error:
            check_timestamp(reply, note, roots)
        one_line(error)


def test_an_authority_that_misbehaves(authority: Authority) -> None:
    place = anchor(f"rfc3161+{authority.url}")
    place.put(LOG, 7, NOTE)
    older = authority.stamp(authority.seen[0][1])
    refused = authority.stamp(authority.seen[0][1].replace(b"\x04\x20", b"\x04\x1f", 1)[:-1])
    assert decode_timestamp_response(refused).status == 2
    for status, answer, why in (
        (200, older, "for another request"),
        (200, refused, "no timestamp was granted"),
        (200, b"", "no timestamp"),
        (200, b"<html>", "no timestamp"),
        (200, b"\x30" * (1 << 17), "no timestamp"),
        (503, older, "status 503"),
        (302, b"", "status 302"),
    ):
        authority.status = status
        authority.answer = lambda _request, answer=answer: answer
        with pytest.raises(StoreError, match=why) as error:
            place.put(LOG, 7, NOTE)
        one_line(error, authority.url)
    with pytest.raises(StoreError, match="cannot anchor at") as error:
        anchor("rfc3161+http://127.0.0.1:1/").put(LOG, 7, NOTE)
    one_line(error)
    with pytest.raises(StoreError, match="cannot anchor at") as error:
        anchor("rfc3161+http://\x00").put(LOG, 7, NOTE)
    one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "rfc3161+http://me:hunter2@tsa/",
        "s3://me:hunter2@bucket/x?days=1",
        "s3://b/x?days=1&endpoint=http://me:hunter2@h",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        anchor(text)
    assert "hunter2" not in str(refused.value)
