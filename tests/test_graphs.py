"""Honest runs of real graphs are accepted at every node, and a graph that could not be checked is refused by name."""

from collections import Counter
from dataclasses import replace

import graphs
import numpy as np
import onnx
import pytest
import world
from graphs import FLOAT, GRAPHS, value

from gpu.plan import Model
from gpu.reach import selection
from proof.errors import Malformed
from proof.messages import Challenge

HONEST: Counter[str] = Counter()  # node rows checked, by graph
POLICIES = ("spot", "standard", "full")


@pytest.mark.parametrize("name", GRAPHS)
def test_an_honest_run_is_accepted_at_every_node(name):
    honest = GRAPHS[name]()
    trace = honest.run()
    for i, policy in enumerate(POLICIES):
        subject = replace(honest, policy=policy)
        proof = subject.prove(trace, bytes([i]) * 32)
        verdict = subject.judge(proof)
        assert (verdict.verdict, verdict.detail) == ("accepted", "")
        assert verdict.nodes_checked == verdict.nodes_total == len(subject.model.nodes)
        plan = subject.model.plan({key: array.shape for key, array in subject.inputs.items()})
        HONEST[name] += sum(len(rows) for rows in selection(plan, proof.challenge).checked.values())


def test_enough_honest_rows_were_checked():
    """After the graphs above: no false rejection in at least 20,000 node rows."""
    if HONEST.keys() != GRAPHS.keys():
        pytest.fail("run the whole file: this counts what the tests above checked")
    assert sum(HONEST.values()) >= 20_000


def test_the_folded_weights_are_bound_by_the_model_id():
    subject = world.minilm()
    assert len(subject.model.folded) >= 48
    proto = onnx.load_model_from_string(subject.source)
    tensor = next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8)
    data = bytearray(tensor.raw_data)
    data[0] ^= 1
    tensor.raw_data = bytes(data)
    assert Model.open(proto.SerializeToString()).id != subject.model.id


def test_the_id_does_not_depend_on_how_the_file_is_written(tmp_path):
    source = graphs.mlp().source
    proto = onnx.load_model_from_string(source)
    proto.doc_string, proto.producer_name = "a comment", "another tool"
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=0)
    assert Model.open(path).id == Model.open(source).id


@pytest.mark.parametrize(
    ("op", "attributes"),
    [("RandomNormalLike", {}), ("LSTM", {"hidden_size": 4}), ("NonMaxSuppression", {})],
)
def test_an_op_without_a_check_makes_a_model_unregistrable_by_name(op, attributes):
    inputs = ["x"] * {"LSTM": 3, "NonMaxSuppression": 2}.get(op, 1)
    node = onnx.helper.make_node(op, inputs, ["y"], "suspect", **attributes)
    graph = onnx.helper.make_graph([node], "g", [value("x", FLOAT, [1, 2, 4])], [value("y", FLOAT, ["a", "b", "c"])])
    with pytest.raises(Malformed, match=f"{op} node 'suspect'"):
        Model.open(_bytes(graph))


def test_control_flow_is_refused_by_name():
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["b"])], "branch", [], [value("b", FLOAT, [1])]
    )
    node = onnx.helper.make_node("If", ["c"], ["y"], "fork", then_branch=branch, else_branch=branch)
    inputs = [value("c", onnx.TensorProto.BOOL, []), value("x", FLOAT, [1])]
    with pytest.raises(Malformed, match="'fork'"):
        Model.open(_bytes(onnx.helper.make_graph([node], "g", inputs, [value("y", FLOAT, [1])])))


def test_a_shape_that_depends_on_data_is_refused_by_name():
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"], "fickle")
    inputs = [value("x", FLOAT, [4]), value("shape", onnx.TensorProto.INT64, [2])]
    with pytest.raises(Malformed, match="'fickle'.*depends on data"):
        Model.open(_bytes(onnx.helper.make_graph([node], "g", inputs, [value("y", FLOAT, ["a", "b"])])))


def test_weights_outside_the_folder_are_not_read(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_bytes(np.zeros(64, np.float32).tobytes())
    proto = onnx.load_model_from_string(graphs.mlp().source)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "inside" / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Malformed):
        Model.open(tmp_path / "inside" / "model.onnx")


@pytest.mark.parametrize("cut", [0, 1, 100, 5000])
def test_a_broken_file_is_malformed(cut):
    with pytest.raises(Malformed):
        Model.open(graphs.mlp().source[:cut])


def test_inputs_of_another_shape_are_malformed():
    with pytest.raises(Malformed, match="input 'x'"):
        graphs.mlp().model.plan({"x": (3, 31)})


def test_every_challenge_opens_every_tensor():
    subject = world.small()
    plan = subject.model.plan({"ids": (2, 12)})
    chosen = selection(plan, Challenge(bytes(32), "spot", world.SEED))
    assert chosen.checked.keys() | plan.derived == set(plan.tensors)
    assert all(len(rows) for rows in chosen.checked.values())


def _bytes(graph: onnx.GraphProto) -> bytes:
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    return bytes(model.SerializeToString())
