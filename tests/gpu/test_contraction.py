"""Every contraction op: honest nodes pass under every policy, forged ones never, and reach names what a check reads."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from gpu.ops import contraction
from gpu.ops.call import Call
from proof.errors import Reason, Rejected
from proof.graph import spec_of
from proof.policy import POLICIES, Policy, policy
from proof.sampling import Draw, select
from tests.gpu.nodes import CONTRIBUTED, Case, accepted_forgeries, assembled, claims, opened, run, sampled

RNG = np.random.default_rng(11)
BF16 = np.dtype(ml_dtypes.bfloat16)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def unsigned(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def signed(*shape):
    """Within 6 bits and sign: engines without 8-bit dot products saturate pairs of larger ones times uint8."""
    return RNG.integers(-64, 64, shape, np.int8)


def scale(*values):
    return np.array(values if len(values) > 1 else values[0], np.float32)


def zero(value, dtype=np.uint8):
    return np.array(value, dtype)


def conv(x, w, bias=None, **attributes):
    return Case("Conv", [floats(*x), floats(*w), *([floats(bias)] if bias else [])], attributes)


def transposed(x, w, **attributes):
    return Case("ConvTranspose", [floats(*x), floats(*w)], attributes)


def einsum(equation, *shapes):
    return Case("Einsum", [floats(*shape) for shape in shapes], {"equation": equation})


CASES = [
    *(
        Case("MatMul", [floats(*a), floats(*b)])
        for a, b in [
            ((5, 7), (7, 3)),
            ((7,), (7, 3)),
            ((5, 7), (7,)),
            ((7,), (7,)),
            ((2, 3, 5, 7), (7, 4)),
            ((2, 3, 5, 7), (2, 3, 7, 4)),
            ((3, 5, 7), (2, 1, 7, 4)),
            ((2, 5, 7), (7,)),
            ((7,), (2, 7, 4)),
            ((200, 300), (300, 200)),
            ((3, 4), (4, 5000)),
        ]
    ),
    Case("MatMul", [floats(60, 64), floats(64, 100)], constant=(1,)),
    Case("MatMul", [RNG.integers(-9, 9, (4, 5)), RNG.integers(-9, 9, (5, 3))]),
    Case("MatMul", [floats(6, 5).astype(np.float64), floats(5, 3).astype(np.float64)]),
    *(
        Case(
            "Gemm",
            [floats(*((8, 5) if a else (5, 8))), floats(*((6, 8) if b else (8, 6))), floats(*c)],
            {"transA": a, "transB": b, "alpha": 0.7, "beta": -1.3},
        )
        for a, b, c in [(0, 0, (6,)), (1, 0, (1, 6)), (0, 1, (5, 1)), (1, 1, (5, 6)), (0, 1, ()), (0, 0, (1,))]
    ),
    Case("Gemm", [floats(5, 8), floats(8, 6)]),
    Case("Gemm", [floats(90, 80), floats(70, 80), floats(70) * 100], {"transB": 1}, constant=(1, 2)),
    Case(
        "FusedMatMul", [floats(2, 8, 5), floats(2, 6, 8)], {"transA": 1, "transB": 1, "alpha": 0.25}, domain=CONTRIBUTED
    ),
    Case("MatMulInteger", [unsigned(5, 9), signed(9, 4)]),
    Case("MatMulInteger", [unsigned(2, 5, 9), unsigned(9, 4), zero(3), unsigned(4)], constant=(1, 3)),
    Case("MatMulInteger", [signed(80, 90), signed(90, 70), zero(-3, np.int8), zero(5, np.int8)]),
    Case(
        "QLinearMatMul",
        [unsigned(5, 9), scale(0.1), zero(3), signed(9, 4), scale(0.02), zero(0, np.int8), scale(0.3), zero(100)],
    ),
    Case(
        "MatMulIntegerToFloat",
        [unsigned(5, 9), signed(9, 4), scale(0.1), np.abs(floats(4)), zero(3), signed(4), floats(4)],
        domain=CONTRIBUTED,
    ),
    conv((2, 4, 9, 9), (6, 2, 3, 3), 6, group=2, pads=[1, 2, 0, 1], strides=[2, 1], dilations=[1, 2]),
    conv((2, 4, 9), (6, 4, 3), auto_pad="SAME_UPPER"),
    conv((2, 4, 9), (6, 4, 4), auto_pad="SAME_LOWER", strides=[2]),
    conv((2, 4, 9), (6, 4, 4), auto_pad="VALID", strides=[2]),
    conv((1, 3, 5, 6, 7), (4, 3, 2, 2, 3), 4),
    conv((1, 8, 12, 12), (8, 1, 3, 3), group=8, pads=[1, 1, 1, 1]),
    conv((2, 3, 32, 32), (16, 3, 3, 3), 16, pads=[1, 1, 1, 1]),
    conv((3, 40, 12, 12), (50, 40, 1, 1)),
    transposed(
        (2, 4, 5, 6), (4, 3, 3, 3), group=2, strides=[2, 3], pads=[1, 0, 1, 2], output_padding=[1, 1], dilations=[2, 1]
    ),
    *(transposed((2, 4, 5), (4, 3, 4), strides=[3], auto_pad=kind) for kind in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    *(transposed((2, 4, 5), (4, 3, 4), strides=[3], output_shape=[size]) for size in (14, 15, 17)),
    Case("ConvInteger", [unsigned(2, 4, 9, 9), unsigned(6, 4, 3, 3), zero(5), zero(7)], {"pads": [1, 1, 1, 1]}),
    Case("ConvInteger", [unsigned(2, 4, 9, 9), unsigned(6, 4, 3, 3)], {"strides": [2, 2]}),
    Case(
        "QLinearConv",
        [
            *(unsigned(2, 4, 9, 9), scale(0.02), zero(5), signed(6, 2, 3, 3), np.abs(floats(6)) * np.float32(0.01)),
            *(np.zeros(6, np.int8), scale(0.05), zero(100), RNG.integers(-1000, 1000, 6).astype(np.int32)),
        ],
        {"pads": [1, 1, 1, 1], "group": 2},
    ),
    einsum("ij,jk->ik", (3, 4), (4, 5)),
    einsum("bhid,bhjd->bhij", (2, 2, 3, 4), (2, 2, 5, 4)),
    einsum("bnd,hdk->bhnk", (2, 3, 4), (2, 4, 5)),
    einsum("...ij,...jk->...ik", (2, 1, 3, 4), (1, 5, 4, 5)),
    einsum("i,j->ij", (3,), (4,)),
    einsum("ij,jk", (3, 4), (4, 5)),
    einsum("ij->ji", (3, 4)),
    einsum("ij->", (3, 4)),
    einsum("ii->i", (4, 4)),
    einsum("bij,bij->bj", (2, 3, 4), (2, 3, 4)),
    einsum("i,i->", (5,), (5,)),
    einsum("ijk,k->ij", (2, 3, 4), (4,)),
]


def checked(result, chosen: Policy, claimed=None, seed=bytes(32)):
    rows = tuple(select(seed, chosen.rows, spec_of(value).rows) for value in result.outputs)
    op = contraction.OPS[result.site.node.domain, result.site.node.op]
    given = claims(replace(result, outputs=claimed or result.outputs), rows)
    return op.check(Call(result.site, opened(op, result, rows), rows, tuple(given), chosen, Draw(seed, "node")))


def of(op):
    return next(case for case in CASES if case.op == op)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_honest_node_passes_and_no_forgery_does(case):
    result = run(case)
    op = contraction.OPS[case.domain, case.op]
    assert op.refuses(result.site.node) is None
    for chosen in POLICIES.values():
        measured = checked(result, chosen)
        assert measured.ratio <= 1.0
    assert measured.entries == result.outputs[0].size
    assert accepted_forgeries(op, result, np.random.default_rng(0)) == []


def test_every_op_of_the_table_is_exercised():
    assert {(case.domain, case.op) for case in CASES} == set(contraction.OPS)


@pytest.mark.parametrize("op", ["FusedMatMul", "MatMulIntegerToFloat"])
def test_contributed_ops_infer_their_outputs(op):
    result = run(of(op))
    assert contraction.OPS[CONTRIBUTED, op].infer(result.site.node, result.site.inputs) == result.site.outputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_random_output_is_accepted_under_the_full_policy(case):
    result, honest = run(case), np.random.default_rng(1)
    values = result.outputs[0].reshape(-1)
    if values.dtype.kind in "iu":
        forged = honest.permutation(values)
    else:
        forged = (honest.standard_normal(values.shape) * np.std(values) + np.mean(values)).astype(values.dtype)
    if (forged == values).all():
        forged = forged + forged.dtype.type(1)
    with pytest.raises(Rejected):
        checked(result, policy("full"), (forged.reshape(result.outputs[0].shape),))


def random_case(rng):
    m, k, n, batch = (int(size) for size in rng.integers(1, 40, 4))
    kind = rng.integers(5)
    data = lambda *shape: (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3)).astype(np.float32)  # noqa: E731
    if kind == 0:
        return Case(
            "MatMul", [data(batch % 5 + 1, m, k), data(*((batch % 5 + 1, k, n) if rng.random() < 0.5 else (k, n)))]
        )
    if kind == 1:
        a, b = (int(bit) for bit in rng.integers(0, 2, 2))
        shapes = (k, m) if a else (m, k), (n, k) if b else (k, n)
        bias = data(*[(n,), (1, n), (m, 1), (m, n), (1,)][rng.integers(5)])
        return Case("Gemm", [*(data(*shape) for shape in shapes), bias], {"transA": a, "transB": b, "alpha": 1.5})
    if kind == 2:
        groups, size = int(rng.integers(1, 4)), [int(v) for v in rng.integers(5, 14, rng.integers(1, 4))]
        kernel = [int(v) for v in rng.integers(1, 4, len(size))]
        attributes = {"group": groups, "strides": [int(v) for v in rng.integers(1, 3, len(size))]}
        attributes["pads"] = [int(v) for v in rng.integers(0, 2, 2 * len(size))]
        channels = groups * int(rng.integers(1, 4))
        w = data(groups * int(rng.integers(1, 4)), channels // groups, *kernel)
        return Case("Conv", [data(2, channels, *size), w, data(len(w))], attributes)
    if kind == 3:
        x, w = rng.integers(0, 256, (m, k), np.uint8), rng.integers(0, 256, (k, n), np.uint8)
        return Case("MatMulInteger", [x, w, np.array(rng.integers(0, 256), np.uint8)])
    return Case("Einsum", [data(m % 6 + 1, k, n), data(m % 6 + 1, k)], {"equation": "bkn,bk->bn"})


@pytest.mark.parametrize("seed", range(6))
def test_random_nodes(seed):
    """At least 20,000 honest rows in all, none rejected; forgeries of every one, none accepted."""
    rng = np.random.default_rng(seed)
    rows = 0
    while rows < 3500:
        result = run(random_case(rng))
        op = contraction.OPS["", result.site.node.op]
        for chosen in (policy("full"), policy("standard")):
            assert checked(result, chosen, seed=rng.bytes(32)).ratio <= 1.0
        assert accepted_forgeries(op, result, rng) == []
        rows += spec_of(result.outputs[0]).rows


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
@pytest.mark.parametrize("named", POLICIES)
def test_sixteen_bit_products_rounded_once(dtype, named):
    x, w = floats(3, 50, 64).astype(dtype), floats(64, 80).astype(dtype)
    y = (x.astype(np.float32) @ w.astype(np.float32)).astype(dtype)
    result = assembled(Case("MatMul", [x, w]), [y])
    assert checked(result, policy(named)).ratio <= 1.0
    quantised = np.round(w.astype(np.float32) * 30) / 30
    with pytest.raises(Rejected):
        checked(result, policy(named), ((x.astype(np.float32) @ quantised).astype(dtype),))


def test_a_masked_infinity_is_not_multiplied():
    case = Case("MatMul", [floats(4, 5), floats(5, 6)])
    result = run(case)
    broken = [case.inputs[0].copy(), case.inputs[1]]
    broken[0][2, 1] = -np.inf
    with pytest.raises(Rejected) as caught:
        checked(replace(result, inputs=tuple(broken)), policy("full"))
    assert caught.value.reason == Reason.NONFINITE


def test_only_the_opened_rows_of_a_batch_reach_its_matrices():
    result = run(Case("MatMul", [floats(6, 4, 3), floats(6, 3, 5)]))
    reached = contraction.OPS["", "MatMul"].reach(result.site, 0, np.array([4, 6]))
    assert reached[0].tolist() == [4, 6]
    assert reached[1].tolist() == [3, 4, 5]


def test_a_convolution_reaches_the_rows_under_its_kernel():
    result = run(conv((1, 2, 8, 8), (3, 2, 3, 3), pads=[1, 1, 1, 1]))
    reached = contraction.OPS["", "Conv"].reach(result.site, 0, np.array([0, 8 + 4]))
    assert reached[0].tolist() == [0, 1, 3, 4, 5, 8, 9, 11, 12, 13]
    assert reached[1].tolist() == list(range(12))


def test_three_operands_are_refused():
    node = assembled(einsum("ij,jk,kl->il", (2, 2), (2, 2), (2, 2)), [floats(2, 2)]).site.node
    assert "3 operands" in contraction.OPS["", "Einsum"].refuses(node)


def test_sampled_rows_are_enough_for_every_case():
    for case in CASES:
        result = run(case)
        rows = sampled(result, np.random.default_rng(3), 3)
        op = contraction.OPS[case.domain, case.op]
        tensors = opened(op, result, rows)
        given = tuple(claims(result, rows))
        assert op.check(Call(result.site, tensors, rows, given, policy("spot"), Draw(bytes(32), "n"))).ratio <= 1.0
