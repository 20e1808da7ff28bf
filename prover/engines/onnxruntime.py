"""ONNX Runtime, graph optimisations off, every node output recorded under its ONNX name.

With optimisations off the outputs are the same bits whether or not inner values are recorded. The CPU has no 16-bit
float kernels; left alone the runtime would hand unrounded float32 values from node to node, so every node that reads
16-bit floats is run in float32 between explicit casts: each committed value is what the next node consumed.
On x86 without VNNI the runtime's uint8 x int8 products saturate and are wrong, so constant int8 operands are handed
over as uint8 with their zero point moved by 128, which is the same product.
With a device outputs stay where the runtime left them: in the device's memory, as Residents. The runtime is waited for
before they are handed out, so that kernels may read them from any stream.
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

from gpu.device import Device
from gpu.plan import Model, Plan
from gpu.resident import Resident, Segment
from proof.errors import Malformed
from proof.graph import Spec, load

Array = npt.NDArray[Any]
Trace = dict[str, Any]  # arrays; with a device, outputs as Residents
Provider = tuple[str, dict[str, str]]  # with its options

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
CPU: Provider = ("CPUExecutionProvider", {})
PROVIDERS: dict[str, list[Provider]] = {  # by a device's place; TF32 products are no roundings of float32 ones
    "cpu": [CPU],
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), CPU],
}


class Recorder:
    """A loaded session that returns whole traces of runs with the planned shapes; keep it between runs."""

    def __init__(
        self, source: Path | bytes, model: Model, plan: Plan, threads: int = 0, device: Device | None = None
    ) -> None:
        """`threads` 0 leaves the number of threads to the runtime.

        A device that this build of the runtime knows nothing of is left alone: the run is the CPU's.
        Raises Malformed when the runtime refuses the graph.
        """
        known = onnxruntime.get_available_providers()
        self._device = device if device and PROVIDERS[device.place][0][0] in known else None
        self._place = self._device.place if self._device else "cpu"
        self._specs = plan.specs
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
                proto.SerializeToString(), options, providers=PROVIDERS[self._place]
            )
        except REFUSALS as error:
            raise Malformed(f"ONNX Runtime refuses the graph: {error}") from error

    def run(self, inputs: Mapping[str, Array]) -> Trace:
        """Run once; returns the trace: graph inputs and the output of every node that is not folded."""
        for name, spec in self._inputs.items():
            if name not in inputs or inputs[name].dtype != spec.dtype or inputs[name].shape != spec.shape:
                raise Malformed(f"input {name!r} must be {spec.dtype}{list(spec.shape)}")
        feeds = {name: _to_runtime(inputs[name]) for name in self._inputs}
        try:
            if self._device:
                outputs = self._bound(self._device, feeds)
            else:
                values = self._session.run_with_ort_values(self._names, feeds)
                outputs = {name: _from_runtime(value) for name, value in zip(self._names, values, strict=True)}
        except REFUSALS as error:
            raise Malformed(f"ONNX Runtime refused the run: {error}") from error
        return {name: np.asarray(inputs[name], order="C") for name in self._inputs} | outputs

    def _bound(self, device: Device, feeds: Mapping[str, onnxruntime.OrtValue]) -> Trace:
        """Outputs on the device, in memory that the runtime has for each of them."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._names:
            binding.bind_output(name, self._place)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values = dict(zip(self._names, binding.get_outputs(), strict=True))
        return {name: _resident(device, value, self._specs[name]) for name, value in values.items()}


def record(
    source: Path | bytes, model: Model, inputs: Mapping[str, Array], threads: int = 0, device: Device | None = None
) -> Trace:
    """Load, run once and return the trace. Raises Malformed when the inputs do not fit the graph."""
    plan = model.plan({name: array.shape for name, array in inputs.items()})
    return Recorder(source, model, plan, threads, device).run(inputs)


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


def _resident(device: Device, value: onnxruntime.OrtValue, spec: Spec) -> Resident:
    """Raises Malformed where the runtime gives another shape than the plan: the rows would lie elsewhere."""
    if tuple(value.shape()) != spec.shape:
        raise Malformed(f"ONNX Runtime gives {value.shape()} where the graph gives {list(spec.shape)}")
    width = spec.width * spec.dtype.itemsize
    rows = Segment(value.data_ptr(), (1, 1, spec.rows), (0, 0, width), width, 0, (0, 0, 1), value)
    return Resident(device, spec.dtype, spec.shape, (rows,))


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
