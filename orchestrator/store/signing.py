"""Checkpoints: who signs the logs, and what it remembers so that it never signs a smaller or a forked one.

When a query ends, its tenant's log is signed, the signed head becomes an entry of the platform's log (so that a tenant
whose log is dropped is missed), and that log is signed, too. What was signed last is remembered in the data folder,
apart from the database: one that was put back to an older state, or rewritten, is not signed any more.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from hmac import compare_digest
from pathlib import Path
from typing import cast

import sqlalchemy as sa

from orchestrator.core.errors import StoreError
from orchestrator.core.events import Event
from orchestrator.core.merkle import Tree
from orchestrator.core.notes import Checkpoint, NoteError, Signer, open_checkpoint
from orchestrator.files import alone
from orchestrator.store import journal, logs
from orchestrator.store.prepared import Prepared
from orchestrator.store.schema import checkpoints

_LAST = Prepared(
    sa.select(checkpoints.c.note)
    .where(checkpoints.c.log == sa.bindparam("of"))
    .order_by(checkpoints.c.size.desc())
    .limit(1)
)
_add = Prepared(sa.insert(checkpoints))
_NAME = 40  # characters of a file's name in the memory


@dataclass(frozen=True, slots=True)
class Signed:
    """A tenant's checkpoint, and the platform's, which has the tenant's head in it. heads: log -> (what, its note)."""

    tenant: str
    heads: dict[str, tuple[Checkpoint, str]]

    @property
    def note(self) -> str:
        return self.heads[logs.tenants_log(self.tenant)][1]


class Notary:
    """Signs the logs of one database. memory: a folder apart from it. stamp: what records are authenticated with."""

    def __init__(self, signer: Signer, memory: Path, stamp: Callable[[bytes], bytes] = lambda _record: b"") -> None:
        self._signer = signer
        self._stamp = stamp
        self._memory = memory
        self.verifier = signer.verifier
        self._open = lru_cache(256)(partial(open_checkpoint, verifier=signer.verifier))

    def sign(self, tx: sa.Connection, tenant: str) -> Signed:
        """Sign the tenant's log as this transaction leaves it. Raises StoreError when it does not go on from before.

        Once the transaction is committed, `remember` what this returns.
        """
        log = logs.tenants_log(tenant)
        head, note, is_new = self._sign(tx, log)
        if is_new:
            body = {"tenant": tenant, "size": head.size, "root": base64.b64encode(head.root).decode()}
            journal.append(tx, journal.PLATFORM, Event("tenant.head", "root", body))
        above, over, _is_new = self._sign(tx, logs.PLATFORM)
        return Signed(tenant, {log: (head, note), logs.PLATFORM: (above, over)})

    def require_whole(self, tx: sa.Connection, tenant: str) -> None:
        """Raise StoreError when what was signed last is not what the logs have: before anything is done in vain."""
        for log in (logs.PLATFORM, logs.tenants_log(tenant)):
            self._checked(tx, log)

    def _sign(self, tx: sa.Connection, log: str) -> tuple[Checkpoint, str, bool]:
        """The checkpoint, its note, and whether it had to be made."""
        tree, last, note = self._checked(tx, log)
        if last and last.size == tree.size:
            return last, note, False
        head = Checkpoint(f"{self.verifier.name}/{log}", tree.size, tree.root())
        note = self._signer.sign(head.text())
        _add(tx, {"log": log, "size": head.size, "note": note})
        return head, note, True

    def _checked(self, tx: sa.Connection, log: str) -> tuple[Tree, Checkpoint | None, str]:
        """The log, found to go on from the checkpoint that was signed last, and that with its note."""
        note = next((note for (note,) in _LAST(tx, {"of": log})), "")
        try:
            # What was signed last, as the database and as the folder have it: mostly the same.
            last = self._open(note) if note else None
            tree = logs.tree(tx, log)
            for before in {last, self.remembered(log)} - {None}:
                _require_going_on(tree, cast("Checkpoint", before), log)
            self._require_stamped(tx, log, last.size if last else 0)
        except ValueError as error:  # a NoteError, or hashes that are none
            raise StoreError(f"log {log} is not used, what is stored of it is damaged: {error}") from None
        return tree, last, note

    def _require_stamped(self, tx: sa.Connection, log: str, size: int) -> None:
        """What was signed is what was looked at then; what came since has to be from an Airlock."""
        for leaf, record, mac in logs.written_since(tx, log, size):
            if not compare_digest(self._stamp(record), mac):
                raise StoreError(f"entry {leaf} of log {log} was written by somebody else: nothing is added to it")

    def remembered(self, log: str) -> Checkpoint | None:
        """What this folder has of the log. Raises StoreError where that was not signed with this database's key."""
        note = self.note(log)
        try:
            return None if note is None else self._open(note)
        except NoteError as error:
            file = self._file(log)
            raise StoreError(f"{file}, what was signed last of log {log}, cannot be used: {error}") from None

    def note(self, log: str) -> str | None:
        """Likewise, whatever it is. Raises StoreError where it cannot be read."""
        file = self._file(log)
        try:
            return file.read_text(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{file}, what was signed last of log {log}, cannot be read: {error.strerror}") from None

    def notes(self) -> list[str]:
        """All that this folder remembers. Raises StoreError."""
        try:
            files = [file for file in self._memory.iterdir() if len(file.name) == _NAME]
            return [file.read_text(errors="replace") for file in files]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read {self._memory}: {error.strerror}") from None

    def remember(self, signed: Signed) -> None:
        """The newest of what was signed and committed. Raises StoreError."""
        try:
            self._memory.mkdir(mode=0o700, exist_ok=True)
            with alone(self._memory / "lock"):
                for log, (head, note) in signed.heads.items():
                    before = self.remembered(log)
                    if before is None or before.size < head.size:
                        _put(self._memory / "draft", note, self._file(log))
        except OSError as error:
            raise StoreError(f"cannot write to {self._memory}: {error.strerror}") from None

    def _file(self, log: str) -> Path:
        return self._memory / hashlib.sha256(log.encode()).hexdigest()[:_NAME]


def _require_going_on(tree: Tree, before: Checkpoint, log: str) -> None:
    if before.size > tree.size:
        raise StoreError(
            f"log {log} has {tree.size} entries, and {before.size} were signed: the database is an older one, "
            "or was cut; nothing is added to it"
        )
    if tree.root(before.size) != before.root:
        raise StoreError(f"log {log} is not the one that was signed at {before.size} entries: nothing is added to it")


def _put(draft: Path, note: str, path: Path) -> None:
    """Whole, whenever the power is cut."""
    with draft.open("w") as file:
        file.write(note)
        file.flush()
        os.fdatasync(file.fileno())
    draft.replace(path)
