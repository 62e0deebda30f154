"""Signed notes and checkpoints of logs, as C2SP signed-note and tlog-checkpoint have them, with Ed25519. Pure.

A note is a text, an empty line, and a line for each signature. A checkpoint is a note whose text says of which log, of
how many entries, and with which Merkle root. A proof that one entry is in a log is a C2SP tlog-proof,
and one that a log went on from what it was is what C2SP tlog-witness has a log send.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_ED25519 = b"\x01"
_NAME = re.compile(r"[^\s+]{1,256}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_MOST_NOTE = 64 * 1024  # characters: room for more than the sixteen signatures that everybody has to take
_PROOF = "c2sp.org/tlog-proof@v1"


class NoteError(ValueError):
    """What is wrong with a note, a checkpoint, a key or a proof; one line."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log signs. root: 32 bytes."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


@dataclass(frozen=True, slots=True)
class Verifier:
    """Who may have signed. name: of the key. public: 32 bytes of Ed25519."""

    name: str
    public: bytes

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:4]

    def __str__(self) -> str:
        """As verifiers' keys are written: NAME+ID+KEY."""
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(_ED25519 + self.public).decode()}"

    @classmethod
    def read(cls, text: str) -> Verifier:
        """Raises NoteError."""
        name, _, rest = text.strip().partition("+")
        digits, _, key = rest.partition("+")
        raw = _base64(key) if _NAME.fullmatch(name) else b""
        if len(raw) != 33 or raw[:1] != _ED25519:
            raise NoteError("a verifier's key is NAME+ID+KEY, with the key of Ed25519")
        found = cls(name, raw[1:])
        if found.key_id.hex() != digits:
            raise NoteError("the id in the verifier's key is not that of its key: it was cut or changed")
        return found

    def accepts(self, message: bytes, signature: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class Signer:
    """private: 32 bytes of Ed25519."""

    def __init__(self, name: str, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.verifier = Verifier(name, self._key.public_key().public_bytes_raw())

    def sign(self, text: str) -> str:
        """The note of `text`, which has to end with a line break."""
        signature = self.verifier.key_id + self._key.sign(text.encode())
        return f"{text}\n\u2014 {self.verifier.name} {base64.b64encode(signature).decode()}\n"


def open_note(note: str, verifier: Verifier) -> str:
    """The text that `verifier` has signed; signatures of others are passed over. Raises NoteError."""
    if len(note) > _MOST_NOTE or re.search(r"[\x00-\x09\x0b-\x1f]", note):
        raise NoteError("this is no signed note")
    text, gap, lines = note.rpartition("\n\n")
    if not gap or not lines.endswith("\n"):
        raise NoteError("this is no signed note: it has no signature")
    text += "\n"
    signed = False
    for line in lines[:-1].split("\n"):
        mark, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        signature = _base64(encoded)
        if mark != "\u2014" or not _NAME.fullmatch(name) or len(signature) < 5:
            raise NoteError("this is no signed note: a line below the empty one is no signature")
        if (name, signature[:4]) == (verifier.name, verifier.key_id):
            if not verifier.accepts(text.encode(), signature[4:]):
                raise NoteError(f"the signature of {name} is wrong: the note was changed")
            signed = True
    if not signed:
        raise NoteError(f"the note is not signed by {verifier.name} with the key that is trusted here")
    return text


def read_checkpoint(text: str) -> Checkpoint:
    """Of a note's text. Raises NoteError."""
    lines = text.split("\n")
    if len(lines) < 4 or lines.pop() or not all(lines):
        raise NoteError("this is no checkpoint: it has fewer than three lines, or an empty one")
    root = _base64(lines[2])
    if not _NUMBER.fullmatch(lines[1]) or len(root) != 32:
        raise NoteError("this is no checkpoint: origin, size and root are its first lines")
    return Checkpoint(lines[0], int(lines[1]), root)


def open_checkpoint(note: str, verifier: Verifier) -> Checkpoint:
    """Raises NoteError."""
    return read_checkpoint(open_note(note, verifier))


@dataclass(frozen=True, slots=True)
class Proof:
    """That a log has an entry: its index, its audit path (RFC 6962 section 2.1.1), and the checkpoint's note.

    extra: what nobody vouches for; here the entry itself, whose hash does.
    """

    index: int
    path: Sequence[bytes]
    note: str
    extra: bytes = b""

    def text(self) -> str:
        extra = f"extra {base64.b64encode(self.extra).decode()}\n" if self.extra else ""
        steps = "".join(f"{base64.b64encode(step).decode()}\n" for step in self.path)
        return f"{_PROOF}\n{extra}index {self.index}\n{steps}\n{self.note}"

    @classmethod
    def read(cls, text: str) -> Proof:
        """Raises NoteError."""
        head, gap, note = text.partition("\n\n")
        lines = head.split("\n")
        extra = b""
        if lines[1:] and lines[1].startswith("extra "):
            extra = _base64(lines.pop(1).removeprefix("extra "))
        index = lines[1].removeprefix("index ") if lines[1:] else ""
        path = [_base64(line) for line in lines[2:]]
        if not gap or lines[0] != _PROOF or not _NUMBER.fullmatch(index) or {len(step) for step in path} - {32}:
            raise NoteError("this is no proof of an entry in a log (C2SP tlog-proof)")
        return cls(int(index), path, note, extra)


@dataclass(frozen=True, slots=True)
class Growth:
    """That a log went on from its first `old` entries: the consistency proof (RFC 6962 section 2.1.2), and the note of
    the checkpoint that it went on to. Written as witnesses are sent it (C2SP tlog-witness, add-checkpoint)."""

    old: int
    path: Sequence[bytes]
    note: str

    def text(self) -> str:
        steps = "".join(f"{base64.b64encode(step).decode()}\n" for step in self.path)
        return f"old {self.old}\n{steps}\n{self.note}"

    @classmethod
    def read(cls, text: str) -> Growth:
        """Raises NoteError."""
        head, gap, note = text.partition("\n\n")
        first, *rest = head.split("\n")
        old = first.removeprefix("old ")
        path = [_base64(line) for line in rest]
        if not gap or old == first or not _NUMBER.fullmatch(old) or {len(step) for step in path} - {32}:
            raise NoteError("this is no proof that a log went on (C2SP tlog-witness)")
        return cls(int(old), path, note)


def _base64(text: str) -> bytes:
    """Empty where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
