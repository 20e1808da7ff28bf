"""Row-wise ops against ONNX Runtime: reductions, normalisations, windows and scans along any axes."""

from dataclasses import replace

import numpy as np
import pytest

from gpu.ops import rowwise
from proof.errors import Malformed
from tests.gpu.nodes import BF16, CONTRIBUTED, Case, accepted_forgeries, assembled, check, opened, run, sampled

RNG = np.random.default_rng(13)
OPS = rowwise.OPS


def f(*shape, scale=1.0):
    return np.asarray(RNG.standard_normal(shape) * scale, np.float32)


def positive(*shape):
    return np.exp(f(*shape))


def n(*shape, low=-50, high=50, dtype=np.int64):
    return RNG.integers(low, high, shape).astype(dtype)


def ints(*values):
    return np.array(values, np.int64)


def half(x):
    return x.astype(np.float16)


X = f(2, 3, 5, 64)
IMAGE = f(2, 4, 9, 8)
REDUCTIONS = ("Max", "Min", "Sum", "Mean", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")
NORMALISED = [X, f(64), f(64)]

CASES = [
    *(Case(f"Reduce{r}", [positive(2, 3, 5, 4), ints(-1)], constant=(1,)) for r in REDUCTIONS),
    *(Case(f"Reduce{r}", [positive(2, 3, 5, 4), ints(1)], {"keepdims": 0}, constant=(1,)) for r in REDUCTIONS),
    *(Case(f"Reduce{r}", [positive(2, 3, 5, 4), ints(3, 1)], {"keepdims": 0}, constant=(1,)) for r in REDUCTIONS),
    *(Case(f"Reduce{r}", [positive(2, 3, 5, 4)]) for r in REDUCTIONS),
    *(Case(f"Reduce{r}", [positive(2, 3, 5, 4)], {"axes": [0, 2]}, opset=11) for r in REDUCTIONS),
    *(Case(f"Reduce{r}", [f(7, 300), ints(1)], constant=(1,)) for r in ("Sum", "Mean", "L1", "L2", "LogSumExp", "Max")),
    *(Case(f"Reduce{r}", [half(positive(2, 30)), ints(1)], constant=(1,)) for r in ("Sum", "Mean", "Max", "L2")),
    *(Case(f"Reduce{r}", [n(3, 5, 4), ints(1)], constant=(1,)) for r in ("Sum", "Max", "Min", "Prod")),
    *(
        Case(f"Reduce{r}", [n(3, 5, 4, dtype=np.int32)], {"axes": [2], "keepdims": 0}, opset=11)
        for r in ("Sum", "Mean")
    ),
    Case("ReduceSum", [X, ints()], {"noop_with_empty_axes": 1}, constant=(1,)),
    Case("ReduceMean", [f(2, 100000) + 1, ints(1)], {"keepdims": 0}, constant=(1,)),
    Case("ReduceSum", [positive(3, 100000), ints(1)], {"keepdims": 0}, constant=(1,)),
    *(
        Case(f"Arg{m}", [X], {"axis": axis, "keepdims": k})
        for m in ("Max", "Min")
        for axis, k in ((0, 1), (-1, 0), (2, 0))
    ),
    *(
        Case(f"Arg{m}", [np.round(f(6, 9))], {"axis": 1, "select_last_index": s})
        for m in ("Max", "Min")
        for s in (0, 1)
    ),
    Case("ArgMax", [n(6, 9, dtype=np.int32)], {"axis": 1}),
    Case("GlobalAveragePool", [IMAGE]),
    Case("GlobalAveragePool", [f(2, 4, 9)]),
    Case("GlobalLpPool", [IMAGE], {"p": 3}),
    Case("GlobalMaxPool", [IMAGE]),
    *(Case("Softmax", [f(2, 3, 5, 64, scale=4)], {"axis": axis}) for axis in (-1, 1, 0, 2)),
    *(Case("Softmax", [X], {"axis": axis}, opset=11) for axis in (1, 3)),
    Case("Softmax", [half(X)]),
    Case("Softmax", [np.where(f(4, 9) > 0.5, -np.inf, f(4, 9)).astype(np.float32)]),
    Case("Softmax", [f(3, 5000, scale=20)]),
    *(Case("LogSoftmax", [f(2, 3, 5, 64, scale=4)], {"axis": axis}) for axis in (-1, 1)),
    Case("LogSoftmax", [half(X)]),
    *(Case("Hardmax", [X], {"axis": axis}) for axis in (-1, 1)),
    Case("LayerNormalization", NORMALISED, {"epsilon": 1e-12}, outputs=3, opset=17, constant=(1, 2)),
    Case("LayerNormalization", [X, f(5, 64), f(5, 64)], {"axis": 2}, outputs=3, opset=17),
    Case("LayerNormalization", [X + 30, f(64)], opset=17),
    Case("LayerNormalization", [half(x) for x in NORMALISED], opset=17),
    Case("RMSNormalization", [X, f(64)], opset=23, constant=(1,)),
    Case("RMSNormalization", [X, f(5, 64)], {"axis": 2}, opset=23),
    Case("SimplifiedLayerNormalization", [X, f(64)], {"epsilon": 1e-6}, constant=(1,)),
    Case("SimplifiedLayerNormalization", [X, f(64)], {"epsilon": 1e-6}, outputs=2),
    Case("InstanceNormalization", [IMAGE, f(4), f(4)], constant=(1, 2)),
    Case("InstanceNormalization", [f(2, 4, 30), f(4), f(4)]),
    Case("GroupNormalization", [IMAGE, f(4), f(4)], {"num_groups": 2}, constant=(1, 2)),
    Case("GroupNormalization", [IMAGE, f(2), f(2)], {"num_groups": 2}, opset=18),
    Case("MeanVarianceNormalization", [IMAGE]),
    Case("MeanVarianceNormalization", [X], {"axes": [-1]}),
    *(Case("LpNormalization", [X], {"axis": axis, "p": p}, opset=1) for axis, p in ((-1, 2), (1, 2), (2, 1))),
    Case("SkipLayerNormalization", [f(2, 5, 64), f(2, 5, 64), f(64), f(64), f(64)], domain=CONTRIBUTED),
    Case("SkipLayerNormalization", [f(2, 5, 64), f(1, 5, 64), f(64)], domain=CONTRIBUTED, constant=(2,)),
    Case("SkipSimplifiedLayerNormalization", [f(2, 5, 64), f(2, 5, 64), f(64), f(64)], domain=CONTRIBUTED),
    Case("CumSum", [X, np.array(1)], constant=(1,)),
    Case("CumSum", [X, np.array(-1)], {"exclusive": 1, "reverse": 1}, constant=(1,)),
    Case("CumSum", [n(4, 9), np.array(1, np.int32)], {"reverse": 1}, constant=(1,)),
    Case("CumSum", [n(9, 4), np.array(0)], {"exclusive": 1}, constant=(1,)),
    Case("TopK", [f(4, 30), ints(5)], outputs=2, constant=(1,)),
    Case("TopK", [np.round(f(3, 9, 4)), ints(3)], {"axis": 1, "largest": 0}, outputs=2, constant=(1,)),
    Case("TopK", [n(4, 30, high=-40), ints(5)], outputs=2, constant=(1,)),
    Case("TopK", [f(4, 30)], {"k": 4}, outputs=2, opset=9),
    Case("DynamicQuantizeLinear", [f(6, 40)], outputs=3),
    Case("DynamicQuantizeLinear", [f(2, 3, 40) + 5], outputs=3),
    Case("DynamicQuantizeLinear", [-positive(3, 40)], outputs=3),
    Case("DynamicQuantizeLinear", [np.zeros((3, 4), np.float32)], outputs=3),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}, outputs=2),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 1], "ceil_mode": 1, "strides": [2, 3]}),
    Case("MaxPool", [f(2, 3, 11)], {"kernel_shape": [3], "auto_pad": "SAME_UPPER", "strides": [2]}),
    Case("MaxPool", [f(1, 2, 5, 6, 7)], {"kernel_shape": [2, 3, 2], "auto_pad": "SAME_LOWER"}),
    Case("MaxPool", [n(2, 3, 8, 8, dtype=np.int8)], {"kernel_shape": [3, 3], "strides": [2, 2]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "auto_pad": "VALID"}),
    *(
        Case(
            "AveragePool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 1, 1, 0], **more}, opset=19
        )
        for more in ({}, {"count_include_pad": 1}, {"ceil_mode": 1}, {"ceil_mode": 1, "count_include_pad": 1})
    ),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}, opset=11),
    Case("LpPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 1]}),
    Case("LpPool", [IMAGE], {"kernel_shape": [2, 2], "p": 3, "pads": [1, 0, 0, 1]}),
    Case("LRN", [f(2, 9, 4, 5, scale=4)], {"size": 5, "alpha": 0.1, "beta": 0.6, "bias": 2.0}),
    Case("LRN", [f(2, 9, 4, 5, scale=4)], {"size": 3}),
    Case("Upsample", [IMAGE, np.array([1, 1, 2, 2], np.float32)], opset=9, constant=(1,)),
    Case("Upsample", [IMAGE, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}, opset=9, constant=(1,)),
    Case("Upsample", [IMAGE], {"scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
    Case("Resize", [IMAGE, np.array([1, 1, 2, 0.5], np.float32)], opset=10, constant=(1,)),
]


def resized(scales=None, sizes=None, x=IMAGE, **attributes):
    inputs = [x, None, None if scales is None else np.array(scales, np.float32)]
    constant = (2,) if sizes is None else (3,)
    return Case("Resize", inputs if sizes is None else [*inputs, ints(*sizes)], attributes, constant=constant)


MODES = ("nearest", "linear", "cubic")
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")
CASES += [
    *(
        resized((1, 1, 2, 2), mode="nearest", coordinate_transformation_mode=c, nearest_mode=rounding)
        for c in COORDINATES
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    *(resized(sizes=(2, 4, 13, 5), mode=mode, coordinate_transformation_mode=c) for c in COORDINATES for mode in MODES),
    *(resized((1, 1, 1.7, 0.6), mode=mode, coordinate_transformation_mode=c) for c in COORDINATES for mode in MODES),
    resized((2, 2), axes=[2, 3], mode="linear"),
    resized(sizes=(7, 20), x=f(4, 9), mode="linear"),
    resized((1, 1, 2, 2), mode="cubic", cubic_coeff_a=-0.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_honest_result_is_accepted_and_no_forged_one(case):
    worker, op = run(case), OPS[case.domain, case.op]
    assert op.refuses(worker.site.node) is None
    for rows in (sampled(worker, RNG), sampled(worker, RNG, None)):
        entries = sum(len(taken) * spec.width for taken, spec in zip(rows, worker.site.outputs, strict=True))
        assert check(op, worker, rows).entries == entries
    assert accepted_forgeries(op, worker, RNG) == []


def test_every_op_has_a_case():
    assert {(case.domain, case.op) for case in CASES} == OPS.keys()


BFLOAT = [
    case
    for case in CASES
    if all(x is None or i in case.constant or x.dtype == np.float32 for i, x in enumerate(case.inputs))
    and case.outputs == 1
    and case.op not in ("Upsample", "Resize")
]


@pytest.mark.parametrize("case", BFLOAT, ids=str)
def test_bfloat16_computed_in_float32_is_accepted(case):
    def narrowed(x):
        return x if x is None or x.dtype != np.float32 else x.astype(BF16)

    narrow = [narrowed(x) for x in case.inputs]
    wide = run(replace(case, inputs=[x if x is None or x.dtype != BF16 else x.astype(np.float32) for x in narrow]))
    worker, op = assembled(replace(case, inputs=narrow), [narrowed(y) for y in wide.outputs]), OPS[case.domain, case.op]
    check(op, worker, sampled(worker, RNG, None))
    assert accepted_forgeries(op, worker, RNG) == []


DOUBLE = [
    case
    for case in CASES
    if not case.domain
    and case.op.startswith(("Reduce", "Softmax", "LogSoftmax", "CumSum", "TopK", "Group", "RMS", "Layer"))
    and all(x is None or i in case.constant or x.dtype == np.float32 for i, x in enumerate(case.inputs))
    and case.op not in ("ReduceMin", "ReduceLogSumExp")
]


@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_float64_is_held_to_its_own_precision(case):
    worker = run(replace(case, inputs=[x.astype(np.float64) if x.dtype == np.float32 else x for x in case.inputs]))
    op = OPS[case.domain, case.op]
    check(op, worker, sampled(worker, RNG, None))
    assert accepted_forgeries(op, worker, RNG) == []


def test_a_row_of_softmax_opens_its_own_lane_alone():
    worker = run(Case("Softmax", [f(2, 30, 8)]))
    (tensor,) = opened(OPS["", "Softmax"], worker, (np.array([3, 44]),))
    assert tensor.index.tolist() == [3, 44]


def test_a_pooled_row_opens_its_window_alone():
    worker = run(Case("MaxPool", [f(1, 2, 10, 10)], {"kernel_shape": [2, 2], "strides": [2, 2]}))
    (tensor,) = opened(OPS["", "MaxPool"], worker, (np.array([6]),))
    assert tensor.index.tolist() == [12, 13]


def test_groups_need_positions():
    case = Case("GroupNormalization", [f(3, 4), f(4), f(4)], {"num_groups": 2})
    worker = assembled(case, [f(3, 4)])
    with pytest.raises(Malformed, match="groups"):
        check(OPS["", "GroupNormalization"], worker, sampled(worker, RNG))


REFUSED = [
    Case("TopK", [f(4, 30), ints(5)], {"sorted": 0}, outputs=2),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "storage_order": 1}, outputs=2),
    Case("DynamicQuantizeLinear", [f(4, 5)], outputs=2),
    resized((1, 1, 0.5, 0.5), mode="linear", antialias=1),
    resized((1, 1, 0.5, 0.5), mode="cubic", exclude_outside=1),
    resized(sizes=(2, 4, 5, 5), mode="linear", keep_aspect_ratio_policy="not_larger"),
    resized((1, 1, 0.5, 0.5), mode="linear", coordinate_transformation_mode="tf_crop_and_resize"),
    Case("SkipLayerNormalization", [f(2, 5, 64), f(2, 5, 64), f(64)], domain=CONTRIBUTED, outputs=2),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_checked_is_refused_with_a_reason(case):
    assert OPS[case.domain, case.op].refuses(assembled(case, []).site.node)
