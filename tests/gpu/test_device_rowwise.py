"""Rows on a device at the edge of the reference's radius, entry by entry, and nodes as ONNX Runtime computes them."""

import ml_dtypes
import numpy as np
import pytest

from gpu.clearing import rowwise
from gpu.clearing.stand import Shelf, Stand
from gpu.ops import normalisation
from gpu.ops.registry import REGISTRY
from gpu.rounding import EVALUATION, FORMATS, half_ulp
from tests.gpu.clearing import accepts, agree, call_of, cleared, taken
from tests.gpu.nodes import FORGERIES, Case, assembled, claims, run, same
from tests.gpu.test_rowwise import CASES

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
FACTORS = [sign * (1 + step) for sign in (-1, 1) for step in (0, 1e-7, -1e-7, 1e-4, -1e-4, -1e-3, 0.2)]
WELL_INSIDE = 1 - 1e-3
RUN = [case for case in CASES if REGISTRY[case.domain, case.op].clear and case.inputs[0].dtype in DTYPES]
SPREADS = {
    "one": (1.0, 0.0),
    "small": (1e-3, 0.0),
    "large": (30.0, 0.0),
    "far": (1.0, 300.0),
    "subnormal": (1e-41, 0.0),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(rowwise, "LEAST", 0)


def left(device, op, call):
    """How many entries the device leaves, every one of them judged."""
    stand = Stand(Shelf(device, 1e9), call.site.node.index + 1)
    mark = stand._marks[call.site.node.index]
    assert op.clear(call, stand, mark)
    _, judged, kept = device.numpy(mark)
    assert judged == call.claimed[0].size
    return int(kept)


def reference(monkeypatch, module, op, call):
    """What the reference compares the claimed entries with: values and slack, in float64."""
    found = []

    def record(claimed, z, slack):
        found.append([np.broadcast_to(part, claimed.shape) for part in (z, slack)])
        return 0.0

    with monkeypatch.context() as patched, np.errstate(all="ignore"):
        patched.setattr(module, "compare", record)
        op.check(call)
    return [np.concatenate(parts).reshape(call.claimed[0].shape) for parts in zip(*found, strict=True)]


def used(y, z, slack):
    """Share of its radius that each entry uses, as gpu/rounding.py counts it; NaN where it is not finite."""
    wide, form = y.astype(np.float64), FORMATS[y.dtype]
    radius = half_ulp(wide, y.dtype) + slack + form.flush + EVALUATION * np.abs(z)
    return np.abs(np.where(np.isfinite(wide), wide, np.nan) - z) / radius


def held_at_the_edge(device, op, run, z, slack):
    """No entry outside of its radius is cleared, with nothing that is beside it; all of those well inside are."""
    dtype, rows = run.outputs[0].dtype, (np.arange(run.site.outputs[0].rows),)
    flush, nearest, outside = FORMATS[dtype].flush, z.astype(dtype), 0
    for factor in FACTORS:
        near = (z + factor * (slack + flush)).astype(dtype).astype(np.float64)
        y = (z + factor * (slack + flush + half_ulp(near, dtype))).astype(dtype)
        share = used(y, z, slack)
        wrong = ~(share <= 1)
        alone = np.where(wrong, y, np.array(np.nan, dtype))
        inside = np.where(share <= WELL_INSIDE, y, nearest)
        assert left(device, op, call_of(op, run, rows, [alone])) == y.size
        assert left(device, op, call_of(op, run, rows, [inside])) == 0
        outside += wrong.sum()
    assert outside


def given(kinds, dtype, shape, spread=(1.0, 0.0)):
    """x of a shape, then parameters of its width."""
    rng = np.random.default_rng(3)
    scale, offset = spread
    x = rng.standard_normal(shape) * scale + offset
    return [x.astype(dtype), *(rng.standard_normal(shape[-1]).astype(dtype) for _ in range(kinds - 1))]


def unanswered(case):
    """The case with zeros for an answer."""
    return assembled(case, [np.zeros_like(case.inputs[0])])


FORMS = {  # op, how many inputs, attributes, opset
    "Softmax": ("Softmax", 1, {}, 13),
    "LogSoftmax": ("LogSoftmax", 1, {}, 13),
    "LayerNormalization": ("LayerNormalization", 3, {}, 17),
    "LayerNormalization, tiny epsilon": ("LayerNormalization", 2, {"epsilon": 1e-12}, 17),
    "RMSNormalization": ("RMSNormalization", 2, {}, 23),
}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_no_entry_outside_of_its_radius_is_cleared(device, monkeypatch, form, dtype, spread):
    name, kinds, attributes, opset = form
    inputs = given(kinds, dtype, (2, 67), spread)
    run, op = unanswered(Case(name, inputs, attributes, opset=opset)), REGISTRY["", name]
    rows = (np.arange(2),)
    z, slack = reference(monkeypatch, normalisation, op, call_of(op, run, rows, claims(run, rows)))
    held_at_the_edge(device, op, run, z, slack)


@pytest.mark.parametrize("case", RUN, ids=str)
def test_what_onnx_runtime_computes_is_cleared_or_not_taken(device, case):
    result, op = run(case), REGISTRY[case.domain, case.op]
    rows = tuple(np.arange(spec.rows) for spec in result.site.outputs)
    honest = claims(result, rows)
    call = call_of(op, result, rows, honest)
    if taken(device, op, call) and all(np.isfinite(x).all() for x in case.inputs):
        assert cleared(device, op, call).ratio == pytest.approx(accepts(op, call).ratio, rel=1e-6)
        for forge in FORGERIES.values():
            forged = forge(honest[0], np.random.default_rng(0))
            assert same(forged, honest[0]) or not agree(device, op, call_of(op, result, rows, [forged]))


def test_some_of_onnx_runtime_s_are_taken(device):
    ops = {case.op for case in RUN if taken(device, REGISTRY["", case.op], _every_row(case))}
    assert ops == {"Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}


def _every_row(case):
    result = run(case)
    rows = tuple(np.arange(spec.rows) for spec in result.site.outputs)
    return call_of(REGISTRY["", case.op], result, rows, claims(result, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Softmax", "LayerNormalization", "RMSNormalization"])
def test_long_rows_are_cleared(device, monkeypatch, name, dtype):
    _, kinds, attributes, opset = FORMS[name]
    result, op = unanswered(Case(name, given(kinds, dtype, (2, 5000)), attributes, opset=opset)), REGISTRY["", name]
    rows = (np.array([1]),)
    z, _ = reference(monkeypatch, normalisation, op, call_of(op, result, rows, claims(result, rows)))
    assert agree(device, op, call_of(op, result, rows, [z.astype(dtype)]))
    assert not agree(device, op, call_of(op, result, rows, [np.roll(z, 1).astype(dtype)]))


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5])
@pytest.mark.parametrize("size", [1e-30, 0.1, 1e4, 1e30])
@pytest.mark.parametrize("other", [False, True])
def test_rows_of_next_to_no_variance_are_cleared_only_as_the_reference_accepts_them(device, size, epsilon, other):
    x = np.full((2, 131), size, np.float32)
    x[:, 0] = np.nextafter(x[:, 0], 0) if other else x[:, 0]
    case = Case("LayerNormalization", [x, np.ones(131, np.float32)], {"epsilon": epsilon}, opset=17)
    op, result, rows = REGISTRY["", "LayerNormalization"], unanswered(case), (np.arange(2),)
    for value in (0.0, 1.0, -1e3, 1e10, 1e20, 1e30):
        agree(device, op, call_of(op, result, rows, [np.full_like(x, value)]))


def test_no_rows_are_nothing_to_clear(device):
    x = np.ones((4, 9), np.float32)
    op, result = REGISTRY["", "Softmax"], unanswered(Case("Softmax", [x], opset=13))
    call = call_of(op, result, (np.zeros(0, np.int64),), [np.zeros((0, 9), np.float32)])
    assert cleared(device, op, call).entries == 0
