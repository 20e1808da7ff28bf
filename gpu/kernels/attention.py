"""Rows of causal attention replayed as an engine rounds them (numerics-local-report section 3), in float64.

`eager`: scores rounded, scaled and rounded again, a softmax in fp32 whose probabilities are rounded, their product
with V. `flash`: fp32 scores, and over blocks of keys the running maximum, exponentials rounded before they meet V and
summed as they are, rescaled as the maximum grows, divided at the end. Where fp32 arithmetic leaves a score or a weight
open, its interval is carried into the radius of the row.
"""

import numba
import numpy as np
import numpy.typing as npt

from gpu.kernels.widen import Raw, raw
from gpu.rounding import BFLOAT16, FORMATS, U32

Array = npt.NDArray[np.float64]

BLOCK = 16  # terms whose partial sums bound an fp32 accumulator
KEYS = 512  # of a block of the flash kernel
LANES = 15  # keys that may be left when vectors of 8 (AVX2) or 16 (AVX-512) are full
LEAST_EXPONENT = np.float32(-87.33654)  # the logarithm of the smallest normal number
LOG2_E = np.float32(1.4426950408889634)
CUBIC = tuple(
    float(np.float32(c))
    for c in (-0.079204240219773236, -0.22433836478672356, 0.30354260500649682, 0.00010703434948458272)
)


def replay(
    q: Array,
    k: Raw,
    v: Raw,
    allowed: npt.NDArray[np.bool_],
    scale: float,
    *,
    eager: bool,
    units: tuple[float, float, float],
) -> tuple[Array, Array]:
    """The exact rows and their radii, (r, e) each, before their own rounding.

    q (r, d), k (n, d), v (n, e); `allowed` (r, n) says which keys a query sees, at least one. `units`, in 2^-24: of a
    score and of a weighted sum beside their partial sums, and of an exponential.
    """
    form = FORMATS[k.dtype]
    scores, sums, exponential = (unit * U32 for unit in units)
    errors = scale, scores, sums, exponential
    rows: tuple[Array, Array] = _replay(raw(q), _widened(k), _widened(v), allowed, errors, (form.p, form.e_min), eager)
    return rows


def _widened(array: Raw) -> Raw:
    """16-bit floats as float32: bfloat16 by a shift, which is faster than its cast."""
    if array.dtype == BFLOAT16:
        bits = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32)
        return raw((bits << np.uint32(16)).view(np.float32))
    return raw(array)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round(value, form):  # type: ignore[no-untyped-def]
    """Nearest even with p significand bits and exponents from e_min."""
    p, e_min = form
    exponent = max(((np.float64(value).view(np.int64) >> 52) & 0x7FF) - 1023, e_min) - p + 1
    quantum = np.int64((exponent + 1023) << 52).view(np.float64)
    return np.rint(value / quantum) * quantum


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _dot(q, key):  # type: ignore[no-untyped-def]
    """The product, and the sum over blocks of the largest of |sum before|, |sum after| and |term|."""
    z, size = 0.0, 0.0
    for first in range(0, len(q), BLOCK):
        a, b = q[first : first + BLOCK], key[first : first + BLOCK]
        total, largest = 0.0, 0.0
        for d in range(len(a)):
            term = a[d] * b[d]
            total += term
            largest = max(largest, abs(term))
        size += max(max(abs(z), abs(z + total)), largest)
        z += total
    return z, size


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _replay(q, k, v, allowed, units, form, eager):  # type: ignore[no-untyped-def]
    _, _, sums, exponential = units
    r, n, e = len(q), len(k), v.shape[1]
    z, radius = np.zeros((r, e)), np.zeros((r, e))
    score, doubt, weight, half = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    for i in range(r):
        _scores(q[i], k, allowed[i], units, form, (eager, score, doubt))
        if eager:
            _softmax(score, doubt, allowed[i], form, weight, half)
            total, spread = 1.0, 0.0
        else:
            total, spread = _running(score, doubt, allowed[i], form, exponential, weight, half)
        size = _weigh(weight, half, v, allowed[i], z[i], radius[i])
        for d in range(e):
            z[i, d] /= total
            radius[i, d] = (radius[i, d] + sums * size[d]) / total + abs(z[i, d]) * spread
    return z, radius


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _scores(q, keys, allowed, units, form, into):  # type: ignore[no-untyped-def]
    scale, sums, _, _ = units
    eager, score, doubt = into
    for j in range(len(keys)):
        if allowed[j]:
            exact, partial = _dot(q, keys[j])
            room = sums * partial + 2.0**-133
            if eager:
                score[j] = _round(_round(exact, form) * scale, form)
                low = _round(_round(exact - room, form) * scale, form)
                high = _round(_round(exact + room, form) * scale, form)
                doubt[j] = max(high - score[j], score[j] - low)
            else:
                score[j] = exact * scale
                doubt[j] = room * abs(scale) + U32 * abs(score[j])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _weigh(weight, half, v, allowed, z, radius):  # type: ignore[no-untyped-def]
    """Add weighted rows of v to z and the doubt in them to radius; returns the sizes of partial sums."""
    n, e = v.shape
    size, before, largest = np.zeros(e), np.empty(e), np.empty(e)
    for first in range(0, n, BLOCK):
        before[:] = np.abs(z)
        largest[:] = 0.0
        for j in range(first, min(first + BLOCK, n)):
            if allowed[j]:
                _accumulate(weight[j], half[j], v[j], z, radius, largest)
        for d in range(e):
            size[d] += max(max(before[d], abs(z[d])), largest[d])
    return size


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _accumulate(weight, half, value, z, radius, largest):  # type: ignore[no-untyped-def]
    for d in range(len(value)):
        term = weight * value[d]
        z[d] += term
        radius[d] += half * abs(value[d])
        largest[d] = max(largest[d], abs(term))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _softmax(score, doubt, allowed, form, weight, half):  # type: ignore[no-untyped-def]
    """Probabilities of the eager kernel, rounded, and how far they may lie from it."""
    top, total, most, count = -np.inf, 0.0, 0.0, 0
    for j in range(len(score)):
        if allowed[j]:
            top = max(top, score[j])
            count += 1
    for j in range(len(score)):
        if allowed[j]:
            weight[j] = np.exp(score[j] - top)
            total += weight[j]
            most += weight[j] * np.exp(doubt[j])
    spread = np.log(most / total)
    steps = 24.0 + min(count + 2.0, 16.0 + 2.0 * np.sqrt(count)) / 4.0
    for j in range(len(score)):
        if allowed[j]:
            p = weight[j] / total
            room = doubt[j] + spread + (steps + top - score[j]) * U32
            weight[j] = _round(p, form)
            half[j] = max(_round(p * np.exp(room), form) - weight[j], weight[j] - _round(p * np.exp(-room), form))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _running(score, doubt, allowed, form, exponential, weight, half):  # type: ignore[no-untyped-def]
    """Weights of the flash kernel scaled to the last maximum, their sum, and its relative error with the division's.

    The kernel takes a fast exponential for whole vectors of keys and an exact one for those that are left at the
    end of a launch, of which a row does not say how many there were.
    """
    n, end = len(score), len(score) - 1
    while not allowed[end]:
        end -= 1
    top, top_doubt, total, spread = -np.inf, 0.0, 0.0, 0.0
    for first in range(0, n, KEYS):
        last, previous, previous_doubt = min(first + KEYS, n), top, top_doubt
        for j in range(first, last):
            if allowed[j] and score[j] > top:
                top, top_doubt = score[j], doubt[j]
        if top > previous > -np.inf:
            shrink = np.exp(previous - top)
            slip = previous_doubt + top_doubt + (2.0 * (top - previous) + 4.0) * U32
            total *= shrink
            spread = spread * shrink + total * slip
            for j in range(first):
                weight[j] *= shrink
                half[j] = half[j] * shrink + weight[j] * slip
        for j in range(first, last):
            if allowed[j]:
                below = score[j] - top
                room = doubt[j] + top_doubt - 2.0 * below * U32
                p, low, high = _fast_exp(below), _fast_exp(below - room), _fast_exp(below + room)
                if j > end - LANES:
                    exact = np.exp(below)
                    low = min(low, exact * (1.0 - room - exponential))
                    high = max(high, exact * (1.0 + room + exponential))
                weight[j] = _round(p, form)
                half[j] = max(_round(high, form) - weight[j], weight[j] - _round(low, form))
                total += p
                spread += max(high - p, p - low)
    blocks = (n + KEYS - 1) // KEYS
    return total, spread / total + (16.0 + 4.0 * blocks) * U32


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fast_exp(x):  # type: ignore[no-untyped-def]
    """PyTorch's exponential for 16-bit attention on CPUs, bit for bit: exponent and a cubic in the fraction are put
    together as the bits of a float (Malossi et al. 2015); off by up to 1.1e-4."""
    x = np.float32(x)
    if x < LEAST_EXPONENT:
        return 0.0
    scaled = np.float32(x * LOG2_E)
    fraction = np.float64(np.float32(scaled - np.floor(scaled)))
    bend = CUBIC[0]
    for coefficient in CUBIC[1:]:
        bend = np.float64(np.float32(fraction * bend + coefficient))
    bits = np.float32(2.0**23 * np.float64(np.float32(scaled - np.float32(bend))) + 2.0**23 * 127.0)
    return np.float64(np.int32(bits).view(np.float32))
