"""ONNX's own node tests (onnx.backend.test.case.node): a second honest engine, every form of every op, old and new.

The expected outputs come from ONNX's reference implementation, not from ONNX Runtime.
"""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from gpu.ops import movement, pointwise, rowwise
from proof.errors import Malformed
from proof.graph import DTYPES, graph_of, spec_of
from tests.gpu.nodes import Run, Site, check, sampled

OPS = {**movement.OPS, **pointwise.OPS, **rowwise.OPS}
CHECKED = 800  # of them at least; the others have another op, several nodes, or a dtype that no tensor may have

DIFFERENT = {
    "test_averagepool_2d_ceil_last_window_starts_on_pad": "its expected values are written with four digits",
    "test_resize_downsample_scales_linear_align_corners": "takes the length before rounding, ONNX Runtime after",
    "test_resize_downsample_scales_cubic_align_corners": "takes the length before rounding, ONNX Runtime after",
}


def array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def runs(case):
    """The runs of a test of one node that the registry may check; none where a tensor has an unknown dtype."""
    (node,) = case.model.graph.node
    op = OPS[node.domain, node.op_type]
    for given, expected in case.data_sets:
        names = [value.name for value in case.model.graph.input]
        inputs = dict(zip(names, map(array, given), strict=True))
        outputs = dict(zip((value.name for value in case.model.graph.output), map(array, expected), strict=True))
        if not all(value.dtype in DTYPES.values() for value in (*inputs.values(), *outputs.values())):
            continue
        ordered = tuple(inputs[name] if name else None for name in node.input)
        site = Site(
            node=graph_of(case.model).nodes[0],
            inputs=tuple(None if value is None else spec_of(value) for value in ordered),
            outputs=tuple(spec_of(outputs[name]) if name else None for name in node.output),
            known=tuple(value if i in op.values else None for i, value in enumerate(ordered)),
        )
        yield Run(site, ordered, tuple(outputs[name] for name in node.output if name))


def one_node(case):
    graph = case.model.graph
    tensors = all(value.type.HasField("tensor_type") for value in graph.input)
    if not tensors or len(graph.node) != 1 or not all(graph.node[0].output):
        return False
    return (graph.node[0].domain, graph.node[0].op_type) in OPS


@pytest.mark.filterwarnings("ignore")
def test_the_reference_outputs_of_onnx_are_accepted():
    rng, seen = np.random.default_rng(5), Counter()
    for case in filter(one_node, collect_testcases(None)):
        for worker in runs(case):
            op = OPS[worker.site.node.domain, worker.site.node.op]
            if case.name in DIFFERENT or op.refuses(worker.site.node):
                continue
            if case.name.startswith("test_training_dropout"):
                with pytest.raises(Malformed, match="training mode"):
                    check(op, worker, sampled(worker, rng, None))
                continue
            check(op, worker, sampled(worker, rng, None))
            seen[worker.site.node.op] += 1
    assert seen.total() >= CHECKED
    assert len(seen) > 100
