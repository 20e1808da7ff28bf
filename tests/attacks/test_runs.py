"""Lies about the run: another computation, or a trace bent after the honest one. Each has its reason."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import world
from world import Trace, World

from proof.errors import Reason
from prover import cheats

FREIVALDS, REEXECUTION, NONFINITE = Reason.FREIVALDS, Reason.REEXECUTION, Reason.NONFINITE


def places(subject: World) -> dict[str, str]:
    """Values to lie about, by what they are: the last of each kind in the graph."""
    last = {node.op: node.outputs[0] for node in subject.model.nodes}
    products = [node.outputs[0] for node in subject.model.nodes if node.op == "MatMul"]
    out = subject.model.graph.outputs[0]
    return {"softmax": last["Softmax"], "product": products[2], "sum": last["Add"], "out": out}


def layers(subject: World) -> tuple[str, str]:
    """Where the second layer takes its input and leaves its output."""
    return ("layer0.out", "layer1.out") if subject.model is world.small().model else ("layer_norm_2", "layer_norm_4")


def one_element(array: np.ndarray) -> np.ndarray:
    """The largest element of the first row 1 % larger."""
    row = array.reshape(-1, array.shape[-1])[0]
    row[np.argmax(np.abs(row))] *= 1.01
    return array


RUNS = {  # another computation, run honestly
    "weights in int4": lambda w: w.run(cheats.quantised(w.source, 4)),
    "another model of the same shape": lambda w: w.run(cheats.impostor(w.source)),
    "one layer skipped": lambda w: w.run(cheats.skipped(w.source, *layers(w))),
    "uniform attention": lambda w: w.run(cheats.inattentive(w.source)),
}
BENT = {  # (what, bend, reasons): the honest trace with one tensor changed
    "output tampered": ("out", lambda a: a + np.float32(0.01), {FREIVALDS, REEXECUTION}),
    "rows swapped": ("product", cheats.swapped, {FREIVALDS, REEXECUTION}),
    "attention replaced by uniform": ("softmax", lambda a: np.full_like(a, 1 / a.shape[-1]), {REEXECUTION}),
    "zeros": ("sum", np.zeros_like, {REEXECUTION}),
    "noise of the right norm": ("sum", cheats.noise, {REEXECUTION}),
    "zeros for a product": ("product", np.zeros_like, {FREIVALDS, REEXECUTION}),
    "noise for a product": ("product", cheats.noise, {FREIVALDS, REEXECUTION}),
    "NaN": ("product", lambda a: np.full_like(a, np.nan), {NONFINITE}),
    "infinity": ("sum", lambda a: np.full_like(a, np.inf), {NONFINITE}),
}
WORLDS = {"small": world.small, "minilm": world.minilm}


@pytest.fixture(params=WORLDS, scope="module")
def subject(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]()


@pytest.fixture(scope="module")
def honest(subject: World) -> Trace:
    return subject.run()


@pytest.mark.parametrize("policy", ["spot", "standard", "full"])
def test_the_honest_worker_is_accepted_at_every_node(subject, honest, policy):
    verdict = replace(subject, policy=policy).judge(replace(subject, policy=policy).prove(honest))
    assert (verdict.verdict, verdict.detail) == ("accepted", "")
    assert verdict.nodes_checked == verdict.nodes_total == len(subject.model.nodes) > 50


@pytest.mark.parametrize("policy", ["spot", "full"])
@pytest.mark.parametrize("lie", RUNS)
def test_another_computation_is_refused(subject, lie, policy):
    bent = replace(subject, policy=policy)
    verdict = bent.judge(bent.prove(RUNS[lie](subject)))
    assert verdict.verdict == "rejected"
    assert verdict.reason in {FREIVALDS, REEXECUTION}
    assert verdict.node in {node.name for node in subject.model.nodes}


@pytest.mark.parametrize("policy", ["standard", "full"])
@pytest.mark.parametrize("lie", BENT)
def test_a_bent_trace_is_refused_at_the_bent_node(subject, honest, lie, policy):
    what, bend, reasons = BENT[lie]
    name = places(subject)[what]
    bent = replace(subject, policy=policy)
    verdict = bent.judge(bent.prove(cheats.bent(honest, name, bend)))
    assert verdict.verdict == "rejected"
    assert verdict.reason in reasons
    assert verdict.node == next(node.name for node in subject.model.nodes if name in node.outputs)


@pytest.mark.parametrize("what", ["product", "sum", "softmax", "out"])
def test_one_element_of_an_opened_row_off_by_a_hundredth_is_refused(subject, honest, what):
    full = replace(subject, policy="full")
    verdict = full.judge(full.prove(cheats.bent(honest, places(subject)[what], one_element)))
    assert verdict.reason in {FREIVALDS, REEXECUTION}


def test_every_value_of_the_graph_is_guarded():
    """Zeros in place of any one node output are refused, unless the honest values are zeros."""
    full = replace(world.small(), policy="full")
    honest = full.run()
    for name in honest.keys() - full.inputs.keys():
        bent = cheats.bent(honest, name, np.zeros_like)
        if not np.array_equal(bent[name], honest[name]):
            assert full.judge(full.prove(bent)).verdict == "rejected", name


def test_int8_weights_on_a_bf16_model_are_refused():
    source = half_model(onnx.TensorProto.BFLOAT16)
    subject = world.of(source, {"x": np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)})
    assert subject.judge(subject.prove(subject.run())).verdict == "accepted"
    verdict = subject.judge(subject.prove(subject.run(cheats.quantised(source, 8))))
    assert verdict.reason is REEXECUTION


def half_model(kind: int) -> bytes:
    """Two products with weights in a 16-bit float, cast as ONNX graphs do."""
    write = world.Writer(5)
    write.weight("first", 128, 256, scale=128**-0.5)
    write.weight("second", 256, 32, scale=256**-0.5)
    x = write.cast("x", "x16", kind)
    for layer, weight in enumerate(("first", "second")):
        w = write.cast(weight, f"{weight}16", kind)
        x = write.op("MatMul", x, w, to=f"product{layer}")
    write.cast(x, "y", onnx.TensorProto.FLOAT)
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", k]) for n, k in (("x", 128), ("y", 32))]
    return write.model(ends[:1], ends[1:])
