"""Rows of an integer matrix folded with two vectors in wrapping 64-bit arithmetic (numerics-matmul S6).

Words of 31 bits are passed as int32: a product of two 32-bit integers is one instruction, of two 64-bit ones four.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

TILE = 2048  # columns whose words stay in the first-level cache while rows stream by


def fold(matrix: npt.NDArray[Any], vectors: npt.NDArray[Any]) -> Integers:
    """(m, 2): matrix (m, n) of 8 or 32-bit integers times vectors (2, n) of int32 or int64, modulo 2^64."""
    out = np.zeros((len(matrix), 2), np.int64)
    transposed = not matrix.flags.c_contiguous and matrix.T.flags.c_contiguous
    source = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.ndarray).view()
    source.flags.writeable = False
    (_fold_columns if transposed else _fold_rows)(source, np.ascontiguousarray(vectors), out)
    return out


def fold_reference(matrix: npt.NDArray[Any], vectors: npt.NDArray[Any]) -> Integers:
    """The definition of `fold`, in NumPy, whose int64 arithmetic wraps."""
    return matrix.astype(np.int64) @ vectors.astype(np.int64).T


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fold_rows(matrix, vectors, out):  # type: ignore[no-untyped-def]
    m, n = matrix.shape
    for first in range(0, n, TILE):
        r, s = vectors[0, first : first + TILE], vectors[1, first : first + TILE]
        for i in range(m):
            row = matrix[i, first : first + TILE]
            a, b = np.int64(0), np.int64(0)
            for j in range(len(row)):
                a += np.int64(row[j]) * np.int64(r[j])
                b += np.int64(row[j]) * np.int64(s[j])
            out[i, 0] += a
            out[i, 1] += b


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fold_columns(matrix, vectors, out):  # type: ignore[no-untyped-def]
    """`matrix` holds the columns as rows (n, m)."""
    n, m = matrix.shape
    a, b = np.zeros(m, np.int64), np.zeros(m, np.int64)
    for j in range(n):
        row, r, s = matrix[j], np.int64(vectors[0, j]), np.int64(vectors[1, j])
        for i in range(len(row)):
            a[i] += np.int64(row[i]) * r
            b[i] += np.int64(row[i]) * s
    out[:, 0] = a
    out[:, 1] = b
