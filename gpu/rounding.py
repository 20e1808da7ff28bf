"""The numeric contract: how far a rounded result may lie from the exact value.

Source: numerics-matmul S2 and numerics-local section 2. p significand bits, half_ulp(y) = 2^(max(e(y), e_min) - p).
If y is z rounded to nearest then |y - z| <= half_ulp(y), ties and binade edges included.
All arithmetic here is float64; the arrays passed in are of any shape.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from proof.errors import Reason, Rejected

Array = npt.NDArray[np.float64]
Values = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
U32 = 2.0**-24
CLOSING_ROW, CLOSING_ENTRY = 1.0, 8.0
EVALUATION = 2.0**-50  # relative error of our own float64 evaluation


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: p significand bits with the hidden one."""

    p: int
    e_min: int
    largest: float
    flush: float  # results below this may be flushed to zero by an honest engine

    @property
    def u(self) -> float:
        return 2.0**-self.p

    @property
    def overflow(self) -> float:
        """Values from here on round to infinity."""
        return self.largest * (1.0 + 2.0 ** -(self.p + 1))


FORMATS: dict[np.dtype, Format] = {  # fp16 engines keep subnormals, the others may flush them
    np.dtype(np.float64): Format(53, -1022, float(np.finfo(np.float64).max), 2.0**-1022),
    np.dtype(np.float32): Format(24, -126, float(np.finfo(np.float32).max), 2.0**-126),
    np.dtype(np.float16): Format(11, -14, 65504.0, 0.0),
    BFLOAT16: Format(8, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 2.0**-126),
}


def is_float(dtype: np.dtype) -> bool:
    return dtype in FORMATS


def half_ulp(y: Array, dtype: np.dtype) -> Array:
    """Half the spacing of `dtype` in the binade of y; y are values of that dtype, in float64.

    Built from the exponent bits of float64. Below 2^-1022, which concerns float64 alone, that is what it gives.
    """
    form = FORMATS[dtype]
    exponent = (np.ascontiguousarray(y).view(np.int64) >> 52) & 0x7FF
    bits = np.left_shift(np.maximum(np.maximum(exponent, form.e_min + 1023) - form.p, 1), 52)
    half: Array = bits.view(np.float64).reshape(y.shape)
    return half


@dataclass(frozen=True)
class Interval:
    """What a kernel that rounds as its profile says may return: low <= y <= high, and the exact value rounded once.

    All three are of the output's dtype and of one shape.
    """

    low: Values
    nearest: Values
    high: Values


def round_to(values: Array, dtype: np.dtype) -> Values:
    """float64 values rounded to nearest even in `dtype`, once: a bfloat16 does not pass through float32 first."""
    if dtype != BFLOAT16:
        with np.errstate(over="ignore"):
            rounded: Values = values.astype(dtype)
        return rounded
    # Rounding to odd in between keeps the second rounding from meeting a tie that the first one made.
    with np.errstate(over="ignore", invalid="ignore"):
        odd = values.astype(np.float32)
        inexact = (odd.astype(np.float64) != values) & np.isfinite(odd)
        away = np.abs(odd.astype(np.float64)) > np.abs(values)
    bits = odd.view(np.int32)
    bits = np.where(inexact, (bits - (away & inexact)) | 1, bits).astype(np.int32)
    return bits.view(np.float32).astype(dtype)


def determined(values: Values) -> Interval:
    return Interval(values, values, values)


def around(z: Array, radius: Array | float, dtype: np.dtype) -> Interval:
    """What rounding a value within `radius` of z may give."""
    return Interval(*(round_to(value, dtype) for value in (z - radius, z, z + radius)))


def compare_interval(claimed: Values, interval: Interval) -> int:
    """Check entries against what a profile allows; returns how many of them it left no choice.

    Raises Rejected(NONFINITE | REEXECUTION).
    """
    y, low, high, nearest = (
        array.astype(np.float64) for array in (claimed, interval.low, interval.high, interval.nearest)
    )
    _refuse(~(np.isfinite(y) & (low <= y) & (y <= high)), y, nearest)
    return int((low == high).sum())


def compare_closing(claimed: Values, replayed: Values) -> float:
    """Check rows at the end of a segment that was recomputed, all but the roundings of its inner sums the same.

    The distance of an entry is counted in `half_ulp` of the entry and of its row's root mean square. CLOSING_ROW bounds
    its root mean square over a row, CLOSING_ENTRY every one; both are calibrated (bench/README.md), not proven.
    Returns the largest share of a bound that was used. Raises Rejected(NONFINITE | REEXECUTION).
    """
    y, z = claimed.astype(np.float64), replayed.astype(np.float64)
    finite = np.isfinite(y) & np.isfinite(z)
    _refuse(~finite, y, z)
    size = np.sqrt(np.mean(z * z, axis=-1, keepdims=True)) * np.ones_like(z)
    off = np.abs(y - z) / (half_ulp(y, claimed.dtype) + half_ulp(size, claimed.dtype))
    row = np.sqrt(np.mean(off * off, axis=-1, keepdims=True)) * np.ones_like(off)
    _refuse((off > CLOSING_ENTRY) | (row > CLOSING_ROW), y, z)
    return float(max(off.max(initial=0.0) / CLOSING_ENTRY, row.max(initial=0.0) / CLOSING_ROW))


def compare(claimed: Values, exact: Array, slack: Array | float = 0.0) -> float:
    """Check committed float entries against values recomputed in float64.

    An entry passes iff |claimed - exact| <= half_ulp(claimed) + slack (plus what an engine may flush).
    Where `exact` is NaN or infinite the claim must be the same; where it is finite the claim must be
    finite, or an infinity that overflow explains. `slack` is the op's radius beyond one rounding.
    Returns the largest |claimed - exact| / radius. Raises Rejected(NONFINITE | REEXECUTION).
    """
    form = FORMATS[claimed.dtype]
    y = claimed.astype(np.float64)
    exact = np.broadcast_to(exact, y.shape)
    radius = half_ulp(y, claimed.dtype) + slack + form.flush + EVALUATION * np.abs(exact)
    with np.errstate(invalid="ignore"):
        off = np.abs(y - exact)
        passed = (off <= radius) & np.isfinite(radius) & np.isfinite(off)
    if not passed.all():
        _compare_nonfinite(y, exact, np.broadcast_to(slack, y.shape), form.overflow)
        _refuse(~passed & np.isfinite(exact) & np.isfinite(y), y, exact)
    return float(np.divide(off, radius, out=np.zeros_like(off), where=passed).max(initial=0.0))


def _compare_nonfinite(y: Array, exact: Array, slack: Array, overflow: float) -> None:
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    overflowed = np.isinf(y) & np.isfinite(exact) & (np.sign(y) == np.sign(exact)) & (np.abs(exact) + slack >= overflow)
    _refuse(~(np.isfinite(y) & np.isfinite(exact)) & ~same & ~overflowed, y, exact)


def compare_equal(claimed: Values, exact: Values) -> float:
    """Check entries that are determined bit for bit (integers, booleans, moved data; any NaN equals any NaN).

    Raises Rejected(NONFINITE | REEXECUTION) unless dtype and values are the same. Zeros of both signs are equal.
    """
    if claimed.dtype != exact.dtype or claimed.shape != exact.shape:
        raise Rejected(
            Reason.REEXECUTION,
            f"{claimed.dtype}{claimed.shape} where the op gives {exact.dtype}{exact.shape}",
        )
    wrong = claimed != exact
    if is_float(claimed.dtype):
        wrong &= ~(np.isnan(claimed) & np.isnan(exact))
    _refuse(wrong, claimed, exact)
    return 0.0


def compare_nearest(claimed: Values, exact: Array) -> float:
    """Check the result of one IEEE operation: its bits are `exact` rounded to nearest even, or 0 where flushed.

    Rounding twice, through float64 and float32, is harmless here: each has at least 2 p + 2 bits (Figueroa 1995).
    Raises Rejected(NONFINITE | REEXECUTION).
    """
    rounded = exact.astype(claimed.dtype)
    flushed = (claimed == 0) & (np.abs(exact) < FORMATS[claimed.dtype].flush)
    return compare_equal(claimed, np.where(flushed, claimed, rounded))


def compare_between(claimed: Values, low: Values, high: Values) -> float:
    """Check integers that a rounding before them leaves a choice of: low <= claimed <= high.

    Raises Rejected(REEXECUTION).
    """
    exact = np.broadcast_to(low, claimed.shape)
    _refuse(~((claimed >= low) & (claimed <= high)), claimed, exact)
    return 0.0


def unit(dtype: np.dtype) -> float:
    """Relative error of one operation inside a kernel: formats of at most 32 bits are computed in fp32.

    For fp64 the verifier's own float64 evaluation errs as much as the kernel: 2^-52 counts both.
    """
    return U32 if FORMATS[dtype].p <= 24 else 2.0**-52


def second_rounding(z: Array, dtype: np.dtype) -> Array | float:
    """What rounding to fp32 before a narrower format can add."""
    return U32 * np.abs(z) if FORMATS[dtype].p < 24 else 0.0


def accumulation(count: int) -> float:
    """alpha(K) of numerics-local: a sum of K terms, in any order, errs by at most alpha(K) u sum|terms|."""
    return float(min(count + 2.0, 16.0 + 2.0 * count**0.5))


def _refuse(wrong: npt.NDArray[np.bool_], claimed: Values, exact: Values) -> None:
    if wrong.any():
        where = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        found, wanted = claimed[where], exact[where]
        reason = Reason.REEXECUTION if np.isfinite(found) and np.isfinite(wanted) else Reason.NONFINITE
        detail = f"{int(wrong.sum())} of {wrong.size} entries differ, first {found} where {wanted} follows"
        raise Rejected(reason, detail)
