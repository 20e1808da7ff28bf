"""Merkle trees against published vectors, the RFC's own recursion, and every way to lie."""

import json
from base64 import b64decode
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proof import merkle
from proof.errors import Reason, Rejected
from proof.merkle import BLAKE3, SHA256

VECTORS = Path(__file__).parents[3] / "shared/vectors/merkle"
published = pytest.mark.skipif(not VECTORS.is_dir(), reason=f"published vectors are not at {VECTORS}")

# Entries and roots of the certificate-transparency reference tests.
SPANS = [(0, 0), (0, 1), (0x10, 1), (0x20, 2), (0x30, 2), (0x40, 4), (0x50, 8), (0x60, 16)]
ENTRIES = [bytes(range(first, first + size)) for first, size in SPANS]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}
HASHES = st.sampled_from([SHA256, BLAKE3])
LEAVES = st.lists(st.binary(max_size=8).map(BLAKE3.leaf), min_size=1, max_size=70, unique=True)
SEVERAL = LEAVES.filter(lambda leaves: len(leaves) > 1)


def vectors(kind):
    return sorted((VECTORS / kind).rglob("*.json")) or [None]


def identify(path):
    return path and "-".join(path.parts[-2:])


def recursive_root(tree_hash, leaves):
    """MTH as section 2.1.1 writes it."""
    if len(leaves) < 2:
        return leaves[0] if leaves else tree_hash.empty
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return tree_hash.node(recursive_root(tree_hash, leaves[:k]), recursive_root(tree_hash, leaves[k:]))


def recursive_proof(tree_hash, m, leaves, complete=True):
    """SUBPROOF as section 2.1.4.1 writes it."""
    if m == len(leaves):
        return [] if complete else [recursive_root(tree_hash, leaves)]
    k = 1 << (len(leaves) - 1).bit_length() - 1
    if m <= k:
        return [*recursive_proof(tree_hash, m, leaves[:k], complete), recursive_root(tree_hash, leaves[k:])]
    return [*recursive_proof(tree_hash, m - k, leaves[k:], False), recursive_root(tree_hash, leaves[:k])]


def opens(want_error):
    return pytest.raises(Rejected) if want_error else nullcontext()


def subset(data, size):
    return sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))


@published
@pytest.mark.parametrize("path", vectors("inclusion"), ids=identify)
def test_inclusion_as_published(path):
    case = json.loads(path.read_text())
    root, leaf = b64decode(case["root"]), b64decode(case["leafHash"])
    siblings = [b64decode(node) for node in case["proof"] or []]
    with opens(case["wantErr"]):
        merkle.verify_inclusion(SHA256, root, case["treeSize"], case["leafIdx"], leaf, siblings)


@published
@pytest.mark.parametrize("path", vectors("consistency"), ids=identify)
def test_consistency_as_published(path):
    case = json.loads(path.read_text())
    root1, root2 = b64decode(case["root1"]), b64decode(case["root2"])
    nodes = [b64decode(node) for node in case["proof"] or []]
    with opens(case["wantErr"]):
        merkle.verify_consistency(SHA256, case["size1"], root1, case["size2"], root2, nodes)


@pytest.mark.parametrize("size", ROOTS)
def test_root_is_the_published_one(size):
    leaves = [SHA256.leaf(entry) for entry in ENTRIES[:size]]
    assert merkle.root_hash(merkle.build(SHA256, leaves)).hex() == ROOTS[size]


def test_leaves_and_nodes_are_hashed_apart():
    for tree_hash in (SHA256, BLAKE3):
        assert tree_hash.leaf(bytes(64)) != tree_hash.node(bytes(32), bytes(32))
    assert SHA256.leaf(b"entry") == sha256(b"\0entry").digest()


@given(HASHES, LEAVES)
def test_root_is_the_recursive_one(tree_hash, leaves):
    assert merkle.root_hash(merkle.build(tree_hash, leaves)) == recursive_root(tree_hash, leaves)


@given(HASHES, LEAVES, st.data())
def test_every_leaf_opens(tree_hash, leaves, data):
    tree, index = merkle.build(tree_hash, leaves), data.draw(st.integers(0, len(leaves) - 1))
    path = merkle.inclusion_path(tree, index)
    merkle.verify_inclusion(tree_hash, merkle.root_hash(tree), len(leaves), index, leaves[index], path)


@given(HASHES, LEAVES, st.data())
def test_every_prefix_is_consistent(tree_hash, leaves, data):
    size = data.draw(st.integers(1, len(leaves)))
    small, large = merkle.build(tree_hash, leaves[:size]), merkle.build(tree_hash, leaves)
    path = merkle.consistency_path(large, size)
    assert path == recursive_proof(tree_hash, size, leaves)
    merkle.verify_consistency(tree_hash, size, merkle.root_hash(small), len(leaves), merkle.root_hash(large), path)


@given(HASHES, LEAVES, st.data())
def test_every_subset_opens_at_once(tree_hash, leaves, data):
    tree, indices = merkle.build(tree_hash, leaves), subset(data, len(leaves))
    opened, siblings = [leaves[index] for index in indices], merkle.multiproof(tree, indices)
    root = merkle.multiproof_root(tree_hash, len(leaves), indices, opened, siblings)
    assert root == merkle.root_hash(tree)
    assert len(siblings) <= sum(len(merkle.inclusion_path(tree, index)) for index in indices)


@given(LEAVES, st.data())
def test_one_opened_leaf_has_its_inclusion_path(leaves, data):
    tree, index = merkle.build(BLAKE3, leaves), data.draw(st.integers(0, len(leaves) - 1))
    assert merkle.multiproof(tree, [index]) == merkle.inclusion_path(tree, index)


@given(LEAVES)
def test_all_leaves_need_no_sibling(leaves):
    assert merkle.multiproof(merkle.build(BLAKE3, leaves), range(len(leaves))) == []


def test_an_empty_tree_opens_to_the_empty_root():
    assert merkle.multiproof_root(BLAKE3, 0, [], [], []) == BLAKE3.empty
    assert merkle.root_hash(merkle.build(BLAKE3, [])) == BLAKE3.empty


def test_a_leaf_outside_the_tree_is_a_bug_of_the_caller():
    tree = merkle.build(BLAKE3, [bytes(32)] * 3)
    for wrong in (
        lambda: merkle.inclusion_path(tree, 3),
        lambda: merkle.multiproof(tree, [1, 3]),
        lambda: merkle.consistency_path(tree, 4),
        lambda: merkle.consistency_path(tree, 0),
    ):
        with pytest.raises(IndexError):
            wrong()


INCLUSION_LIES = {
    "another leaf hash": lambda c: c | {"leaf": bytes(32)},
    "another root": lambda c: c | {"root": bytes(32)},
    "another leaf": lambda c: c | {"index": (c["index"] + 1) % c["size"]},
    "outside the tree": lambda c: c | {"index": c["size"]},
    "negative leaf": lambda c: c | {"index": -1},
    "a sibling too many": lambda c: c | {"path": [*c["path"], bytes(32)]},
    "a sibling too few": lambda c: c | {"path": c["path"][:-1]},
    "another sibling": lambda c: c | {"path": [bytes(32), *c["path"][1:]]},
    "another hash": lambda c: c | {"tree_hash": SHA256},
    "a byte moved from the sibling to the leaf": lambda c: (
        c | {"leaf": c["leaf"] + c["path"][0][:1], "path": [c["path"][0][1:], *c["path"][1:]]}
    ),
}
CONSISTENCY_LIES = {
    "another old root": lambda c: c | {"root1": bytes(32)},
    "another new root": lambda c: c | {"root2": bytes(32)},
    "swapped roots": lambda c: c | {"root1": c["root2"], "root2": c["root1"]},
    "of no leaves": lambda c: c | {"size1": 0},
    "shrunk": lambda c: c | {"size1": c["size2"] + 1},
    "a node too many": lambda c: c | {"path": [*c["path"], bytes(32)]},
    "a node too few": lambda c: c | {"path": c["path"][:-1]},
    "another node": lambda c: c | {"path": [*c["path"][:-1], bytes(32)]},
    "another hash": lambda c: c | {"tree_hash": SHA256},
}
COUNT_LIES = {
    "a sibling too many": lambda c: c | {"siblings": [*c["siblings"], bytes(32)]},
    "a sibling too few": lambda c: c | {"siblings": c["siblings"][:-1]},
    "a leaf too many": lambda c: c | {"leaves": [*c["leaves"], bytes(32)]},
    "a leaf too few": lambda c: c | {"leaves": c["leaves"][:-1]},
    "a leaf twice": lambda c: c | {"indices": c["indices"] * 2, "leaves": c["leaves"] * 2},
    "nothing opened": lambda c: c | {"indices": [], "leaves": []},
    "outside the tree": lambda c: c | {"indices": [*c["indices"][:-1], c["size"]]},
    "negative leaf": lambda c: c | {"indices": [-1, *c["indices"][1:]]},
}
VALUE_LIES = {
    "another leaf": lambda c: c | {"leaves": [bytes(32), *c["leaves"][1:]]},
    "another sibling": lambda c: c | {"siblings": [*c["siblings"][:-1], bytes(32)]},
    "another hash": lambda c: c | {"tree_hash": SHA256},
}


@pytest.mark.parametrize("lie", INCLUSION_LIES.values(), ids=INCLUSION_LIES.keys())
@given(leaves=SEVERAL, data=st.data())
def test_no_lie_about_a_leaf_opens(lie, leaves, data):
    tree, index = merkle.build(BLAKE3, leaves), data.draw(st.integers(0, len(leaves) - 1))
    claim = {
        "tree_hash": BLAKE3,
        "root": merkle.root_hash(tree),
        "size": len(leaves),
        "index": index,
        "leaf": leaves[index],
        "path": merkle.inclusion_path(tree, index),
    }
    with pytest.raises(Rejected) as rejection:
        merkle.verify_inclusion(**lie(claim))
    assert rejection.value.reason is Reason.OPENING


@pytest.mark.parametrize("lie", CONSISTENCY_LIES.values(), ids=CONSISTENCY_LIES.keys())
@given(leaves=SEVERAL, data=st.data())
def test_no_lie_about_a_prefix_is_consistent(lie, leaves, data):
    size = data.draw(st.integers(1, len(leaves) - 1))
    tree = merkle.build(BLAKE3, leaves)
    claim = {
        "tree_hash": BLAKE3,
        "size1": size,
        "root1": merkle.root_hash(merkle.build(BLAKE3, leaves[:size])),
        "size2": len(leaves),
        "root2": merkle.root_hash(tree),
        "path": merkle.consistency_path(tree, size),
    }
    with pytest.raises(Rejected) as rejection:
        merkle.verify_consistency(**lie(claim))
    assert rejection.value.reason is Reason.OPENING


def opened(leaves, data):
    """A multiproof with a sibling at least: of some leaves, not of all."""
    size = len(leaves)
    indices = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1)))
    tree = merkle.build(BLAKE3, leaves)
    return merkle.root_hash(tree), {
        "tree_hash": BLAKE3,
        "size": size,
        "indices": indices,
        "leaves": [leaves[index] for index in indices],
        "siblings": merkle.multiproof(tree, indices),
    }


@pytest.mark.parametrize("lie", COUNT_LIES.values(), ids=COUNT_LIES.keys())
@given(leaves=SEVERAL, data=st.data())
def test_no_wrong_count_opens(lie, leaves, data):
    _, claim = opened(leaves, data)
    with pytest.raises(Rejected) as rejection:
        merkle.multiproof_root(**lie(claim))
    assert rejection.value.reason is Reason.OPENING


@pytest.mark.parametrize("lie", VALUE_LIES.values(), ids=VALUE_LIES.keys())
@given(leaves=SEVERAL, data=st.data())
def test_no_wrong_value_leads_to_the_root(lie, leaves, data):
    root, claim = opened(leaves, data)
    assert merkle.multiproof_root(**lie(claim)) != root
