"""Random shapes, axes, broadcasting, dtypes and hard data: no honest node is rejected, no forged one accepted.

Entries are counted, so that a table that ran empty would fail.
"""

from collections.abc import Callable

import numpy as np
import pytest

from gpu.ops import movement, pointwise, rowwise
from tests.gpu.nodes import Case, accepted_forgeries, check, run, sampled

OPS = {**movement.OPS, **pointwise.OPS, **rowwise.OPS}
TRIES = 40

Random = np.random.Generator


def shape(rng: Random, rank: int | None = None, top: int = 7) -> list[int]:
    return [int(size) for size in rng.integers(1, top, rank or rng.integers(1, 5))]


def data(rng: Random, sizes, dtype=None):
    """Floats of a random scale and offset, in a random format of at most 32 bits."""
    dtype = dtype or rng.choice([np.float32, np.float32, np.float16])
    scale = 10.0 ** rng.uniform(-2, 2)
    return np.asarray(rng.standard_normal(sizes) * scale + rng.choice([0, 0, scale * 3]), dtype)


def broadcast(rng: Random, sizes: list[int]) -> list[int]:
    """A shape that broadcasts to `sizes`."""
    kept = [size if rng.random() < 0.6 else 1 for size in sizes]
    return kept[rng.integers(0, len(sizes) + 1) :]


def ints(*values) -> np.ndarray:
    return np.array(values, np.int64)


def binary(rng: Random) -> Case:
    sizes, dtype = shape(rng), rng.choice([np.float32, np.float16, np.float64])
    op = rng.choice(["Add", "Sub", "Mul", "Div", "Min", "Max", "Less", "GreaterOrEqual"])
    pair = [data(rng, sizes, dtype), data(rng, broadcast(rng, sizes), dtype)]
    return Case(str(op), pair if rng.random() < 0.5 else pair[::-1])


def whole(rng: Random) -> Case:
    sizes, dtype = shape(rng), rng.choice([np.int32, np.int64])
    op = rng.choice(["Add", "Sub", "Mul", "Div", "Mod", "Equal", "Less", "Greater"])
    left = rng.integers(-(2**30), 2**30, sizes).astype(dtype)
    return Case(str(op), [left, rng.integers(1, 99, broadcast(rng, sizes)).astype(dtype)])


def chosen(rng: Random) -> Case:
    sizes = shape(rng)
    condition = rng.integers(0, 2, broadcast(rng, sizes)).astype(np.bool_)
    return Case("Where", [condition, data(rng, sizes, np.float32), data(rng, broadcast(rng, sizes), np.float32)])


def transposed(rng: Random) -> Case:
    sizes = shape(rng)
    return Case("Transpose", [data(rng, sizes)], {"perm": [int(axis) for axis in rng.permutation(len(sizes))]})


def sliced(rng: Random) -> Case:
    sizes = shape(rng, top=16)
    axes = rng.permutation(len(sizes))
    steps, starts = rng.choice([-2, -1, 1, 1, 2, 3], len(sizes)), rng.integers(0, np.array(sizes)[axes])
    ends = np.where(steps > 0, starts + rng.integers(1, 9, len(sizes)), -99)
    parameters = [np.asarray(p, np.int64) for p in (starts, ends, axes, steps)]
    return Case("Slice", [data(rng, sizes), *parameters], constant=(1, 2, 3, 4))


def joined(rng: Random) -> Case:
    sizes, dtype = shape(rng), rng.choice([np.float32, np.float16])
    axis = int(rng.integers(-len(sizes), len(sizes)))
    parts = []
    for _ in range(rng.integers(1, 4)):
        part = list(sizes)
        part[axis] = int(rng.integers(1, 5))
        parts.append(data(rng, part, dtype))
    return Case("Concat", parts, {"axis": axis})


def cut(rng: Random) -> Case:
    sizes = shape(rng)
    axis, parts = int(rng.integers(0, len(sizes))), [int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
    sizes[axis] = sum(parts)
    return Case("Split", [data(rng, sizes), ints(*parts)], {"axis": axis}, outputs=len(parts), constant=(1,))


def gathered(rng: Random) -> Case:
    sizes = shape(rng)
    axis = int(rng.integers(-len(sizes), len(sizes)))
    index = rng.integers(-sizes[axis], sizes[axis], shape(rng, int(rng.integers(0, 3)) or 1))
    return Case("Gather", [data(rng, sizes), index], {"axis": axis}, constant=((), (1,), (0,))[rng.integers(0, 3)])


def padded(rng: Random) -> Case:
    sizes = shape(rng)
    pads = rng.integers(0, 3, 2 * len(sizes)).astype(np.int64)
    mode = str(rng.choice(["constant", "edge", "wrap"]))
    return Case("Pad", [data(rng, sizes, np.float32), pads], {"mode": mode}, constant=(1,))


def expanded(rng: Random) -> Case:
    sizes = shape(rng)
    return Case("Expand", [data(rng, broadcast(rng, sizes)), ints(*sizes)], constant=(1,))


def reshaped(rng: Random) -> Case:
    sizes = shape(rng)
    return Case("Reshape", [data(rng, sizes), ints(*rng.permutation(sizes))], constant=(1,))


def reduced(rng: Random) -> Case:
    sizes = shape(rng)
    axes = rng.permutation(len(sizes))[: rng.integers(1, len(sizes) + 1)] - rng.choice([0, len(sizes)])
    op = rng.choice(["Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp"])
    keep = {"keepdims": int(rng.integers(0, 2))}
    return Case(f"Reduce{op}", [data(rng, sizes, np.float32), np.asarray(axes, np.int64)], keep, constant=(1,))


def softmaxed(rng: Random) -> Case:
    sizes = shape(rng)
    opset = int(rng.choice([11, 13]))
    axis = int(rng.integers(0 if opset == 11 else -len(sizes), len(sizes)))
    return Case(str(rng.choice(["Softmax", "LogSoftmax"])), [data(rng, sizes, np.float32)], {"axis": axis}, opset=opset)


def layered(rng: Random) -> Case:
    sizes = [*shape(rng, int(rng.integers(1, 3))), int(rng.choice([8, 64, 768]))]
    axis = int(rng.integers(0, len(sizes)))
    parameters = [data(rng, sizes[axis:], np.float32) for _ in range(2)]
    return Case("LayerNormalization", [data(rng, sizes, np.float32), *parameters], {"axis": axis}, opset=17)


def pooled(rng: Random) -> Case:
    spatial = int(rng.integers(1, 4))
    sizes = [*shape(rng, 2, 4), *(int(n) for n in rng.integers(6, 10, spatial))]
    kernel = [int(k) for k in rng.integers(2, 4, spatial)]
    attributes = {
        "kernel_shape": kernel,
        "strides": [int(s) for s in rng.integers(1, 4, spatial)],
        "pads": [int(rng.integers(0, k)) for k in kernel] * 2,
        "ceil_mode": int(rng.integers(0, 2)),
    }
    op = str(rng.choice(["MaxPool", "AveragePool"]))
    if op == "AveragePool":
        attributes["count_include_pad"] = int(rng.integers(0, 2))
    return Case(op, [data(rng, sizes, np.float32)], attributes, opset=19)


def ranked(rng: Random) -> Case:
    sizes = shape(rng)
    axis = int(rng.integers(-len(sizes), len(sizes)))
    k = ints(rng.integers(1, sizes[axis] + 1))
    ties = np.round(rng.standard_normal(sizes)).astype(np.float32)
    return Case("TopK", [ties, k], {"axis": axis, "largest": int(rng.integers(0, 2))}, outputs=2, constant=(1,))


def quantised(rng: Random) -> Case:
    sizes, dtype = shape(rng), rng.choice([np.int8, np.uint8])
    axis = int(rng.integers(-len(sizes), len(sizes)))
    scale = np.exp(rng.standard_normal(sizes[axis])).astype(np.float32) / 30
    zero = rng.integers(0, 50, sizes[axis]).astype(dtype)
    if rng.random() < 0.5:
        return Case("QuantizeLinear", [data(rng, sizes, np.float32), scale, zero], {"axis": axis}, constant=(1, 2))
    return Case("DequantizeLinear", [rng.integers(0, 100, sizes).astype(dtype), scale, zero], {"axis": axis})


def cumulated(rng: Random) -> Case:
    sizes = shape(rng)
    flags = {"exclusive": int(rng.integers(0, 2)), "reverse": int(rng.integers(0, 2))}
    return Case("CumSum", [data(rng, sizes, np.float32), np.array(rng.integers(0, len(sizes)))], flags, constant=(1,))


MAKERS: list[Callable[[Random], Case]] = [
    binary,
    whole,
    chosen,
    transposed,
    sliced,
    joined,
    cut,
    gathered,
    padded,
    expanded,
    reshaped,
    reduced,
    softmaxed,
    layered,
    pooled,
    ranked,
    quantised,
    cumulated,
]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_no_honest_node_is_rejected_and_no_forged_one_accepted(maker):
    rng, entries = np.random.default_rng(len(maker.__name__)), 0
    for _ in range(TRIES):
        case = maker(rng)
        worker, op = run(case), OPS["", case.op]
        for rows in (sampled(worker, rng), sampled(worker, rng, None)):
            entries += check(op, worker, rows).entries
        missed = [name for name in accepted_forgeries(op, worker, rng) if not name.startswith("one element")]
        assert missed == [], str(case)
    assert entries > 10 * TRIES


HARD = {
    "constant rows": lambda rng: np.full((4, 96), 3.7) * np.array([[1], [1e-4], [1e4], [0]]),
    "a large offset": lambda rng: rng.standard_normal((4, 96)) + 1000,
    "one outlier": lambda rng: rng.standard_normal((4, 96)) + 1e4 * (np.arange(96) == 5),
    "small": lambda rng: rng.standard_normal((4, 96)) * 1e-12,
    "large": lambda rng: rng.standard_normal((4, 96)) * 1e12,
    "long": lambda rng: rng.standard_normal((2, 20000)),
    "long of one sign": lambda rng: rng.random((2, 20000)),
}
EXTREME = {  # squares and sums of these leave float32
    "masked": lambda rng: np.where(rng.random((4, 96)) < 0.5, np.finfo(np.float32).min, rng.standard_normal((4, 96))),
    "infinitely masked": lambda rng: np.where(rng.random((4, 96)) < 0.5, -np.inf, rng.standard_normal((4, 96))),
    "huge": lambda rng: rng.standard_normal((4, 96)) * 1e30,
    "tiny": lambda rng: rng.standard_normal((4, 96)) * 1e-30,
}
SCALED, REDUCED = ("LayerNormalization", "RMSNormalization"), ("Mean", "Sum", "L1", "L2", "SumSquare", "LogSumExp")
PLAIN = ("Softmax", "LogSoftmax")
HARD_CASES = [
    *(
        (op, make)
        for op in (*PLAIN, "LpNormalization", *SCALED, *(f"Reduce{r}" for r in REDUCED))
        for make in HARD.items()
    ),
    *((op, make) for op in PLAIN for make in EXTREME.items()),
]


@pytest.mark.parametrize(("op", "make"), HARD_CASES, ids=str)
def test_no_honest_row_is_rejected_on_hard_data(op, make):
    rng = np.random.default_rng(3)
    x = make[1](rng).astype(np.float32)
    more = [rng.standard_normal(x.shape[-1]).astype(np.float32)] if op in SCALED else []
    more += [ints(1)] if op.startswith("Reduce") else []
    opset = 23 if op == "RMSNormalization" else 18
    worker = run(Case(op, [x, *more], opset=opset, constant=(1,) if more else ()))
    assert check(OPS["", op], worker, sampled(worker, rng, None)).entries == worker.outputs[0].size


NOTHING = np.zeros((0, 4, 6, 6), np.float32)
EMPTY = [
    Case("Add", [NOTHING, np.ones(6, np.float32)]),
    Case("Softmax", [NOTHING.reshape(6, 4, 0)]),
    Case("ReduceSum", [NOTHING, ints(0)], constant=(1,)),
    Case("ReduceMean", [NOTHING, ints(0)], constant=(1,)),
    Case("ReduceMax", [NOTHING, ints(1)], constant=(1,)),
    Case("Slice", [NOTHING.reshape(4, 6, 0), ints(1, 2), ints(3, 9), ints(1, 2)], constant=(1, 2, 3)),
    Case("Concat", [NOTHING, np.ones((2, 4, 6, 6), np.float32)], {"axis": 0}),
    Case("Gather", [NOTHING, ints(1, 2)], {"axis": 2}),
    Case("MaxPool", [NOTHING], {"kernel_shape": [2, 2]}),
    Case("Resize", [NOTHING, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}, constant=(2,)),
]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_an_empty_tensor_is_checked_like_any_other(case):
    worker = run(case)
    rng = np.random.default_rng(1)
    assert check(OPS["", case.op], worker, sampled(worker, rng, None)).entries == worker.outputs[0].size
