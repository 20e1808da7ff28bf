"""T1 and the integer test on a device: folds are those of the reference, and what is cleared passes there too."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from gpu import freivalds
from gpu.clearing import folds, integers
from gpu.clearing.operands import Operands
from gpu.freivalds import Product
from gpu.kernels.fold import fold_reference
from gpu.kernels.ring import fold_reference as ring_reference
from gpu.ops.contraction import OPS
from gpu.rounding import FORMATS
from proof.errors import Rejected
from proof.policy import policy
from proof.sampling import Draw
from tests.gpu.clearing import agree, call_of, taken
from tests.gpu.nodes import Case, assembled, claims

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
FULL = policy("full")
ERROR = {np.dtype(np.float32): 1e-13, np.dtype(np.float16): 1e-6, BF16: 1e-6}
SHAPES = [(1, 1, 1), (1, 7, 300), (40, 1, 9), (33, 130, 17), (130, 24, 40), (3, 1100, 8), (20, 64, 1)]


def draw(seed):
    return Draw(int(seed).to_bytes(32, "big"), "test")


def uploaded(device, product, transposed=False, shuffled=False):
    """A product's operands: w lies as (n, k) if `transposed`; x is scattered among other rows if `shuffled`."""
    (m, k, n), rng = product.shape, np.random.default_rng(0)
    at = np.arange(m)
    x = product.x
    if shuffled:
        at = rng.permutation(2 * m)[:m]
        x = np.full((2 * m, k), np.nan, product.x.dtype)
        x[at] = product.x
    w, strides = (product.w.T, (1, k)) if transposed else (product.w, (n, 1))
    before = np.full(shuffled * 3, np.nan, w.dtype)
    bias = np.atleast_2d(np.asarray(product.bias, np.float64))
    bias = np.broadcast_to(bias, (len(bias), n))
    return Operands(
        x=device.array(x),
        x_at=device.array(at),
        w=device.array(np.concatenate([before, w.reshape(-1)])),
        w_strides=strides,
        w_first=len(before),
        y=device.array(product.y),
        bias=device.array(bias),
        bias_rows=len(bias) if bias.any() else 0,
        k=k,
        dtype=product.y.dtype,
    )


def product_of(x, w, bias=0.0):
    with np.errstate(over="ignore", invalid="ignore"):
        y = (x.astype(np.float32) @ w.astype(np.float32) + np.asarray(bias, np.float32)).astype(x.dtype)
    return Product(x, w, y, bias)


def honest(rng, shape, dtype, scale=1.0):
    m, k, n = shape
    x = (rng.standard_normal((m, k)) * scale).astype(dtype)
    w = (rng.standard_normal((k, n)) * np.exp2(rng.integers(-3, 4, n)) / np.sqrt(k)).astype(dtype)
    return product_of(x, w)


def accepted(product, seed):
    try:
        return freivalds.check_rows(product, FULL, draw(seed), len(product.x))
    except Rejected:
        return None


def judged(device, product, seed, **form):
    """Ratio, entries judged and entries left, of T1 on the device."""
    operands, mark = uploaded(device, product, **form), device.zeros(3, np.uint64)
    n = product.shape[2]
    starts = range(0, n, freivalds.WIDEST_FOLD)
    quantile = freivalds.quantile_of(8, FULL.delta_bits, len(product.x) * len(starts))
    for start in starts:
        width = min(freivalds.WIDEST_FOLD, n - start)
        normals = device.array(draw(seed).normals(f"product/normals/{start}", (8, width)))
        folds.clear_rows(operands, device, mark, normals, quantile, start)
    worst, count, left = device.numpy(mark)
    return float(worst.view(np.float64)), int(count), int(left)


def agrees(device, product, seed=0, **form):
    """Whether T1 on the device clears the product; it must not where the reference refuses."""
    worst, count, left = judged(device, product, seed, **form)
    ratio = accepted(product, seed)
    assert count == product.y.size
    if left == 0:
        assert ratio is not None
        assert worst == pytest.approx(ratio, abs=1e-9 if product.y.dtype == np.float32 else 2e-3)
    return left == 0


@pytest.mark.parametrize("form", [{}, {"transposed": True}, {"shuffled": True}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folds_are_the_reference(device, dtype, shape, form):
    product = honest(np.random.default_rng(sum(shape)), shape, dtype)
    operands, normals = uploaded(device, product, **form), draw(1).normals("normals", (8, shape[2]))
    key, mark = freivalds.prepare(product.w, normals), device.zeros(3, np.uint64)
    vectors = folds.weigh(operands, device, mark, device.array(normals), operands.w_first)
    np.testing.assert_array_equal(device.numpy(vectors.scales), key.d)
    np.testing.assert_array_equal(device.numpy(vectors.values), key.r.T)
    assert device.numpy(vectors.norm)[0] == pytest.approx((key.d**2).sum())
    assert not device.numpy(mark).any()

    factor = folds.fold_w(operands, device, vectors, operands.w_first)
    error = ERROR[dtype]
    size = np.sqrt(key.nu).max() * np.sqrt(8)
    np.testing.assert_allclose(device.numpy(factor.values), key.u.T, rtol=error, atol=error * size)
    np.testing.assert_allclose(device.numpy(factor.scales), np.sqrt(key.nu), rtol=error)

    right = fold_reference(product.x, key.u, key.nu, min(16, shape[1]))
    left = fold_reference(product.y, key.r, key.d**2, dtype=dtype)
    unit = FORMATS[dtype].u ** 2
    for found, known in (
        (folds.fold_x(operands, device, factor), right),
        (folds.fold_y(operands, device, vectors, 0), left),
    ):
        sums, marks = device.numpy(found.sums), device.numpy(found.marks)
        size = np.sqrt(known.energy).max() + 1e-30
        np.testing.assert_allclose(sums, known.sums, rtol=error, atol=10 * error * size)
        np.testing.assert_allclose(marks[:, 0], known.energy, rtol=10 * error)
        np.testing.assert_allclose(marks[:, 1], known.probe, rtol=30 * error, atol=30 * error * size**2)
        if found is not right and known is left:
            np.testing.assert_allclose(marks[:, 2] * unit, known.rounding, rtol=10 * error)


@pytest.mark.parametrize("form", [{}, {"transposed": True, "shuffled": True}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_rows_are_cleared(device, dtype, shape, form):
    assert agrees(device, honest(np.random.default_rng(sum(shape)), shape, dtype), **form)


# ---- what is cleared, and what is not

FORGERIES = {
    "zeros": lambda y, rng: np.zeros_like(y),
    "noise": lambda y, rng: rng.standard_normal(y.shape).astype(y.dtype),
    "rows shifted": lambda y, rng: np.roll(y, 1, axis=0),
    "columns shifted": lambda y, rng: np.roll(y, 1, axis=1),
    "one row negated": lambda y, rng: np.where(np.arange(len(y))[:, None] == 3, -y, y),
    "one row doubled": lambda y, rng: np.where(np.arange(len(y))[:, None] == 3, y + y, y),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forged_rows_are_never_cleared(device, dtype):
    for trial, forge in enumerate(FORGERIES.values()):
        rng = np.random.default_rng(trial)
        product = honest(rng, (18, 40, 30), dtype)
        forged = replace(product, y=forge(product.y, rng).astype(dtype))
        assert not agrees(device, forged, trial)


def bent(product, amount):
    """Row 3 off by `amount` along a fixed direction: through the bias, which is exact in float64."""
    bias = np.zeros(product.y.shape)
    bias[3] = amount * np.random.default_rng(1).standard_normal(bias.shape[1])
    return replace(product, bias=bias)


def edge_of(product, seed):
    """The amount at which the reference begins to refuse."""
    low, high = 0.0, 1.0
    while accepted(bent(product, high), seed) is not None:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if accepted(bent(product, middle), seed) is None else (middle, high)
    return low


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_the_threshold_only_what_the_reference_passes_is_cleared(device, dtype):
    margin = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 0.1, BF16: 0.02}[dtype]
    for seed in range(2):
        product = honest(np.random.default_rng(seed), (9, 30 + 100 * seed, 24), dtype)
        edge = edge_of(product, seed)
        verdicts = [agrees(device, bent(product, edge * (1 + by)), seed) for by in (-1e-4, -1e-7, 0, 1e-7, 1e-4, 1)]
        assert not any(verdicts[3:])
        assert agrees(device, bent(product, edge * (1 - margin)), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_errors_of_every_size(device, dtype):
    rng, seen = np.random.default_rng(5), set()
    for trial in range(25):
        product = honest(rng, (5, rng.integers(1, 60), rng.integers(1, 40)), dtype)
        noise = rng.standard_normal(product.y.shape) * np.exp2(rng.uniform(-24, 0))
        forged = replace(product, y=(product.y.astype(np.float64) * (1 + noise)).astype(dtype))
        seen.add((agrees(device, forged, trial), accepted(forged, trial) is not None))
    assert {(True, True), (False, False)} <= seen <= {(True, True), (False, False), (False, True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["x", "w", "y"])
def test_what_is_not_finite_is_left(device, dtype, place):
    for value in (np.nan, np.inf, -np.inf):
        product = honest(np.random.default_rng(0), (6, 20, 9), dtype)
        array = getattr(product, place).copy()
        array[2, 1] = value
        assert not agrees(device, replace(product, **{place: array}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_of_zeros(device, dtype):
    product = honest(np.random.default_rng(3), (20, 30, 40), dtype)
    x, w = product.x.copy(), product.w.copy()
    x[4], w[:, 7] = 0, 0
    zeros = product_of(x, w)
    assert agrees(device, zeros)
    assert agrees(device, zeros, transposed=True)
    assert agrees(device, replace(zeros, y=np.where(zeros.y == 0, -zeros.y, zeros.y)))
    for tiny in (1e-7, 1e-30, 1e-40):
        y = zeros.y.copy()
        y[4, 1] = tiny
        if y[4, 1]:
            assert not agrees(device, replace(zeros, y=y))
    agrees(device, product_of(np.zeros_like(x), w))
    agrees(device, product_of(x, np.zeros_like(w)))


SCALES = [(1e-30, 1e30), (2.0**-60, 2.0**-60), (2.0**110, 1.0), (1e-38, 1.0), (1e-20, 1e-25), (1e-38, 2.0**59)]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_extreme_scales_are_left_or_right(device, dtype, scales):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((10, 20)) * scales[0]).astype(dtype)
    w = (rng.standard_normal((20, 30)) * scales[1]).astype(dtype)
    product = product_of(x, w)
    agrees(device, product)
    for forge in (FORGERIES["noise"], FORGERIES["one row doubled"]):
        forged = replace(product, y=forge(product.y, rng).astype(dtype))
        assert not agrees(device, forged) or scales[0] * scales[1] < 2.0**-120  # where results may be flushed


def test_small_numbers_of_float16(device):
    product = honest(np.random.default_rng(2), (20, 30, 40), np.float16, scale=2.0**-16)
    assert (np.abs(product.y) < 2.0**-14).mean() > 0.5
    assert agrees(device, product)


def test_a_fold_that_overflows_is_left(device):
    product = honest(np.random.default_rng(2), (10, 64, 8), np.float16, scale=1000.0)
    assert agrees(device, product)
    huge = product_of((product.x * np.float16(10)).astype(np.float16), product.w * np.float16(8))
    assert np.isinf(huge.y).any()
    assert not agrees(device, huge)


COHERENT = {
    "constant": lambda rng, m, k, n: (np.full((m, k), 0.7), np.full((k, n), 0.3)),
    "positive": lambda rng, m, k, n: (rng.random((m, k)), rng.random((k, n))),
    "one direction": lambda rng, m, k, n: (np.full((m, k), 1 / 3), np.tile(rng.standard_normal(n), (k, 1))),
    "heavy": lambda rng, m, k, n: (
        rng.standard_t(3, (m, k)) * np.exp(rng.normal(0, 1, k)), rng.standard_t(5, (k, n)) * np.exp(rng.normal(0, 1, n))
    ),
    "cancelling": lambda rng, m, k, n: (np.resize([1.0, -1.0], (m, k)), rng.standard_normal((1, n)) + np.zeros((k, 1))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("data", COHERENT.values(), ids=COHERENT.keys())
def test_float32_folds_err_less_than_is_allowed(device, dtype, data):
    """The residual of both folds, against float64, as a share of what judge_rows takes off for it."""
    shape = m, k, n = 4, 600, 2048
    x, w = (part.astype(dtype) for part in data(np.random.default_rng(0), *shape))
    product, normals = product_of(x, w), draw(0).normals("normals", (8, n))
    key, operands = freivalds.prepare(w, normals), uploaded(device, product)
    vectors = folds.weigh(operands, device, device.zeros(3, np.uint64), device.array(normals), 0)
    right = folds.fold_x(operands, device, folds.fold_w(operands, device, vectors, 0))
    left = folds.fold_y(operands, device, vectors, 0)
    exact_right, exact_left = fold_reference(x, key.u, key.nu, 16), fold_reference(product.y, key.r, key.d**2)
    size = np.sqrt(np.maximum(np.maximum(exact_right.energy, exact_left.energy), exact_right.probe))
    allowed = 8.6 * 2.0**-24 * 48 * size
    for found, exact in ((right, exact_right), (left, exact_left)):
        off = np.sqrt(((device.numpy(found.sums) - exact.sums) ** 2).sum(1))
        assert (off <= allowed / 10).all(), (off / allowed).max()


def test_wide_products_are_judged_in_blocks(device):
    rng = np.random.default_rng(3)
    product = honest(rng, (3, 8, 4096 * 2 + 5), BF16)
    assert agrees(device, product)
    for column in (0, 5000, 8196):
        y = product.y.copy()
        y[1, column] = y[1, column] * 2 + 100
        assert not agrees(device, replace(product, y=y))


@pytest.mark.parametrize("shape", [(1, 24), (9, 24), (9, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_is_part_of_the_product(device, dtype, shape):
    rng = np.random.default_rng(3)
    base = honest(rng, (9, 70, 24), dtype)
    product = product_of(base.x, base.w, rng.standard_normal(shape).astype(dtype).astype(np.float64) * 10)
    assert agrees(device, product)
    assert not agrees(device, replace(product, bias=product.bias * 1.2))


# ---- integers

EIGHT_BITS = [np.dtype(np.int8), np.dtype(np.uint8)]
INTEGER_SHAPES = {
    "odd": ((33, 50), (50, 37)),
    "aligned": ((40, 64), (64, 96)),
    "batched": ((2, 30, 20), (2, 20, 21)),
    "a matrix for all": ((2, 15, 20), (20, 21)),
    "many terms": ((26, 1100), (1100, 6)),
}


@pytest.mark.parametrize("dtype", [*EIGHT_BITS, np.dtype(np.int32)], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 700), (130, 3), (9, 128), (5, 1200)], ids=str)
def test_integer_folds_are_the_reference(device, dtype, shape):
    rng = np.random.default_rng(sum(shape))
    limits = np.iinfo(dtype)
    matrix = rng.integers(limits.min, limits.max, shape, endpoint=True, dtype=dtype)
    (m, n), words, wide = shape, rng.integers(0, 2**31, (2, shape[1])), rng.integers(0, 2**63, (2, shape[1]))
    rows, columns = (device.array(np.append(stored.dtype.type(7), stored)) for stored in (matrix, matrix.T))
    by_rows, by_columns = integers.Rows(rows, dtype, 1, n, m, n), integers.Rows(columns, dtype, 1, m, n, m)
    expected = ring_reference(matrix, words).T.view(np.uint64)
    np.testing.assert_array_equal(
        device.numpy(integers.fold_matrix(device, by_rows, device.array(words), False)), expected
    )
    if dtype == np.int32:
        return
    np.testing.assert_array_equal(
        device.numpy(integers.fold_matrix(device, by_columns, device.array(words), True)), expected
    )
    expected = ring_reference(matrix, wide).T.view(np.uint64)
    np.testing.assert_array_equal(
        device.numpy(integers.fold_rows(device, by_rows, device.array(wide), wide=True)), expected
    )


def integer_run(rng, shapes, kinds, zeros):
    x, w = (
        rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, shape, endpoint=True, dtype=kind)
        for kind, shape in zip(kinds, shapes, strict=True)
    )
    x_zero = rng.integers(0, 100, zeros[0], dtype=np.int64).astype(kinds[0])
    w_zero = rng.integers(0, 100, zeros[1], dtype=np.int64).astype(kinds[1])
    left = x.astype(np.int64) - (x_zero[..., None] if x_zero.ndim else x_zero)
    y = (left @ (w.astype(np.int64) - w_zero)).astype(np.int32)
    return assembled(Case("MatMulInteger", [x, w, x_zero, w_zero], constant=(1,)), [y])


@pytest.mark.parametrize("kinds", [(a, b) for a in EIGHT_BITS for b in EIGHT_BITS], ids=str)
@pytest.mark.parametrize("shapes", INTEGER_SHAPES.values(), ids=INTEGER_SHAPES.keys())
def test_integer_products_are_cleared_and_no_wrong_row_is(device, shapes, kinds):
    rng = np.random.default_rng(0)
    zeros = ((shapes[0][-2],), (shapes[1][-1],)) if len(shapes[0]) == 2 else ((), ())
    run, op = integer_run(rng, shapes, kinds, zeros), OPS["", "MatMulInteger"]
    rows = (np.arange(run.site.outputs[0].rows),)
    honest = claims(run, rows)
    assert agree(device, op, call_of(op, run, rows, honest, "full"))
    for change in (-1, 1, 2**20):
        y = honest[0].copy()
        y[rng.integers(len(y)), rng.integers(y.shape[1])] += change
        assert not agree(device, op, call_of(op, run, rows, [y], "full"))
    for lie in (np.zeros_like(honest[0]), honest[0][::-1].copy(), np.roll(honest[0], 1, axis=1)):
        assert not agree(device, op, call_of(op, run, rows, [lie], "full"))


def test_what_the_reference_recomputes_is_not_taken(device):
    run, op = integer_run(np.random.default_rng(0), ((20, 30), (30, 9)), EIGHT_BITS, ((), ())), OPS["", "MatMulInteger"]
    rows = (np.arange(20),)
    assert not taken(device, op, call_of(op, run, rows, claims(run, rows), "full"))
