"""Many rows of an integer product on a device: the exact test of gpu/freivalds.py (S6), in wrapping 64 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu import draws
from gpu.clearing.folds import enough_segments
from gpu.clearing.stand import Stand
from gpu.device import Device, Memory
from gpu.freivalds import FOLDS, folds_integers
from gpu.ops.call import Call, Tensor
from gpu.ops.matrices import Group, Layout, first_row

SUFFIX = {np.dtype(np.int8): "i8", np.dtype(np.uint8): "u8", np.dtype(np.int32): "i32"}
THREADS = 128
FOLD_THREADS, FOLD_ROWS, COLUMNS = 256, 128, 512  # of a block that folds rows; columns of one that goes down them

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """`count` rows of `width` integers; row i begins at first + at[i] stride, or i stride."""

    matrix: Memory
    dtype: np.dtype
    first: int
    stride: int
    count: int
    width: int
    at: Memory | None = None


def clear_products(
    call: Call,
    stand: Stand,
    mark: Memory,
    form: Layout,
    groups: Sequence[tuple[Group, tuple[Integers, Integers]]],
) -> bool:
    """Judge the claimed rows of MatMulInteger; with each group its zero points, (rows or 1, 1) and (1, n or 1).

    False where the reference recomputes a group, which takes no longer, and where sums may wrap.
    """
    left, right, claimed = call.inputs[form.left], call.inputs[form.right], call.claimed[0]
    if left is None or right is None or form.transposed_a or claimed.dtype != np.int32:
        return False
    k, n = form.a[-1], claimed.shape[1]
    if not all(folds_integers((len(group.at), k, n), call.policy) for group, _ in groups):
        return False
    for group, zeros in groups:
        x = Rows(stand.hold(left), left.data.dtype, 0, k, len(group.at), k, stand.places(left, group.x))
        r = draws.words31(stand.device, call.draw, f"{group.left}/{group.right}/words", (FOLDS, n))
        u = fold_matrix(stand.device, _matrix(stand, right, form, group), r, form.transposed_b)
        judge(stand.device, mark, x, claimed[group.at], zeros, r, u)
    return True


def judge(
    device: Device, mark: Memory, x: Rows, y: npt.NDArray[Any], zeros: tuple[Integers, Integers], r: Memory, u: Memory
) -> None:
    """Judge y (m, n) int32 against x, for vectors r (2, n) int64 that w folds to u (2, k) with."""
    (m, n), k = y.shape, x.width
    zero = Rows(device.array(np.broadcast_to(zeros[1], (1, n)).astype(np.int32)), np.dtype(np.int32), 0, n, 1, n)
    sums = device.zeros(FOLDS, np.uint64)
    shift = fold_rows(device, zero, r)
    device.launch("ring", "ring_factor", -(-k // THREADS), THREADS, u, shift, np.int64(k), sums)
    left = fold_rows(device, x, u, wide=True)
    right = fold_rows(device, Rows(device.array(y), y.dtype, 0, n, m, n), r)
    offsets = device.array(zeros[0].reshape(-1).astype(np.int64))
    device.launch(
        *("ring", "judge_ring", -(-m // THREADS), THREADS, left, right, sums, offsets),
        *(np.int64(len(zeros[0])), np.int64(m), np.int64(n), mark),
    )


def fold_rows(device: Device, rows: Rows, vectors: Memory, wide: bool = False) -> Memory:
    """(2, m) uint64: rows times vectors (2, n) int64, below 2^31 unless `wide`, modulo 2^64."""
    out = device.zeros((FOLDS, rows.count), np.uint64)
    blocks = -(-rows.count // FOLD_ROWS)
    kernel = f"ring_rows_{'wide_' if wide else ''}{SUFFIX[rows.dtype]}"
    at = device.empty(1, np.int64) if rows.at is None else rows.at
    device.launch(
        *("ring", kernel, (blocks, enough_segments(blocks, rows.width)), FOLD_THREADS),
        *(rows.matrix, at, np.int32(rows.at is not None)),
        *map(np.int64, (rows.first, rows.stride, rows.count, rows.width)),
        *(vectors, out),
    )
    return out


def fold_matrix(device: Device, rows: Rows, vectors: Memory, transposed: bool) -> Memory:
    """`fold_rows` of a matrix that is stored by rows, or, `transposed`, by columns: these then are the `rows`."""
    if not transposed:
        return fold_rows(device, rows, vectors)
    m, n = rows.width, rows.count
    out = device.zeros((FOLDS, m), np.uint64)
    blocks = -(-m // COLUMNS)
    device.launch(
        *("ring", f"ring_columns_{SUFFIX[rows.dtype]}", (blocks, enough_segments(blocks, n)), THREADS, rows.matrix),
        *map(np.int64, (rows.first, rows.stride, m, n)),
        *(vectors, out),
    )
    return out


def _matrix(stand: Stand, right: Tensor, form: Layout, group: Group) -> Rows:
    """The group's matrix as it is stored."""
    rows, width = form.b[-2:]
    first = first_row(right, group.right, rows) * width
    return Rows(stand.hold(right), right.data.dtype, first, width, rows, width)
