"""Attention on a device: rows of query heads again, those together that read the same keys and values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from gpu.clearing.operands import SUFFIX
from gpu.clearing.stand import Stand
from gpu.device import Device, Memory, Scalar
from gpu.kernels.attention_radius import Bounds
from gpu.ops.call import Call

LEAST = 2**18  # multiplications, below which the launches cost more than they save
PAIRS = 2**23  # of a row and a key that are weighed at one time, in 16 bytes each
MOST_KEYS = 2**20
MOST_ROWS = 2**15  # at one time: a grid is no higher than 2^16
ROWS, KEYS, COLUMNS, THREADS = 8, 128, 64, 128  # of a tile; of a block
BLOCKS, SPLITS = 512, 64  # that keep a device busy; parts of the keys where tiles are too few

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Query rows of one head; `q`, `y`, `k`, `v`, `mask` count elements of what is at hand."""

    q: Ints  # where each begins
    y: Ints  # where its claim begins
    mask: Ints  # where its row of the mask begins
    limits: Ints  # keys that it may see, from the first on; a mask may hide more
    k: int
    v: int
    visible: int  # keys that one of them may see
    bounds: Bounds


@dataclass(frozen=True)
class Tile:
    """At most 8 rows with the same keys and values."""

    rows: Ints  # (rows, 5) as kernels/attention.cu has them
    sums: npt.NDArray[np.float64]
    k: int
    v: int

    @property
    def keys(self) -> int:
        return int(self.rows[0, 3])


@dataclass(frozen=True)
class Operands:
    """What the kernels read, on the device."""

    q: Memory
    k: Memory
    v: Memory
    mask: Memory
    mask_kind: tuple[np.int64, np.int32]  # columns, 0 for none; whether it is of bool
    strides: tuple[np.int64, np.int64]  # elements from a key, a value to the next
    y: Memory
    kind: str  # of the kernels: bf16, f16, f32


def clear(call: Call, stand: Stand, mark: Memory, asked: Sequence[Asked], sizes: tuple[int, int]) -> bool:
    """Judge the claimed rows of output 0. `sizes`: elements of a key and of a value."""
    spec, q, k, v = call.site.outputs[0], *call.inputs[:3]
    mask = call.inputs[3] if len(call.inputs) > 3 else None
    if spec is None or q is None or k is None or v is None or spec.dtype not in SUFFIX:
        return False
    if {tensor.spec.dtype for tensor in (q, k, v)} != {spec.dtype}:
        return False
    boolean = mask is not None and mask.spec.dtype == np.bool_
    if mask is not None and not boolean and mask.spec.dtype != spec.dtype:
        return False
    work = sum(len(rows.q) * rows.visible for rows in asked) * sum(sizes)
    if work < max(1, LEAST) or max(rows.visible for rows in asked) > MOST_KEYS:
        return False
    operands = Operands(
        q=stand.hold(q),
        k=stand.hold(k),
        v=stand.hold(v),
        mask=stand.hold(mask or q),
        mask_kind=(np.int64(mask.spec.width if mask else 0), np.int32(boolean)),
        strides=(np.int64(k.spec.width), np.int64(v.spec.width)),
        y=stand.device.array(call.claimed[0]),
        kind=SUFFIX[spec.dtype],
    )
    for tiles in _rounds(_tiles(asked, whole=mask is not None and not boolean)):
        _judge(operands, tiles, sizes, asked[0].bounds, stand.device, mark)
    return True


def _tiles(asked: Sequence[Asked], whole: bool) -> Iterator[Tile]:
    """Rows that see about as many keys lie together; `whole`: each looks at all that are visible to one."""
    for (k, v), group in groupby(asked, lambda rows: (rows.k, rows.v)):
        heads = list(group)
        rows = np.concatenate([np.stack([h.q, h.y, h.limits, h.limits, h.mask], axis=1) for h in heads])
        sums = np.concatenate([np.full(len(h.q), h.bounds.sums) for h in heads])
        if whole:
            rows[:, 3] = max(h.visible for h in heads)
        order = np.argsort(rows[:, 3], kind="stable")
        for first in range(0, len(order), ROWS):
            own = rows[order[first : first + ROWS]]
            own[:, 3] = own[-1, 3]
            yield Tile(own, sums[order[first : first + ROWS]], k, v)


def _rounds(tiles: Iterator[Tile]) -> Iterator[list[Tile]]:
    """Tiles that are weighed at one time, a row of scratch being as long as the longest."""
    together: list[Tile] = []
    count, keys = 0, 0
    for tile in tiles:
        count, keys = count + len(tile.rows), max(keys, tile.keys)
        if together and (count * keys > PAIRS or count > MOST_ROWS):
            yield together
            together, count, keys = [], len(tile.rows), tile.keys
        together.append(tile)
    if together:
        yield together


def _judge(
    operands: Operands, tiles: list[Tile], sizes: tuple[int, int], may: Bounds, device: Device, mark: Memory
) -> None:
    """The six launches of kernels/attention.cu; the sums that `may` allows are the tiles' own."""
    counts = np.array([len(tile.rows) for tile in tiles])
    first = np.cumsum(counts) - counts
    table = np.stack([first, counts, [tile.k for tile in tiles], [tile.v for tile in tiles]], axis=1)
    at, rows = device.array(table), device.array(np.concatenate([tile.rows for tile in tiles]))
    sums = device.array(np.concatenate([tile.sums for tile in tiles]))
    count, blocks, columns = int(counts.sum()), -(-max(tile.keys for tile in tiles) // KEYS), -(-sizes[1] // COLUMNS)
    splits = max(1, min(blocks, BLOCKS // (len(tiles) * columns), SPLITS))
    d, width, stride = map(np.int64, (*sizes, blocks * KEYS))
    x, e = device.empty((2, count, blocks * KEYS), np.float64)
    tops, weights = device.empty((count, blocks), np.float64), device.empty((count, blocks, 4), np.float64)
    parts, moves = (device.empty((splits, kinds, count, sizes[1]), np.float64) for kinds in (2, 1))
    z, settled = device.empty((2, count, sizes[1]), np.float64), device.empty((count, 3), np.float64)

    def launch(kernel: str, grid: int | tuple[int, int], *args: Scalar) -> None:
        device.launch("attention", f"{kernel}_{operands.kind}", grid, THREADS, *args)

    launch(
        *("score_keys", (blocks, len(tiles)), operands.q, operands.k, operands.strides[0]),
        *(operands.mask, *operands.mask_kind, at, rows, d),
        *map(np.float64, (may.scale, may.softcap, may.product, may.score, may.cap)),
        *(stride, x, e, tops),
    )
    launch(
        *("weigh_keys", (blocks, count), x, e, stride, tops, rows, d),
        *map(np.float64, (may.product, may.exponent, may.exponential)),
        weights,
    )
    values = operands.v, operands.strides[1], at, rows, np.int64(count), width, np.int32(splits)
    launch("sum_values", (columns * splits, len(tiles)), x, stride, *values, parts)
    launch(
        "settle_rows", count, operands.q, d, rows, width, np.int64(blocks), weights, np.int32(splits), parts, z, settled
    )
    launch("move_values", (columns * splits, len(tiles)), e, stride, *values, z, moves)
    entries = min(BLOCKS, -(-count * sizes[1] // THREADS))
    launch(
        *("judge_attention", entries, z, settled, moves, np.int32(splits), rows, sums, np.int64(count), width),
        *(operands.y, mark),
    )
