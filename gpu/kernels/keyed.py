"""Rows of bfloat16 under the vectors of a key, in float32: one pass over a row serves all of them.

What `fold` computes in float64, in less than half the time; sums of at most SHORT terms are formed in float32 and added
up in float64. A row whose sums leave the range of float32 is NaN or infinite: `fold` is the way then.
"""

import numba
import numpy as np
import numpy.typing as npt

from gpu.kernels.fold import Fold
from gpu.kernels.widen import Raw

Array = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

UNIT2 = 2.0**-16  # u^2
SHORT = 512  # terms summed in float32
ERROR = 2.0**-24 * (SHORT + 4)  # of such a sum, relative to the size of its terms, and of vectors kept in float32
_FAST = {"reassoc", "contract", "nsz"}


def fold_left(y: Raw, vectors: Float32s, first: int, weights: Float32s) -> Fold:
    """Fold rows y (m, n) of bfloat16, times weights (n,), with columns `first`.. of vectors (s, N)."""
    sums, marks = np.zeros((len(y), len(vectors))), np.zeros((3, len(y)))
    _left(np.ascontiguousarray(y).view(np.uint16), vectors, first, weights, sums, marks)
    return Fold(sums, marks[0], marks[1], marks[2])


def fold_right(x: Raw, vectors: Float32s, weights: Float32s, blocks: int) -> Fold:
    """Fold rows x (m, k) of bfloat16 with vectors (s, k); the energy is of x^2 times weights (k,)."""
    sums, marks = np.zeros((len(x), len(vectors))), np.zeros((3, len(x)))
    _right(np.ascontiguousarray(x).view(np.uint16), vectors, weights, blocks, sums, marks)
    return Fold(sums, marks[0], marks[1], marks[2])


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _right(x, vectors, weights, blocks, sums, marks):  # type: ignore[no-untyped-def]
    wide, k = np.empty(SHORT, np.float32), x.shape[1]
    for i in range(len(x)):
        for block in range(blocks):
            end = (block + 1) * k // blocks
            for a in range(block * k // blocks, end, SHORT):
                b = min(a + SHORT, end)
                part = wide[: b - a]
                _widen(x[i, a:b], part)
                _dots(part, vectors, a, sums[i])
                marks[0, i] += _energy(part, weights[a:b])
            size = 0.0
            for c in range(len(vectors)):
                size += sums[i, c] * sums[i, c]
            marks[1, i] = max(marks[1, i], size / len(vectors))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
def _left(y, vectors, first, weights, sums, marks):  # type: ignore[no-untyped-def]
    wide = np.empty(SHORT, np.float32)
    n = y.shape[1]
    for i in range(len(y)):
        for a in range(0, n, SHORT):
            b = min(a + SHORT, n)
            part = wide[: b - a]
            marks[2, i] += UNIT2 * _binades(y[i, a:b], weights[a:b], part)
            marks[0, i] += _squares(part)
            _dots(part, vectors, first + a, sums[i])


@numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _widen(bits, out):  # type: ignore[no-untyped-def]
    for j in range(len(bits)):
        out[j] = np.uint32(np.uint32(bits[j]) << np.uint32(16)).view(np.float32)


@numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _binades(bits, weights, out):  # type: ignore[no-untyped-def]
    """`out` = values times weights; returns the sum of (2^exponent weight)^2."""
    total = np.float32(0.0)
    for j in range(len(bits)):
        word = np.uint32(np.uint32(bits[j]) << np.uint32(16))
        out[j] = word.view(np.float32) * weights[j]
        binade = np.uint32(max(word & np.uint32(0x7F800000), np.uint32(0x00800000))).view(np.float32) * weights[j]
        total += binade * binade
    return total


@numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _energy(x, weights):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(len(x)):
        total += x[j] * x[j] * weights[j]
    return total


@numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _squares(x):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(len(x)):
        total += x[j] * x[j]
    return total


@numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _dots(x, vectors, first, out):  # type: ignore[no-untyped-def]
    last = first + len(x)
    for c in range(0, len(vectors), 4):
        v0, v1 = vectors[c, first:last], vectors[c + 1, first:last]
        v2, v3 = vectors[c + 2, first:last], vectors[c + 3, first:last]
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for j in range(len(x)):
            s0 += x[j] * v0[j]
            s1 += x[j] * v1[j]
            s2 += x[j] * v2[j]
            s3 += x[j] * v3[j]
        out[c] += s0
        out[c + 1] += s1
        out[c + 2] += s2
        out[c + 3] += s3
