"""Products in float64 beside the size of their partial sums, which bounds what an fp32 accumulator may lose.

Per entry, over the bias and the terms x_0 w_0, x_1 w_1, ... in order: z the sum, and PS the sum over consecutive blocks
of 16 terms of the largest of |sum before|, |sum after| and |term| (numerics-local-report section 1).
"""

import numba
import numpy as np
import numpy.typing as npt

from gpu.kernels.widen import Raw, bits, raw, widen

Array = npt.NDArray[np.float64]

BLOCK = 16


def partial_sums(x: Array, w: Raw, bias: Array) -> tuple[Array, Array]:
    """z and PS, both (m, n), of x (m, k) times w (k, n), w of any dtype, bias (m or 1, n)."""
    z, size = _partial_sums(raw(x), bits(w.T), raw(bias))
    return z, size


def partial_sums_reference(x: Array, w: Raw, bias: Array) -> tuple[Array, Array]:
    """The definition of `partial_sums`, in NumPy."""
    terms = x[:, :, None] * w.astype(np.float64)
    z, size = np.broadcast_to(bias, (len(x), w.shape[1])).copy(), np.zeros((len(x), w.shape[1]))
    for first in range(0, terms.shape[1], BLOCK):
        block = terms[:, first : first + BLOCK]
        after = z + block.sum(1)
        size += np.maximum(np.maximum(np.abs(z), np.abs(after)), np.abs(block).max(1))
        z = after
    return z, size


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _partial_sums(x, columns, bias):  # type: ignore[no-untyped-def]
    m, k = x.shape
    z, size, column = np.empty((m, len(columns))), np.empty((m, len(columns))), np.empty(k)
    for j in range(len(columns)):
        widen(columns[j], column)
        for i in range(m):
            z[i, j], size[i, j] = _entry(x[i], column, bias[i if len(bias) > 1 else 0, j])
    return z, size


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _entry(x, column, start):  # type: ignore[no-untyped-def]
    z, size = start, 0.0
    for first in range(0, len(x), BLOCK):
        added, largest = _block(x[first : first + BLOCK], column[first : first + BLOCK])
        before = abs(z)
        z += added
        size += max(before, abs(z), largest)
    return z, size


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _block(x, w):  # type: ignore[no-untyped-def]
    """The sum of a block's terms and the largest magnitude; bits of positive doubles are ordered as these are, and
    their comparison becomes a vector instruction."""
    added, largest = 0.0, np.int64(0)
    for i in range(len(x)):
        term = x[i] * w[i]
        added += term
        largest = max(largest, np.float64(abs(term)).view(np.int64))
    return added, np.int64(largest).view(np.float64)
