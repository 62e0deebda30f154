"""Signed notes: what others have signed is read, what was changed is refused, and nothing hostile gets through."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.notes import (
    Checkpoint,
    Growth,
    NoteError,
    Proof,
    Signer,
    Verifier,
    open_checkpoint,
    open_note,
    read_checkpoint,
)

SIGNER = Signer("airlock-test", bytes(range(32)))
OTHER = Signer("airlock-test", bytes(32))
HEAD = Checkpoint("airlock-test/tenants/acme", 20852163, bytes(range(100, 132)))


def test_a_note_that_another_implementation_signed():
    """The example of golang.org/x/mod/sumdb/note, with the key of its documentation."""
    verifier = Verifier.read("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    signature = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    note = f"{text}\n\u2014 PeterNeumann {signature}\n"
    assert open_note(note, verifier) == text
    assert str(verifier).startswith("PeterNeumann+c74f20a3+")


def test_a_checkpoint_there_and_back():
    assert open_checkpoint(SIGNER.sign(HEAD.text()), SIGNER.verifier) == HEAD
    assert Verifier.read(str(SIGNER.verifier)) == SIGNER.verifier


def test_signatures_of_others_are_passed_over():
    note = SIGNER.sign(HEAD.text())
    witness = Signer("witness.example", bytes(range(1, 33))).sign(HEAD.text()).rpartition("\n\n")[2]
    assert open_checkpoint(note + witness, SIGNER.verifier) == HEAD
    with pytest.raises(NoteError, match="not signed by airlock-test"):
        open_note(note, OTHER.verifier)


@given(st.data())
def test_a_note_with_one_character_changed_is_refused(data: st.DataObject):
    note = SIGNER.sign(HEAD.text())
    at = data.draw(st.integers(0, len(note) - 1))
    other = data.draw(st.characters(exclude_characters=note[at]))
    with pytest.raises(NoteError):
        open_checkpoint(note[:at] + other + note[at + 1 :], SIGNER.verifier)


@given(st.text() | st.text("\u2014 +airlock-tesA=\n0123456789"))
def test_hostile_texts_are_refused_in_one_line(text: str):
    for read in (
        lambda: open_note(text, SIGNER.verifier),
        lambda: Verifier.read(text),
        lambda: Proof.read(text),
        lambda: Growth.read(text),
        lambda: Proof.read("c2sp.org/tlog-proof@v1\nindex " + text),
    ):
        with pytest.raises(NoteError) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["", "-1", "01", "1e3", "\u0661", "9" * 20, "1_0"])
def test_sizes_that_are_none(size: str):
    with pytest.raises(NoteError):
        read_checkpoint(f"origin\n{size}\n{base64.b64encode(bytes(32)).decode()}\n")


def test_a_key_whose_id_is_another_ones_is_refused():
    name, digits, key = str(SIGNER.verifier).split("+", 2)
    with pytest.raises(NoteError, match="cut or changed"):
        Verifier.read(f"{name}x+{digits}+{key}")


def test_a_growth_there_and_back():
    """As the example of C2SP tlog-witness is written."""
    growth = Growth(7, [bytes(32), bytes(range(32))], SIGNER.sign(HEAD.text()))
    assert growth.text().startswith(f"old 7\n{'A' * 43}=\nAAEC")
    assert Growth.read(growth.text()) == growth
    alone = replace(growth, path=[])
    assert alone.text().startswith("old 7\n\n")
    assert Growth.read(alone.text()) == alone
    for other in ("7", "old", "new 7", "old 07", "old 7\nAAAA", "old -1", "old  7", ""):
        with pytest.raises(NoteError):
            Growth.read(f"{other}\n\n{growth.note}")


def test_a_proof_there_and_back():
    proof = Proof(7, [bytes(32), bytes(range(32))], SIGNER.sign(HEAD.text()))
    assert Proof.read(proof.text()) == proof
    one, rest = proof.text().split("\n", 1)
    assert Proof.read(f"{one}\nextra AAAA\n{rest}") == replace(proof, extra=bytes(3))
    with_entry = replace(proof, extra=b"{}")
    assert Proof.read(with_entry.text()) == with_entry
    alone = Proof(0, [], proof.note)
    assert Proof.read(alone.text()) == alone
