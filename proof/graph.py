"""An ONNX model as nodes, tensors and weights, and the model id that binds all of them.

The id is BLAKE3 over canonical JSON of the operator sets, nodes with attributes, inputs, outputs and the digest
of every initializer: it does not depend on protobuf encoding, file layout or documentation strings.
Weights are NumPy arrays; external data is memory-mapped and must lie beside the model file, or where the reader of a
model's bytes says that it does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, inliner, numpy_helper

from proof.digest import Tag, digest_json, tagged
from proof.errors import Malformed

MAX_MODEL_BYTES = 2**31 - 1  # protobuf's own limit
MAX_NODES = 100_000
MAX_RANK = 16
MAX_NAME_BYTES = 1024  # of a value or node; what messages carry
MAX_NESTED = 64  # local functions that call each other

DTYPES: dict[str, np.dtype[Any]] = {  # names as safetensors writes them
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_GRAPH_KINDS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

Array = npt.NDArray[Any]
Files = Callable[[str], Path | None]  # the file that a location of external data means


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The wire name of a dtype. Raises Malformed for one that no tensor may have."""
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise Malformed(f"dtype {dtype} is not one of {', '.join(DTYPES)}") from None


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor: `rows` rows of `width` elements; a scalar is one row of one."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def spec_of(array: Array) -> Spec:
    return Spec(array.dtype, array.shape)


@dataclass(frozen=True)
class Node:
    """One operator application. `since` is the opset version that defines its semantics.

    Attributes are int, float, str, bytes, a tuple of those, or an array.
    """

    index: int
    name: str
    op: str
    domain: str
    since: int
    inputs: tuple[str, ...]  # "" marks an optional input that is absent
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: onnx.NodeProto = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.op} node {self.name!r}"


@dataclass(frozen=True)
class Input:
    """A graph input; a dimension is a size, or a name or None where it is free."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Graph:
    """A model as it was read: nodes in graph order, weights by name."""

    id: bytes
    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    weights: Mapping[str, Array]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]


def load(source: Path | bytes) -> onnx.ModelProto:
    """Parse and check an ONNX file or its bytes, local functions inlined, external data not yet read.

    Raises Malformed for anything that is not a valid model, Unavailable never.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_MODEL_BYTES:
        raise Malformed(f"the model file has {size} bytes, over {MAX_MODEL_BYTES}: move weights to external data")
    try:
        if isinstance(source, bytes):
            proto = onnx.load_model_from_string(source)
            onnx.checker.check_model(_alone(proto))
        else:
            proto = onnx.load(source, load_external_data=False)
            onnx.checker.check_model(str(source))
        return _inlined(proto) if proto.functions else proto
    except (DecodeError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise Malformed(f"not a valid ONNX model: {_first_line(error)}") from error


def _alone(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With weights of other files taken as empty: the checker would look for them in the current directory."""
    if not any(external_data_helper.uses_external_data(tensor) for tensor in proto.graph.initializer):
        return proto
    alone = onnx.ModelProto()
    alone.CopyFrom(proto)
    for tensor in alone.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0], raw_data=b""))
    return alone


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without local functions. Raises Malformed before it makes more nodes or bytes than a model may have."""
    bodies = {(_domain(body.domain), body.name, body.overload): body.node for body in proto.functions}
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}

    def size(nodes: Iterable[onnx.NodeProto], depth: int) -> tuple[int, int]:
        if depth > MAX_NESTED:
            raise Malformed(f"local functions call each other more than {MAX_NESTED} deep")
        count, weight = 0, 0
        for node in nodes:
            _refuse_subgraphs(node, node.name)
            called = _domain(node.domain), node.op_type, node.overload
            if called in bodies and called not in sizes:
                sizes[called] = size(bodies[called], depth + 1)
            inner, bytes_inside = sizes.get(called, (1, 0))
            count, weight = count + inner, weight + node.ByteSize() + bytes_inside
        return count, weight

    count, weight = size(proto.graph.node, 0)
    if count > MAX_NODES or weight > MAX_MODEL_BYTES:
        raise Malformed(f"local functions unfold to {count} nodes of {weight} bytes")
    return inliner.inline_local_functions(proto)


def read_graph(source: Path | bytes, files: Files | None = None) -> Graph:
    """Read a model; `files` finds external data, where it does not lie beside a model file.

    Raises Malformed that names what cannot be read.
    """
    proto = load(source)
    if files is None and isinstance(source, Path):
        files = _beside(source.resolve().parent)
    return graph_of(proto, files)


def _beside(folder: Path) -> Files:
    def find(location: str) -> Path | None:
        path = (folder / location).resolve()
        return path if path.is_relative_to(folder) and path.is_file() else None

    return find


def graph_of(proto: onnx.ModelProto, files: Files | None = None) -> Graph:
    """The graph of a parsed model whose external data, if any, `files` finds."""
    for name in (name for node in proto.graph.node for name in (node.name, *node.input, *node.output)):
        if len(name.encode()) > MAX_NAME_BYTES:
            raise Malformed(f"a name of {len(name.encode())} bytes; the limit is {MAX_NAME_BYTES}")
    if len(proto.graph.node) > MAX_NODES:
        raise Malformed(f"the graph has {len(proto.graph.node)} nodes; the limit is {MAX_NODES}")
    if proto.graph.sparse_initializer:
        raise Malformed("sparse initializers are not supported: store the weights as dense tensors")
    opsets = {_domain(entry.domain): entry.version for entry in proto.opset_import}
    if any(opsets[_domain(entry.domain)] != entry.version for entry in proto.opset_import):
        raise Malformed("two versions of one operator set are imported")
    weights = {tensor.name: _array(tensor, files) for tensor in proto.graph.initializer}
    inputs = tuple(_input(value) for value in proto.graph.input if value.name not in weights)
    nodes = tuple(_node(i, node, opsets) for i, node in enumerate(proto.graph.node))
    outputs = tuple(value.name for value in proto.graph.output)
    if not outputs or not nodes:
        raise Malformed("the graph has no nodes or no outputs")
    return Graph(_model_id(opsets, nodes, weights, inputs, outputs), opsets, nodes, weights, inputs, outputs)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _node(index: int, node: onnx.NodeProto, opsets: Mapping[str, int]) -> Node:
    domain = _domain(node.domain)
    name = node.name or next((value for value in node.output if value), f"{node.op_type}_{index}")
    _refuse_subgraphs(node, name)
    return Node(
        index=index,
        name=name,
        op=node.op_type,
        domain=domain,
        since=_since(node.op_type, domain, opsets),
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes={a.name: _attribute(a, name) for a in node.attribute},
        proto=node,
    )


def _refuse_subgraphs(node: onnx.NodeProto, name: str) -> None:
    if any(attribute.type in _GRAPH_KINDS for attribute in node.attribute):
        raise Malformed(f"op {node.op_type} of node {name!r} runs a subgraph: control flow cannot be checked")


def _since(op: str, domain: str, opsets: Mapping[str, int]) -> int:
    version = opsets.get(domain, 1)
    if not onnx.defs.has(op, domain):
        return version
    try:
        return int(onnx.defs.get_schema(op, version, domain).since_version)
    except onnx.defs.SchemaError as error:
        raise Malformed(f"op {op} does not exist in opset {version}") from error


def _attribute(attribute: onnx.AttributeProto, node: str) -> Any:
    if attribute.ref_attr_name:
        raise Malformed(f"attribute {attribute.name!r} of node {node!r} refers to a function's, outside of one")
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(value, None)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, int | float):
        return value
    try:
        items = tuple(v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in value)
    except TypeError:
        items = (value,)
    if not all(isinstance(item, int | float | str) for item in items):
        raise Malformed(f"attribute {attribute.name!r} of node {node!r} has a kind that is not supported")
    return items


def _input(value: onnx.ValueInfoProto) -> Input:
    if value.type.WhichOneof("value") != "tensor_type":
        raise Malformed(f"input {value.name!r} is not a tensor")
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.dim_value > 0 else (d.dim_param or None) for d in tensor.shape.dim]
    return Input(value.name, _dtype(tensor.elem_type, value.name), tuple(dims))


def _dtype(elem_type: int, name: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, TypeError) as error:
        raise Malformed(f"tensor {name!r} has unknown element type {elem_type}") from error
    if dtype not in _NAMES:
        kind = onnx.TensorProto.DataType.Name(elem_type)
        raise Malformed(f"tensor {name!r} has element type {kind}, which cannot be checked")
    return dtype


def _array(tensor: onnx.TensorProto, files: Files | None) -> Array:
    dtype, shape = _dtype(tensor.data_type, tensor.name), tuple(tensor.dims)
    if len(shape) > MAX_RANK or any(dim < 0 for dim in shape):
        raise Malformed(f"tensor {tensor.name!r} has the impossible shape {shape}")
    try:
        if external_data_helper.uses_external_data(tensor):
            return _external(tensor, files, dtype, shape)
        array: Array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OSError) as error:
        raise Malformed(f"tensor {tensor.name!r} cannot be read: {_first_line(error)}") from error
    if array.dtype != dtype or array.shape != shape:
        raise Malformed(f"tensor {tensor.name!r} holds {array.dtype}{array.shape}, not {dtype}{shape}")
    return array


def _external(tensor: onnx.TensorProto, files: Files | None, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if files is None:
        raise Malformed(f"tensor {tensor.name!r} lies in another file: save the model with its weights inside")
    info = external_data_helper.ExternalDataInfo(tensor)
    path = files(info.location)
    if path is None:
        raise Malformed(f"tensor {tensor.name!r} points to {info.location!r}, which is not a file beside the model")
    offset, length = info.offset or 0, prod(shape) * dtype.itemsize
    if offset + length > path.stat().st_size or (info.length or length) != length:
        raise Malformed(f"tensor {tensor.name!r} needs {length} bytes at {offset} of {info.location!r}")
    if not length:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape)


def _model_id(
    opsets: Mapping[str, int],
    nodes: tuple[Node, ...],
    weights: Mapping[str, Array],
    inputs: tuple[Input, ...],
    outputs: tuple[str, ...],
) -> bytes:
    return digest_json(
        Tag.MODEL,
        {
            "opsets": dict(opsets),
            "nodes": [
                {
                    "op": node.op,
                    "domain": node.domain,
                    "name": node.name,
                    "inputs": list(node.inputs),
                    "outputs": list(node.outputs),
                    "attributes": {key: _describe(value) for key, value in node.attributes.items()},
                }
                for node in nodes
            ],
            "weights": {name: _describe(array) for name, array in weights.items()},
            "inputs": [[i.name, dtype_name(i.dtype), [_describe(dim) for dim in i.shape]] for i in inputs],
            "outputs": list(outputs),
        },
    )


def _describe(value: Any) -> Any:
    """A value as JSON that keeps every bit: integers as decimal strings, floats as hexadecimal ones."""
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "digest": tagged(Tag.WEIGHT, data).hex()}
    if isinstance(value, tuple):
        return [_describe(item) for item in value]
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, int):
        return {"int": str(value)}
    return value if value is None else {"text": value.encode("utf-8", "surrogateescape").hex()}
