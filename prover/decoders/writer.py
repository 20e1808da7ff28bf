"""Writes the nodes and initializers of a decoder's graph; a node has the name of its output."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from proof.errors import Malformed
from prover.decoders.weights import Stored

FLOATS = (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT)
IGNORED = ("rotary_emb.inv_freq",)  # endings of names: kept in old folders, and computed anew by everyone


class Writer:
    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        """Raises Malformed where the weights are not of one float type."""
        self._tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
        self._read: set[str] = set()
        self._initializers: dict[str, onnx.TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        kinds = {helper.np_dtype_to_tensor_dtype(tensor.spec.dtype) for tensor in self._tensors.values()}
        if len(kinds) != 1 or not kinds <= set(FLOATS):
            named = " and ".join(sorted({str(tensor.spec.dtype) for tensor in self._tensors.values()}))
            raise Malformed(f"weights of {named or 'no type'}: all must be bfloat16, float16 or float32")
        self.kind: int = kinds.pop()
        self.dtype = next(iter(self._tensors.values())).spec.dtype
        self.narrow = self.kind != TensorProto.FLOAT

    @property
    def initializers(self) -> list[onnx.TensorProto]:
        return list(self._initializers.values())

    def node(self, op: str, *inputs: str, to: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [to], name=to, **attributes))
        return to

    def cast(self, x: str, kind: int, *, to: str) -> str:
        self.nodes.append(helper.make_node("Cast", [x], [to], name=to, to=kind))
        return to

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def weight(self, name: str, *shape: int) -> str:
        """A tensor of the folder, under its name there. Raises Malformed where it is missing or of another shape."""
        if name not in self._initializers:
            self._initializers[name] = self._stored(name, shape).initializer(name)
        return name

    def values(self, name: str, *shape: int) -> npt.NDArray[Any]:
        return self._stored(name, shape).read()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def refuse_unread(self) -> None:
        """Raises Malformed for a tensor of the folder that the graph makes nothing of."""
        unread = self._tensors.keys() - self._read
        if unread:
            raise Malformed(f"the folder has a tensor {min(unread)} which config.json gives no place")

    def _stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        if name not in self._tensors:
            raise Malformed(f"the folder has no tensor {name}")
        found = self._tensors[name].spec.shape
        if found != shape:
            raise Malformed(f"{name} has the shape {found} where config.json makes it {shape}")
        self._read.add(name)
        return self._tensors[name]
