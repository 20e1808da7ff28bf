"""Pointwise ops against ONNX Runtime: honest results of every dtype and form of broadcasting, and no forged one."""

from dataclasses import replace

import numpy as np
import pytest

from gpu.ops import pointwise
from proof.errors import Rejected
from tests.gpu.nodes import BF16, CONTRIBUTED, Case, accepted_forgeries, assembled, check, run, sampled

RNG = np.random.default_rng(11)
OPS = pointwise.OPS


def f(*shape, scale=1.0):
    return np.asarray(RNG.standard_normal(shape) * scale, np.float32)


def positive(*shape):
    return np.exp(f(*shape))


def inside(*shape):
    return np.asarray(RNG.uniform(-0.99, 0.99, shape), np.float32)


def n(*shape, low=-50, high=50, dtype=np.int64):
    return RNG.integers(low, high, shape).astype(dtype)


def b(*shape):
    return RNG.integers(0, 2, shape).astype(np.bool_)


def half(x):
    return x.astype(np.float16)


SHAPE = (2, 5, 7)

UNARY = {  # op: inputs it is defined on, opset it came with
    "Abs": (f, 13),
    "Acos": (inside, 7),
    "Acosh": (lambda *shape: 1 + positive(*shape), 9),
    "Asin": (inside, 7),
    "Asinh": (f, 9),
    "Atan": (f, 7),
    "Atanh": (inside, 9),
    "Celu": (f, 12),
    "Ceil": (lambda *shape: f(*shape, scale=5), 13),
    "Cos": (lambda *shape: f(*shape, scale=5), 7),
    "Cosh": (f, 9),
    "Elu": (f, 6),
    "Erf": (f, 13),
    "Exp": (lambda *shape: f(*shape, scale=5), 13),
    "Floor": (lambda *shape: f(*shape, scale=5), 13),
    "Gelu": (f, 20),
    "HardSigmoid": (f, 6),
    "HardSwish": (f, 14),
    "LeakyRelu": (f, 16),
    "Log": (positive, 13),
    "Mish": (f, 18),
    "Neg": (f, 13),
    "Reciprocal": (f, 13),
    "Relu": (f, 14),
    "Round": (lambda *shape: f(*shape, scale=5), 11),
    "Selu": (f, 6),
    "Shrink": (f, 9),
    "Sigmoid": (f, 13),
    "Sign": (f, 13),
    "Sin": (lambda *shape: f(*shape, scale=5), 7),
    "Sinh": (f, 9),
    "Softplus": (f, 1),
    "Softsign": (f, 1),
    "Sqrt": (positive, 13),
    "Swish": (f, 24),
    "Tan": (f, 7),
    "Tanh": (f, 13),
    "ThresholdedRelu": (lambda *shape: f(*shape, scale=2), 10),
}
TIE = np.array([[0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)

CASES = [
    *(Case(op, [make(*SHAPE)], opset=max(since, 13)) for op, (make, since) in UNARY.items()),
    *(Case(op, [half(make(*SHAPE))], opset=max(since, 13)) for op, (make, since) in UNARY.items() if op != "Celu"),
    *(Case(op, [f(*SHAPE), f(7)]) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu")),
    *(Case(op, [f(*SHAPE), f(2, 1, 1)]) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(Case(op, [f(), f(*SHAPE)]) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(Case(op, [f(5, 1), f(3, 1, 4)], opset=13) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, [half(f(*SHAPE)), half(f(5, 1))]) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu")),
    *(Case(op, [f(*SHAPE).astype(np.float64), f(7).astype(np.float64)]) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, [n(*SHAPE), n(7, low=1)]) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Mod")),
    *(Case(op, [n(*SHAPE, dtype=np.int32), n(5, 1, low=-9, high=-1, dtype=np.int32)]) for op in ("Add", "Div", "Mod")),
    Case("Add", [n(4, 6, low=2**31 - 9, high=2**31 - 1, dtype=np.int32), n(6, low=5, high=30, dtype=np.int32)]),
    Case("Div", [n(4, 6, low=1, high=200, dtype=np.uint8), n(6, low=1, high=9, dtype=np.uint8)]),
    Case("Mod", [f(*SHAPE, scale=9), f(7)], {"fmod": 1}),
    Case("Mod", [n(*SHAPE), n(7, low=1)], {"fmod": 1}),
    Case("Pow", [positive(*SHAPE), f(7)]),
    Case("Pow", [f(*SHAPE), np.array(2.0, np.float32)], constant=(1,)),
    Case("Pow", [f(*SHAPE), np.array(3, np.int64)], constant=(1,)),
    Case("Pow", [half(positive(*SHAPE)), half(f(7))]),
    Case("Pow", [n(*SHAPE, low=0, high=9), n(7, low=0, high=5)]),
    Case("Sum", [f(*SHAPE), f(7), f(5, 1)]),
    Case("Mean", [f(*SHAPE), f(7), f(5, 1)]),
    Case("Sum", [f(*SHAPE)]),
    Case("Max", [f(*SHAPE), f(7), f(5, 1)]),
    Case("Min", [f(*SHAPE)]),
    Case("Gelu", [f(*SHAPE, scale=3)], {"approximate": "tanh"}),
    Case("Celu", [f(*SHAPE)], {"alpha": 0.7}),
    Case("Elu", [f(*SHAPE)], {"alpha": 1.3}),
    Case("LeakyRelu", [f(*SHAPE)], {"alpha": 0.2}),
    Case("HardSigmoid", [f(*SHAPE, scale=3)], {"alpha": 0.3, "beta": 0.4}),
    Case("Sigmoid", [f(*SHAPE, scale=20)]),
    Case("Tanh", [f(*SHAPE, scale=20)]),
    Case("Relu", [n(*SHAPE, dtype=np.int32)]),
    Case("Neg", [n(*SHAPE)]),
    Case("Abs", [n(*SHAPE)]),
    Case("Sign", [n(*SHAPE)]),
    Case("Round", [TIE]),
    Case("Clip", [f(*SHAPE), np.array(-0.5, np.float32), np.array(0.7, np.float32)], constant=(1, 2)),
    Case("Clip", [f(*SHAPE), None, f()]),
    Case("Clip", [n(*SHAPE), np.array(-5), None], constant=(1,)),
    Case("Clip", [f(*SHAPE)], {"min": 0.0, "max": 6.0}, opset=10),
    Case("Clip", [half(f(*SHAPE)), half(np.array(-0.5))]),
    Case("Where", [b(2, 1, 7), f(*SHAPE), f()]),
    Case("Where", [b(5, 7), n(7), n(2, 5, 1)]),
    Case("Where", [b(5, 7), f(7), np.array(-np.inf, np.float32)], constant=(2,)),
    Case("IsNaN", [np.where(b(4, 6), np.nan, f(4, 6))]),
    Case("IsInf", [np.where(b(4, 6), np.inf, f(4, 6))]),
    Case("IsInf", [np.where(b(4, 6), -np.inf, np.where(b(4, 6), np.inf, f(4, 6)))], {"detect_negative": 0}),
    *(Case(op, [f(*SHAPE), f(7)]) for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(Case(op, [n(*SHAPE, high=-45), n(7, high=-45)]) for op in ("Equal", "Less", "LessOrEqual", "GreaterOrEqual")),
    Case("Equal", [b(5, 7), b(7)]),
    Case("Equal", [np.round(f(5, 7)), np.round(f(7))]),
    *(Case(op, [b(5, 7), b(7)]) for op in ("And", "Or", "Xor")),
    Case("Not", [b(5, 7)]),
    *(Case(op, [n(5, 7), n(7)]) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    Case("BitwiseNot", [n(5, 7, dtype=np.int32)]),
    Case("BitShift", [n(5, 7, low=0, dtype=np.uint8), n(7, low=0, high=8, dtype=np.uint8)], {"direction": "LEFT"}),
    Case("BitShift", [n(5, 7, low=0, dtype=np.uint64), n(7, low=0, high=8, dtype=np.uint64)], {"direction": "RIGHT"}),
    *(Case("Cast", [f(4, 9, scale=30)], {"to": to}) for to in (3, 6, 7, 9, 10, 11)),
    *(Case("Cast", [n(4, 9)], {"to": to}) for to in (1, 2, 3, 6, 9, 10)),
    *(Case("Cast", [b(4, 9)], {"to": to}) for to in (1, 7, 10)),
    *(Case("Cast", [half(f(4, 9, scale=30))], {"to": to}) for to in (1, 7, 9)),
    Case("Cast", [f(4, 9, scale=1e36)], {"to": 10}),
    Case("Cast", [f(4, 9).astype(np.float64)], {"to": 1}),
    Case("CastLike", [f(4, 9, scale=30), n(2, 3, 4)]),
    Case("QuantizeLinear", [f(4, 9), np.array(0.02, np.float32), np.array(3, np.int8)], constant=(1, 2)),
    Case("QuantizeLinear", [f(4, 9), np.array(0.02, np.float32)], constant=(1,)),
    Case("QuantizeLinear", [f(4, 9), positive(9) / 30, n(9, low=0, dtype=np.uint8)], {"axis": 1}, constant=(1, 2)),
    Case("QuantizeLinear", [f(3, 4, 9), positive(4) / 30, n(4, low=0, dtype=np.int8)], {"axis": -2}),
    Case("QuantizeLinear", [f(4, 9), positive(2, 9) / 30, n(2, 9, dtype=np.int8)], {"axis": 0, "block_size": 2}),
    Case("QuantizeLinear", [TIE, np.array(1, np.float32), np.array(0, np.int8)]),
    Case("QuantizeLinear", [half(f(4, 9)), half(np.array(0.02)), np.array(3, np.int8)], opset=19),
    Case("DequantizeLinear", [n(4, 9, dtype=np.int8), np.array(0.02, np.float32), np.array(3, np.int8)]),
    Case("DequantizeLinear", [n(4, 9, dtype=np.int32, low=-(2**30), high=2**30), np.array(0.02, np.float32)]),
    Case("DequantizeLinear", [n(4, 9, low=0, dtype=np.uint8), positive(4), n(4, low=0, dtype=np.uint8)], {"axis": 0}),
    Case("DequantizeLinear", [n(4, 9, dtype=np.int8), positive(4, 3), n(4, 3, dtype=np.int8)], {"block_size": 3}),
    Case("DequantizeLinear", [n(4, 9, dtype=np.int8), half(np.array(0.02)), np.array(3, np.int8)], opset=19),
    Case("BatchNormalization", [f(2, 3, 4, 5), positive(3), f(3), f(3), positive(3)], constant=(1, 2, 3, 4)),
    Case("BatchNormalization", [f(6, 3), positive(3), f(3), f(3), positive(3)], {"epsilon": 1e-3}, opset=9),
    Case("Gelu", [f(*SHAPE, scale=3)], domain=CONTRIBUTED),
    Case("BiasGelu", [f(*SHAPE, scale=3), f(7)], domain=CONTRIBUTED),
    Case("FastGelu", [f(*SHAPE, scale=3), f(7)], domain=CONTRIBUTED),
    Case("FastGelu", [f(*SHAPE, scale=3)], domain=CONTRIBUTED),
    Case("QuantizeLinear", [f(4, 9), np.array(0.02, np.float32), np.array(3, np.int8)], domain=CONTRIBUTED),
    Case("QuantizeLinear", [f(4, 9), np.array(0.0001, np.float32), np.array(3, np.uint16)], domain=CONTRIBUTED),
    Case(
        "DequantizeLinear", [n(4, 9, dtype=np.int8), positive(9), n(9, dtype=np.int8)], {"axis": 1}, domain=CONTRIBUTED
    ),
    Case("QuickGelu", [f(*SHAPE, scale=3)], domain=CONTRIBUTED),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_honest_result_is_accepted_and_no_forged_one(case):
    worker, op = run(case), OPS[case.domain, case.op]
    assert op.refuses(worker.site.node) is None
    for rows in (sampled(worker, RNG), sampled(worker, RNG, None)):
        assert check(op, worker, rows).entries == len(rows[0]) * worker.site.outputs[0].width
    assert accepted_forgeries(op, worker, RNG) == []


def test_every_op_has_a_case():
    assert {(case.domain, case.op) for case in CASES} == OPS.keys()


BFLOAT = [case for case in CASES if all(x is None or x.dtype == np.float32 for x in case.inputs) and case.op != "Cast"]


@pytest.mark.parametrize("case", BFLOAT, ids=str)
def test_bfloat16_computed_in_float32_is_accepted(case):
    narrow = [None if x is None else x.astype(BF16) for x in case.inputs]
    wide = run(replace(case, inputs=[None if x is None else x.astype(np.float32) for x in narrow]))
    outputs = [y.astype(BF16) if y.dtype == np.float32 else y for y in wide.outputs]
    worker, op = assembled(replace(case, inputs=narrow), outputs), OPS[case.domain, case.op]
    check(op, worker, sampled(worker, RNG, None))
    assert accepted_forgeries(op, worker, RNG) == []


WIDE = {  # op: a range of inputs it is defined on, far beyond what activations reach
    **{op: lambda: f(40, 5000, scale=30) for op in UNARY},
    **{op: lambda: np.exp(f(40, 5000, scale=8)) for op in ("Log", "Sqrt", "Reciprocal")},
    **{op: lambda: inside(40, 5000) for op in ("Acos", "Asin", "Atanh")},
    "Acosh": lambda: 1 + np.exp(f(40, 5000, scale=8)),
}


@pytest.mark.parametrize("op", WIDE)
def test_no_honest_result_is_rejected_over_a_wide_range(op):
    worker = run(Case(op, [WIDE[op]()], opset=max(UNARY[op][1], 13)))
    assert check(OPS["", op], worker, sampled(worker, RNG, None)).entries == 200_000


@pytest.mark.parametrize(("x", "to"), [(f(4, 9), 16), (n(4, 9), 16), (half(f(4, 9)), 16), (f(4, 9).astype(BF16), 1)])
def test_casts_from_and_to_bfloat16_round_once(x, to):
    worker = assembled(Case("Cast", [x], {"to": to}), [x.astype(BF16 if to == 16 else np.float32)])
    check(OPS["", "Cast"], worker, sampled(worker, RNG, None))
    assert accepted_forgeries(OPS["", "Cast"], worker, RNG) == []


def test_an_undefined_cast_may_saturate_or_wrap_but_not_invent():
    case = Case("Cast", [np.array([[300.7, -5.0, np.nan]], np.float32)], {"to": 2})
    for honest in ([255, 0, 0], [44, 251, 0]):
        worker = assembled(case, [np.array([honest], np.uint8)])
        check(OPS["", "Cast"], worker, sampled(worker, RNG))
    worker = assembled(case, [np.array([[17, 0, 0]], np.uint8)])
    with pytest.raises(Rejected):
        check(OPS["", "Cast"], worker, sampled(worker, RNG))


REFUSED = [
    Case("BatchNormalization", [f(2, 3, 4, 5), positive(3), f(3), f(3), positive(3)], {"training_mode": 1}),
    Case("BatchNormalization", [f(2, 3, 4, 5), positive(3), f(3), f(3), positive(3)], {"spatial": 0}, opset=7),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_training_is_refused_with_a_reason(case):
    assert OPS[case.domain, case.op].refuses(assembled(case, []).site.node)
