"""Products on a device: honest rows are cleared, no lie is, and nothing that the reference would refuse."""

import ml_dtypes
import numpy as np
import pytest

from gpu import freivalds
from gpu.clearing import folds, products
from gpu.clearing.operands import Operands
from gpu.kernels import entries
from gpu.ops.contraction import OPS
from gpu.rounding import half_ulp
from tests.gpu.clearing import accepts, agree, call_of, cleared, lies, taken
from tests.gpu.nodes import CONTRIBUTED, Case, assembled, claims

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
SHAPES = {
    "one entry": ((1, 1), (1, 1), {}),
    "one term": ((5, 1), (1, 7), {}),
    "odd": ((13, 33), (33, 130), {}),
    "more rows than a launch takes": ((29, 7), (7, 21), {}),
    "parts of k": ((3, 600), (600, 9), {}),
    "batched": ((2, 9, 17), (2, 17, 21), {}),
    "of activations": ((2, 9, 17), (2, 17, 21), {"constant": ()}),
    "a matrix for all": ((2, 9, 17), (17, 21), {}),
    "broadcast": ((2, 1, 3, 17), (3, 17, 9), {}),
    "a row": ((40,), (40, 30), {}),
    "a column": ((7, 40), (40,), {}),
    "transposed": ((9, 41), (29, 41), {"transB": 1}),
    "transposed, aligned": ((13, 64), (130, 64), {"transB": 1}),
    "a bias of a row": ((9, 17), (17, 21), {"bias": (21,)}),
    "a bias of an entry": ((9, 17), (17, 21), {"bias": (1,)}),
    "a bias of rows": ((29, 17), (17, 21), {"bias": (29, 21), "beta": 0.5}),
    "a bias of columns": ((9, 17), (17, 21), {"bias": (9, 1)}),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(products, "LEAST", 0)


def run_of(shapes, dtype, rng, scale=1.0):
    """An honest run: float32 sums of the exact products, rounded once."""
    left, right, attributes = shapes
    attributes = dict(attributes)
    bias, constant = attributes.pop("bias", None), attributes.pop("constant", (1,))
    x, w = (rng.standard_normal(left) * scale).astype(dtype), rng.standard_normal(right).astype(dtype)
    inputs = [x, w]
    with np.errstate(over="ignore"):
        y = x.astype(np.float32) @ (w.T if attributes.get("transB") else w).astype(np.float32)
        if bias is not None:
            inputs.append(rng.standard_normal(bias).astype(dtype))
            y = y + np.float32(attributes.get("beta", 1.0)) * inputs[-1].astype(np.float32)
        y = y.astype(dtype)
    op = "Gemm" if attributes or bias is not None else "MatMul"
    return OPS["", op], assembled(Case(op, inputs, attributes, constant=constant), [y])


def every_row(run):
    return (np.arange(run.site.outputs[0].rows),)


def matmul(x, w, y):
    return OPS["", "MatMul"], assembled(Case("MatMul", [x, w], constant=(1,)), [y])


# ---- calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_honest_products_are_cleared(device, shapes, dtype):
    op, run = run_of(shapes, dtype, np.random.default_rng(0))
    rows = every_row(run)
    call = call_of(op, run, rows, claims(run, rows))
    assert agree(device, op, call)
    assert cleared(device, op, call).ratio == pytest.approx(accepts(op, call).ratio, rel=1e-6)


def test_rows_that_were_drawn_are_cleared(device):
    op, run = run_of(((2, 3, 9, 17), (2, 3, 17, 21), {"constant": ()}), BF16, np.random.default_rng(0))
    rows = (np.array([0, 8, 13, 14, 40]),)
    honest = claims(run, rows)
    assert agree(device, op, call_of(op, run, rows, honest))
    assert not agree(device, op, call_of(op, run, rows, [honest[0][::-1]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["odd", "broadcast", "transposed", "a bias of rows"])
def test_lies_are_not_cleared(device, name, dtype):
    rng = np.random.default_rng(1)
    op, run = run_of(SHAPES[name], dtype, rng)
    rows = every_row(run)
    for lie, claim in lies(claims(run, rows)[0], rng).items():
        assert not agree(device, op, call_of(op, run, rows, [claim])), lie


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
def test_many_rows_are_folded(device, dtype):
    op, run = run_of(((40, 64), (64, 64), {"bias": (40, 64)}), dtype, np.random.default_rng(2))
    rows = every_row(run)
    call = call_of(op, run, rows, claims(run, rows), "full")
    assert freivalds.folds((40, 64, 64), call.policy)
    assert agree(device, op, call)
    claimed = call.claimed[0]
    for lie in (np.roll(claimed, 1, 0), -claimed):
        assert not agree(device, op, call_of(op, run, rows, [lie], "full"))


def test_a_fused_product_is_cleared(device):
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((2, 9, 17)).astype(np.float32), rng.standard_normal((2, 21, 17)).astype(np.float32)
    case = Case("FusedMatMul", [x, w], {"transB": 1}, domain=CONTRIBUTED, constant=(1,))
    op, run = OPS[CONTRIBUTED, "FusedMatMul"], assembled(case, [x @ w.swapaxes(1, 2)])
    rows = every_row(run)
    assert agree(device, op, call_of(op, run, rows, claims(run, rows)))


def test_what_the_device_has_no_kernel_for_is_not_taken(device):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 4)), rng.standard_normal((4, 5))
    single = [x.astype(np.float32), w.astype(np.float32)]
    for case, y in (
        (Case("MatMul", [x, w]), x @ w),
        (Case("MatMul", [x.astype(np.int32), w.astype(np.int32)]), x.astype(np.int32) @ w.astype(np.int32)),
        (Case("Gemm", single, {"alpha": 0.5}), (0.5 * x @ w).astype(np.float32)),
        (Case("Gemm", [x.T.astype(np.float32), single[1]], {"transA": 1}), (x @ w).astype(np.float32)),
    ):
        op, run = OPS["", case.op], assembled(case, [y])
        rows = every_row(run)
        assert not taken(device, op, call_of(op, run, rows, claims(run, rows)))
    op, run = matmul(*single, single[0] @ single[1])
    assert not taken(device, op, call_of(op, run, (np.zeros(0, np.int64),), [np.zeros((0, 5), np.float32)]))


def test_what_is_too_small_is_not_taken(device, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 9 * 17 * 21)
    for batch, expected in (((), True), ((2,), True), ((17, 1, 1), False)):
        shapes = ((*batch, 9, 17), (*batch, 17, 21), {}) if len(batch) < 2 else ((17, 1, 17), (17, 17, 21), {})
        op, run = run_of(shapes, BF16, np.random.default_rng(0))
        rows = every_row(run)
        assert taken(device, op, call_of(op, run, rows, claims(run, rows))) is expected


# ---- numbers at the edges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_of_zeros_are_cleared(device, dtype):
    op, run = run_of(SHAPES["odd"], dtype, np.random.default_rng(4))
    x, w = run.inputs
    x[3], w[:, 5] = 0, 0
    op, run = matmul(x, w, (x.astype(np.float32) @ w.astype(np.float32)).astype(dtype))
    rows = every_row(run)
    assert agree(device, op, call_of(op, run, rows, claims(run, rows)))
    for tiny in (1e-7, 1e-30, -1e-36):
        claim = claims(run, rows)[0]
        claim[3, 7] = tiny
        if claim[3, 7]:
            assert not agree(device, op, call_of(op, run, rows, [claim]))


@pytest.mark.parametrize("scale", [2.0**-133, 2.0**-126, 2.0**-76, 2.0**-75, 2.0**-60, 2.0**-20, 2.0**70, 2.0**120])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
def test_extreme_scales_are_cleared_or_left(device, dtype, scale):
    rng = np.random.default_rng(5)
    op, run = run_of(((3, 40), (40, 9), {}), dtype, rng, scale)
    rows = every_row(run)
    honest = claims(run, rows)[0]
    assert agree(device, op, call_of(op, run, rows, [honest])) or scale in (2.0**70, 2.0**120)
    for name, lie in lies(honest, rng).items():  # agree: cleared only where the reference accepts it
        assert not agree(device, op, call_of(op, run, rows, [lie])) or scale < 2.0**-120, name


def test_infinities_of_float16_are_left(device):
    op, run = run_of(((5, 64), (64, 9), {}), np.dtype(np.float16), np.random.default_rng(6), 6e3)
    rows = every_row(run)
    assert np.isinf(run.outputs[0]).any()
    assert not agree(device, op, call_of(op, run, rows, claims(run, rows)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_operands_that_are_not_finite_are_left(device, value, dtype):
    _, run = run_of(((5, 33), (33, 9), {}), dtype, np.random.default_rng(7))
    for position in (0, 1):
        inputs = [array.copy() for array in run.inputs]
        inputs[position][2, 1] = value
        op, bad = matmul(*inputs, run.outputs[0])
        rows = every_row(bad)
        assert not agree(device, op, call_of(op, bad, rows, claims(run, rows)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_cancel(device, dtype):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 64))
    x = np.concatenate([x, -x], axis=1).astype(dtype)
    w = rng.standard_normal((64, 30))
    w = np.concatenate([w, w + 1e-3 * rng.standard_normal(w.shape)]).astype(dtype)
    op, run = matmul(x, w, (x.astype(np.float32) @ w.astype(np.float32)).astype(dtype))
    rows = every_row(run)
    assert agree(device, op, call_of(op, run, rows, claims(run, rows)))
    for lie in lies(run.outputs[0], rng).values():
        assert not agree(device, op, call_of(op, run, rows, [lie]))


# ---- entries beside their tolerance: claims are moved by the bias, which no dtype rounds

FACTORS = (-1 - 1e-4, -1 + 1e-4, 0.0, 1 - 1e-4, 1 - 1e-7, 1 + 1e-7, 1 + 1e-4, 1.5)
ALTERNATING = np.resize([1.0, -1.0], (2, 300))
UP = 2.0**-12 * 1.005
TERMS = {  # x, w and a bias
    "random": lambda rng, m, k, n: (rng.standard_normal((m, k)), rng.standard_normal((k, n)), 0.0),
    "of one sign": lambda rng, m, k, n: (rng.random((m, k)), rng.random((k, n)), 0.0),
    "biased": lambda rng, m, k, n: (rng.standard_normal((m, k)), rng.random((k, n)), 3.0 * rng.standard_normal(n)),
    "tiny": lambda rng, m, k, n: (rng.random((m, k)) * 1e-12, rng.random((k, n)) * 1e-12, 0.0),
    "cancelling": lambda rng, m, k, n: (ALTERNATING[:, :k], rng.random(n) + 1e-4 * rng.random((k, n)), 0.0),
}
ROUNDED_UP = {  # by float32: the squares of terms, alone or beside a sum of 1
    "barely above zero": lambda rng, m, k, n: (ALTERNATING[:, :k], np.full((k, n), 2.0**-95 * 1.01), 0.0),
    "beside one": lambda rng, m, k, n: (np.where(np.arange(k), UP * ALTERNATING[:, :k], 1), np.ones((k, n)), 0.0),
}


def uploaded(device, x, w, y, bias):
    (m, k), n = x.shape, w.shape[1]
    return Operands(
        x=device.array(x),
        x_at=device.array(np.arange(m)),
        w=device.array(w),
        w_strides=(n, 1),
        w_first=0,
        y=device.array(y),
        bias=device.array(bias),
        bias_rows=m,
        k=k,
        dtype=x.dtype,
    )


def tolerances(x, w, y, bias, full):
    """What the reference allows each entry (kernels/entries.py, judge)."""
    z, a, s, p = entries.statistics(x.astype(np.float64), w, bias, full=full)
    k, profile, a = x.shape[1], freivalds.PROFILES[x.dtype], np.sqrt(a)
    p = np.maximum(np.abs(z), p)
    coherence = np.minimum(1.0, np.divide(2 * p, s, out=np.zeros_like(s), where=s > 0))
    units = profile.incoherent(k) + profile.u * profile.gamma * k * coherence
    return half_ulp(y.astype(np.float64), x.dtype) + units * np.maximum(a, p) + k * freivalds.UNDERFLOW + 2.0**-50 * s


def beside(terms, dtype, shape, factor, full):
    """x, w, y and the bias that puts every y at `factor` times its tolerance from the exact value, and who passes."""
    rng = np.random.default_rng(8)
    *factors, bias = terms(rng, *shape)
    x, w = (part.astype(dtype) for part in factors)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    y = (exact + bias).astype(dtype)
    bias = y.astype(np.float64) - exact
    for _ in range(3):  # the tolerance depends on the bias a little
        bias = y.astype(np.float64) - exact + factor * tolerances(x, w, y, bias, full)
    off = np.abs(y.astype(np.float64) - entries.statistics(x.astype(np.float64), w, bias)[0])
    return (x, w, y, bias), off <= tolerances(x, w, y, bias, full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
@pytest.mark.parametrize("k", [1, 7, 300])
def test_beside_its_tolerance_an_entry_is_cleared_only_where_the_reference_accepts_it(device, k, terms, dtype):
    for factor in FACTORS:
        operands, passes = beside(terms, dtype, (2, k, 9), factor, full=False)
        mark = device.zeros(3, np.uint64)
        products.recompute(uploaded(device, *operands), device, mark)
        _, judged, left = device.numpy(mark)
        assert judged == passes.size
        if abs(abs(factor) - 1) > 1e-5:
            assert passes.all() == (abs(factor) < 1) == passes.any()
            assert left == (~passes).sum()
        else:
            assert left >= (~passes).sum()


@pytest.mark.parametrize("terms", ROUNDED_UP.values(), ids=ROUNDED_UP.keys())
@pytest.mark.parametrize("k", [1, 7, 300])
def test_squares_that_are_rounded_up_clear_nothing_more(device, k, terms):
    for factor in FACTORS:
        operands, passes = beside(terms, np.float32, (2, k, 9), factor, full=False)
        mark = device.zeros(3, np.uint64)
        products.recompute(uploaded(device, *operands), device, mark)
        left = device.numpy(mark)[2]
        assert left >= (~passes).sum()
        assert factor or not left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
@pytest.mark.parametrize("k", [1, 7, 300])
def test_beside_its_tolerance_a_single_entry_too(device, k, terms, dtype):
    flat = np.array([0, 17, 4, 4, 9])
    for factor in FACTORS:
        operands, passes = beside(terms, dtype, (2, k, 9), factor, full=True)
        passes, mark = passes.reshape(-1)[flat], device.zeros(3, np.uint64)
        folds.spot_check(uploaded(device, *operands), device, mark, device.array(flat))
        worst, judged, left = device.numpy(mark)
        assert judged == 0
        if abs(abs(factor) - 1) > 1e-5:
            assert passes.all() == (abs(factor) < 1) == passes.any()
            assert left == (~passes).sum()
            assert left or worst.view(np.float64) == pytest.approx(abs(factor), rel=1e-6, abs=1e-6)
        else:
            assert left >= (~passes).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_single_entries_are_found_in_both_layouts(device, dtype, wide):
    """A wrong entry is left, and no other."""
    rng = np.random.default_rng(9)
    x, w = rng.standard_normal((4, 70)).astype(dtype), rng.standard_normal((70, 11)).astype(dtype)
    y = (x.astype(np.float32) @ w.astype(np.float32)).astype(dtype)
    y[2, 5] = y[2, 5] * 2 + 1
    stored = np.ascontiguousarray(w.T) if wide else w
    product = Operands(
        x=device.array(x[::-1]),
        x_at=device.array(np.arange(4)[::-1]),
        w=device.array(np.concatenate([np.full(3, np.nan, dtype), stored.reshape(-1)])),
        w_strides=(1, 70) if wide else (11, 1),
        w_first=3,
        y=device.array(y),
        bias=device.empty((1, 1), np.float64),
        bias_rows=0,
        k=70,
        dtype=np.dtype(dtype),
    )
    for flat, expected in (([0, 26, 28, 43], 0), ([27], 1), ([27, 3, 27], 2), ([], 0)):
        mark = device.zeros(3, np.uint64)
        folds.spot_check(product, device, mark, device.array(np.array(flat, np.int64)))
        assert device.numpy(mark)[2] == expected
