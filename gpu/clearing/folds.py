"""Many rows of a product on a device: T1 over all of them and T3 on entries, as gpu/freivalds.py has them."""

from dataclasses import dataclass

import numpy as np

from gpu import draws
from gpu.clearing.operands import Operands
from gpu.device import Device, Memory
from gpu.freivalds import PREFIXES, WIDEST_FOLD, coefficients, entry_count, quantile_of
from gpu.ops.call import Call
from gpu.rounding import FORMATS

S = 8  # vectors: the kernels are written for that many
THREADS = 128
FOLD_THREADS, FOLD_ROWS = 256, {"bf16": 128, "f16": 128, "f32": 64, "f64": 64}  # of a block that folds rows
COLUMNS, WARPS = 64, 4  # of a block that goes down columns; rows, or entries, of one with a warp for each
BLOCKS = 512  # that keep a device busy
LEAST = 512  # elements of a row that are worth a segment


@dataclass(frozen=True)
class Rows:
    """`count` rows of `width` elements; row i begins at first + at[i] stride, or i stride."""

    matrix: Memory
    first: int
    stride: int
    count: int
    width: int
    at: Memory | None = None


@dataclass(frozen=True)
class Vectors:
    """values (n, 8) and scales (n,), of one dtype; `norm` (1,) float64 is the sum of the squared scales."""

    values: Memory
    scales: Memory
    norm: Memory | None = None


@dataclass(frozen=True)
class Parts:
    """What segments of rows fold to: sums (segments, m, 8) and marks (segments, m, 2), float64."""

    sums: Memory
    marks: Memory


@dataclass(frozen=True)
class Folded:
    """sums (m, 8) and marks (m, 3): energy, probe, rounding in squared binades; float64."""

    sums: Memory
    marks: Memory


def clear_folded(product: Operands, call: Call, device: Device, mark: Memory, label: str) -> None:
    """Judge every entry of the product into `mark`, those of a row together. The policy has S challenges."""
    m, k, n = product.shape
    starts = range(0, n, WIDEST_FOLD)
    quantile = quantile_of(S, call.policy.delta_bits, len(call.rows[0]) * len(starts))
    for start in starts:
        width = min(WIDEST_FOLD, n - start)
        normals = draws.normals(device, call.draw, f"{label}/normals/{start}", (S, width))
        clear_rows(product, device, mark, normals, quantile, start)
    count = entry_count(k, call.policy)
    every = m * n <= count
    label = f"{label}/entries"
    flat = device.array(np.arange(m * n)) if every else draws.entries(device, call.draw, label, count, m * n)
    spot_check(product, device, mark, flat)


def clear_rows(
    product: Operands, device: Device, mark: Memory, normals: Memory, quantile: float, start: int = 0
) -> None:
    """T1 (S4) on the columns from `start` that normals (8, width) belong to."""
    m, k, n = product.shape
    width, kind = normals.shape[1], product.kind
    first = product.w_first + start * product.w_strides[1]
    vectors = weigh(product, device, mark, normals, first)
    right = fold_x(product, device, fold_w(product, device, vectors, first))
    left = fold_y(product, device, vectors, start)
    bias = left
    if product.bias_rows:
        rows = Rows(product.bias, start, n, product.bias_rows, width)
        bias = folded(device, fold_parts(device, "fold_blocks_f64", rows, vectors, 1), 1)
    *units, underflow = coefficients(product.dtype, k, product.rounds)
    bound = quantile, *units, underflow + FORMATS[product.dtype].flush
    device.launch(
        *("fold", f"judge_rows_{kind}", -(-m // THREADS), THREADS),
        *(right.sums, right.marks, left.sums, left.marks, bias.sums, np.int64(product.bias_rows), vectors.norm),
        *(np.int64(m), np.int64(k), np.int64(width), *map(np.float64, bound), mark),
    )


def weigh(product: Operands, device: Device, mark: Memory, normals: Memory, first: int) -> Vectors:
    """S3: normals (8, n) times the weights of the columns of w from element `first`, float32."""
    (_, k, _), n = product.shape, normals.shape[1]
    by_row = product.w_strides[1] == 1
    segments = enough_segments(-(-n // (COLUMNS if by_row else WARPS)), k)
    squares = device.empty((segments, n), np.float64)
    name, stride = ("columns", product.w_strides[0]) if by_row else ("rows", product.w_strides[1])
    device.launch(
        *("fold", f"square_{name}_{product.kind}", (-(-n // (COLUMNS if by_row else WARPS)), segments), THREADS),
        *(product.w, np.int64(first), np.int64(stride), np.int64(n), np.int64(k), squares),
    )
    exponents, largest = device.empty(n, np.int32), device.zeros(1, np.int32)
    counts = np.int32(segments), np.int64(k), np.int64(n)
    blocks = -(-n // THREADS)
    device.launch("fold", "column_weights", blocks, THREADS, squares, *counts, exponents, largest, mark)
    values, scales = device.empty((n, S), np.float32), device.empty(n, np.float32)
    norm = device.zeros(1, np.float64)
    given = normals, exponents, largest, np.int64(n)
    device.launch("fold", "weighted_vectors", blocks, THREADS, *given, values, scales, norm)
    return Vectors(values, scales, norm)


def fold_w(product: Operands, device: Device, vectors: Vectors, first: int) -> Vectors:
    """u = w r (k, 8) and the norms (k,) of the rows of w d, in what x is folded with."""
    (_, k, _), n = product.shape, vectors.scales.shape[0]
    if product.w_strides[1] == 1:
        rows = Rows(product.w, first, product.w_strides[0], k, n)
        parts = fold_parts(device, f"fold_blocks_{product.kind}", rows, vectors, 1)
    else:
        segments = enough_segments(-(-k // COLUMNS), n)
        parts = Parts(device.empty((segments, k, S), np.float64), device.empty((segments, k, 2), np.float64))
        device.launch(
            *("fold", f"fold_columns_{product.kind}", (-(-k // COLUMNS), segments), THREADS),
            *(product.w, np.int64(first), np.int64(product.w_strides[1]), np.int64(k), np.int64(n)),
            *(vectors.values, vectors.scales, parts.sums, parts.marks),
        )
    wide = product.kind == "f32"
    dtype = np.float64 if wide else np.float32
    factor = Vectors(device.empty((k, S), dtype), device.empty(k, dtype))
    device.launch(
        *("fold", f"fold_factor_{'f64' if wide else 'f32'}", -(-k * S // THREADS), THREADS),
        *(parts.sums, parts.marks, np.int32(parts.sums.shape[0]), np.int64(k), factor.values, factor.scales),
    )
    return factor


def fold_x(product: Operands, device: Device, factor: Vectors) -> Folded:
    m, k, _ = product.shape
    kernel = "fold_blocks_wide_f32" if product.kind == "f32" else f"fold_blocks_{product.kind}"
    blocks = min(PREFIXES, k)
    parts = fold_parts(device, kernel, Rows(product.x, 0, k, m, k, product.x_at), factor, blocks)
    return folded(device, parts, blocks)


def fold_y(product: Operands, device: Device, vectors: Vectors, start: int) -> Folded:
    m, _, n = product.shape
    rows = Rows(product.y, start, n, m, vectors.scales.shape[0])
    return folded(device, fold_parts(device, f"fold_claims_{product.kind}", rows, vectors, 1), 1)


def fold_parts(device: Device, kernel: str, rows: Rows, vectors: Vectors, blocks: int) -> Parts:
    """Fold rows in segments whose bounds include those of `blocks` equal blocks of columns."""
    grid = -(-rows.count // FOLD_ROWS[kernel.rsplit("_", 1)[1]])
    segments = blocks * enough_segments(grid * blocks, rows.width // blocks)
    parts = Parts(
        device.empty((segments, rows.count, S), np.float64), device.empty((segments, rows.count, 2), np.float64)
    )
    at = device.empty(1, np.int64) if rows.at is None else rows.at
    device.launch(
        *("fold", kernel, (grid, segments), FOLD_THREADS, rows.matrix, at, np.int32(rows.at is not None)),
        *map(np.int64, (rows.first, rows.stride, rows.count, rows.width)),
        *(vectors.values, vectors.scales, parts.sums, parts.marks),
    )
    return parts


def folded(device: Device, parts: Parts, blocks: int) -> Folded:
    """Segments put together, probed at the end of each of `blocks` blocks."""
    segments, m = parts.sums.shape[:2]
    found = Folded(device.empty((m, S), np.float64), device.empty((m, 3), np.float64))
    device.launch(
        *("fold", "fold_rows", -(-m * S // THREADS), THREADS, parts.sums, parts.marks),
        *(np.int32(segments), np.int32(segments // blocks), np.int64(m), found.sums, found.marks),
    )
    return found


def spot_check(product: Operands, device: Device, mark: Memory, flat: Memory) -> None:
    """T3 on entries by flat index, int64: those that are not cleared are added to what `mark` leaves."""
    _, k, n = product.shape
    device.launch(
        *("entries", f"spot_check_{product.kind}", -(-len(flat) // WARPS), 32 * WARPS),
        *(product.x, product.x_at, np.int64(k)),
        *(product.w, np.int64(product.w_first), *map(np.int64, product.w_strides), np.int64(n)),
        *(product.y, product.bias, np.int64(product.bias_rows), flat, np.int64(len(flat))),
        *(*map(np.float64, coefficients(product.dtype, k, product.rounds)), mark),
    )


def enough_segments(blocks: int, width: int) -> int:
    """How many segments give a device enough blocks."""
    return max(1, min(-(-BLOCKS // max(blocks, 1)), width // LEAST))
