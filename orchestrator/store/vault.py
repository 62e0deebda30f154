"""Keys, and payloads under them: each tenant's key and the signer's are in the database, sealed with the master key.

Everything is sealed with AES-256-GCM under a random nonce. A query's payloads have a key of their own, derived from
the tenant's by HKDF (RFC 5869), so that no key seals more than its nonces are good for. What was sealed is bound to its
place: moved to another one, it does not open.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.events import commitment
from orchestrator.core.notes import Signer, Verifier
from orchestrator.core.redact import Redactor
from orchestrator.store.db import Database
from orchestrator.store.schema import keys, records

Created = Callable[[sa.Connection, str, str | None], None]  # told the name of a new key, and its public half
KEY_BYTES = 32
SALT_BYTES = 16
STAMP_BYTES = 16
_NONCE_BYTES = 12
_SIGNER = "signer"
_FILE = "master.key"


def _as_it_is(text: str) -> tuple[str, int]:
    return text, 0


class Keeper:
    """How the payloads of one query are kept. names: of those that are kept at all. redact: takes secrets out."""

    def __init__(
        self,
        tenant_key: bytes,
        query: str,
        names: Container[str] = frozenset(),
        redact: Callable[[str], tuple[str, int]] = _as_it_is,
    ) -> None:
        self.names = names
        self.redact = redact
        derived = HKDF(SHA256(), KEY_BYTES, salt=None, info=b"airlock payloads " + query.encode())
        self._cipher = AESGCM(derived.derive(tenant_key))
        self._query = query

    def seal(self, seq: int, name: str, salt: bytes, data: bytes) -> bytes:
        """`data`, of the record `seq`, with the salt of its commitment."""
        return _seal(self._cipher, salt + data, self._place(seq, name))

    def open(self, seq: int, name: str, sealed: bytes) -> tuple[bytes, bytes] | None:
        """(salt, data); None when it is not what was sealed."""
        opened = _open(self._cipher, sealed, self._place(seq, name))
        return None if opened is None else (opened[:SALT_BYTES], opened[SALT_BYTES:])

    def _place(self, seq: int, name: str) -> bytes:
        return f"{self._query}\n{seq}\n{name}".encode()


class Vault:
    """The keys of one database. Use `open_vault`. created: told of each new key, inside the transaction."""

    def __init__(self, db: Database, master: bytes, created: Created, secrets: Iterable[str]) -> None:
        self._db = db
        self._secret = master
        self._master = AESGCM(master)
        self._created = created
        self._records = self.derived("records")
        db.stamp_with(self.stamp)
        self._redactor = Redactor([*secrets, base64.b64encode(master).decode()])
        self._tenants: dict[str, bytes] = {}

    def keeper(self, tenant: str, query: str, names: Container[str] = frozenset()) -> Keeper:
        """For a query of this tenant, whose key is made when it is its first. Blocks. Raises StoreError."""
        if tenant not in self._tenants:
            name = f"tenants/{tenant}"
            sealed = self._db.read(lambda tx: _sealed(tx, name)) or self._db.write_sync(lambda tx: self._make(tx, name))
            self._tenants[tenant] = self._unseal(name, sealed)
        return Keeper(self._tenants[tenant], query, names, self._redactor.redact)

    def opener(self, tenant: str, query: str) -> Keeper | None:
        """For what was kept of a query; None where the tenant has no key. Blocks. Raises StoreError."""
        name = f"tenants/{tenant}"
        if tenant not in self._tenants:
            sealed = self._db.read(lambda tx: _sealed(tx, name))
            if sealed is None:
                return None
            self._tenants[tenant] = self._unseal(name, sealed)
        return Keeper(self._tenants[tenant], query)

    def signer(self) -> Signer:
        """Whose key all logs of the database are signed with; made for a new one. Blocks. Raises StoreError."""
        return self.existing_signer() or self._opened(self._db.write_sync(self._make_signer))

    def derived(self, purpose: str) -> bytes:
        """A key of the master key's for this alone, which every process that has the master key comes to."""
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"airlock " + purpose.encode()).derive(self._secret)

    def stamp(self, record: bytes) -> bytes:
        """Authenticates a record (HMAC-SHA256): until a signature covers it, nothing else does."""
        return hmac.digest(self._records, record, "sha256")[:STAMP_BYTES]

    def existing_signer(self) -> Signer | None:
        """None where nothing has been signed. Blocks. Raises StoreError."""
        sealed = self._db.read(lambda tx: _sealed(tx, _SIGNER))
        return self._opened(sealed) if sealed else None

    def _opened(self, sealed: bytes) -> Signer:
        name, _, private = self._unseal(_SIGNER, sealed).partition(b"\n")
        return Signer(name.decode(), private)

    def _make(self, tx: sa.Connection, name: str) -> bytes:
        return self._add(tx, name, secrets.token_bytes(KEY_BYTES), None)

    def _make_signer(self, tx: sa.Connection) -> bytes:
        if not _sealed(tx, _SIGNER) and (_any(tx, keys.c.id) or _any(tx, records.c.query)):
            # Under a new key, what the old one had signed would not be held against what comes.
            raise StoreError("the signer's key is gone from this database, which has records: put it back")
        name, private = f"airlock-{secrets.token_hex(8)}", secrets.token_bytes(KEY_BYTES)
        verifier = str(Signer(name, private).verifier)
        return self._add(tx, _SIGNER, name.encode() + b"\n" + private, verifier)

    def _add(self, tx: sa.Connection, name: str, secret: bytes, public: str | None) -> bytes:
        if there := _sealed(tx, name):  # another process was faster
            return there
        sealed = _seal(self._master, secret, name.encode())
        tx.execute(sa.insert(keys).values(id=name, sealed=sealed, public=public))
        self._created(tx, name, public)
        return sealed

    def _unseal(self, name: str, sealed: bytes) -> bytes:
        secret = _open(self._master, sealed, name.encode())
        if secret is None:
            raise StoreError(
                f"the key {name} of this database does not open with the master key that is here: set "
                f"AIRLOCK_MASTER_KEY to the one it was made with, or put that one's {_FILE} into the data folder"
            )
        return secret


def open_vault(
    db: Database,
    home: Path,
    given: str | None,
    created: Created,
    secrets: Iterable[str] = (),
) -> Vault:
    """given: the master key as text (AIRLOCK_MASTER_KEY); else it is `master.key` in the data folder, made if need be.

    secrets: that this process holds, and no payload may. Raises RequestError, StoreError.
    """
    master = _decoded(given, "AIRLOCK_MASTER_KEY") if given else _master_file(db, home / _FILE)
    return Vault(db, master, created, secrets)


def verifier(tx: sa.Connection) -> Verifier | None:
    """Who signs this database's logs, if anybody has."""
    text = tx.execute(sa.select(keys.c.public).where(keys.c.id == _SIGNER)).scalar()
    return None if text is None else Verifier.read(text)


def sealed_payload(keeper: Keeper, seq: int, name: str, data: bytes) -> tuple[str, bytes]:
    """(commitment, what is stored) of a payload, under a salt of its own."""
    salt = secrets.token_bytes(SALT_BYTES)
    return commitment(salt, data), keeper.seal(seq, name, salt, data)


def _master_file(db: Database, path: Path) -> bytes:
    if not path.exists():
        if db.read(lambda tx: tx.execute(sa.select(keys.c.id).limit(1)).scalar()):
            where = f"set AIRLOCK_MASTER_KEY, or put {_FILE} into {path.parent}"
            raise StoreError(f"the master key of this database is not here: {where}")
        _write_once(path, base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
    try:
        return _decoded(path.read_text("ascii", "replace"), str(path))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None


def _write_once(path: Path, content: bytes) -> None:
    """Complete or not at all, and only if there is none yet."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None


def _decoded(text: str, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise RequestError(f"{where} is no master key: 32 bytes in base64, such as `openssl rand -base64 32` prints")
    return key


def _any(tx: sa.Connection, column: sa.Column[str]) -> bool:
    return tx.execute(sa.select(column).limit(1)).scalar() is not None


def _sealed(tx: sa.Connection, name: str) -> bytes | None:
    return tx.execute(sa.select(keys.c.sealed).where(keys.c.id == name)).scalar()


def _seal(cipher: AESGCM, secret: bytes, place: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, secret, place)


def _open(cipher: AESGCM, sealed: bytes, place: bytes) -> bytes | None:
    try:
        return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], place)
    except (InvalidTag, ValueError):  # ValueError: it is too short to be anything
        return None
