"""What dishonest workers do. The demo hires them, and the attack tests prove that none is paid.

A cheat gives a trace under the honest model's names: by running another graph, or by bending the trace afterwards.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]
Trace = dict[str, Array]
Bend = Callable[[Array], Array]


def quantised(source: bytes, bits: int) -> bytes:
    """The model with every weight matrix requantised to `bits` bits, one scale a column."""
    levels = 2 ** (bits - 1) - 1

    def bend(weight: Array) -> Array:
        wide: Array = weight.astype(np.float64)
        scale: Array = np.abs(wide).max(axis=0, keepdims=True) / levels
        coarse: Array = np.round(wide / np.where(scale > 0, scale, 1)) * scale
        rounded: Array = np.rint(coarse) if weight.dtype.kind == "i" else coarse
        return rounded.astype(weight.dtype)

    return _weights(source, bend)


def impostor(source: bytes, seed: int = 1) -> bytes:
    """Another model of the same shape: every weight matrix with its entries shuffled."""
    rng = np.random.default_rng(seed)
    return _weights(source, lambda weight: rng.permuted(weight.reshape(-1)).reshape(weight.shape))


def skipped(source: bytes, taken: str, left: str) -> bytes:
    """The model with everything between two values left out: `left` is `taken` again."""

    def bend(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        yield helper.make_node("Identity", [taken], [left], name=node.name) if left in node.output else node

    return _nodes(source, bend)


def inattentive(source: bytes) -> bytes:
    """The model with uniform attention: every softmax is fed zeros."""

    def bend(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        if node.op_type != "Softmax":
            yield node
            return
        flat = f"{node.output[0]}/flat"
        yield helper.make_node("Sub", [node.input[0], node.input[0]], [f"{flat}/zero"])
        yield helper.make_node("IsNaN", [f"{flat}/zero"], [f"{flat}/masked"])
        yield helper.make_node("Where", [f"{flat}/masked", node.input[0], f"{flat}/zero"], [flat])
        bent = onnx.NodeProto()
        bent.CopyFrom(node)
        bent.input[0] = flat
        yield bent

    return _nodes(source, bend)


def bent(trace: Trace, name: str, bend: Bend) -> Trace:
    """The trace with one tensor changed after the run, and nothing that follows from it."""
    return trace | {name: np.asarray(bend(trace[name].copy()), order="C")}


def noise(array: Array) -> Array:
    """Noise of the norm that the honest tensor has."""
    wild = np.random.default_rng(2).standard_normal(array.shape)
    size = float(np.linalg.norm(np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)))
    bent: Array = wild * (size / max(float(np.linalg.norm(wild)), 1e-300))
    return bent.astype(array.dtype)


def swapped(array: Array) -> Array:
    """The rows in another order."""
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    return np.roll(rows, 1, axis=0).reshape(array.shape)


def _weights(source: bytes, bend: Bend) -> bytes:
    proto = onnx.load_model_from_string(source)
    for i, tensor in enumerate(proto.graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.ndim >= 2 and array.dtype.kind in "fi" and array.dtype.itemsize <= 4:  # int64 are shapes and indices
            proto.graph.initializer[i].CopyFrom(numpy_helper.from_array(bend(array), tensor.name))
    return bytes(proto.SerializeToString())


def _nodes(source: bytes, bend: Callable[[onnx.NodeProto], Iterator[onnx.NodeProto]]) -> bytes:
    proto = onnx.load_model_from_string(source)
    nodes = [part for node in proto.graph.node for part in bend(node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString())
