"""ONNX Runtime on the CPU, graph optimisations off, every node output recorded under its ONNX name.

With optimisations off the outputs are the same bits whether or not inner values are recorded. The CPU has no 16-bit
float kernels; left alone the runtime would hand unrounded float32 values from node to node, so every node that reads
16-bit floats is run in float32 between explicit casts: each committed value is what the next node consumed.
On x86 without VNNI the runtime's uint8 x int8 products saturate and are wrong, so constant int8 operands are handed
over as uint8 with their zero point moved by 128, which is the same product.
"""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from gpu.plan import Model, Plan
from proof.errors import Malformed
from proof.graph import load

Array = npt.NDArray[Any]

REFUSALS = (
    runtime.Fail,
    runtime.InvalidArgument,
    runtime.InvalidGraph,
    runtime.NotImplemented,
    runtime.RuntimeException,
)
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PRODUCTS = {  # positions of the left operand, the right one, and its zero point
    "MatMulInteger": (0, 1, 3),
    "ConvInteger": (0, 1, 3),
    "QLinearMatMul": (0, 3, 5),
    "QLinearConv": (0, 3, 5),
}
UNCAST = {"Cast", "CastLike"}  # they convert themselves


class Recorder:
    """A loaded session that returns whole traces of runs with the planned shapes; keep it between runs."""

    def __init__(self, source: Path | bytes, model: Model, plan: Plan, threads: int = 0) -> None:
        """`threads` 0 leaves the number of threads to the runtime. Raises Malformed when it refuses the graph."""
        self._inputs = {name: plan.specs[name] for name in plan.inputs}
        self._names = [name for name in plan.tensors if name not in self._inputs]
        options = _options(threads)
        proto = _exposed(load(source), model, plan, self._names)
        if isinstance(source, Path):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(source.resolve().parent)
            )
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except REFUSALS as error:
            raise Malformed(f"ONNX Runtime refuses the graph: {error}") from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; returns the trace: graph inputs and the output of every node that is not folded."""
        for name, spec in self._inputs.items():
            if name not in inputs or inputs[name].dtype != spec.dtype or inputs[name].shape != spec.shape:
                raise Malformed(f"input {name!r} must be {spec.dtype}{list(spec.shape)}")
        feeds = {name: _to_runtime(inputs[name]) for name in self._inputs}
        try:
            values = self._session.run_with_ort_values(self._names, feeds)
        except REFUSALS as error:
            raise Malformed(f"ONNX Runtime refused the run: {error}") from error
        outputs = {name: _from_runtime(value) for name, value in zip(self._names, values, strict=True)}
        return {name: np.asarray(inputs[name], order="C") for name in self._inputs} | outputs


def record(source: Path | bytes, model: Model, inputs: Mapping[str, Array], threads: int = 0) -> dict[str, Array]:
    """Load, run once and return the trace. Raises Malformed when the inputs do not fit the graph."""
    plan = model.plan({name: array.shape for name, array in inputs.items()})
    return Recorder(source, model, plan, threads).run(inputs)


def _exposed(proto: onnx.ModelProto, model: Model, plan: Plan, names: list[str]) -> onnx.ModelProto:
    """The model with every recorded value as an output, and 16-bit nodes between explicit casts."""
    for node in proto.graph.node:
        if node.op_type in PRODUCTS and not node.domain:
            _unsigned(proto.graph, node, plan)
    nodes = [part for node in proto.graph.node for part in _wide(node, plan)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.graph.output[:]
    for name in names:
        kind = helper.np_dtype_to_tensor_dtype(plan.specs[name].dtype)
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, plan.specs[name].shape))
    return proto


def _wide(node: onnx.NodeProto, plan: Plan) -> list[onnx.NodeProto]:
    """A node that reads 16-bit floats, as float32 work between casts; any other node as it is."""
    halves = [name for name in dict.fromkeys(node.input) if name in plan.specs and plan.specs[name].dtype in HALVES]
    if not halves or node.op_type in UNCAST:
        return [node]
    marker = f"{node.output[0]}/float32"
    renamed = {name: f"{marker}/{name}" for name in halves}
    before = [helper.make_node("Cast", [name], [to], to=TensorProto.FLOAT) for name, to in renamed.items()]
    wide = onnx.NodeProto()
    wide.CopyFrom(node)
    wide.input[:] = [renamed.get(name, name) for name in node.input]
    after = []
    for i, name in enumerate(node.output):
        if name and plan.specs[name].dtype in HALVES:
            wide.output[i] = f"{marker}/{name}"
            kind = helper.np_dtype_to_tensor_dtype(plan.specs[name].dtype)
            after.append(helper.make_node("Cast", [wide.output[i]], [name], to=kind))
    return [*before, wide, *after]


def _unsigned(graph: onnx.GraphProto, node: onnx.NodeProto, plan: Plan) -> None:
    """Turn a constant int8 operand that meets a uint8 one into uint8."""
    left, right, zero = PRODUCTS[node.op_type]
    weight = plan.known.get(node.input[right])
    if plan.specs[node.input[left]].dtype != np.uint8 or weight is None or weight.dtype != np.int8:
        return
    node.input.extend([""] * (zero + 1 - len(node.input)))
    at = plan.known.get(node.input[zero], np.zeros((), np.int8))
    for position, array in ((right, weight), (zero, at)):
        name = f"{node.output[0]}/unsigned/{position}"
        graph.initializer.append(numpy_helper.from_array(array.view(np.uint8) ^ np.uint8(0x80), name))
        node.input[position] = name


def _to_runtime(array: Array) -> onnxruntime.OrtValue:
    array = np.asarray(array, order="C")
    if array.dtype == BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _from_runtime(value: onnxruntime.OrtValue) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    raw = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    return np.frombuffer(raw, BFLOAT16).reshape(shape)


def plain(source: bytes) -> Callable[[Mapping[str, Array]], list[Array]]:
    """The model as it stands, optimisations off, nothing recorded: what a run costs without a proof."""
    session = onnxruntime.InferenceSession(source, _options(0), providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run(None, dict(inputs)))


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return options
