"""Freivalds' test of matrix products: T1 on whole rows, T3 on entries, and an exact one for integers.

Source: numerics-matmul SPECIFICATION S2 to S6. A claim y = x w is folded with Gaussian vectors r, drawn after
the commitment: y r - x (w r) is normal with the size of the row's error, so a chi-square quantile bounds what
honest rounding gives. Entries are recomputed in float64 where few rows are at hand, and spot-checked otherwise.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import sqrt

import ml_dtypes
import numpy as np
import numpy.typing as npt
from scipy.special import chdtri

from gpu.kernels import entries as kernel
from gpu.kernels import ring
from gpu.kernels.fold import Fold, column_energy, fold
from gpu.kernels.widen import Raw
from gpu.rounding import EVALUATION, FORMATS, Array
from proof.errors import Reason, Rejected
from proof.policy import Policy
from proof.sampling import Draw

FEW = 3  # rows a challenge vector, up to which all of them are recomputed: what a policy draws is always
PREFIXES = 16  # blocks of k after which the partial sums of a row are probed
WIDEST_FOLD = 4096  # columns: a wider row hides one wrong entry from T1 (S5)
LONG = 8192  # terms beyond which T3 takes twice the entries
UNDERFLOW = 2.0**-126  # what each product may lose where subnormal numbers are flushed
CHUNK = 2**21  # entries recomputed at once


@dataclass(frozen=True)
class Profile:
    """How an engine accumulates: an error is at most u (alpha k + beta sqrt k + constant + gamma k coherence) M."""

    u: float
    alpha: float
    beta: float
    gamma: float
    constant: float

    def incoherent(self, k: int) -> float:
        return self.u * (self.alpha * k + self.beta * sqrt(k) + self.constant)

    def accumulation(self, k: int, coherence: Array) -> Array:
        return self.incoherent(k) + self.u * self.gamma * k * np.minimum(1.0, coherence)


FP32 = Profile(2.0**-24, 0, 2, 0.5, 16)
TC = Profile(2.0**-24, 0.25, 8, 1, 16)  # matrix cores with an fp32 accumulator
PROFILES = {
    np.dtype(np.float64): Profile(2.0**-53, 0, 2, 0.5, 16),
    np.dtype(np.float32): FP32,
    np.dtype(np.float16): TC,
    np.dtype(ml_dtypes.bfloat16): TC,
}


@dataclass(frozen=True)
class Product:
    """The claim y = x w + bias, for y of a float dtype and `rounds` roundings to it.

    x (m, k) and w (k, n) are the operands as multiplied; bias broadcasts to (m, n), exact in float64.
    """

    x: Raw
    w: Raw
    y: Raw
    bias: Array | float = 0.0
    rounds: int = 1
    label: str = field(default="product", kw_only=True)  # of its draws, unlike any other product's of the node

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.x.shape[1], self.w.shape[1]

    @property
    def profile(self) -> Profile:
        return PROFILES[self.y.dtype]


def check(product: Product, policy: Policy, draw: Draw, rows: int | None = None) -> float:
    """The largest error seen, relative to what an honest engine may make. Raises Rejected.

    Few rows are recomputed, which sees every entry; many are folded (T1) and spot-checked (T3), where that takes
    fewer multiplications. `rows` is how many rows the node has in all, which share the false alarms allowed.
    """
    m, _, n = product.shape
    if m == 0 or n == 0:
        return 0.0
    if folds(product.shape, policy):
        return max(check_rows(product, policy, draw, rows or m), check_entries(product, policy, draw))
    return recompute(product)


def folds(shape: tuple[int, int, int], policy: Policy) -> bool:
    """Whether a product of shape (m, k, n) is folded: many rows, and fewer multiplications than recomputing them."""
    m, k, n = shape
    cost = policy.challenges * (k * n + m * (k + n)) + policy.entries * k
    return m > FEW * policy.challenges and m * k * n > cost


def recompute(product: Product) -> float:
    """S5 for every entry. S and P, which only widen a tolerance, are left out until an entry fails without them."""
    m, _, n = product.shape
    step = max(1, CHUNK // max(n, 1))
    x, bias = product.x.astype(np.float64), _bias_rows(product)
    worst = 0.0
    for start in range(0, m, step):
        part = slice(start, start + step)
        operands = x[part], product.w, bias[part] if len(bias) > 1 else bias
        ratio, failed = _judge(product, kernel.statistics(*operands, full=False), product.y[part])
        if failed >= 0:
            ratio = _accept(product, kernel.statistics(*operands), product.y[part])
        worst = max(worst, ratio)
    return worst


def check_entries(product: Product, policy: Policy, draw: Draw) -> float:
    """T3 (S5): random entries of the product, all of them where it has no more than that."""
    m, k, n = product.shape
    count = entry_count(k, policy)
    if m * n <= count:
        return recompute(product)
    row, column = np.divmod(draw.entries(f"{product.label}/entries", count, m * n), n)
    bias = np.broadcast_to(product.bias, (m, n))[row, column]
    statistics = kernel.paired(product.x[row], kernel.columns(product.w, column), bias)
    return _accept(product, statistics[:, None], product.y[row, column][None])


def entry_count(k: int, policy: Policy) -> int:
    return policy.entries * (2 if k > LONG else 1)


def check_terms(x: Raw, w: Raw, y: Raw) -> float:
    """S5 for entries y (p,) that are sums of products of their own factors, x and w (p, k)."""
    statistics = kernel.paired(x, w.T, np.zeros(len(y)))
    return _accept(Product(x, w.T, y[None]), statistics[:, None], y[None])


def _judge(product: Product, statistics: Array, claimed: Raw) -> tuple[float, int]:
    """The largest error relative to its tolerance, and the first entry that exceeds it or -1."""
    if not (np.isfinite(statistics).all() and np.isfinite(claimed).all()):
        raise Rejected(Reason.NONFINITE, "NaN or infinity in a product")
    form, allowed = FORMATS[claimed.dtype], coefficients(claimed.dtype, product.shape[1], product.rounds)
    worst, failed = kernel.judge(statistics, claimed.astype(np.float64), (form.p, form.e_min), allowed)
    return float(worst), int(failed)


def coefficients(dtype: np.dtype, k: int, rounds: int) -> tuple[float, float, float, float]:
    """(c, g, r, t) of kernels/entries.py: what a sum of k terms, rounded so often to `dtype`, may be off."""
    profile = PROFILES[dtype]
    return (
        profile.incoherent(k) if k else 0.0,
        profile.u * profile.gamma * k,
        (rounds - 1) * FORMATS[dtype].u,
        k * _underflow(dtype),
    )


def _accept(product: Product, statistics: Array, claimed: Raw) -> float:
    ratio, failed = _judge(product, statistics, claimed)
    if failed >= 0:
        y, z = claimed.reshape(-1)[failed], statistics[0].reshape(-1)[failed]
        raise Rejected(Reason.REEXECUTION, f"an entry of a product is {y} where {z} follows")
    return ratio


# ---- S3, S4: T1, rows under a fold


@dataclass(frozen=True)
class Key:
    """What w is folded to: vectors r (s, n) with column weights d (n,), u = w r (s, k), and the squared norms nu (k,)
    of the rows of w d."""

    r: Array
    d: Array
    u: Array
    nu: Array


def prepare(w: Raw, normals: npt.NDArray[np.float32]) -> Key:
    """S3, from normals (s, n). Raises Rejected(NONFINITE)."""
    d = column_weights(column_energy(w))
    r = normals.astype(np.float64) * d
    folded = fold(w, r, d**2)
    if not np.isfinite(folded.energy).all():
        raise Rejected(Reason.NONFINITE, "NaN or infinity in the right factor of a product")
    return Key(r, d, np.ascontiguousarray(folded.sums.T), folded.energy)


def column_weights(energy: Array) -> Array:
    """Powers of two that bring columns of these mean squares to one scale; columns of zeros get the largest."""
    used = (energy > 0) & np.isfinite(energy)
    if not used.any():
        return np.ones_like(energy)
    weights = np.exp2(-(np.frexp(energy)[1] >> 1).astype(np.float64))
    return np.where(used, weights, weights[used].max())


def check_rows(product: Product, policy: Policy, draw: Draw, rows: int) -> float:
    """T1 (S4) in blocks of at most `WIDEST_FOLD` columns; `rows` share a false alarm rate of 2^-delta_bits."""
    n = product.shape[2]
    bias = _bias_rows(product)
    starts = range(0, n, WIDEST_FOLD)
    quantile = quantile_of(policy.challenges, policy.delta_bits, rows * len(starts))
    worst = 0.0
    for start in starts:
        part = slice(start, start + WIDEST_FOLD)
        w = np.ascontiguousarray(product.w[:, part])
        block = replace(product, w=w, y=product.y[:, part], bias=bias[:, part])
        normals = draw.normals(f"{product.label}/normals/{start}", (policy.challenges, block.shape[2]))
        worst = max(worst, _check_block(block, prepare(block.w, normals), quantile))
    return worst


def _check_block(product: Product, key: Key, quantile: float) -> float:
    right = fold(product.x, key.u, key.nu, min(PREFIXES, product.shape[1]))
    left = fold(product.y, key.r, key.d**2, dtype=product.y.dtype)
    return judge_rows(product, right, left, _bias_rows(product) @ key.r.T, key.d, quantile)


def judge_rows(
    product: Product, right: Fold, left: Fold, bias: Array, d: Array, quantile: float, evaluation: float = 0.0
) -> float:
    """S4 for rows whose sides are folded; `bias` (m or 1, s) is too. `evaluation` is the relative error of the folds
    where they were not made in float64."""
    m, k, n = product.shape
    if not (np.isfinite(right.energy).all() and np.isfinite(left.energy).all()):
        raise Rejected(Reason.NONFINITE, "NaN or infinity in a product")
    residual = np.sqrt(((left.sums - right.sums - bias) ** 2).sum(1))
    a, norm = np.sqrt(right.energy), np.sqrt(left.energy)
    form, profile = FORMATS[product.y.dtype], product.profile
    size = np.maximum(np.maximum(a, norm), np.sqrt(right.probe))
    coherence = np.divide(2 * size, sqrt(k) * a, out=np.ones(m), where=a > 0)
    bound = np.sqrt(left.rounding) + ((product.rounds - 1) * form.u + profile.accumulation(k, coherence)) * size
    bound += sqrt(d @ d) * (k * _underflow(product.y.dtype) + form.flush)
    threshold = quantile * (bound + evaluation * size) + EVALUATION * sqrt(k * n) * (a + norm)
    passes = np.isfinite(threshold) & (threshold > 0) & (residual <= threshold)
    if not np.any(product.bias):
        passes &= (a > 0) | (norm == 0)
    if not passes.all():
        i = int(np.argmin(passes))
        raise Rejected(Reason.FREIVALDS, f"{m - passes.sum()} of {m} rows of a product fail, first row {i}")
    return float((residual / threshold).max())


def _underflow(dtype: np.dtype) -> float:
    return FORMATS[dtype].flush if dtype == np.float64 else UNDERFLOW


@lru_cache
def quantile_of(challenges: int, delta_bits: int, rows: int) -> float:
    """c_s(delta) for delta = 2^-delta_bits / rows."""
    return sqrt(chdtri(challenges, 2.0**-delta_bits / rows))


def _bias_rows(product: Product) -> Array:
    """Bias as (m or 1, n)."""
    m, _, n = product.shape
    bias = np.asarray(product.bias, np.float64)
    rows = m if bias.ndim == 2 and len(bias) > 1 else 1
    return np.broadcast_to(bias, (rows, n))


# ---- S6: integers

EXACT_TERMS = 33025  # k up to which a sum of 255 * 255 stays below 2^31
TILE = 2**17  # elements of w widened at once, 1 MiB
FOLDS = 2  # vectors of 31 bits: a wrong row escapes with probability 2^-62

Integers = npt.NDArray[np.int64]


def check_integers(
    x: Raw, w: Raw, y: Raw, zeros: tuple[Integers, Integers], policy: Policy, draw: Draw, label: str
) -> None:
    """Check y = (x - x_zero)(w - w_zero) for 8-bit x (m, k), w (k, n) and int32 y, exactly.

    Zero points are (m or 1, 1) and (1, n or 1). Beyond `EXACT_TERMS` an int32 sum may wrap, which no fold can
    judge, and the product is recomputed. Raises Rejected(FREIVALDS | REEXECUTION).
    """
    m, k, n = x.shape[0], x.shape[1], w.shape[1]
    if not folds_integers((m, k, n), policy):
        product = exact_product(x, w, zeros).astype(np.int32)
        if (product != y).any():
            at = np.unravel_index(int(np.argmax(product != y)), y.shape)
            raise Rejected(Reason.REEXECUTION, f"an integer product is {y[at]} where {product[at]} follows")
        return
    r = draw.words31(f"{label}/words", (FOLDS, n))
    u = ring.fold(w, r.astype(np.int32)) - (zeros[1] * r).sum(1)
    left = ring.fold(x, np.ascontiguousarray(u.T)) - zeros[0] * u.sum(0)
    wrong = (left != ring.fold(y, r.astype(np.int32))).any(1)
    if wrong.any():
        raise Rejected(Reason.FREIVALDS, f"{wrong.sum()} of {m} rows of an integer product fail")


def folds_integers(shape: tuple[int, int, int], policy: Policy) -> bool:
    """Whether an integer product of shape (m, k, n) is folded: many rows, fewer multiplications, no sum that wraps."""
    m, k, n = shape
    return m > FEW * policy.challenges and m * k * n > FOLDS * (k * n + m * (k + n)) and k <= EXACT_TERMS


def exact_product(x: Raw, w: Raw, zeros: tuple[Integers, Integers]) -> Integers:
    """(x - x_zero)(w - w_zero), exact: float64 holds every partial sum, all below 2^53."""
    left = (x - zeros[0]).astype(np.float64)
    step = max(1, TILE // max(len(w), 1))
    tiles = [left @ w[:, j : j + step].astype(np.float64) for j in range(0, w.shape[1], step)]
    product = np.concatenate(tiles, axis=1) if tiles else np.zeros((len(left), 0))
    exact: Integers = (product - left.sum(1)[:, None] * zeros[1]).astype(np.int64)
    return exact
