"""One node run by ONNX Runtime, and its check given only the rows that `reach` names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from gpu.ops.call import Call, Measure, Op, Site, Tensor
from proof.errors import Rejected
from proof.graph import graph_of, spec_of
from proof.policy import policy
from proof.sampling import Draw

Array = npt.NDArray[Any]
ROWS = 4  # sampled of every output
BF16 = np.dtype(ml_dtypes.bfloat16)
CONTRIBUTED = "com.microsoft"


@dataclass(frozen=True)
class Case:
    """An op on concrete inputs. `constant`: positions that are weights; the others are data."""

    op: str
    inputs: Sequence[Array | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    domain: str = ""
    constant: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = " ".join("-" if x is None else f"{x.dtype}{list(x.shape)}".replace(" ", "") for x in self.inputs)
        attributes = " ".join(f"{k}={v}" for k, v in self.attributes.items() if not isinstance(v, np.ndarray))
        return f"{self.op}-{self.opset} {shapes} {attributes}".strip()


@dataclass(frozen=True)
class Run:
    """What a worker computed for a case."""

    site: Site
    inputs: tuple[Array | None, ...]
    outputs: tuple[Array, ...]


def proto_of(case: Case) -> onnx.ModelProto:
    names = ["" if x is None else f"in{i}" for i, x in enumerate(case.inputs)]
    outs = [f"out{i}" for i in range(case.outputs)]
    attributes = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in case.attributes.items()}
    node = helper.make_node(case.op, names, outs, name="node", domain=case.domain, **attributes)
    given = {f"in{i}": x for i, x in enumerate(case.inputs) if x is not None}
    weights = [numpy_helper.from_array(given[f"in{i}"], f"in{i}") for i in case.constant]
    feeds = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in given.items()
        if int(name[2:]) not in case.constant
    ]
    graph = helper.make_graph([node], "one", feeds, [helper.make_empty_tensor_value_info(o) for o in outs], weights)
    opsets = [helper.make_opsetid("", case.opset), helper.make_opsetid(CONTRIBUTED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(case: Case) -> Run:
    """Run a case in ONNX Runtime without graph optimisations."""
    proto = proto_of(case)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {f"in{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constant}
    outputs = tuple(np.asarray(value) for value in session.run(None, fed))
    return assembled(case, outputs)


def assembled(case: Case, outputs: Sequence[Array]) -> Run:
    node = graph_of(proto_of(case)).nodes[0]
    site = Site(
        node=node,
        inputs=tuple(None if x is None else spec_of(x) for x in case.inputs),
        outputs=tuple(spec_of(value) for value in outputs),
        known=tuple(x if i in case.constant else None for i, x in enumerate(case.inputs)),
    )
    return Run(site, tuple(case.inputs), tuple(outputs))


def sampled(run: Run, rng: np.random.Generator, count: int | None = ROWS) -> tuple[npt.NDArray[np.int64], ...]:
    rows = []
    for value in run.outputs:
        total = spec_of(value).rows
        every = count is None or total <= count
        rows.append(np.arange(total) if every else np.unique(rng.integers(0, total, count)))
    return tuple(rows)


def opened(op: Op, run: Run, rows: Sequence[npt.NDArray[np.int64]]) -> tuple[Tensor | None, ...]:
    """Inputs as the verifier has them: the reached rows of data, weights whole."""
    wanted: dict[int, npt.NDArray[np.int64]] = {}
    for position in range(len(run.outputs)):
        for source, needed in op.reach(run.site, position, rows[position]).items():
            wanted[source] = np.union1d(wanted.get(source, needed), needed)
    tensors: list[Tensor | None] = []
    for i, value in enumerate(run.inputs):
        if value is None:
            tensors.append(None)
            continue
        spec = spec_of(value)
        data = value.reshape(spec.rows, spec.width)
        index = None if run.site.known[i] is not None else wanted.get(i, np.zeros(0, np.int64))
        tensors.append(Tensor(spec, data if index is None else data[index], index))
    return tuple(tensors)


def check(op: Op, run: Run, rows: Sequence[npt.NDArray[np.int64]], claimed: Sequence[Array] | None = None) -> Measure:
    """Check claimed rows (the run's own by default) with nothing but the reached rows of the inputs."""
    return op.check(
        Call(
            site=run.site,
            inputs=opened(op, run, rows),
            rows=tuple(rows),
            claimed=tuple(claimed or claims(run, rows)),
            policy=policy("standard"),
            draw=Draw(bytes(32), "node/0"),
            outputs=returned(run, rows, claimed or claims(run, rows)),
        )
    )


def returned(run: Run, rows: Sequence[npt.NDArray[np.int64]], claimed: Sequence[Array]) -> tuple[Tensor, ...]:
    """Outputs opened whole, the claimed rows in their places."""
    tensors = []
    for value, taken, claim in zip(run.outputs, rows, claimed, strict=True):
        spec = spec_of(value)
        data = value.reshape(spec.rows, spec.width).copy()
        data[taken] = claim
        tensors.append(Tensor(spec, data))
    return tuple(tensors)


def claims(run: Run, rows: Sequence[npt.NDArray[np.int64]]) -> list[Array]:
    """The run's own rows of every output."""
    matrices = [value.reshape(spec_of(value).rows, spec_of(value).width) for value in run.outputs]
    return [matrix[taken] for matrix, taken in zip(matrices, rows, strict=True)]


def _largest(claim: Array) -> tuple[int, ...]:
    size = np.abs(np.nan_to_num(claim.astype(np.float64), posinf=0.0, neginf=0.0))
    return np.unravel_index(int(np.argmax(size)), claim.shape)


def _one(claim: Array, change: Callable[[Any], Any]) -> Array:
    forged, at = claim.copy(), _largest(claim)
    forged[at] = change(claim[at])
    return forged


def _noise(claim: Array, rng: np.random.Generator) -> Array:
    if claim.dtype == np.bool_:
        return rng.integers(0, 2, claim.shape).astype(np.bool_)
    if np.issubdtype(claim.dtype, np.integer):
        return rng.permutation(claim.reshape(-1)).reshape(claim.shape)
    size = np.sqrt(np.mean(np.nan_to_num(claim.astype(np.float64), posinf=0.0, neginf=0.0) ** 2))
    return (rng.standard_normal(claim.shape) * size).astype(claim.dtype)


def _nudged(value: Any) -> Any:
    if value.dtype == np.bool_:
        return ~value
    if np.issubdtype(value.dtype, np.integer):
        with np.errstate(over="ignore"):
            return value + value.dtype.type(1)
    return value.dtype.type(float(value) * (1.03 if value.dtype == BF16 else 1.01))  # one bfloat16 step is up to 0.8 %


def _special(value: float) -> Callable[[Array, np.random.Generator], Array]:
    def forge(claim: Array, rng: np.random.Generator) -> Array:
        return claim if claim.dtype.kind in "iub" else _one(claim, lambda _: value)

    return forge


FORGERIES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "zeros": lambda claim, rng: np.zeros_like(claim),
    **{f"noise {i}": _noise for i in range(5)},
    "rows shifted": lambda claim, rng: np.roll(claim, 1, axis=0),
    "columns shifted": lambda claim, rng: np.roll(claim, 1, axis=1),
    "rows reversed": lambda claim, rng: claim[::-1].copy(),
    "one element": lambda claim, rng: _one(claim, _nudged),
    "NaN": _special(np.nan),
    "infinity": _special(np.inf),
}


def same(left: Array, right: Array) -> bool:
    if left.dtype.kind in "iub":
        return bool(np.array_equal(left, right))
    return bool(np.array_equal(left.astype(np.float64), right.astype(np.float64), equal_nan=True))


def accepted_forgeries(op: Op, run: Run, rng: np.random.Generator) -> list[str]:
    """Forgeries of one output at a time that differ from the honest rows and are not rejected."""
    missed = []
    rows = sampled(run, rng)
    honest = claims(run, rows)
    for name, forge in FORGERIES.items():
        for position, claim in enumerate(honest):
            forged = forge(claim, rng) if claim.size else claim
            if same(forged, claim):
                continue
            try:
                check(op, run, rows, [*honest[:position], forged, *honest[position + 1 :]])
            except Rejected:
                continue
            missed.append(f"{name} of output {position}")
    return missed
