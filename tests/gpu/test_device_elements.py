"""Row-wise and pointwise ops on a device: honest rows are cleared, no lie is, nothing that the reference refuses."""

import ml_dtypes
import numpy as np
import pytest
from scipy.special import erf

from gpu.clearing import pointwise, rowwise
from gpu.ops.registry import REGISTRY
from gpu.rounding import half_ulp
from tests.gpu.clearing import accepts, agree, call_of, lies, taken
from tests.gpu.nodes import Case, assembled, claims

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for module in (pointwise, rowwise):
        monkeypatch.setattr(module, "LEAST", 0)


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def layer(x, scale=None, bias=None):
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.float32(1e-5))
    return n if scale is None else n * scale if bias is None else n * scale + bias


def root(x, scale=None):
    n = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5))
    return n if scale is None else n * scale


def swish(x, alpha=1.0):
    return x / (1 + np.exp(-alpha * x))


ROWS = {  # op: opset, domain, what it computes in float32, shapes of its inputs
    "Softmax": (13, "", softmax, ["x"]),
    "LogSoftmax": (13, "", lambda x: np.log(softmax(x)), ["x"]),
    "LayerNormalization": (17, "", layer, ["x", "c", "c"]),
    "LayerNormalization, no bias": (17, "", layer, ["x", "c"]),
    "RMSNormalization": (23, "", root, ["x", "c"]),
}
ELEMENTS = {
    "Add": (14, "", np.add, ["x", "x"]),
    "Sub, a row": (14, "", np.subtract, ["x", "c"]),
    "Mul": (14, "", np.multiply, ["x", "x"]),
    "Mul, an entry a row": (14, "", np.multiply, ["x", "r"]),
    "Div, one for all": (14, "", np.divide, ["x", "1"]),
    "Sigmoid": (13, "", lambda x: 1 / (1 + np.exp(-x)), ["x"]),
    "Swish": (24, "", swish, ["x"]),
    "Gelu": (20, "", lambda x: x / 2 * (1 + erf(x / np.float32(2**0.5))), ["x"]),
    "QuickGelu": (21, "com.microsoft", lambda x: swish(x, np.float32(1.702)), ["x"]),
}
SHAPES = [(1, 1), (3, 1), (5, 7), (2, 3, 130), (19, 300)]


def run_of(ops, name, dtype, shape, spread=1.0):
    opset, domain, value, kinds = ops[name]
    forms = {"x": shape, "c": shape[-1:], "r": (*shape[:-1], 1), "1": ()}
    constant = tuple(i for i, kind in enumerate(kinds) if kind in "c1")
    with np.errstate(all="ignore"):
        inputs = [np.asarray(RNG.standard_normal(forms[kind]) * spread).astype(dtype) for kind in kinds]
        exact = np.asarray(value(*(x.astype(np.float32) for x in inputs))).astype(dtype)
    case = Case(name.split(",")[0], inputs, opset=opset, domain=domain, constant=constant)
    return assembled(case, [exact])


def held(device, run, rng):
    """Clears the honest rows; no lie; and whatever it clears the reference accepts."""
    op = REGISTRY[run.site.node.domain, run.site.node.op]
    total = run.site.outputs[0].rows
    rows = (np.unique(rng.integers(0, total, 4)),)
    honest = claims(run, rows)
    assert taken(device, op, call_of(op, run, rows, honest))
    assert agree(device, op, call_of(op, run, rows, honest))
    for name, lie in lies(honest[0], rng).items():
        call = call_of(op, run, rows, [lie])
        assert not agree(device, op, call), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_cleared_and_lies_are_not(device, name, dtype, shape):
    held(device, run_of(ROWS, name, dtype, shape), np.random.default_rng(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_are_cleared_and_lies_are_not(device, name, dtype, shape):
    run = run_of(ELEMENTS, name, dtype, shape)
    op = REGISTRY[run.site.node.domain, run.site.node.op]
    rows = (np.arange(run.site.outputs[0].rows),)
    honest = claims(run, rows)
    assert taken(device, op, call_of(op, run, rows, honest))
    assert agree(device, op, call_of(op, run, rows, honest))
    for label, lie in lies(honest[0], np.random.default_rng(1)).items():
        assert not agree(device, op, call_of(op, run, rows, [lie])), label


@pytest.mark.parametrize(("ops", "name"), [(ROWS, name) for name in ROWS] + [(ELEMENTS, name) for name in ELEMENTS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-40, 1e-4, 30.0, 3e4])
def test_entries_around_the_edge_are_cleared_only_where_the_reference_accepts_them(device, ops, name, dtype, spread):
    run = run_of(ops, name, dtype, (3, 40), spread)
    op, rows = REGISTRY[run.site.node.domain, run.site.node.op], (np.arange(3),)
    honest = claims(run, rows)[0]
    for column in range(0, 40, 7):
        for steps in (-40, -6, -3, -2, -1, 1, 2, 3, 6, 40):
            bent = honest.copy()
            value = bent[1, column].astype(np.float64)
            bent[1, column] = value + steps * half_ulp(value, dtype) * 2
            agree(device, op, call_of(op, run, rows, [bent]))
    for lie in lies(honest, np.random.default_rng(2)).values():
        agree(device, op, call_of(op, run, rows, [lie]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("ops", "name"), [(ROWS, name) for name in ROWS] + [(ELEMENTS, name) for name in ELEMENTS])
def test_what_is_not_finite_is_left_or_agreed_on(device, ops, name, value):
    run = run_of(ops, name, np.dtype(np.float32), (3, 20))
    run.inputs[0][1, 4] = value
    _, _, compute, _ = ops[name]
    with np.errstate(all="ignore"):
        run = assembled(
            Case(
                name.split(",")[0],
                run.inputs,
                opset=ops[name][0],
                domain=ops[name][1],
                constant=tuple(i for i, known in enumerate(run.site.known) if known is not None),
            ),
            [np.asarray(compute(*run.inputs)).astype(np.float32)],
        )
    op, rows = REGISTRY[run.site.node.domain, run.site.node.op], (np.arange(3),)
    call = call_of(op, run, rows, claims(run, rows))
    agree(device, op, call)
    assert accepts(op, call) is not None


def test_masked_scores_are_cleared(device):
    x = RNG.standard_normal((4, 50)).astype(np.float32)
    x[np.triu(np.ones((4, 50), bool), 10)] = -np.inf
    run, rows = assembled(Case("Softmax", [x], opset=13), [softmax(x)]), (np.arange(4),)
    assert agree(device, REGISTRY["", "Softmax"], call_of(REGISTRY["", "Softmax"], run, rows, claims(run, rows)))


def test_other_axes_statistics_and_dtypes_are_not_taken(device):
    x = RNG.standard_normal((4, 6)).astype(np.float32)
    ones = np.ones(6, np.float32)
    cases = [
        (Case("Softmax", [x], {"axis": 0}, opset=13), [softmax(x.T).T]),
        (Case("Softmax", [x.astype(np.float64)], opset=13), [softmax(x.astype(np.float64))]),
        (
            Case("LayerNormalization", [x, ones], outputs=2, opset=17, constant=(1,)),
            [layer(x), x.mean(-1, keepdims=True)],
        ),
        (Case("Add", [x.astype(np.int32), x.astype(np.int32)]), [2 * x.astype(np.int32)]),
    ]
    for case, outputs in cases:
        run = assembled(case, outputs)
        rows = tuple(np.arange(spec.rows) for spec in run.site.outputs)
        op = REGISTRY[case.domain, case.op]
        assert not taken(device, op, call_of(op, run, rows, claims(run, rows)))
