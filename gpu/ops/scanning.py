"""Ops that order, accumulate or quantise a whole lane or tensor: TopK, CumSum, DynamicQuantizeLinear."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, Tensor, distinct, every_row
from gpu.ops.conversion import compare_quantized
from gpu.ops.indexing import known, measured, normalize_axis, output, source, widen
from gpu.ops.lanes import Lanes
from gpu.ops.normalisation import Normalisation, normalisation
from gpu.rounding import Array, Values, accumulation, compare, compare_between, compare_equal, unit
from proof.errors import Reason, Rejected
from proof.graph import Node


def cumulated(u: float, x: Values, *, exclusive: int, reverse: int) -> tuple[Values, Array]:
    """Running sums; the k-th may err by alpha(K) u times the running sum of |x|."""
    turned = x[..., ::-1] if reverse else x
    sums, sizes = np.cumsum(turned, axis=-1, dtype=x.dtype), np.cumsum(np.abs(turned), axis=-1, dtype=np.float64)
    if exclusive:
        sums, sizes = _shifted(sums), _shifted(sizes)
    if reverse:
        sums, sizes = sums[..., ::-1], sizes[..., ::-1]
    return sums, accumulation(x.shape[-1]) * u * sizes


def _shifted(sums: Values) -> Values:
    return np.concatenate([np.zeros_like(sums[..., :1]), sums[..., :-1]], axis=-1)


def _given_axis(site: Site) -> tuple[int, ...]:
    axis = known(site, 1)
    if axis is None:
        raise ValueError(f"{site.node} has no axis")
    return (normalize_axis(int(axis.reshape(-1)[0]), len(source(site, 0).shape)),)


def _top_lanes(site: Site, spec_shape: tuple[int, ...]) -> Lanes:
    return Lanes(spec_shape, (normalize_axis(site.node.attributes.get("axis", -1), len(spec_shape)),))


def _top_reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    frames = distinct(_top_lanes(site, output(site, position).shape).place(rows)[0])
    return {0: distinct(_top_lanes(site, source(site, 0).shape).rows(frames))}


def _top_check(call: Call) -> Measure:
    site, tensor = call.site, call.inputs[0]
    if tensor is None:
        raise ValueError(f"{site.node} has no input")
    lanes = _top_lanes(site, source(site, 0).shape)

    def block(position: int, rows: RowIds, claimed: Values) -> float:
        top = _top_lanes(site, output(site, position).shape)
        for frames, chosen, frame, at in top.group(rows):
            x = widen(lanes.take(tensor, frames))
            order = _order(x, bool(site.node.attributes.get("largest", 1)))[..., : top.length]
            exact = order if position else np.take_along_axis(x, order, axis=-1)
            compare_equal(claimed[chosen], top.spread(exact)[frame, at].astype(claimed.dtype))
        return 0.0

    return measured(call, block, lambda position: lanes.cost // max(lanes.length, 1))


def _order(x: Values, descending: bool) -> npt.NDArray[np.int64]:
    """Positions by value; of equals the lower position first."""
    if not descending:
        return np.argsort(x, axis=-1, kind="stable")
    ascending = np.argsort(x[..., ::-1], axis=-1, kind="stable")
    return np.asarray(x.shape[-1] - 1 - ascending[..., ::-1])


def _unsorted(node: Node) -> str | None:
    return None if node.attributes.get("sorted", 1) else "sorted=0 leaves the order of its results open"


def _dynamic_reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    """Quantised rows need their own input rows beside the claimed scale; scale and zero point need all of them."""
    spec = source(site, 0)
    return {0: rows if position == 0 else every_row(spec)}


def _dynamic_check(call: Call) -> Measure:
    site, tensor = call.site, call.inputs[0]
    if tensor is None or any(claimed.size == 0 for claimed in call.claimed[1:]):
        raise ValueError(f"{site.node} lacks a tensor")
    scale, zero = call.claimed[1].reshape(1, 1), call.claimed[2].reshape(1, 1)
    low, high = _range(tensor)
    ratio = _compare_scale(scale, zero, low, high)

    def block(position: int, rows: RowIds, claimed: Values) -> float:
        return ratio if position else compare_quantized(site, claimed, tensor.take(rows), scale, zero)

    return measured(call, block, lambda position: output(site, position).width)


def _range(tensor: Tensor) -> tuple[float, float]:
    """Smallest and largest element with 0 between them."""
    values = tensor.whole()
    return min(float(values.min(initial=0)), 0.0), max(float(values.max(initial=0)), 0.0)


def _compare_scale(scale: Values, zero: Values, low: float, high: float) -> float:
    """scale = (max - min) / 255, of an all-zero tensor 1; zero point = round(-min / scale)."""
    u = unit(scale.dtype)
    if not np.isfinite(low) or not np.isfinite(high):
        raise Rejected(Reason.NONFINITE, "the quantised tensor is not finite")
    z = np.full((1, 1), (high - low) / 255.0 or 1.0)
    ratio = compare(scale, z, 2.0 * u * z)
    offset = -low / np.maximum(scale.astype(np.float64), np.finfo(np.float64).tiny)
    doubt = 4.0 * u * np.abs(offset)
    compare_between(zero, np.rint(offset - doubt), np.rint(np.minimum(offset + doubt, 255.0)))
    return ratio


def _all_outputs(node: Node) -> str | None:
    return None if len(node.outputs) == 3 and all(node.outputs) else "lacks one of its three outputs"


OPS: dict[tuple[str, str], Op] = {
    ("", "CumSum"): normalisation(
        Normalisation(
            stage=cumulated,
            axes=_given_axis,
            attributes={"exclusive": 0, "reverse": 0},
            values=(1,),
        )
    ),
    ("", "TopK"): Op(
        family=Family.ROWWISE, reach=_top_reach, check=_top_check, exact=True, values=(1,), refuses=_unsorted
    ),
    ("", "DynamicQuantizeLinear"): Op(
        family=Family.ROWWISE, reach=_dynamic_reach, check=_dynamic_check, refuses=_all_outputs
    ),
}
