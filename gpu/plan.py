"""From a model to a concrete run: constants folded, every tensor's dtype and shape known, every node in the registry.

`Model.open` refuses a graph that could not be checked at every node. `Model.plan` gives one run's tensors:
graph inputs, then node outputs in graph order. Shapes come from ONNX's own inference, folded values from its
reference evaluator, restricted to ops whose results are determined bit for bit.
"""

from collections import Counter, OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TypeProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from gpu.ops.call import Family, Infer, Op, Site
from gpu.ops.registry import REGISTRY
from gpu.rounding import is_float
from proof.errors import Malformed
from proof.graph import MAX_RANK, Files, Graph, Node, Spec, dtype_name, read_graph, spec_of

MAX_FOLDED_BYTES = 2**32  # of all values computed from a run's shapes, or from constants
MAX_GROWTH = 16  # bytes more that may be computed from constants, for each byte of weights
MAX_TENSOR_BYTES = 2**40
MAX_ROWS = 2**27  # of a tensor: their numbers are held in memory
MAX_SHAPE_VALUE = 4096  # elements of a value that shape inference may read
PLANS_KEPT = 16  # per model, by input shapes; fewer where they hold more than MAX_FOLDED_BYTES

SHAPE_ONLY = {("", "Shape"), ("", "Size")}  # ops that read no values
UNFIT = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)  # of an op and its inputs

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """One run: what must be committed, and what every node meets."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # graph outputs that a run produces, in graph order
    specs: Mapping[str, Spec]
    known: Mapping[str, Array]  # constants, and values that follow from shapes
    derived: frozenset[str]  # node outputs among the known: the verifier computes them itself
    sites: Mapping[int, Site] = field(repr=False)  # by node index
    answers: frozenset[str]  # graph inputs that no task gives: a node ties them to the rest of the run

    @property
    def nbytes(self) -> int:
        """Held for this run alone."""
        return sum(self.known[name].nbytes for name in self.derived)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor that a commitment covers: graph inputs, then node outputs in graph order."""
        return self.inputs + tuple(name for node in self.nodes for name in node.outputs if name)


@dataclass(frozen=True)
class Model:
    """A graph that can be checked at every node, with its constant subgraphs folded."""

    graph: Graph
    nodes: tuple[Node, ...]  # those that a run executes
    folded: tuple[Node, ...]
    constants: Mapping[str, Array]
    _plans: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Plan] = field(repr=False, compare=False)

    @property
    def id(self) -> bytes:
        return self.graph.id

    @property
    def answers(self) -> frozenset[str]:
        return _answers(self.graph, self.nodes)

    @classmethod
    def open(cls, source: Path | bytes, files: Files | None = None) -> "Model":
        """Read a model and fold it. Raises Malformed naming the op and node that cannot be checked."""
        return cls.of(read_graph(source, files))

    @classmethod
    def of(cls, graph: Graph) -> "Model":
        constants, folded, running = dict(graph.weights), [], []
        known = set(constants)  # now, or once the shapes are
        room = MAX_FOLDED_BYTES + MAX_GROWTH * sum(array.nbytes for array in constants.values())
        for node in graph.nodes:
            op = registry_row(node)
            _refuse_unknown_values(node, op, known)
            if (node.domain, node.op) not in SHAPE_ONLY and _determined(graph, node, op, constants):
                values = _evaluate(graph, node, constants, room)
                room -= sum(value.nbytes for value in values.values())
                constants.update(values)
                known.update(values)
                folded.append(node)
                continue
            running.append(node)
            if (node.domain, node.op) in SHAPE_ONLY or _all_known(node, known):
                known.update(node.outputs)
        if not running:
            raise Malformed("the graph computes nothing from its inputs: there is no run to prove")
        used = {name for node in running for name in node.inputs} | set(graph.outputs)
        kept = {name: value for name, value in constants.items() if name in used}
        return cls(graph, tuple(running), tuple(folded), kept, OrderedDict())

    def plan(self, shapes: Shapes) -> Plan:
        """The run on inputs of these shapes. Raises Malformed when they do not fit the graph."""
        key = tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
        if key not in self._plans:
            self._plans[key] = _Planner(self).plan(shapes)
            while len(self._plans) > 1 and self._over():
                self._plans.popitem(last=False)
        return self._plans[key]

    def _over(self) -> bool:
        return len(self._plans) > PLANS_KEPT or sum(plan.nbytes for plan in self._plans.values()) > MAX_FOLDED_BYTES

    def report(self) -> dict[str, Any]:
        """What there is to check, as JSON."""
        return _report(self.graph, self.nodes, None)


def report(graph: Graph) -> dict[str, Any]:
    """The report on a model; one that cannot be verified says why, and its ops without a check have the family none."""
    try:
        return Model.of(graph).report()
    except Malformed as refusal:
        return _report(graph, graph.nodes, str(refusal))


def _report(graph: Graph, nodes: tuple[Node, ...], refusal: str | None) -> dict[str, Any]:
    ops: dict[str, Counter[str]] = {}
    for node in nodes:
        op = REGISTRY.get((node.domain, node.op))
        ops.setdefault(str(op.family) if op else "none", Counter())[node.op] += 1
    weights, answers = graph.weights.values(), _answers(graph, nodes)
    inputs = [{"name": i.name, "dtype": dtype_name(i.dtype), "shape": list(i.shape)} for i in graph.inputs]
    return {
        "model": graph.id.hex(),
        "nodes": len(nodes),
        "folded": len(graph.nodes) - len(nodes),
        "families": {family: ops[family].total() for family in sorted(ops)},
        "ops": {family: dict(ops[family]) for family in sorted(ops)},
        "weights": {
            "tensors": len(weights),
            "elements": sum(w.size for w in weights),
            "bytes": sum(w.nbytes for w in weights),
        },
        "inputs": [entry for entry in inputs if entry["name"] not in answers],
        "answers": [entry for entry in inputs if entry["name"] in answers],
        "outputs": list(graph.outputs),
        "verifiable": refusal is None,
        "refusal": refusal,
    }


def _answers(graph: Graph, nodes: tuple[Node, ...]) -> frozenset[str]:
    """Graph inputs that no task gives: the worker does, and a node ties them to the rest."""
    given = {i.name for i in graph.inputs}
    rows = [(node, REGISTRY.get((node.domain, node.op))) for node in nodes]
    return frozenset(node.inputs[i] for node, op in rows if op for i in op.answers if i < len(node.inputs)) & given


def registry_row(node: Node) -> Op:
    """The registry's row for a node. Raises Malformed naming both."""
    op = REGISTRY.get((node.domain, node.op))
    if op is None:
        raise Malformed(f"{node}: the registry has no check for this op, so the model cannot be verified")
    reason = op.refuses(node)
    if reason:
        raise Malformed(f"{node} cannot be verified: {reason}")
    return op


def _all_known(node: Node, known: Container[str]) -> bool:
    return all(name in known for name in node.inputs if name)


def _determined(graph: Graph, node: Node, op: Op, values: Mapping[str, Array]) -> bool:
    """Whether known values determine a node's outputs bit for bit: the op is exact, or all of it is integers.

    Products are not folded: small constants that unfold could ask for any amount of work.
    """
    if not _all_known(node, values) or op.family is Family.CONTRACTION:
        return False
    present = [values[name] for name in node.inputs if name]
    if op.exact or not present or any(is_float(array.dtype) for array in present):
        return op.exact
    specs = _infer(graph, node, {name: spec_of(values[name]) for name in node.inputs if name}, values)
    return not any(is_float(spec.dtype) for spec in specs.values())


def _refuse_unknown_values(node: Node, op: Op, known: Container[str]) -> None:
    for position in op.values:
        name = node.inputs[position] if position < len(node.inputs) else ""
        if name and name not in known:
            raise Malformed(f"{node} cannot be verified: its input {name!r} depends on data, not only on shapes")


def _evaluate(graph: Graph, node: Node, values: Mapping[str, Array], room: int) -> dict[str, Array]:
    """Outputs of an exact node, by ONNX's reference evaluator, in at most `room` bytes."""
    specs = _infer(graph, node, {name: spec_of(values[name]) for name in node.inputs if name}, values)
    if sum(spec.nbytes for spec in specs.values()) > room:
        raise Malformed(f"{node} computes more from constants or shapes than the {room} bytes that are left for it")
    feeds = {name: values[name] for name in node.inputs if name}
    names = [name for name in node.outputs if name]
    proto = helper.make_graph(
        [node.proto],
        "folded",
        [_value_info(name, spec_of(array)) for name, array in feeds.items()],
        [_value_info(name, specs[name]) for name in names],
    )
    try:
        results = _evaluator(proto, graph.opsets).run(None, feeds)
        return {
            name: np.asarray(value, specs[name].dtype).reshape(specs[name].shape)
            for name, value in zip(names, results, strict=True)
        }
    except UNFIT as error:
        raise Malformed(f"{node} cannot be computed from its constants: {_first(error)}") from error


def _evaluator(proto: onnx.GraphProto, opsets: Mapping[str, int]) -> ReferenceEvaluator:
    """The evaluator at the model's opset, or at the newest where onnx has no implementation as old as that."""
    for versions in (opsets, {**opsets, "": onnx.defs.onnx_opset_version()}):
        imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        try:
            return ReferenceEvaluator(helper.make_model(proto, opset_imports=imports))
        except RuntimeError:  # "No implementation for operator"
            continue
    raise Malformed(f"op {proto.node[0].op_type} of constants cannot be evaluated")


def _value_info(name: str, spec: Spec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(spec.dtype), spec.shape)


def _infer(graph: Graph, node: Node, specs: Mapping[str, Spec], values: Mapping[str, Array]) -> dict[str, Spec]:
    """Dtype and shape of every present output of a node. Raises Malformed when they cannot be told."""
    op = REGISTRY[(node.domain, node.op)]
    if op.infer is not None:
        return _infer_contributed(node, op.infer, tuple(specs[name] if name else None for name in node.inputs))
    types = {name: _type(specs[name]) for name in node.inputs if name}
    small = {
        name: numpy_helper.from_array(np.asarray(values[name], order="C"), name)
        for name in node.inputs
        if name in values and values[name].size <= MAX_SHAPE_VALUE
    }
    schema = onnx.defs.get_schema(node.op, graph.opsets[node.domain], node.domain)
    opsets = [helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    try:
        inferred = shape_inference.infer_node_outputs(schema, node.proto, types, small, None, opsets)
    except (shape_inference.InferenceError, onnx.checker.ValidationError, *UNFIT) as error:
        raise Malformed(f"{node} does not accept its inputs {_shapes(node, specs)}: {_first(error)}") from error
    return {name: _spec(node, name, inferred.get(name), specs) for name in node.outputs if name}


def _infer_contributed(node: Node, infer: Infer, inputs: tuple[Spec | None, ...]) -> dict[str, Spec]:
    try:
        found = {name: spec for name, spec in zip(node.outputs, infer(node, inputs), strict=False) if name}
    except UNFIT as error:
        raise Malformed(f"{node} does not accept its inputs: {_first(error)}") from error
    for name in node.outputs:
        if name and name not in found:
            raise Malformed(f"{node} does not give {name!r}")
    return {name: _bounded(spec, f"{node}: {name!r}") for name, spec in found.items()}


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _type(spec: Spec) -> TypeProto:
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(spec.dtype), spec.shape)


def _shapes(node: Node, specs: Mapping[str, Spec]) -> str:
    return ", ".join(f"{specs[name].dtype}{list(specs[name].shape)}" for name in node.inputs if name)


def _spec(node: Node, name: str, proto: TypeProto | None, specs: Mapping[str, Spec]) -> Spec:
    tensor = proto.tensor_type if proto is not None else None
    if tensor is None or not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        raise Malformed(f"{node}: the shape of {name!r} does not follow from the input shapes {_shapes(node, specs)}")
    shape = tuple(dim.dim_value for dim in tensor.shape.dim)
    return _bounded(Spec(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape), f"{node}: {name!r}")


def _bounded(spec: Spec, label: str) -> Spec:
    """The spec, if such a tensor can be worked on; Malformed if not. An empty one has sizes too."""
    dtype_name(spec.dtype)
    full = Spec(spec.dtype, tuple(max(dim, 1) for dim in spec.shape))
    most = MAX_TENSOR_BYTES if spec.size else MAX_ROWS
    if len(spec.shape) > MAX_RANK or min(spec.shape, default=0) < 0 or full.rows > MAX_ROWS or full.nbytes > most:
        raise Malformed(f"{label} would have the shape {spec.shape}")
    return spec


class _Planner:
    """Walks the nodes once, carrying specs and the values that shapes determine."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[str, Array] = dict(model.constants)
        self.specs: dict[str, Spec] = {name: spec_of(value) for name, value in model.constants.items()}
        self.derived: set[str] = set()
        self.sites: dict[int, Site] = {}
        self.room = MAX_FOLDED_BYTES

    def plan(self, shapes: Shapes) -> Plan:
        model = self.model
        self._take_inputs(shapes)
        for node in model.nodes:
            self._visit(node)
        produced = {name for node in model.nodes for name in node.outputs}
        return Plan(
            nodes=model.nodes,
            inputs=tuple(i.name for i in model.graph.inputs),
            outputs=tuple(name for name in model.graph.outputs if name in produced),
            specs=self.specs,
            known=self.known,
            derived=frozenset(self.derived),
            sites=self.sites,
            answers=model.answers,
        )

    def _take_inputs(self, shapes: Shapes) -> None:
        expected = {i.name for i in self.model.graph.inputs}
        if shapes.keys() != expected:
            raise Malformed(f"the model takes the inputs {sorted(expected)}, not {sorted(shapes)}")
        for declared in self.model.graph.inputs:
            shape = tuple(shapes[declared.name])
            fits = len(shape) == len(declared.shape) and all(
                size == dim or (not isinstance(dim, int) and size >= 0)
                for size, dim in zip(shape, declared.shape, strict=True)
            )
            if not fits:
                raise Malformed(f"input {declared.name!r} has the shape {shape}, not {declared.shape}")
            self.specs[declared.name] = _bounded(Spec(declared.dtype, shape), f"input {declared.name!r}")

    def _visit(self, node: Node) -> None:
        op = registry_row(node)
        _refuse_unknown_values(node, op, self.known)
        self.specs.update(_infer(self.model.graph, node, self.specs, self.known))
        if (node.domain, node.op) in SHAPE_ONLY:
            self._learn({node.outputs[0]: _shape_value(node, self.specs[node.inputs[0]])})
        elif _determined(self.model.graph, node, op, self.known):
            self._learn(_evaluate(self.model.graph, node, self.known, self.room))
        self.sites[node.index] = Site(
            node=node,
            inputs=tuple(self.specs[name] if name else None for name in node.inputs),
            outputs=tuple(self.specs[name] if name else None for name in node.outputs),
            known=tuple(self.known.get(name) for name in node.inputs),
        )

    def _learn(self, values: Mapping[str, Array]) -> None:
        self.known.update(values)
        self.derived.update(values)
        self.room -= sum(value.nbytes for value in values.values())


def _shape_value(node: Node, spec: Spec) -> Array:
    if node.op == "Size":
        return np.array(spec.size, np.int64)
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return np.array(spec.shape[start:end], np.int64)
