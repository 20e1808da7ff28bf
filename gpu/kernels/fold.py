"""Rows of a matrix folded with random vectors in one pass: m r, weighted sums of squares, and what T1 asks besides.

Four rows times two vectors are eight accumulators, which fit the registers of AVX2 beside their operands.
Vectors lie as rows (s, n). `bounds` cuts the columns into blocks; after each, the sums so far are probed.
Everything is float64. Reassociation is allowed, NaN and infinity are kept.
"""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from gpu.kernels.widen import NARROW, Raw, raw
from gpu.rounding import FORMATS, half_ulp

Array = npt.NDArray[np.float64]

SPAN = 4096  # columns whose vectors stay in the second-level cache while rows stream by
ROWS = 4
CHUNK = 64  # rows of 16-bit floats widened at a time, a multiple of ROWS
_FAST = {"reassoc", "contract", "nsz"}


@dataclass(frozen=True)
class Fold:
    """Per row: `sums` (m, s) of element times vector; `energy` (m,), of squares times weights; `probe` (m,), the
    largest mean square of the sums after each block; `rounding` (m,), of half_ulp(element)^2 times weights."""

    sums: Array
    energy: Array
    probe: Array
    rounding: Array


def fold(matrix: Raw, vectors: Array, weights: Array, blocks: int = 1, dtype: np.dtype | None = None) -> Fold:
    """Fold the rows of `matrix` (m, n) with `vectors` (s, n) and `weights` (n,); `rounding` is of `dtype`."""
    m, n = matrix.shape
    s = len(vectors)
    even = np.zeros((s + s % 2, n))
    even[:s] = vectors
    sums, marks = np.zeros((m + ROWS, len(even))), np.zeros((3, m + ROWS))
    form = FORMATS.get(dtype) if dtype is not None else None
    smallest = 0.0 if form is None else 2.0**form.e_min
    step = CHUNK if matrix.dtype in NARROW else max(m, 1)
    spans = _spans(n, blocks)
    for first in range(0, m, step):
        part = raw(matrix[first : first + step])
        for bounds in spans:
            _fold(part, even, weights, bounds, smallest, sums[first:], marks[:, first:])
    scale = 0.0 if form is None else form.u**2
    return Fold(sums[:m, :s], marks[0, :m], marks[1, :m] / max(s, 1), marks[2, :m] * scale)


def fold_reference(matrix: Raw, vectors: Array, weights: Array, blocks: int = 1, dtype: np.dtype | None = None) -> Fold:
    """The definition of `fold`, in NumPy."""
    wide = matrix.astype(np.float64)
    ends = np.arange(1, blocks + 1) * matrix.shape[1] // blocks
    prefixes = np.stack([wide[:, :end] @ vectors[:, :end].T for end in ends])
    rounding = 0.0 * wide if dtype is None else half_ulp(wide, dtype)
    return Fold(prefixes[-1], wide**2 @ weights, (prefixes**2).mean(2).max(0), rounding**2 @ weights)


def column_energy(matrix: Raw) -> Array:
    """(n,) mean squares of the columns."""
    m, out = len(matrix), np.zeros(matrix.shape[1])
    step = CHUNK if matrix.dtype in NARROW else max(m, 1)
    for first in range(0, m, step):
        _column_energy(raw(matrix[first : first + step]), out)
    return out / max(m, 1)


def _spans(n: int, blocks: int) -> list[npt.NDArray[np.int64]]:
    """Bounds of the blocks, in runs of whole blocks that cover at most `SPAN` columns where blocks allow it."""
    cuts = np.arange(max(blocks, 1) + 1) * n // max(blocks, 1)
    runs, first = [], 0
    for last in range(1, len(cuts)):
        if last == len(cuts) - 1 or cuts[last + 1] - cuts[first] > SPAN:
            runs.append(cuts[first : last + 1])
            first = last
    return runs


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _fold(matrix, vectors, weights, bounds, smallest, sums, marks):  # type: ignore[no-untyped-def]
    last = len(matrix) - 1
    energy, probe, rounding = marks[0], marks[1], marks[2]
    for i in range(0, len(matrix), ROWS):
        for block in range(len(bounds) - 1):
            a, b = bounds[block], bounds[block + 1]
            weight = weights[a:b]
            w0, w1 = matrix[i, a:b], matrix[min(i + 1, last), a:b]
            w2, w3 = matrix[min(i + 2, last), a:b], matrix[min(i + 3, last), a:b]
            for c in range(0, len(vectors), 2):
                _dots(w0, w1, w2, w3, vectors[c, a:b], vectors[c + 1, a:b], sums[i : i + ROWS, c : c + 2])
            _squares(w0, w1, w2, w3, weight, energy[i : i + ROWS])
            for row in range(i, min(i + ROWS, len(matrix))):
                if smallest > 0.0:
                    rounding[row] += _binades(matrix[row, a:b], weight, smallest)
                size = 0.0
                for c in range(vectors.shape[0]):
                    size += sums[row, c] * sums[row, c]
                probe[row] = max(probe[row], size)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _dots(w0, w1, w2, w3, r0, r1, out):  # type: ignore[no-untyped-def]
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = 0.0
    for j in range(len(w0)):
        p, q = r0[j], r1[j]
        a, b, c, d = np.float64(w0[j]), np.float64(w1[j]), np.float64(w2[j]), np.float64(w3[j])
        a0 += a * p
        a1 += a * q
        b0 += b * p
        b1 += b * q
        c0 += c * p
        c1 += c * q
        d0 += d * p
        d1 += d * q
    out[0, 0] += a0
    out[0, 1] += a1
    out[1, 0] += b0
    out[1, 1] += b1
    out[2, 0] += c0
    out[2, 1] += c1
    out[3, 0] += d0
    out[3, 1] += d1


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _squares(w0, w1, w2, w3, weights, out):  # type: ignore[no-untyped-def]
    a2 = b2 = c2 = d2 = 0.0
    for j in range(len(w0)):
        weight = weights[j]
        a, b, c, d = np.float64(w0[j]), np.float64(w1[j]), np.float64(w2[j]), np.float64(w3[j])
        a2 += a * a * weight
        b2 += b * b * weight
        c2 += c * c * weight
        d2 += d * d * weight
    out[0] += a2
    out[1] += b2
    out[2] += c2
    out[3] += d2


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _binades(w, weights, smallest):  # type: ignore[no-untyped-def]
    """Sum of 2^(2 exponent) times weights; half an ulp is u times as much."""
    total = 0.0
    for j in range(len(w)):
        bits = np.int64(np.float64(w[j]).view(np.int64) & 0x7FF0000000000000)
        binade = max(bits.view(np.float64), smallest)
        total += binade * binade * weights[j]
    return total


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _column_energy(matrix, out):  # type: ignore[no-untyped-def]
    last = len(matrix) - 1
    for i in range(0, len(matrix) - ROWS + 1, ROWS):
        w0, w1, w2, w3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        for j in range(len(out)):
            a, b, c, d = np.float64(w0[j]), np.float64(w1[j]), np.float64(w2[j]), np.float64(w3[j])
            out[j] += (a * a + b * b) + (c * c + d * d)
    for i in range(len(matrix) - len(matrix) % ROWS, last + 1):
        w0 = matrix[i]
        for j in range(len(out)):
            out[j] += np.float64(w0[j]) * np.float64(w0[j])
