"""Merkle trees over leaf hashes: RFC 9162 section 2.1, for any hash.

A tree is the list of its levels, leaf hashes first and root last. A level of odd length
hands its last node up unchanged, which gives the root of the RFC's recursive definition.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import NamedTuple

from proof.digest import DIGEST_BYTES, Tag, tagged
from proof.errors import Reason, Rejected

Digest = bytes  # 32 bytes
Tree = list[list[Digest]]


class TreeHash(NamedTuple):
    """Leaves and nodes are hashed apart, so that no node passes for an entry."""

    leaf: Callable[[bytes], Digest]
    node: Callable[[Digest, Digest], Digest]
    empty: Digest  # the root of no leaves


SHA256 = TreeHash(
    leaf=lambda entry: sha256(b"\x00" + entry).digest(),
    node=lambda left, right: sha256(b"\x01" + left + right).digest(),
    empty=sha256().digest(),
)
BLAKE3 = TreeHash(
    leaf=lambda entry: tagged(Tag.ROW, entry),
    node=lambda left, right: tagged(Tag.NODE, left + right),
    empty=tagged(Tag.NODE, b""),
)


def build(tree_hash: TreeHash, leaves: Sequence[Digest]) -> Tree:
    """Return the tree over leaf hashes, in order. No leaves: one level, the root of the empty tree."""
    level = list(leaves) or [tree_hash.empty]
    tree = [level]
    while len(level) > 1:
        parents = [tree_hash.node(*pair) for pair in zip(level[::2], level[1::2], strict=False)]
        level = parents + level[2 * len(parents) :]
        tree.append(level)
    return tree


def root_hash(tree: Tree) -> Digest:
    return tree[-1][0]


def inclusion_path(tree: Tree, index: int) -> list[Digest]:
    """Return the siblings met from leaf `index` (counted from 0) up to the root."""
    if not 0 <= index < len(tree[0]):
        raise IndexError(f"no leaf {index} in a tree of {len(tree[0])}")
    path = []
    for level in tree[:-1]:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        index >>= 1
    return path


def verify_inclusion(
    tree_hash: TreeHash, root: Digest, size: int, index: int, leaf: Digest, path: Sequence[Digest]
) -> None:
    """Check that the hash `leaf` is leaf `index` of the tree of `size` leaves under `root`.

    Raises Rejected; there is no result that a caller could forget to read.
    """
    if not 0 <= index < size:
        raise Rejected(Reason.OPENING, f"leaf {index} is outside a tree of {size}")
    at, last = index, size - 1
    inner = (at ^ last).bit_length()  # below this level a sibling always exists
    expected = inner + (at >> inner).bit_count()
    if len(path) != expected:
        raise Rejected(Reason.OPENING, f"leaf {index}: {len(path)} siblings, not {expected}")
    _digests(leaf, *path)

    node, siblings = leaf, iter(path)
    while last:
        if at & 1:
            node = tree_hash.node(next(siblings), node)
        elif at < last:
            node = tree_hash.node(node, next(siblings))
        at, last = at >> 1, last >> 1
    if node != root:
        raise Rejected(Reason.OPENING, f"leaf {index} does not lead to {root.hex()}")


def consistency_path(tree: Tree, size: int) -> list[Digest]:
    """PROOF(size, D_n) of section 2.1.4.1: the nodes that show the first `size` leaves to be a prefix."""
    if not 0 < size <= len(tree[0]):
        raise IndexError(f"no tree of {size} leaves begins a tree of {len(tree[0])}")
    if size == len(tree[0]):
        return []
    low = (size & -size).bit_length() - 1  # the smaller tree ends with a full subtree of 2^low leaves
    at, last = size - 1 >> low, len(tree[0]) - 1 >> low
    path = [tree[low][at]] if at else []  # else it is the smaller tree's root
    for level in tree[low:-1]:
        if at & 1:
            path.append(level[at - 1])
        elif at < last:
            path.append(level[at + 1])
        at, last = at >> 1, last >> 1
    return path


def verify_consistency(
    tree_hash: TreeHash,
    size1: int,
    root1: Digest,
    size2: int,
    root2: Digest,
    path: Sequence[Digest],
) -> None:
    """Check that the tree `root1` of `size1` leaves begins the tree `root2` of `size2`. Raises Rejected.

    A tree of no leaves begins every tree, which says nothing; it is refused.
    """
    if not 0 < size1 <= size2:
        raise Rejected(Reason.OPENING, f"a tree of {size1} begins no tree of {size2}")
    low = (size1 & -size1).bit_length() - 1
    at, last = size1 - 1 >> low, size2 - 1 >> low
    inner = (at ^ last).bit_length()  # below this level the larger tree has a sibling of its own
    expected = 0 if size1 == size2 else inner + (at >> inner).bit_count() + (at > 0)
    if len(path) != expected:
        raise Rejected(Reason.OPENING, f"{len(path)} nodes, not {expected}")
    _digests(*path)

    siblings = iter(path)
    node1 = node2 = next(siblings) if at and path else root1
    while last and path:
        if at & 1:
            left = next(siblings)
            node1, node2 = tree_hash.node(left, node1), tree_hash.node(left, node2)
        elif at < last:
            node2 = tree_hash.node(node2, next(siblings))
        at, last = at >> 1, last >> 1
    if (node1, node2) != (root1, root2):
        raise Rejected(Reason.OPENING, f"{root1.hex()} does not begin {root2.hex()}")


def multiproof(tree: Tree, indices: Sequence[int]) -> list[Digest]:
    """Return the siblings that lead from leaves `indices` (sorted, unique) to the root.

    Level by level from the leaves up, left to right inside a level, without those that the opened
    leaves determine.
    """
    if indices and not 0 <= indices[0] <= indices[-1] < len(tree[0]):
        raise IndexError(f"leaves outside a tree of {len(tree[0])}")
    opened, siblings = list(indices), []
    for level in tree[:-1]:
        beside = {at ^ 1 for at in opened}.difference(opened)
        siblings += [level[at] for at in sorted(beside) if at < len(level)]
        opened = sorted({at >> 1 for at in opened})
    return siblings


def multiproof_root(
    tree_hash: TreeHash,
    size: int,
    indices: Sequence[int],
    leaves: Sequence[Digest],
    siblings: Sequence[Digest],
) -> Digest:
    """Return the root that hashes `leaves`, at `indices` (sorted, unique) of `size` leaves, lead to.

    Raises Rejected where the counts do not fit; the caller compares the root with the committed one.
    """
    if len(leaves) != len(indices) or list(indices) != sorted(set(indices)):
        raise Rejected(Reason.OPENING, f"{len(leaves)} leaves for {len(indices)} unique indices")
    if not indices and (size or siblings):
        raise Rejected(Reason.OPENING, f"nothing is opened of a tree of {size}")
    if indices and not 0 <= indices[0] <= indices[-1] < size:
        raise Rejected(Reason.OPENING, f"leaves outside a tree of {size}")
    _digests(*leaves, *siblings)

    nodes, rest = dict(zip(indices, leaves, strict=True)), list(reversed(siblings))
    while size > 1:
        parents: dict[int, Digest] = {}
        for at, node in nodes.items():
            if at ^ 1 >= size:
                parents[at >> 1] = node
            elif at >> 1 not in parents:
                if at ^ 1 not in nodes and not rest:
                    raise Rejected(Reason.OPENING, f"{len(siblings)} siblings are too few")
                sibling = nodes[at ^ 1] if at ^ 1 in nodes else rest.pop()
                pair = (sibling, node) if at & 1 else (node, sibling)
                parents[at >> 1] = tree_hash.node(*pair)
        nodes, size = parents, (size + 1) // 2
    if rest:
        raise Rejected(Reason.OPENING, f"{len(siblings)} siblings are {len(rest)} too many")
    return nodes.get(0, tree_hash.empty)


def _digests(*nodes: bytes) -> None:
    """A pair of nodes is hashed without its lengths, so each must have the one length. Raises Rejected."""
    if any(len(node) != DIGEST_BYTES for node in nodes):
        raise Rejected(Reason.OPENING, f"a node that is not of {DIGEST_BYTES} bytes")
