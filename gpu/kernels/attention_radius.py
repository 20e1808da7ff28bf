"""Exact rows of attention, and how far any honest kernel's may lie from them (numerics-local section 3, F), in float64.

Every key has a least and a largest weight; the output moves by at most sum max(high - w, w - low) |v - z| / sum low.
K and V are read as they are committed: a bfloat16 is widened in its register.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from gpu.kernels.widen import Raw, bits, raw, widen
from gpu.rounding import FORMATS

Array = npt.NDArray[np.float64]
ANY_ORDER = {"reassoc", "contract", "nsz"}


class Bounds(NamedTuple):
    """Relative errors an honest kernel may make, and what it computes: the score is `scale` q k, capped, and biased."""

    scale: float
    softcap: float
    product: float  # beside sum |q k| scale
    score: float  # beside the score
    cap: float  # beside the softcap
    exponent: float  # beside a score's distance from the largest
    exponential: float
    sums: float  # beside sum p |v|


def attend(q: Array, k: Raw, v: Raw, bias: Array, bounds: Bounds, dtype: np.dtype) -> tuple[Array, Array]:
    """Rows (r, e) and their radii before their own rounding; NaN or infinity in a row that meets one.

    q (r, d), k (n, d), v (n, e), bias (r, n); a key with bias -inf is not read. Scores may be rounded to `dtype`.
    """
    form = FORMATS[dtype]
    narrow = (form.p, form.e_min, form.largest) if form.p < 53 else (0, 0, 0.0)
    rows: tuple[Array, Array] = _attend(raw(q), bits(k), bits(v), raw(bias), bounds, narrow)
    return rows


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _attend(q, k, v, bias, bounds, narrow):  # type: ignore[no-untyped-def]
    r, n, e = len(q), len(k), v.shape[1]
    z, radius = np.empty((r, e)), np.empty((r, e))
    exact, low, high = np.empty(n), np.empty(n), np.empty(n)
    for i in range(r):
        _multiply(q[i], k, bias[i], exact, low)
        _score(exact, low, high, bias[i], bounds, narrow)
        total, least = _weigh(exact, low, high, bounds)
        weighted, size = _sum(exact, v, bias[i])
        z[i] = weighted / total
        radius[i] = _move(high, v, bias[i], z[i]) / least + bounds.sums * size / total
    return z, radius


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=ANY_ORDER)
def _multiply(query, k, bias, exact, magnitudes):  # type: ignore[no-untyped-def]
    row = np.empty(k.shape[1])
    for j in range(len(k)):
        exact[j] = -np.inf
        if bias[j] > -np.inf:
            widen(k[j], row)
            product, magnitude = 0.0, 0.0
            for d in range(len(query)):
                term = query[d] * row[d]
                product += term
                magnitude += abs(term)
            exact[j], magnitudes[j] = product, magnitude


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=ANY_ORDER)
def _sum(weights, v, bias):  # type: ignore[no-untyped-def]
    row, z, size = np.empty(v.shape[1]), np.zeros(v.shape[1]), np.zeros(v.shape[1])
    for j in range(len(v)):
        if bias[j] > -np.inf:
            widen(v[j], row)
            weight = weights[j]
            for d in range(len(z)):
                z[d] += weight * row[d]
                size[d] += weight * abs(row[d])
    return z, size


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=ANY_ORDER)
def _move(weights, v, bias, z):  # type: ignore[no-untyped-def]
    row, away = np.empty(v.shape[1]), np.zeros(v.shape[1])
    for j in range(len(v)):
        if bias[j] > -np.inf:
            widen(v[j], row)
            weight = weights[j]
            for d in range(len(away)):
                away[d] += weight * abs(row[d] - z[d])
    return away


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _score(exact, low, high, bias, bounds, narrow):  # type: ignore[no-untyped-def]
    """From products in `exact` and their magnitudes in `low` to the exact, least and largest score of every key."""
    p, e_min, largest = narrow
    for j in range(len(exact)):
        if bias[j] > -np.inf:
            score = bounds.scale * exact[j]
            error = bounds.product * abs(bounds.scale) * low[j] + bounds.score * abs(score)
            if bounds.softcap > 0:
                score = bounds.softcap * np.tanh(score / bounds.softcap)
                error += bounds.score * 2.0 * abs(score) + bounds.cap * bounds.softcap
            least, exact[j], most = score - error + bias[j], score + bias[j], score + error + bias[j]
            if p > 0:
                least = min(least, np.float64(np.float32(least)), _round(least, p, e_min, largest))
                most = max(most, np.float64(np.float32(most)), _round(most, p, e_min, largest))
            low[j], high[j] = least, most


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round(value, p, e_min, largest):  # type: ignore[no-untyped-def]
    """Nearest even with p significand bits and exponents from e_min, or infinity."""
    exponent = max(((np.float64(value).view(np.int64) >> 52) & 0x7FF) - 1023, e_min) - p + 1
    quantum = np.int64((exponent + 1023) << 52).view(np.float64)
    rounded = np.rint(value / quantum) * quantum
    return rounded if abs(rounded) <= largest else np.copysign(np.inf, rounded)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _weigh(exact, low, high, bounds):  # type: ignore[no-untyped-def]
    """Turn scores into weights in `exact` and their distances to either bound in `high`; returns both sums."""
    top, total, sum_least = -np.inf, 0.0, 0.0
    for j in range(len(exact)):
        top = max(top, exact[j])
    for j in range(len(exact)):
        if exact[j] > -np.inf:
            spread = bounds.exponent * (top - exact[j])
            weight = np.exp(exact[j] - top)
            least = np.exp(low[j] - top - spread) * (1.0 - bounds.exponential)
            most = np.exp(high[j] - top + spread) * (1.0 + bounds.exponential)
            total += weight
            sum_least += least
            exact[j], high[j] = weight, max(most - weight, weight - least)
    return total, sum_least
