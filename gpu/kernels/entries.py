"""Entries of a product recomputed in float64, with what bounds an honest engine's error (numerics-matmul S5).

Per entry, over the terms bias, x_0 w_0, x_1 w_1, ... in this order: z the sum, A^2 the sum of squares, S the sum of
magnitudes, P the largest magnitude of a prefix sum. A tile of w is widened and packed once for all rows of x.
"""

import numba
import numpy as np
import numpy.typing as npt

from gpu.kernels.widen import Raw, raw

Array = npt.NDArray[np.float64]

DEPTH, WIDTH = 32, 256  # of a packed tile: 64 KiB


def statistics(x: Array, w: Raw, bias: Array, *, full: bool = True) -> Array:
    """(4, m, n): z, A^2, S and P of x (m, k) times w (k, n), w of any dtype, bias (m or 1, n).

    Without `full` S and P stay zero, at less than half the time.
    """
    transposed = not w.flags.c_contiguous and w.T.flags.c_contiguous
    out: Array = _statistics(raw(x), raw(w.T if transposed else w), transposed, raw(bias), full)
    return out


def paired(x: Raw, w: Raw, bias: Array) -> Array:
    """(4, p): the statistics of p single entries, from their terms' factors x (p, k) and w (k, p) and bias (p,)."""
    out: Array = _paired(raw(x), raw(w), raw(bias))
    return out


def columns(matrix: Raw, numbers: npt.NDArray[np.int64]) -> Raw:
    """(k, p): columns of `matrix` (k, n) by number, read row by row as they lie."""
    if not matrix.flags.c_contiguous:
        return matrix.T[numbers].T
    bits = matrix.view(np.ndarray).view(f"u{matrix.itemsize}")
    bits.flags.writeable = False
    out = np.empty((len(matrix), len(numbers)), bits.dtype)
    _columns(bits, numbers, out)
    return out.view(matrix.dtype)


def statistics_reference(x: Array, w: Raw, bias: Array) -> Array:
    """The definition of `statistics`, in NumPy."""
    bias = np.broadcast_to(bias, (len(x), w.shape[1]))
    terms = np.concatenate([bias[:, None], x[:, :, None] * w.astype(np.float64)], axis=1)
    prefixes = np.abs(np.cumsum(terms, axis=1))
    return np.stack([terms.sum(1), (terms**2).sum(1), np.abs(terms).sum(1), prefixes.max(1)])


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _statistics(x, w, transposed, bias, full):  # type: ignore[no-untyped-def]
    m, k = x.shape
    n = w.shape[0] if transposed else w.shape[1]
    out = np.empty((4, m, n))
    tile = np.zeros((DEPTH, WIDTH))
    for i in range(m):
        b = bias[i if len(bias) > 1 else 0]
        for j in range(n):
            out[0, i, j], out[1, i, j] = b[j], b[j] * b[j]
            out[2, i, j] = out[3, i, j] = abs(b[j]) if full else 0.0
    for j in range(0, n, WIDTH):
        width = min(WIDTH, n - j)
        for l in range(0, k, DEPTH):  # noqa: E741
            depth = min(DEPTH, k - l)
            if transposed:
                _pack_columns(tile, w[j : j + width, l : l + depth])
            else:
                _pack_rows(tile, w[l : l + depth, j : j + width])
            for i in range(m):
                z, a = out[0, i, j : j + width], out[1, i, j : j + width]
                if full:
                    _add(x[i, l : l + depth], tile, z, a, out[2, i, j : j + width], out[3, i, j : j + width])
                else:
                    _add_moments(x[i, l : l + depth], tile, z, a)
    return out


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _pack_rows(tile, w):  # type: ignore[no-untyped-def]
    for i in range(w.shape[0]):
        source, target = w[i], tile[i]
        for j in range(len(source)):
            target[j] = source[j]
    tile[w.shape[0] :] = 0.0


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _pack_columns(tile, w):  # type: ignore[no-untyped-def]
    for j in range(w.shape[0]):
        source = w[j]
        for i in range(len(source)):
            tile[i, j] = source[i]
    tile[w.shape[1] :] = 0.0


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _factor(x, i):  # type: ignore[no-untyped-def]
    return x[i] if i < len(x) else 0.0


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _add_moments(x, tile, z, a):  # type: ignore[no-untyped-def]
    """Four terms at a time, so that the running values are loaded and stored once for them."""
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], _factor(x, i + 1), _factor(x, i + 2), _factor(x, i + 3)
        w0, w1, w2, w3 = tile[i], tile[i + 1], tile[i + 2], tile[i + 3]
        for j in range(len(z)):
            t0, t1, t2, t3 = x0 * w0[j], x1 * w1[j], x2 * w2[j], x3 * w3[j]
            z[j] += (t0 + t1) + (t2 + t3)
            a[j] += (t0 * t0 + t1 * t1) + (t2 * t2 + t3 * t3)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _add(x, tile, z, a, s, p):  # type: ignore[no-untyped-def]
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], _factor(x, i + 1), _factor(x, i + 2), _factor(x, i + 3)
        w0, w1, w2, w3 = tile[i], tile[i + 1], tile[i + 2], tile[i + 3]
        for j in range(len(z)):
            t0, t1, t2, t3 = x0 * w0[j], x1 * w1[j], x2 * w2[j], x3 * w3[j]
            z0 = z[j] + t0
            z1 = z0 + t1
            z2 = z1 + t2
            z3 = z2 + t3
            z[j] = z3
            a[j] += (t0 * t0 + t1 * t1) + (t2 * t2 + t3 * t3)
            s[j] += (abs(t0) + abs(t1)) + (abs(t2) + abs(t3))
            p0, p1, p2, p3 = abs(z0), abs(z1), abs(z2), abs(z3)
            p0 = p0 if p0 > p1 else p1
            p2 = p2 if p2 > p3 else p3
            p0 = p0 if p0 > p2 else p2
            p[j] = p[j] if p[j] > p0 else p0


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _columns(matrix, numbers, out):  # type: ignore[no-untyped-def]
    for i in range(len(matrix)):
        row, target = matrix[i], out[i]
        for j in range(len(numbers)):
            target[j] = row[numbers[j]]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _paired(x, w, bias):  # type: ignore[no-untyped-def]
    z, s, a, p = bias.copy(), np.abs(bias), bias * bias, np.abs(bias)
    block = np.empty((DEPTH, len(z)))
    for first in range(0, len(w), DEPTH):
        depth = min(DEPTH, len(w) - first)
        for j in range(len(z)):
            row = x[j, first : first + depth]
            for i in range(depth):
                block[i, j] = row[i]
        for i in range(depth):
            left, right = block[i], w[first + i]
            for j in range(len(z)):
                term = left[j] * np.float64(right[j])
                z[j] += term
                s[j] += abs(term)
                a[j] += term * term
                p[j] = p[j] if p[j] > abs(z[j]) else abs(z[j])
    out = np.empty((4, len(z)))
    out[0], out[1], out[2], out[3] = z, a, s, p
    return out


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def judge(statistics, y, form, coefficients):  # type: ignore[no-untyped-def]
    """Compare y with z: (largest |y - z| / tolerance, flat index of the first entry that fails or -1).

    `form` is (p, e_min); `coefficients` (c, g, r, t): tolerance = half_ulp(y) + (c + g min(1, 2 P / S)) max(A, P)
    + r max(|z|, A) + t + 2^-50 S. An entry passes iff its tolerance is finite and covers it. Where S and P are zero
    the tolerance is a lower bound of the full one.
    """
    p, e_min = form
    c, g, r, t = coefficients
    worst, failed = 0.0, -1
    n = y.shape[1]
    for i in range(y.shape[0]):
        for j in range(n):
            z, a, s = statistics[0, i, j], np.sqrt(statistics[1, i, j]), statistics[2, i, j]
            prefix, claim = max(abs(z), statistics[3, i, j]), y[i, j]
            coherence = min(1.0, 2.0 * prefix / s) if s > 0.0 else 0.0
            exponent = max(((np.float64(claim).view(np.int64) >> 52) & 0x7FF) - 1023, e_min) - p
            half_ulp = np.int64((max(exponent, -1022) + 1023) << 52).view(np.float64)
            slack = (c + g * coherence) * max(a, prefix) + r * max(abs(z), a) + t + 2.0**-50 * s
            tolerance = half_ulp + slack
            off = abs(claim - z)
            if not (off <= tolerance and np.isfinite(tolerance)):
                failed = i * n + j if failed < 0 else failed
            elif off > worst * tolerance:
                worst = off / tolerance
    return worst, failed
