"""Trees in tiles, held to another implementation of RFC 6962, to its published vectors, and to tampering."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from orchestrator.core import merkle
from orchestrator.core.merkle import EMPTY, HASH, WIDTH, Tree, goes_on, includes, leaf_hash, path, widths

MOST = 700  # entries: three tiles of level 0, the last one narrower


def entry(number: int) -> bytes:
    return f"entry {number}".encode()


def tiles(entries: Sequence[bytes]) -> merkle.Tiles:
    """Every tile of a tree over `entries`, made in the plainest way."""
    made: dict[tuple[int, int], bytes] = {}
    level, hashes = 0, [leaf_hash(entry) for entry in entries]
    while hashes:
        for n in range(0, len(hashes), WIDTH):
            made[level, n // WIDTH] = b"".join(hashes[n : n + WIDTH])
        full = [made[level, n] for n in range(len(hashes) // WIDTH)]
        level, hashes = level + 1, [merkle.whole(tile) for tile in full]

    def tile(level: int, n: int, width: int) -> bytes:
        assert len(made[level, n]) >= width * HASH, "a tile that is not there was asked for"
        return made[level, n]

    return tile


@cache
def tree() -> Tree:
    return Tree(tiles([entry(number) for number in range(MOST)]), MOST)


@cache
def oracle() -> InmemoryTree:
    other = InmemoryTree(algorithm="sha256")
    for number in range(MOST):
        other.append_entry(entry(number))
    return other


sizes = st.integers(1, MOST)


@given(sizes)
def test_roots_are_those_of_another_implementation(size: int):
    assert tree().root(size) == oracle().get_root(size)


@given(sizes, sizes)
def test_proofs_are_accepted_by_another_implementation_and_its_proofs_here(size: int, index: int):
    assume(index < size)
    root = tree().root(size)
    proof = tree().inclusion(index, size)
    theirs = oracle().prove_inclusion(index + 1, size)
    # Its path begins with the entry's own hash.
    assert proof == [bytes.fromhex(step) for step in theirs.serialize()["path"][1:]]
    assert includes(leaf_hash(entry(index)), index, size, proof, root)


@given(sizes, sizes)
def test_a_tree_goes_on_from_what_it_was(old: int, size: int):
    assume(old <= size)
    proof = tree().consistency(old, size)
    assert goes_on(old, tree().root(old), size, tree().root(size), proof)


def test_vectors_of_certificate_transparency():
    """Those of the reference implementation of RFC 6962 (certificate-transparency, merkle_tree_test)."""
    entries = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    eight = Tree(tiles([bytes.fromhex(text) for text in entries]), 8)
    assert Tree(tiles([]), 0).root() == EMPTY
    assert eight.root(1).hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert eight.root(3).hex() == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert eight.root(8).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    assert [step.hex()[:8] for step in eight.inclusion(5)] == ["bc1a0643", "ca854ea1", "d37ee418"]
    assert [step.hex()[:8] for step in eight.consistency(6)] == ["0ebc5d34", "ca854ea1", "d37ee418"]


@given(sizes, sizes, st.integers(0, 40), st.integers(0, 255))
def test_a_proof_with_one_bit_changed_shows_nothing(size: int, index: int, step: int, bit: int):
    assume(index < size)
    root, leaf = tree().root(size), leaf_hash(entry(index))
    proof = tree().inclusion(index, size)
    assume(step < len(proof))
    wrong = [*proof]
    wrong[step] = flipped(proof[step], bit)
    assert not includes(leaf, index, size, wrong, root)
    assert not includes(flipped(leaf, bit), index, size, proof, root)
    assert not includes(leaf, index, size, proof, flipped(root, bit))
    assert not includes(leaf, index, size, proof[:-1], root)
    assert not includes(leaf, index, size, [*proof, EMPTY], root)


@given(sizes, sizes, st.integers(0, 40), st.integers(0, 255))
def test_a_fork_does_not_go_on_from_what_it_was(old: int, size: int, step: int, bit: int):
    assume(old < size)
    before, after = tree().root(old), tree().root(size)
    proof = tree().consistency(old, size)
    assert not goes_on(old, flipped(before, bit), size, after, proof)
    assert not goes_on(old, before, size, flipped(after, bit), proof)
    assert not goes_on(size, after, old, before, proof)
    assert not goes_on(old, before, size, after, [*proof, EMPTY])
    if step < len(proof):
        assert not goes_on(old, before, size, after, [*proof[:step], flipped(proof[step], bit), *proof[step + 1 :]])


@given(st.integers(-1, 9), st.integers(-1, 9), st.lists(st.binary(min_size=32, max_size=32), max_size=5))
def test_made_up_proofs_show_nothing(old: int, size: int, proof: list[bytes]):
    root = hashlib.sha256(b"no tree").digest()
    assert not includes(leaf_hash(b""), old, size, proof, root)
    assert goes_on(old, root, size, root, proof) == (old == size and not proof)


def test_the_empty_tree_is_what_every_tree_goes_on_from():
    assert goes_on(0, EMPTY, 5, tree().root(5), [])
    assert not goes_on(0, tree().root(5), 5, tree().root(5), [])


def test_what_a_tree_does_not_have_is_not_proved():
    with pytest.raises(ValueError, match="700 entries"):
        tree().root(MOST + 1)
    with pytest.raises(ValueError, match="700 entries"):
        tree().inclusion(MOST)
    with pytest.raises(ValueError, match="700 entries"):
        tree().consistency(0)


def test_names_of_tiles():
    """The examples of C2SP tlog-tiles."""
    assert path(0, 1234067) == "tile/0/x001/x234/067"
    assert path("entries", 1234067, 8) == "tile/entries/x001/x234/067.p/8"
    every = list(widths(70_000))
    assert [tile for tile in every if tile[2] != WIDTH] == [(0, 273, 112), (1, 1, 17), (2, 0, 1)]
    assert sum(tile[0] == 0 for tile in every) == 274
    assert list(widths(256)) == [(0, 0, WIDTH), (1, 0, 1)]
    assert list(widths(0)) == []


def flipped(digest: bytes, bit: int) -> bytes:
    return (int.from_bytes(digest, "big") ^ (1 << bit)).to_bytes(32, "big")
