"""Anchors: where checkpoints are put that are beyond the reach of whoever can write to the data folder.

A log that was cut or rewritten is found out by anybody who holds an older checkpoint of it. These are places that hold
them: a folder (of another machine, or one that is written once), a bucket whose objects cannot be deleted, and a
timestamping authority, which keeps nothing but signs that the checkpoint was there at that time.
All of this blocks. Errors are one line: StoreError where a place cannot be used now, or holds something else.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, urlsplit

import httpx2
from cryptography import x509

from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.notes import NoteError

MOST_BYTES = 4096  # of a checkpoint
_MOST_REPLY = 1 << 16
_TIMEOUT_S = 30.0
_DIGITS = 20  # of a size in a name, so that names are in the order of sizes
_WAYS = "file:/FOLDER, s3://BUCKET/PREFIX?days=N[&endpoint=URL][&region=NAME] or rfc3161+https://AUTHORITY"


@dataclass(frozen=True, slots=True)
class Receipt:
    """where: the address it was put to. proof: what that answered; of a folder, what is there now."""

    where: str
    proof: bytes


class Anchor(ABC):
    """One place. where: its address, as the operator writes it."""

    where: str

    @abstractmethod
    def put(self, log: str, size: int, note: bytes) -> Receipt:
        """Put the checkpoint of `log` at `size` entries there. Again with the same one, nothing happens.

        Raises StoreError, also where the place has another checkpoint of that log and size: the log was forked.
        """

    def latest(self, log: str) -> bytes | None:
        """The checkpoint of the most entries; None where there is none, or where none can be had back.

        Raises StoreError.
        """
        return None


def anchor(text: str) -> Anchor:
    """The place that an operator names. Raises RequestError.

    An address is recorded and shown, so it may have no password; a bucket's keys come from the environment (boto3).
    """
    if "@" in text.partition("?")[0] and not text.startswith("file:"):
        raise RequestError("the address of an anchor has a user or a password in it, and would be shown: leave it out")
    if "@" in dict(parse_qsl(text.partition("?")[2])).get("endpoint", ""):
        raise RequestError("the endpoint of an anchor has a user or a password in it, and would be shown: leave it out")
    if text.startswith("rfc3161+"):
        return TimestampAnchor(text.removeprefix("rfc3161+"))
    try:
        parts = urlsplit(text)
    except ValueError:
        raise RequestError(f"{text!r} is not an address of an anchor: take {_WAYS}") from None
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return FolderAnchor(Path(text.removeprefix("file:")))
    if parts.scheme != "s3" or not parts.netloc:
        raise RequestError(f"{text!r} is not an address of an anchor: take {_WAYS}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    days = options.pop("days", "")
    endpoint, region = options.pop("endpoint", None), options.pop("region", None)
    if options or not days.isdecimal() or not 0 < int(days[:6]) <= 36_500:
        raise RequestError(
            f"anchor {text!r}: say with days=N how long each checkpoint is to be locked, from 1 to 36500; "
            "besides there are endpoint and region"
        )
    return S3Anchor(parts.netloc, parts.path.strip("/"), endpoint, days=int(days), region=region)


def _checked(log: str, size: int, note: bytes) -> str:
    """Its name: that of the log, in which no character means anything to a file system, and the size."""
    if not 0 < len(note) <= MOST_BYTES:
        raise StoreError(f"a checkpoint has 1 to {MOST_BYTES} bytes, and this one has {len(note)}")
    return f"{_prefix(log)}{size:0{_DIGITS}d}"


def _prefix(log: str) -> str:
    return quote(log, safe="") + "@"


def _fork(where: str, log: str, size: int) -> StoreError:
    return StoreError(f"{where} has another checkpoint of log {log} at {size} entries: one of the two is forged")


class FolderAnchor(Anchor):
    """A folder, with one file for each checkpoint. It has to be there: an empty mount point would hold nothing."""

    def __init__(self, path: Path) -> None:
        self.where = f"file:{path}"
        self._path = path

    def put(self, log: str, size: int, note: bytes) -> Receipt:
        path = self._path / _checked(log, size, note)
        draft = self._path / f".draft-{secrets.token_hex(8)}"
        try:
            folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _write(draft, note)
                try:
                    # Takes no name that is taken, and the file is whole from the start.
                    path.hardlink_to(draft)
                except FileExistsError:
                    if _read(path) != note:
                        raise _fork(self.where, log, size) from None
                finally:
                    draft.unlink()
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"cannot anchor at {self.where}: {error.strerror or error}") from None
        return Receipt(f"{self.where}/{path.name}", note)

    def latest(self, log: str) -> bytes | None:
        prefix = _prefix(log)
        try:
            names = [path.name for path in self._path.iterdir() if path.name.startswith(prefix)]
            return _read(self._path / max(names)) if names else None
        except OSError as error:
            raise StoreError(f"cannot read {self.where}: {error.strerror or error}") from None


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        return file.read(MOST_BYTES + 1)


class S3Anchor(Anchor):
    """A bucket with object lock: nobody, the account's owner included, can delete a checkpoint for `days` days.

    Objects are looked at in all of their versions, for a marker of deletion can be put over a locked one. Credentials
    are found as boto3 finds them. Raises RequestError for an endpoint that is no address, and without boto3.
    """

    def __init__(
        self, bucket: str, prefix: str, endpoint: str | None = None, *, days: int, region: str | None = None
    ) -> None:
        self.where = f"s3://{bucket}/{prefix}"
        self._bucket, self._days = bucket, days
        self._prefix = f"{prefix}/" if prefix else ""
        boto3: Any = _library("boto3", "a bucket")
        config: Any = importlib.import_module("botocore.config").Config(
            connect_timeout=_TIMEOUT_S,
            read_timeout=_TIMEOUT_S,
            retries={"max_attempts": 3, "mode": "standard"},
            s3={"addressing_style": "path"} if endpoint else {},
        )
        self._errors: Any = importlib.import_module("botocore.exceptions")
        try:
            session = boto3.session.Session()
            self._client: Any = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
        except (ValueError, self._errors.BotoCoreError) as error:
            raise RequestError(f"anchor {self.where}: {_line(error)}") from None
        self._locks = False

    def put(self, log: str, size: int, note: bytes) -> Receipt:
        key = self._prefix + _checked(log, size, note)
        try:
            self._require_lock()
            made = self._same(key, log, size, note)
            if made is None:
                until = datetime.now(UTC) + timedelta(days=self._days)
                lock = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": until}
                only_if_new = {"IfNoneMatch": "*", "ChecksumAlgorithm": "SHA256"}
                self._client.put_object(Bucket=self._bucket, Key=key, Body=note, **lock, **only_if_new)
                made = self._same(key, log, size, note)
        except self._errors.ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                self._fail(error)
            made = self._same(key, log, size, note)  # another process was faster
        except self._errors.BotoCoreError as error:
            self._fail(error)
        if made is None:
            raise StoreError(f"{self.where} does not hold what was put there: try again")
        return Receipt(f"s3://{self._bucket}/{key}", json.dumps(made, sort_keys=True).encode())

    def latest(self, log: str) -> bytes | None:
        prefix = self._prefix + _prefix(log)
        try:
            self._require_lock()
            found = [*self._versions(prefix)]
            if not found:
                return None
            key = max(version["Key"] for version in found)
            notes = {self._body(version) for version in found if version["Key"] == key}
        except (self._errors.ClientError, self._errors.BotoCoreError) as error:
            self._fail(error)
        if len(notes) > 1:
            raise _fork(self.where, log, int(key[len(prefix) :]))
        return notes.pop()

    def _require_lock(self) -> None:
        if self._locks:
            return
        enabled = None
        try:
            found: Any = self._client.get_object_lock_configuration(Bucket=self._bucket)
            enabled = found["ObjectLockConfiguration"].get("ObjectLockEnabled")
        except self._errors.ClientError as error:
            if error.response["Error"]["Code"] != "ObjectLockConfigurationNotFoundError":
                raise
        if enabled != "Enabled":
            raise StoreError(
                f"bucket {self._bucket} has no object lock: make one with it, what is put here has to stay"
            )
        self._locks = True

    def _same(self, key: str, log: str, size: int, note: bytes) -> Mapping[str, str] | None:
        """Which version holds the note; None where there is none. Raises StoreError where one holds something else."""
        found = [version for version in self._versions(key) if version["Key"] == key]
        if any(self._body(version) != note for version in found):
            raise _fork(self.where, log, size)
        return {"key": key, "version": found[0]["VersionId"], "etag": found[0]["ETag"]} if found else None

    def _versions(self, prefix: str) -> Iterator[Any]:
        pages = self._client.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=prefix)
        for page in pages:
            yield from page.get("Versions", [])

    def _body(self, version: Mapping[str, str]) -> bytes:
        got = self._client.get_object(Bucket=self._bucket, Key=version["Key"], VersionId=version["VersionId"])
        with got["Body"] as body:
            return body.read(MOST_BYTES + 1)

    def _fail(self, error: Exception) -> NoReturn:
        raise StoreError(f"cannot anchor at {self.where}: {_line(error)}") from None


class TimestampAnchor(Anchor):
    """A timestamping authority (RFC 3161) at this address. The receipt's proof is its reply; nothing can be had back.

    Raises RequestError for what is no address, and without rfc3161-client.
    """

    def __init__(self, url: str) -> None:
        self.where = f"rfc3161+{url}"
        if not url.startswith(("https://", "http://")):  # replies are signed: they may come in the clear
            raise RequestError(f"{self.where!r} is not an address of an anchor: take {_WAYS}")
        self._url = url
        _library("rfc3161_client", "a timestamp")

    def put(self, log: str, size: int, note: bytes) -> Receipt:
        from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

        _checked(log, size, note)
        asked = TimestampRequestBuilder(data=note, hash_algorithm=HashAlgorithm.SHA256).build()
        reply = self._ask(asked.as_bytes())
        try:
            said = _opened(reply)
        except NoteError as error:
            raise StoreError(f"cannot anchor at {self.where}: {error}") from None
        imprint = asked.message_imprint.message
        if said.tst_info.nonce != asked.nonce or said.tst_info.message_imprint.message != imprint:
            raise StoreError(f"cannot anchor at {self.where}: its reply is for another request")
        return Receipt(self.where, reply)

    def _ask(self, request: bytes) -> bytes:
        headers = {"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}
        try:
            with (
                httpx2.Client(timeout=_TIMEOUT_S) as client,
                client.stream("POST", self._url, content=request, headers=headers) as response,
            ):
                if response.status_code != 200:
                    raise StoreError(f"cannot anchor at {self.where}: it answered with status {response.status_code}")
                reply = b""
                for piece in response.iter_bytes():
                    reply += piece
                    if len(reply) > _MOST_REPLY:
                        raise StoreError(f"cannot anchor at {self.where}: its reply is no timestamp")
                return reply
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StoreError(f"cannot anchor at {self.where}: {error or type(error).__name__}") from None


def check_timestamp(reply: bytes, note: bytes, roots: Sequence[bytes]) -> datetime:
    """When `note` was there, as an authority says whose certificate one of `roots` (PEM) has signed.

    Raises NoteError where that is not what the reply says, RequestError without rfc3161-client.
    """
    _library("rfc3161_client", "a timestamp")
    from rfc3161_client import VerificationError, VerifierBuilder

    try:
        trusted = [found for root in roots for found in x509.load_pem_x509_certificates(root)]
        verifier = VerifierBuilder(roots=trusted).build()
    except ValueError as error:
        raise NoteError(f"the certificates that a timestamp is checked with cannot be read: {error}") from None
    said = _opened(reply)
    try:
        verifier.verify_message(said, note)
    except (VerificationError, ValueError) as error:
        raise NoteError(f"the timestamp does not verify: {_line(error)}") from None
    return said.tst_info.gen_time


def _opened(reply: bytes) -> Any:
    """A reply that grants a timestamp. Raises NoteError."""
    from rfc3161_client import PKIStatus, decode_timestamp_response

    try:
        said = decode_timestamp_response(reply)
        if said.status == PKIStatus.GRANTED:
            _ = said.tst_info  # is there
            return said
    except ValueError:
        raise NoteError("the reply is no timestamp") from None
    raise NoteError(f"no timestamp was granted: {', '.join(said.status_string) or 'no reason given'}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RequestError(f"{what} as an anchor needs {name}: run `pip install 'airlock[anchors]'`") from None
