"""T1, T3 and the integer test against plain NumPy, the edges of numerics-matmul section 6, and forgeries."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gpu import freivalds
from gpu.freivalds import Product, check_entries, check_integers, check_rows, exact_product, recompute
from gpu.kernels import entries, fold, ring
from gpu.rounding import FORMATS, half_ulp
from proof.errors import Reason, Rejected
from proof.policy import policy
from proof.sampling import Draw

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float32), np.dtype(np.float16), BF16, np.dtype(np.float64)]
FULL = policy("full")
CHECKS = {
    "rows recomputed": recompute,
    "T1": lambda product: check_rows(product, FULL, Draw(bytes(32), "test"), len(product.x)),
    "T3": lambda product: check_entries(product, FULL, Draw(bytes(32), "test")),
}
ZEROS = (np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))


def draw(seed):
    return Draw(int(seed).to_bytes(32, "big"), "test")


def honest(rng, shape=(24, 70, 48), dtype=np.float32, bias=None):
    """A product by BLAS in float32 (float64 for float64), rounded once."""
    m, k, n = shape
    dtype = np.dtype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    x, w = rng.standard_normal((m, k)).astype(dtype), (rng.standard_normal((k, n)) / np.sqrt(k or 1)).astype(dtype)
    return product_of(x, w, wide, bias)


def product_of(x, w, wide=np.float32, bias=None):
    y = x.astype(wide) @ w.astype(wide)
    with np.errstate(over="ignore"):
        return Product(
            x, w, (y if bias is None else y + bias.astype(wide)).astype(x.dtype), 0.0 if bias is None else bias
        )


def claiming(product, change):
    y = product.y.copy()
    change(y)
    return replace(product, y=y)


def rejected(call, *arguments):
    with pytest.raises(Rejected) as caught:
        call(*arguments)
    return caught.value.reason


# ---- the definition, in NumPy


def reference_rows(product, normals, delta):
    """S3 and S4, row by row: residual over threshold."""
    x, w, y = (part.astype(np.float64) for part in (product.x, product.w, product.y))
    form, profile = FORMATS[product.y.dtype], freivalds.PROFILES[product.y.dtype]
    (k, n), s = w.shape, len(normals)
    rms = np.sqrt((w**2).mean(0))
    d = np.exp2(-np.round(np.log2(rms)))
    r = normals.astype(np.float64).T * d[:, None]
    u, nu = w @ r, ((w * d) ** 2).sum(1)
    ratios = []
    for xi, yi in zip(x, y, strict=True):
        partial, probe = np.zeros(s), 0.0
        for block in range(16):
            part = slice(block * k // 16, (block + 1) * k // 16)
            partial = partial + xi[part] @ u[part]
            probe = max(probe, (partial**2).mean())
        a, norm = np.sqrt((xi**2) @ nu), np.linalg.norm(yi * d)
        size = max(a, norm, np.sqrt(probe))
        coherence = min(1.0, 2 * size / (np.sqrt(k) * a))
        c = profile.u * (
            profile.alpha * k + profile.beta * np.sqrt(k) + profile.constant + profile.gamma * k * coherence
        )
        bound = np.linalg.norm(half_ulp(yi, product.y.dtype) * d) + c * size
        underflow = 2.0**-1022 if product.y.dtype == np.float64 else 2.0**-126
        bound += np.linalg.norm(d) * (k * underflow + (0.0 if product.y.dtype == np.float16 else 2.0**form.e_min))
        threshold = np.sqrt(stats.chi2.isf(delta, s)) * bound + 2.0**-50 * np.sqrt(k * n) * (a + norm)
        ratios.append(np.linalg.norm(yi @ r - partial) / threshold)
    return np.array(ratios)


def reference_entries(product):
    """S5 for every entry: error over tolerance."""
    x, w, y = (part.astype(np.float64) for part in (product.x, product.w, product.y))
    profile, k = freivalds.PROFILES[product.y.dtype], product.x.shape[1]
    terms = x[:, :, None] * w[None]
    z, s, a = terms.sum(1), np.abs(terms).sum(1), np.sqrt((terms**2).sum(1))
    p = np.abs(np.cumsum(terms, 1)).max(1)
    slack = profile.accumulation(k, 2 * p / s) * np.maximum(a, p)
    underflow = 2.0**-1022 if product.y.dtype == np.float64 else 2.0**-126
    return np.abs(y - z) / (half_ulp(y, product.y.dtype) + slack + k * underflow + 2.0**-50 * s)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)  # in float64 the residual is the check's own rounding
def test_t1_is_the_specification(dtype):
    rng = np.random.default_rng(1)
    product = honest(rng, (20, 90, 33), dtype)
    product = replace(product, w=(product.w.astype(np.float64) * np.exp2(rng.integers(-3, 4, 33))).astype(dtype))
    product = product_of(product.x, product.w, np.float64 if dtype == np.float64 else np.float32)
    normals = draw(3).normals("product/normals/0", (8, 33))
    expected = reference_rows(product, normals, 2.0**-40 / 20).max()
    assert check_rows(product, FULL, draw(3), 20) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_t3_is_the_specification(dtype):
    product = honest(np.random.default_rng(2), (5, 90, 7), dtype)
    everything = reference_entries(product).max()
    assert check_entries(product, FULL, draw(0)) <= 1.0
    row, column = np.divmod(np.arange(35), 7)
    paired = entries.paired(product.x[row], entries.columns(product.w, column), np.zeros(35))
    assert freivalds._accept(product, paired[:, None], product.y.reshape(1, -1)) == pytest.approx(everything, rel=1e-6)
    assert recompute(product) >= everything * (1 - 1e-9)  # S and P only widen a tolerance


@given(
    st.integers(0, 9),
    st.integers(0, 130),
    st.integers(1, 300),
    st.sampled_from([*FLOATS, np.dtype(np.int8)]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_kernels_are_their_references(m, k, n, dtype, transposed, seed):
    rng = np.random.default_rng(seed)
    x, bias = rng.standard_normal((m, k)), rng.standard_normal((1, n))
    w = (rng.standard_normal((k, n)) * 20).astype(dtype)
    w = np.asfortranarray(w) if transposed else w
    expected = entries.statistics_reference(x, w, bias)
    np.testing.assert_allclose(entries.statistics(x, w, bias), expected, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(entries.statistics(x, w, bias, full=False)[:2], expected[:2], rtol=1e-11, atol=1e-9)


@given(
    st.integers(0, 70),
    st.integers(1, 300),
    st.integers(1, 8),
    st.integers(1, 16),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_folds_are_their_references(m, n, s, blocks, dtype, seed):
    rng = np.random.default_rng(seed)
    matrix, vectors, weights = rng.standard_normal((m, n)).astype(dtype), rng.standard_normal((s, n)), rng.random(n)
    mine, definition = (f(matrix, vectors, weights, blocks, dtype) for f in (fold.fold, fold.fold_reference))
    for name in ("sums", "energy", "probe", "rounding"):
        np.testing.assert_allclose(getattr(mine, name), getattr(definition, name), rtol=1e-10, atol=1e-12)
    if m:
        np.testing.assert_allclose(fold.column_energy(matrix), (matrix.astype(np.float64) ** 2).mean(0), rtol=1e-10)


@given(
    st.integers(0, 20),
    st.integers(0, 300),
    st.sampled_from([np.int8, np.uint8, np.int32]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_ring_folds_are_their_reference(m, n, dtype, transposed, wide):
    rng = np.random.default_rng(m * 1000 + n)
    limits = np.iinfo(dtype)
    matrix = rng.integers(limits.min, limits.max, (m, n), endpoint=True, dtype=dtype)
    matrix = np.asfortranarray(matrix) if transposed else matrix
    top, kind = (2**62, np.int64) if wide else (2**31, np.int32)
    vectors = rng.integers(0, top, (2, n)).astype(kind)
    np.testing.assert_array_equal(ring.fold(matrix, vectors), ring.fold_reference(matrix, vectors))


# ---- honest products


def heavy(rng, m, k, n, dtype):
    """Outlier channels and rows, column scales, shared means: what activations look like."""
    x = rng.standard_t(3, (m, k)) * np.exp(rng.normal(0, 1, k)) + rng.normal(0, 1, k)
    x[:, rng.integers(0, k)] *= 60
    x[rng.integers(0, m)] *= 20
    return x.astype(dtype), (rng.standard_t(5, (k, n)) * np.exp(rng.normal(0, 1, n)) / k).astype(dtype)


DATA = {
    "normal": lambda rng, m, k, n, dtype: (
        rng.standard_normal((m, k)).astype(dtype),
        rng.standard_normal((k, n)).astype(dtype),
    ),
    "heavy": heavy,
    "positive": lambda rng, m, k, n, dtype: (rng.random((m, k)).astype(dtype), rng.random((k, n)).astype(dtype)),
    "constant": lambda rng, m, k, n, dtype: (np.full((m, k), 0.7, dtype), np.full((k, n), 0.3, dtype)),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("data", DATA)
def test_no_honest_row_is_rejected(check, data):
    """3 checks x 4 kinds of data x 3 dtypes x 600 rows x 4 sizes: 86,400 rows."""
    rng = np.random.default_rng(7)
    for dtype in FLOATS[:3]:
        for k, n in ((64, 40), (256, 128), (384, 64), (1000, 16)):
            product = product_of(*DATA[data](rng, 600, k, n, dtype))
            assert CHECKS[check](product) <= 1.0


def test_sequential_float32_sums_are_honest():
    rng = np.random.default_rng(8)
    x, w = rng.random((20, 3000)).astype(np.float32), rng.random((3000, 24)).astype(np.float32)
    y = np.zeros((20, 24), np.float32)
    for i in range(3000):
        y += x[:, i : i + 1] * w[i]
    for check in CHECKS.values():
        assert check(Product(x, w, y)) <= 1.0


def test_a_column_of_one_row_decides_whether_to_fold():
    product = honest(np.random.default_rng(9), (25, 400, 300))
    kinds = {rows: freivalds.folds((rows, 400, 300), FULL) for rows in (1, 24, 25, 400)}
    assert kinds == {1: False, 24: False, 25: True, 400: True}
    assert freivalds.check(product, FULL, draw(0)) <= 1.0


# ---- forgeries

FORGERIES = {
    "zeros": lambda y, rng: y.fill(0),
    "noise": lambda y, rng: np.copyto(y, rng.standard_normal(y.shape).astype(y.dtype)),
    "rows shifted": lambda y, rng: np.copyto(y, np.roll(y, 1, axis=0)),
    "columns shifted": lambda y, rng: np.copyto(y, np.roll(y, 1, axis=1)),
    "two rows swapped": lambda y, rng: y.__setitem__([0, 1], y[[1, 0]]),
    "one row negated": lambda y, rng: y.__setitem__(3, -y[3]),
    "one row zero": lambda y, rng: y.__setitem__(3, 0),
    "one row doubled": lambda y, rng: y.__setitem__(3, y[3] + y[3]),
}


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("check", ["rows recomputed", "T1"])
def test_no_gross_forgery_is_accepted_in_a_thousand_tries(check, dtype):
    for trial in range(1008 // len(FORGERIES) // 3 + 1):
        rng = np.random.default_rng(trial)
        product = honest(rng, (18, 40, 30), dtype)
        for forge in FORGERIES.values():
            forged = claiming(product, lambda y, forge=forge, rng=rng: forge(y, rng))
            run = recompute if check != "T1" else lambda p, t=trial: check_rows(p, FULL, draw(t), 18)
            assert rejected(run, forged) == (Reason.FREIVALDS if check == "T1" else Reason.REEXECUTION)


def test_no_diffuse_forgery_passes_the_entries_in_a_thousand_tries():
    diffuse = ("zeros", "noise", "rows shifted", "columns shifted")
    for trial in range(1000 // len(diffuse)):
        rng = np.random.default_rng(trial)
        product = honest(rng, (18, 40, 30), FLOATS[trial % 3])
        for name in diffuse:
            forged = claiming(product, lambda y, name=name, rng=rng: FORGERIES[name](y, rng))
            assert rejected(check_entries, forged, FULL, draw(trial)) == Reason.REEXECUTION


def quantised(w, bits):
    top = 2 ** (bits - 1) - 1
    scale = np.abs(w.astype(np.float64)).max(0) / top
    return (np.round(w.astype(np.float64) / scale) * scale).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("check", ["rows recomputed", "T3"])
def test_quantised_weights_are_seen(check, dtype, bits):
    rng = np.random.default_rng(5)
    product = honest(rng, (32, 256, 200), dtype)
    y = (product.x.astype(np.float32) @ quantised(product.w, bits)).astype(dtype)
    assert rejected(CHECKS[check], replace(product, y=y)) == Reason.REEXECUTION


def test_entries_see_a_weight_change_of_three_in_ten_thousand_in_bfloat16():
    rng = np.random.default_rng(6)
    product = honest(rng, (300, 512, 400), BF16)
    w = product.w.astype(np.float32) * (1 + 3e-3 * rng.standard_normal(product.w.shape).astype(np.float32))
    forged = replace(product, y=(product.x.astype(np.float32) @ w).astype(BF16))
    assert rejected(CHECKS["T3"], forged) == Reason.REEXECUTION
    assert CHECKS["T1"](forged) <= 1.0  # the row test cannot see it (numerics-matmul section 0, point 3)


def test_small_columns_count_as_much_as_large_ones():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((40, 200)).astype(np.float32)
    w = (rng.standard_normal((200, 64)) * np.exp2(np.repeat([10.0, -10.0], 32))).astype(np.float32)
    product = product_of(x, w)
    assert CHECKS["T1"](product) <= 1.0
    assert rejected(
        CHECKS["T1"], claiming(product, lambda y: y.__setitem__((slice(None), slice(32, None)), y[:, 32:] / 2))
    )


# ---- edges (numerics-matmul section 6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "w", "y"])
@pytest.mark.parametrize("check", CHECKS)
def test_nothing_that_is_not_finite_passes(check, place, value):
    product = honest(np.random.default_rng(0), (6, 20, 9))
    array = getattr(product, place).copy()
    array[2 % len(array), 1] = value
    assert rejected(CHECKS[check], replace(product, **{place: array})) == Reason.NONFINITE


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("left", "right"), [(1e-30, 1e30), (1e18, 1e18), (1e-20, 1e-25), (1e-19, 1e-19)])
def test_extreme_scales_are_honest(check, left, right):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((30, 40)) * left).astype(np.float32)
    w = (rng.standard_normal((40, 50)) * right).astype(np.float32)
    assert CHECKS[check](product_of(x, w)) <= 1.0


@pytest.mark.parametrize("check", CHECKS)
def test_flushed_subnormal_results_are_honest(check):
    rng = np.random.default_rng(1)
    product = product_of((rng.standard_normal((30, 40)) * 1e-38).astype(np.float32), np.eye(40, dtype=np.float32))
    flushed = np.where(np.abs(product.y) < 2.0**-126, np.float32(0), product.y)
    assert CHECKS[check](product) <= 1.0
    assert CHECKS[check](replace(product, y=flushed)) <= 1.0


@pytest.mark.parametrize("check", CHECKS)
def test_huge_claims_are_ordinary_lies(check):
    product = honest(np.random.default_rng(2), (20, 30, 40))
    assert rejected(CHECKS[check], claiming(product, lambda y: y.fill(3.3e38)))
    spread = np.resize([3.3e38, -3.3e38], (20, 40)).astype(np.float32)
    assert rejected(CHECKS[check], replace(product, y=spread))


def test_an_infinite_threshold_accepts_nothing():
    x, w = np.full((3, 4), 1e200), np.full((4, 5), 1e200)
    for check in CHECKS.values():
        assert rejected(check, Product(x, w, np.zeros((3, 5)))) == Reason.NONFINITE


@pytest.mark.parametrize("check", CHECKS)
def test_a_row_of_zeros_gives_zeros(check):
    product = honest(np.random.default_rng(3), (20, 30, 40))
    x = product.x.copy()
    x[4] = 0
    product = product_of(x, product.w)
    minus = claiming(product, lambda y: y.__setitem__(4, -0.0))
    assert CHECKS[check](product) <= 1.0
    assert CHECKS[check](minus) <= 1.0
    if check != "T3":
        assert rejected(CHECKS[check], claiming(product, lambda y: y.__setitem__(4, 1e-30)))


def test_empty_products_are_true():
    for m, n in ((0, 3), (3, 0), (0, 0)):
        product = Product(np.zeros((m, 4), np.float32), np.zeros((4, n), np.float32), np.zeros((m, n), np.float32))
        assert freivalds.check(product, FULL, draw(0)) == 0.0


@pytest.mark.parametrize("bias", [None, np.array([[1.0, -2.0, 0.0]])])
def test_a_sum_of_nothing_is_the_bias(bias):
    product = product_of(np.zeros((4, 0), np.float32), np.zeros((0, 3), np.float32), bias=bias)
    assert freivalds.check(product, FULL, draw(0)) == 0.0
    for column in range(3):
        forged = claiming(product, lambda y, column=column: y.__setitem__((1, column), 1.5))
        assert rejected(freivalds.check, forged, FULL, draw(0)) == Reason.REEXECUTION


@pytest.mark.parametrize("shape", [(1, 1, 1), (30, 1, 20), (30, 40, 1), (1, 40, 1)])
@pytest.mark.parametrize("check", CHECKS)
def test_thin_products(check, shape):
    product = honest(np.random.default_rng(3), shape)
    assert CHECKS[check](product) <= 1.0
    assert rejected(CHECKS[check], claiming(product, lambda y: np.multiply(y, np.float32(1.1), out=y)))


def test_wide_rows_are_folded_in_blocks_that_each_stand_alone():
    rng = np.random.default_rng(3)
    product = honest(rng, (20, 8, 4096 * 2 + 5))
    assert CHECKS["T1"](product) <= 1.0
    for column in (0, 5000, 8196):
        forged = claiming(product, lambda y, column=column: y.__setitem__((7, column), y[7, column] + 1))
        assert rejected(CHECKS["T1"], forged) == Reason.FREIVALDS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("shape", [(1, 48), (24, 48), (24, 1)])
def test_a_bias_is_part_of_the_product(check, shape):
    rng = np.random.default_rng(3)
    product = honest(rng, (24, 70, 48), bias=rng.standard_normal(shape).astype(np.float32).astype(np.float64) * 100)
    assert CHECKS[check](product) <= 1.0
    assert rejected(CHECKS[check], replace(product, bias=product.bias * 1.01))


def test_a_long_sum_takes_twice_the_entries():
    product = honest(np.random.default_rng(0), (40, 8200, 40))
    assert check_entries(product, FULL, draw(0)) <= 1.0


# ---- integers


def integers(rng, shape, kinds=(np.uint8, np.int8)):
    m, k, n = shape
    x, w = (
        rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, size, endpoint=True, dtype=kind)
        for kind, size in zip(kinds, ((m, k), (k, n)), strict=True)
    )
    zeros = (rng.integers(0, 255, (m, 1)), rng.integers(-128, 127, (1, n)))
    return x, w, exact_product(x, w, zeros).astype(np.int32), zeros


@pytest.mark.parametrize("kinds", [(np.uint8, np.int8), (np.int8, np.int8), (np.uint8, np.uint8)])
@pytest.mark.parametrize("shape", [(3, 50, 20), (60, 50, 40), (1, 1, 1), (40, 0, 3), (0, 4, 4)])
def test_integer_products(shape, kinds):
    x, w, y, zeros = integers(np.random.default_rng(0), shape, kinds)
    expected = (x.astype(np.int64) - zeros[0]) @ (w.astype(np.int64) - zeros[1])
    np.testing.assert_array_equal(y, expected)
    check_integers(x, w, y, zeros, FULL, draw(0), "product")


@pytest.mark.parametrize(("rows", "reason"), [(16, Reason.REEXECUTION), (48, Reason.FREIVALDS)])
def test_one_wrong_integer_is_always_seen(rows, reason):
    rng = np.random.default_rng(1)
    x, w, y, zeros = integers(rng, (rows, 40, 30))
    for trial in range(1000):
        forged = y.copy()
        forged[rng.integers(rows), rng.integers(30)] += rng.choice([-1, 1, 2**20])
        assert rejected(check_integers, x, w, forged, zeros, FULL, draw(trial), "product") == reason


def test_sums_that_may_wrap_are_recomputed():
    k = freivalds.EXACT_TERMS + 40
    x, w = np.full((20, k), 255, np.uint8), np.full((k, 40), 255, np.uint8)
    wrapped = np.full((20, 40), k * 255 * 255, np.int64).astype(np.int32)
    check_integers(x, w, wrapped, ZEROS, FULL, draw(0), "product")
    assert rejected(check_integers, x, w, wrapped + 1, ZEROS, FULL, draw(0), "product") == Reason.REEXECUTION
