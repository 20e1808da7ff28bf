"""onnxruntime's fused residual add and normalisation: SkipLayerNormalization, SkipSimplifiedLayerNormalization.

The sum may be normalised as it was rounded to the tensor's dtype or before (numerics-local section 3, fused-add-norm):
an error e of it moves the normalised row by at most rstd (e + mean e + |n| rms e).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, rows_of
from gpu.ops.elementary import total
from gpu.ops.indexing import absent, broadcast_index, elements_of, measured, output, source, unknown
from gpu.ops.normalisation import Stage, root_mean_square, standardised
from gpu.rounding import FORMATS, Array, Values, compare, second_rounding, unit
from proof.graph import Node, Spec

SUM = 3  # output position of the sum
EPSILON = float(np.float32(1e-12))  # onnxruntime's default of these two ops


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Inputs 0 and 1 are added, and `bias` where given; `scale` and `shift` follow the normalisation."""

    stage: Stage
    energy: Callable[[Array], Array]  # what the stage takes the root of, without epsilon
    bias: int
    scale: int = 2
    shift: int | None = None


def residual(row: Residual) -> Op:
    addends = (0, 1, row.bias)

    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        read = [(i, spec) for i, spec in unknown(site) if position == 0 or i in addends]
        return {i: rows_of(_beside(site, i, rows), spec) for i, spec in read}

    def check(call: Call) -> Measure:
        def block(position: int, rows: RowIds, claimed: Values) -> float:
            terms = [_operand(call, i, rows) for i in addends if not absent(call.site, i)]
            x, u = total(*terms), unit(claimed.dtype)
            error = 2.0 * u * total(*(np.abs(term) for term in terms)) + FORMATS[claimed.dtype].u * np.abs(x)
            if position == SUM:
                return compare(claimed, x, error)
            return _compare_normalised(row, call, rows, claimed, x, error)

        return measured(call, block, lambda position: output(call.site).width)

    return Op(family=Family.ROWWISE, reach=reach, check=check, refuses=_statistics, infer=_like_first)


def _compare_normalised(row: Residual, call: Call, rows: RowIds, claimed: Values, x: Array, error: Array) -> float:
    epsilon = call.site.node.attributes.get("epsilon", EPSILON)
    n, room = row.stage(unit(claimed.dtype), x, epsilon=epsilon)
    rstd = 1.0 / np.sqrt(row.energy(x) + epsilon)
    mean, square = np.mean(error, axis=-1, keepdims=True), np.mean(error * error, axis=-1, keepdims=True)
    room = room + rstd * (error + mean + np.abs(n) * np.sqrt(square))
    u, scale = FORMATS[claimed.dtype].u, _operand(call, row.scale, rows)
    z, room = n * scale, np.abs(scale) * (room + u * np.abs(n)) + u * np.abs(n * scale)
    if row.shift is not None and not absent(call.site, row.shift):
        shift = _operand(call, row.shift, rows)
        z, room = z + shift, room + u * (np.abs(z) + np.abs(shift))
    return compare(claimed, z, room + second_rounding(z, claimed.dtype))


def _variance(x: Array) -> Array:
    return np.asarray(np.var(x, axis=-1, keepdims=True))


def _mean_square(x: Array) -> Array:
    return np.asarray(np.mean(x * x, axis=-1, keepdims=True))


def _beside(site: Site, position: int, rows: RowIds) -> npt.NDArray[np.int64]:
    return broadcast_index(elements_of(rows, output(site)), output(site).shape, source(site, position).shape)


def _operand(call: Call, position: int, rows: RowIds) -> Array:
    tensor = call.inputs[position]
    if tensor is None:
        raise ValueError(f"{call.site.node} has no input {position}")
    return tensor.elements(_beside(call.site, position, rows)).astype(np.float64)


def _statistics(node: Node) -> str | None:
    return "returns training statistics: only inference is checked" if any(node.outputs[1:SUM]) else None


def _like_first(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    first = inputs[0]
    if first is None:
        raise ValueError(f"{node} has no first input")
    return (first,) * len(node.outputs)


OPS: dict[tuple[str, str], Op] = {
    ("com.microsoft", "SkipLayerNormalization"): residual(
        Residual(stage=standardised, energy=_variance, bias=4, shift=3)
    ),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): residual(
        Residual(stage=root_mean_square, energy=_mean_square, bias=3)
    ),
}
