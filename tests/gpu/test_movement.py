"""Movement ops against ONNX Runtime: what they move is accepted bit for bit, and nothing else is."""

import numpy as np
import pytest

from gpu.ops import movement
from proof.errors import Reason, Rejected
from tests.gpu.nodes import Case, accepted_forgeries, assembled, check, opened, run, sampled

RNG = np.random.default_rng(7)
OPS = {name: op for (_, name), op in movement.OPS.items()}


def f(*shape):
    return np.asarray(RNG.standard_normal(shape), np.float32)


def n(*shape, below, dtype=np.int64):
    return RNG.integers(0, below, shape).astype(dtype)


def ints(*values):
    return np.array(values, np.int64)


X = f(2, 3, 4, 6)
IMAGE = f(2, 8, 4, 6)

CASES = [
    Case("Identity", [X]),
    Case("Identity", [f()]),
    Case("Identity", [X.astype(np.float16)]),
    Case("Identity", [X > 0]),
    Case("Reshape", [X, ints(2, -1, 8)], constant=(1,)),
    Case("Reshape", [X, ints(6, 4, 6)], constant=(1,)),
    Case("Reshape", [X, ints(0, 0, 24)], constant=(1,), opset=5),
    Case("Flatten", [X], {"axis": 2}),
    Case("Flatten", [X], {"axis": 0}, opset=9),
    Case("Squeeze", [f(1, 3, 1, 5), ints(0)], constant=(1,)),
    Case("Squeeze", [f(3, 5, 1)], {"axes": [2]}, opset=11),
    Case("Unsqueeze", [f(3, 5), ints(0, 3)], constant=(1,)),
    Case("Unsqueeze", [f(3, 5)], {"axes": [2]}, opset=11),
    Case("Dropout", [X], outputs=2),
    Case("Dropout", [X, np.array(0.3, np.float32)], opset=13, constant=(1,)),
    Case("Dropout", [X], {"ratio": 0.3}, opset=10),
    Case("Transpose", [X], {"perm": [2, 0, 1, 3]}),
    Case("Transpose", [X], {"perm": [0, 1, 3, 2]}),
    Case("Transpose", [f(4, 5)]),
    Case("Transpose", [X.astype(np.int8)], {"perm": [3, 1, 0, 2]}),
    Case("Slice", [X, ints(1), ints(3), ints(2)], constant=(1, 2, 3)),
    Case("Slice", [X, ints(-1, 5), ints(-9, 0), ints(2, 3), ints(-2, -2)], constant=(1, 2, 3, 4)),
    Case("Slice", [X, ints(0, 1), ints(2**62, -1)], constant=(1, 2)),
    Case("Slice", [X], {"starts": [1, 2], "ends": [3, 9], "axes": [1, 3]}, opset=9),
    Case("Slice", [X, ints(-1), ints(-9), ints(3), ints(-1)], constant=(1, 2, 3, 4)),
    Case("Split", [X, ints(1, 2)], {"axis": 1}, outputs=2, constant=(1,)),
    Case("Split", [f(4, 7)], {"axis": -1, "num_outputs": 3}, outputs=3),
    Case("Split", [X], {"axis": 2, "split": [1, 3]}, outputs=2, opset=11),
    Case("Split", [f(5, 6)], {"axis": 1}, outputs=3, opset=13),
    Case("Concat", [f(2, 3, 4), f(2, 1, 4), f(2, 2, 4)], {"axis": 1}),
    Case("Concat", [f(2, 3), f(2, 1), f(2, 0)], {"axis": -1}),
    Case("Concat", [n(3, below=9), n(2, below=9)], {"axis": 0}),
    Case("Concat", [f(9, 4), f(2, 4)], {"axis": 0}, opset=4),
    Case("Expand", [f(3, 1, 5), ints(2, 1, 4, 1)], constant=(1,)),
    Case("Expand", [f(5, 1), ints(5, 4)], constant=(1,)),
    Case("Tile", [f(2, 3), ints(3, 2)], constant=(1,)),
    Case("Tile", [f(2, 3), ints(3, 1)], constant=(1,)),
    Case("Gather", [f(40, 8), n(2, 5, below=40)], constant=(0,)),
    Case("Gather", [f(40, 8), n(2, 5, below=40)]),
    Case("Gather", [X, ints(1, -1)], {"axis": 1}, constant=(1,)),
    Case("Gather", [X, np.array(0)], {"axis": 3}, constant=(1,)),
    Case("Gather", [X, n(2, 2, below=6)], {"axis": -1}, constant=(1,)),
    Case("Gather", [n(7, below=9), np.array(2, np.int32)], constant=(1,)),
    Case("GatherElements", [X, n(2, 3, 2, 6, below=4)], {"axis": 2}, constant=(1,)),
    Case("GatherElements", [X, n(2, 3, 4, 5, below=6)], {"axis": -1}),
    Case("GatherND", [X, n(5, 2, below=2)], constant=(1,)),
    Case("GatherND", [X, n(5, 4, below=2)]),
    Case("GatherND", [X, n(2, 5, 1, below=3)], {"batch_dims": 1}),
    Case("ScatterND", [f(6, 4, 3), ints(0, 4, 2).reshape(3, 1), f(3, 4, 3)]),
    Case("ScatterND", [f(6, 4), ints(0, 1, 5, 3).reshape(2, 2), f(2)], constant=(1,)),
    Case("ScatterElements", [f(3, 5), ints(1, 3, 0, 2, 4, 1).reshape(3, 2), f(3, 2)], {"axis": 1}),
    Case("ScatterElements", [f(5, 3), ints(1, 0, 2, 4, 3, 0).reshape(2, 3), f(2, 3)], constant=(1,)),
    Case("Scatter", [f(5, 3), ints(1, 0, 2, 4, 3, 0).reshape(2, 3), f(2, 3)], {"axis": 0}, opset=9),
    Case("Pad", [f(3, 4), ints(1, 0, 2, 3)], constant=(1,)),
    Case("Pad", [f(3, 4), ints(1, -1, 0, 2), np.array(1.5, np.float32)], constant=(1, 2)),
    Case("Pad", [f(3, 4), ints(1, 0, 2, 3), f()], constant=(1,)),
    Case("Pad", [f(2, 5, 6), ints(2, 3), None, ints(-1)], {"mode": "reflect"}, constant=(1, 3)),
    Case("Pad", [f(3, 4), ints(2, 1, 2, 3)], {"mode": "edge"}, constant=(1,)),
    Case("Pad", [f(3, 4), ints(2, 1, 2, 3)], {"mode": "wrap"}, constant=(1,)),
    Case("Pad", [f(3, 4)], {"pads": [0, 1, 2, 1], "value": 0.5}, opset=10),
    Case("CenterCropPad", [f(7, 8, 3), ints(4, 11, 3)], opset=18, constant=(1,)),
    Case("CenterCropPad", [f(7, 8, 3), ints(10, 3)], {"axes": [0, 1]}, opset=18, constant=(1,)),
    Case("DepthToSpace", [IMAGE], {"blocksize": 2}),
    Case("DepthToSpace", [IMAGE], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [IMAGE], {"blocksize": 2}),
    Case("ReverseSequence", [f(6, 3, 4), ints(2, 6, 4)]),
    Case("ReverseSequence", [f(3, 6), ints(2, 6, 4)], {"batch_axis": 0, "time_axis": 1}, constant=(1,)),
    Case("Trilu", [f(2, 5, 6)]),
    Case("Trilu", [f(5, 6), np.array(-1)], {"upper": 0}, constant=(1,)),
    Case("Trilu", [f(5, 6), np.array(2)]),
    Case("OneHot", [n(2, 5, below=7), np.array(7), f(2)], constant=(1, 2)),
    Case("OneHot", [n(2, 5, below=14) - 7, np.array(7), ints(0, 1)], {"axis": 1}, constant=(1, 2)),
    Case("Compress", [f(4, 5), np.array([True, False, True, True])], {"axis": 0}, constant=(1,)),
    Case("Compress", [f(2, 3), np.array([True, False, True, True])], constant=(1,)),
    Case("NonZero", [(f(3, 7) > 0).astype(np.int64)], constant=(0,)),
    Case("Shape", [X]),
    Case("Shape", [X], {"start": 1, "end": -1}),
    Case("Size", [X]),
    Case("Constant", [], {"value": f(3, 4)}),
    Case("Constant", [], {"value_floats": [0.5, 0.25]}),
    Case("ConstantOfShape", [ints(3, 2)], {"value": np.array([7], np.int64)}, constant=(0,)),
    Case("ConstantOfShape", [ints(3, 2)], constant=(0,)),
    Case("EyeLike", [f(4, 6)], {"k": 1}),
    Case("Range", [np.array(3), np.array(17), np.array(4)], constant=(0, 1, 2)),
    Case("Range", [np.array(0.0), np.array(9.0), np.array(2.0)], constant=(0, 1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_moved_is_accepted_and_nothing_else(case):
    worker, op = run(case), OPS[case.op]
    assert op.refuses(worker.site.node) is None
    for rows in (sampled(worker, RNG), sampled(worker, RNG, None)):
        assert check(op, worker, rows).entries == sum(
            len(taken) * (value.shape[-1] if value.shape else 1)
            for taken, value in zip(rows, worker.outputs, strict=True)
        )
    assert accepted_forgeries(op, worker, RNG) == []


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == OPS.keys()
    assert all(OPS[case.op].exact for case in CASES)


def test_rows_that_move_whole_open_one_row_each():
    worker = run(Case("Transpose", [f(2, 50, 6, 8)], {"perm": [0, 2, 1, 3]}))
    rows = (np.array([0, 7, 599]),)
    (tensor,) = opened(OPS["Transpose"], worker, rows)
    assert len(tensor.index) == 3


def test_an_embedding_opens_its_indices_alone():
    worker = run(Case("Gather", [f(40, 8), n(2, 5, below=40)], constant=(0,)))
    assert OPS["Gather"].reach(worker.site, 0, np.array([7]))[1].tolist() == [1]


def test_an_index_outside_its_axis_is_rejected():
    case = Case("Gather", [f(40, 8), ints(3, 40)], constant=(0,))
    worker = assembled(case, [f(2, 8)])
    with pytest.raises(Rejected) as rejection:
        check(OPS["Gather"], worker, sampled(worker, RNG))
    assert rejection.value.reason is Reason.REEXECUTION


REFUSED = [
    Case("ScatterND", [f(6, 4), ints(0).reshape(1, 1), f(1, 4)], {"reduction": "add"}),
    Case("ScatterElements", [f(5, 3), ints(1).reshape(1, 1), f(1, 1)], {"reduction": "mul"}),
    Case("Dropout", [X], opset=6),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_checked_is_refused_with_a_reason(case):
    assert OPS[case.op].refuses(assembled(case, []).site.node)
