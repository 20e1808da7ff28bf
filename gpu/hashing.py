"""Row digests and the Merkle trees over them, fast: bit for bit what proof/digest.py and proof/merkle.py define.

A tensor of shape (..., c) is a list of rows of c elements in C order. Digests are uint8 arrays (n, 32).
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from gpu.blake3 import DIGEST, LANES, climb, digest_levels, digest_rows, siblings_of
from proof.digest import KEYS, Tag, tagged
from proof.errors import Reason, Rejected

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]
Levels = list[Bytes]  # leaves first, root last

SHARE = 1 << 20  # bytes from which a thread of its own pays
WIDE = 1 << 13  # bytes from which the blake3 package hashes one row faster than a lane does

_WORDS = {tag: np.repeat(np.frombuffer(KEYS[tag], np.uint32), LANES).reshape(-1, LANES) for tag in (Tag.ROW, Tag.NODE)}


def row_digests(array: npt.NDArray[np.generic]) -> Bytes:
    digests = np.empty((_rows(array), DIGEST), np.uint8)
    _digest(Tag.ROW, array, digests)
    return digests


def levels(digests: Bytes) -> Levels:
    """The tree over leaf digests. Without leaves it has one level, the root of the empty tree."""
    nodes = _room(len(digests))
    nodes[: len(digests)] = digests
    return _grow(nodes, len(digests))


def tensor_levels(array: npt.NDArray[np.generic]) -> Levels:
    rows = _rows(array)
    nodes = _room(rows)
    _digest(Tag.ROW, array, nodes[:rows])
    return _grow(nodes, rows)


def root(levels: Levels) -> bytes:
    return bytes(levels[-1])


def multiproof(levels: Levels, index: Places) -> Bytes:
    """The siblings that lead from leaves `index` (sorted, unique) to the root, in the order of proof/merkle.py."""
    size = len(levels[0])
    if len(index) and not 0 <= index[0] <= index[-1] < size:
        raise IndexError(f"leaves outside a tree of {size}")
    places = np.empty(len(index) * len(levels), np.int64)
    taken = siblings_of(size, index.astype(np.int64), places)
    siblings = np.empty((taken.sum(), DIGEST), np.uint8)
    start = 0
    for level, count in zip(levels, taken.tolist(), strict=False):
        siblings[start : start + count] = level[places[start : start + count]]
        start += count
    return siblings


def multiproof_root(size: int, index: Places, digests: Bytes, siblings: Bytes) -> bytes:
    """The root that leaf `digests`, at `index` (sorted, unique) of `size` leaves, and `siblings` lead to.

    Raises Rejected(OPENING) where the counts do not fit.
    """
    if digests.shape != (len(index), DIGEST) or siblings.shape != (len(siblings), DIGEST):
        raise Rejected(Reason.OPENING, f"{digests.shape} leaves and {siblings.shape} siblings for {len(index)} indices")
    if not len(index):
        if size or len(siblings):
            raise Rejected(Reason.OPENING, f"nothing is opened of a tree of {size}")
        return tagged(Tag.NODE, b"")
    nodes = np.array(digests, np.uint8, order="C")
    pairs = np.empty((len(index), 2 * DIGEST), np.uint8)
    used = climb(size, index.astype(np.int64), nodes, _frozen(siblings), pairs, _WORDS[Tag.NODE])
    if used < 0:
        raise Rejected(Reason.OPENING, f"indices are not sorted, unique and inside a tree of {size}")
    if used != len(siblings):
        raise Rejected(Reason.OPENING, f"{len(siblings)} siblings, not {used}")
    return bytes(nodes[0])


def _rows(array: npt.NDArray[np.generic]) -> int:
    return math.prod(array.shape[:-1])


def _room(size: int) -> Bytes:
    """An array for all nodes of the tree over `size` leaves."""
    total = size
    while size > 1:
        size = (size + 1) // 2
        total += size
    return np.empty((total, DIGEST), np.uint8)


def _grow(nodes: Bytes, size: int) -> Levels:
    """Hash the levels above the first `size` nodes; they are views of `nodes`."""
    if not size:
        return [np.frombuffer(tagged(Tag.NODE, b""), np.uint8).reshape(1, DIGEST)]
    levels, start = [nodes[:size]], 0
    while size > SHARE // DIGEST:
        above = nodes[start + size : start + size + (size + 1) // 2]
        _digest(Tag.NODE, levels[-1][: size & ~1], above[: size // 2])
        above[size // 2 :] = levels[-1][size & ~1 :]
        start, size = start + size, len(above)
        levels.append(above)
    digest_levels(nodes[start:], size, _WORDS[Tag.NODE])
    while size > 1:
        start, size = start + size, (size + 1) // 2
        levels.append(nodes[start : start + size])
    return levels


def _frozen(array: npt.NDArray[np.generic]) -> Bytes:
    """The bytes of `array`, C-contiguous and read-only: one type, for which kernels are compiled once."""
    data = np.ascontiguousarray(array).view(np.ndarray).view(np.uint8)
    data.flags.writeable = False
    return data


def _digest(tag: Tag, array: npt.NDArray[np.generic], out: Bytes) -> None:
    """Digest each of the len(out) equal parts of the bytes of `array`."""
    data, rows = _frozen(array.reshape(-1)), len(out)
    width = data.size // max(rows, 1)
    threads = numba.get_num_threads() if data.size >= 2 * SHARE else 1
    in_lanes = rows if width < WIDE else rows - rows % LANES
    for row in range(in_lanes, rows):
        message = data[row * width : (row + 1) * width].data
        out[row] = np.frombuffer(blake3(message, key=KEYS[tag], max_threads=threads).digest(), np.uint8)

    step = rows if threads == 1 else max(SHARE // max(width, 1), rows // (4 * threads)) // LANES * LANES + LANES

    def lanes(first: int) -> None:
        digest_rows(data, width, first, min(first + step, in_lanes), _WORDS[tag], out)

    if in_lanes <= step:
        lanes(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lanes, range(0, in_lanes, step)))
