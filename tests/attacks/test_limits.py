"""Small files that ask for much: models that unfold, proofs that point at rows they do not hold, ops that break."""

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import world
from onnx import TensorProto, helper, numpy_helper

from gpu.plan import Model
from gpu.reach import selection
from proof.bundle import Opening, Proof
from proof.errors import Malformed, Reason, Unavailable
from proof.graph import dtype_name
from proof.messages import Challenge, Commitment, TensorClaim
from prover import prove
from verifier.verify import verify

FLOAT = TensorProto.FLOAT
OPSETS = (helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1))
node = helper.make_node


def model(
    *nodes: onnx.NodeProto,
    constants: dict[str, Any] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opsets: Sequence[onnx.OperatorSetIdProto] = OPSETS,
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
) -> bytes:
    """A graph from x (free, 4) to the last node's outputs."""
    taken = {"x": (FLOAT, ["n", 4]), **(inputs or {})}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in taken.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    graph.output[0].type.tensor_type.shape.SetInParent()
    proto = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    return bytes(proto.SerializeToString())


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("local", name, ["a"], ["b"], nodes, OPSETS)


def doubling(depth: int) -> list[onnx.FunctionProto]:
    """Functions of which each calls the one before twice: 2^depth nodes."""
    calls = [
        (node(f"f{i}", ["a"], ["c"], domain="local"), node(f"f{i}", ["c"], ["b"], domain="local")) for i in range(depth)
    ]
    return [function("f0", node("Neg", ["a"], ["b"])), *(function(f"f{i + 1}", *pair) for i, pair in enumerate(calls))]


def referring() -> onnx.NodeProto:
    leaky = node("LeakyRelu", ["x"], ["y"])
    leaky.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    return leaky


MODELS: dict[str, Callable[[], bytes]] = {
    "functions that unfold to a billion nodes": lambda: model(
        node("f30", ["x"], ["y"], domain="local"), functions=doubling(30)
    ),
    "a function that calls itself": lambda: model(
        node("f", ["x"], ["y"], domain="local"), functions=[function("f", node("f", ["a"], ["b"], domain="local"))]
    ),
    "constants of six gigabytes in a line": lambda: model(
        node("ConstantOfShape", ["size"], ["zeros"]),
        node("ReduceMax", ["zeros"], ["top"], keepdims=0),
        node("Add", ["x", "top"], ["y"]),
        constants={"size": [3 * 2**29]},
    ),
    "a constant index outside its tensor": lambda: model(
        node("Gather", ["x0", "at"], ["c"]),
        node("Add", ["x", "c"], ["y"]),
        constants={"x0": np.zeros((2, 4), np.float32), "at": [7]},
    ),
    "an attribute of a function that is not there": lambda: model(referring()),
    "two versions of one operator set": lambda: model(
        node("Relu", ["x"], ["y"]), opsets=[*OPSETS, helper.make_opsetid("ai.onnx", 7)]
    ),
    "a contributed op without its inputs": lambda: model(node("FusedMatMul", ["x"], ["y"], domain="com.microsoft")),
    "a contributed op with an output too many": lambda: model(
        node("QuickGelu", ["x"], ["y"], domain="com.microsoft"),
        node("FusedMatMul", ["y", "w"], ["z", "more"], domain="com.microsoft"),
        constants={"w": np.zeros((4, 4), np.float32)},
    ),
    "a sum of floats and integers": lambda: model(node("Add", ["x", "one"], ["y"]), constants={"one": 1}),
    "a split of fewer parts than outputs": lambda: model(node("Split", ["x"], ["y", "z"], axis=1, num_outputs=1)),
    "a split of more parts than outputs": lambda: model(node("Split", ["x"], ["y"], axis=1, num_outputs=4)),
    "a negative count of batch axes": lambda: model(
        node("GatherND", ["x", "at"], ["y"], batch_dims=-2), constants={"at": np.zeros((1, 1), np.int64)}
    ),
    "a value that only floats of the shapes determine": lambda: model(
        node("Shape", ["x"], ["shape"]),
        node("Cast", ["shape"], ["float"], to=FLOAT),
        node("Exp", ["float"], ["large"]),
        node("Cast", ["large"], ["sizes"], to=TensorProto.INT64),
        node("Gather", ["sizes", "zero"], ["axis"]),
        node("CumSum", ["x", "axis"], ["y"]),
        constants={"zero": 0},
    ),
}


@pytest.mark.parametrize("lie", MODELS)
def test_a_model_that_cannot_be_checked_is_malformed(lie):
    source = MODELS[lie]()
    with pytest.raises(Malformed):
        Model.open(source).plan({"x": (3, 4)})


@pytest.mark.parametrize("shape", [(0, 2**40), (2**40, 0), (2**30, 1), (2**50,)])
def test_a_shape_beyond_what_can_be_worked_on_is_malformed(shape):
    opened = Model.open(model(node("Relu", ["y"], ["z"]), inputs={"y": (FLOAT, [None] * len(shape))}))
    with pytest.raises(Malformed, match="shape"):
        opened.plan({"x": (3, 4), "y": shape})


def test_functions_within_the_limits_are_unfolded():
    opened = Model.open(model(node("f3", ["x"], ["y"], domain="local"), functions=doubling(3)))
    assert [entry.op for entry in opened.nodes] == ["Neg"] * 8


def test_products_of_constants_are_not_folded():
    """Two small constants could expand to matrices whose product takes hours."""
    ones = np.ones((4, 4), np.uint8)
    opened = Model.open(
        model(
            node("MatMulInteger", ["a", "a"], ["c"]),
            node("Cast", ["c"], ["d"], to=FLOAT),
            node("MatMul", ["x", "d"], ["y"]),
            constants={"a": ones},
        )
    )
    assert [entry.op for entry in opened.nodes] == ["MatMulInteger", "Cast", "MatMul"]


@pytest.mark.parametrize("policy", ["spot", "full"])
@pytest.mark.parametrize("held", [0, 4])
def test_a_proof_takes_no_memory_for_rows_that_it_does_not_hold(policy, held):
    subject, words = world.small(), 2**19
    plan = subject.model.plan({"ids": (words, world.LENGTH)})
    specs = {name: plan.specs[name] for name in plan.tensors}
    claims = tuple(TensorClaim(name, dtype_name(spec.dtype), spec.shape, bytes(32)) for name, spec in specs.items())
    commitment = Commitment(subject.model.id, None, claims)
    openings = {
        name: Opening(np.zeros((held, specs[name].width), specs[name].dtype), np.zeros((0, 32), np.uint8))
        for name in specs.keys() - plan.derived
    }
    proof = Proof(None, commitment, Challenge(commitment.digest(), policy, world.SEED), openings)
    tracemalloc.start()
    verdict = verify(proof, subject.model, world.CHECK_SEED, task=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert verdict.reason is Reason.SELECTION
    assert peak < 8 * words


def test_an_op_that_breaks_is_no_verdict():
    """Lengths for one sequence where there are three: no engine runs it, and nobody is to blame but the model."""
    source = model(
        node("ReverseSequence", ["x", "lengths"], ["y"], time_axis=1, batch_axis=0),
        inputs={"lengths": (TensorProto.INT64, [None])},
    )
    opened = Model.open(source)
    x = np.zeros((3, 4), np.float32)
    committed = prove.commit(opened, {"x": x, "lengths": np.array([2]), "y": x})
    plan, challenge = committed.plan, Challenge(committed.commitment.digest(), "full", world.SEED)
    proof = prove.answer(committed, committed.commitment, challenge)
    assert selection(plan, challenge).opened.keys() == {"x", "lengths", "y"}
    with pytest.raises(Unavailable, match="ReverseSequence"):
        verify(proof, opened, world.CHECK_SEED, task=None)


def test_a_position_outside_the_rotary_tables_is_refused():
    write = world.Writer(0)
    write.constant("cos", np.ones((8, 2), np.float32))
    write.constant("sin", np.zeros((8, 2), np.float32))
    write.op("Add", "places", "places", to="doubled")
    write.op("RotaryEmbedding", "x", "cos", "sin", "doubled", to="y", num_heads=1)
    value = helper.make_tensor_value_info
    ends = value("x", FLOAT, [1, 3, 4]), value("places", TensorProto.INT64, [1, 3])
    opened = Model.open(write.model(list(ends), [value("y", FLOAT, [1, 3, 4])], opset=23))
    x, places = np.ones((1, 3, 4), np.float32), np.array([[0, 2, 9]])
    committed = prove.commit(opened, {"x": x, "places": places, "doubled": 2 * places, "y": x})
    challenge = Challenge(committed.commitment.digest(), "full", world.SEED)
    verdict = verify(prove.answer(committed, committed.commitment, challenge), opened, world.CHECK_SEED, task=None)
    assert verdict.reason is Reason.REEXECUTION
