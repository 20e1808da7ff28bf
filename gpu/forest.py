"""Many tensors at once on a device: row digests in one launch, and a launch for each level of all their trees.

Bit for bit what gpu/hashing.py makes of the same rows; only digests travel to the host.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.blake3 import CHUNK, DIGEST
from gpu.device import Device, Memory
from gpu.hashing import Levels
from gpu.resident import Resident, Segment
from proof.digest import KEYS, Tag, tagged

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
RowIds = npt.NDArray[np.int64]

THREADS = 128
CROWD = 256  # chunks that keep a block's threads busy twice over; kernels/rows.cu has room for twice as many


def row_digests(residents: Sequence[Resident]) -> list[Bytes]:
    """Digests (rows, 32) of each tensor, all on one device."""
    if not residents:
        return []
    device, sizes = residents[0].device, [resident.rows for resident in residents]
    starts = [0, *accumulate(sizes)]
    leaves = device.empty((starts[-1], DIGEST), np.uint8)
    digest(device, _segments(residents, starts), leaves)
    found = device.numpy(leaves)
    return [found[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def plant(residents: Sequence[Resident]) -> list[Levels]:
    """The tree over the rows of each tensor, all on one device, as gpu/hashing.py has them."""
    if not residents:
        return []
    device, sizes = residents[0].device, [resident.rows for resident in residents]
    starts = tree_starts(sizes)
    nodes = device.empty((starts[-1], DIGEST), np.uint8)
    digest(device, _segments(residents, starts), nodes)
    return grow(device, sizes, nodes)


def digest(device: Device, segments: Sequence[tuple[Segment, int]], leaves: Memory) -> None:
    """Write the digests of rows to `leaves` (n, 32); with each segment goes the leaf at which its tensor begins."""
    held = [(segment, first) for segment, first in segments if segment.rows]
    if not held:
        return
    table, blocks = _table(held)
    device.launch(
        *("rows", "digest_rows", blocks, THREADS),
        *(device.array(table), np.int32(len(table)), _key(device, Tag.ROW), leaves),
    )


def tree_starts(sizes: Sequence[int]) -> list[int]:
    """Where in one buffer the nodes of each tree begin, leaves first, and where the last one ends."""
    starts: list[int] = np.concatenate([[0], sum(_levels(sizes), np.zeros(len(sizes), np.int64)).cumsum()]).tolist()
    return starts


def grow(device: Device, sizes: Sequence[int], nodes: Memory) -> list[Levels]:
    """Hash the levels above the leaves of every tree of a buffer that `tree_starts` lays out, and fetch them all."""
    starts = tree_starts(sizes)
    key, children = _key(device, Tag.NODE), np.array(starts[:-1], np.int64)
    levels = list(_levels(sizes))
    for count, above in pairwise(levels):
        parents = children + count
        lines = np.stack([above.cumsum() - above, children, count, parents], axis=1)[above > 0]
        total = int(above.sum())
        device.launch(
            *("tree", "grow_level", -(-total // THREADS), THREADS),
            *(device.array(lines), np.int32(len(lines)), np.int64(total), key, nodes),
        )
        children = np.where(above > 0, parents, children)
    found = device.numpy(nodes)
    heights = np.array(levels).T.tolist()
    return [list(_cut(found, *tree)) for tree in zip(starts, heights, strict=False)]


def _levels(sizes: Sequence[int]) -> Iterator[RowIds]:
    """How many nodes each tree has on a level, leaves first; 0 above its root."""
    count = np.array(sizes, np.int64)
    yield count
    while (count > 1).any():
        count = np.where(count > 1, (count + 1) // 2, 0)
        yield count


def _cut(nodes: Bytes, start: int, sizes: list[int]) -> Iterator[Bytes]:
    if not sizes[0]:
        yield np.frombuffer(tagged(Tag.NODE, b""), np.uint8).reshape(1, DIGEST)
    for size in filter(None, sizes):
        yield nodes[start : start + size]
        start += size


def _segments(residents: Sequence[Resident], starts: Sequence[int]) -> list[tuple[Segment, int]]:
    return [
        (segment, start) for resident, start in zip(residents, starts, strict=False) for segment in resident.segments
    ]


def _table(segments: Sequence[tuple[Segment, int]]) -> tuple[Array, int]:
    """What kernels/rows.cu is told of each segment, and how many blocks of threads they take together."""
    own = [(s.address, *s.dims, *s.strides, s.width, first + s.first, *s.places, 0, 0, 0, 0) for s, first in segments]
    table = np.array(own, np.int64)
    rows, chunks = table[:, 1:4].prod(axis=1), np.maximum(-(-table[:, 7] // CHUNK), 1)
    if rows.max() >= 2**31:
        raise ValueError(f"a segment of {rows.max()} rows")
    a_block = np.maximum(CROWD // chunks, 1)
    ends = (-(-rows // a_block)).cumsum()
    table[1:, 12], table[:, 13] = ends[:-1], a_block
    table[:, 4:7][table[:, 1:4] == 1] = 0  # what nothing is multiplied by may not count as misaligned
    return table, int(ends[-1])


def _key(device: Device, tag: Tag) -> Memory:
    return device.array(np.frombuffer(KEYS[tag], np.uint32))
