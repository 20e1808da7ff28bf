"""Reductions along any axes: Reduce*, global pooling, ArgMax and ArgMin.

Radii: alpha(K) u sum|x| for a sum of K terms in any order (numerics-local, SPECIFICATION 5), carried through the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, distinct
from gpu.ops.indexing import Shape, integers, measured, normalize_axis, output, source, widen
from gpu.ops.lanes import Lanes
from gpu.rounding import Array, Values, accumulation, compare, compare_equal, is_float, second_rounding, unit
from proof.errors import Reason, Rejected

Axes = Callable[[Site], tuple[int, ...]]


def rank_one(shape: Shape) -> Shape:
    """A scalar as a tensor of one element."""
    return shape or (1,)


def reduced_axes(site: Site) -> tuple[int, ...]:
    """Axes of Reduce*: an attribute or an input; none given means all of them, or none with noop_with_empty_axes."""
    rank = len(rank_one(source(site, 0).shape))
    axes = integers(site, "axes", 1) or []
    if not axes and site.node.attributes.get("noop_with_empty_axes", 0):
        return ()
    return tuple(sorted({normalize_axis(axis, rank) for axis in axes})) or tuple(range(rank))


def spatial_axes(site: Site) -> tuple[int, ...]:
    return tuple(range(2, len(source(site, 0).shape)))


def one_axis(default: int) -> Axes:
    return lambda site: (
        normalize_axis(site.node.attributes.get("axis", default), len(rank_one(source(site, 0).shape))),
    )


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """`judge(site, claimed, lanes)`: the lanes have the shape (..., K), the claimed entries (...)."""

    judge: Callable[[Site, Values, Values], float]
    axes: Axes = reduced_axes
    values: tuple[int, ...] = (1,)
    exact: bool = False


def reduction(row: Reduction) -> Op:
    def lanes(site: Site) -> Lanes:
        return Lanes(rank_one(source(site, 0).shape), row.axes(site))

    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        return {0: distinct(lanes(site).rows(frames_of(site, position, lanes(site), rows)))}

    def check(call: Call) -> Measure:
        site, groups = call.site, lanes(call.site)
        tensor = call.inputs[0]
        if tensor is None:
            raise ValueError(f"{site.node} has no input")

        def block(position: int, rows: RowIds, claimed: Values) -> float:
            values = groups.take(tensor, frames_of(site, position, groups, rows))
            with np.errstate(all="ignore"):
                return row.judge(site, claimed.reshape(values.shape[:-1]), values)

        return measured(call, block, lambda position: groups.cost * (output(site).width if groups.last else 1))

    return Op(family=Family.ROWWISE, reach=reach, check=check, values=row.values, exact=row.exact)


def frames_of(site: Site, position: int, lanes: Lanes, rows: RowIds) -> RowIds:
    """Frames behind rows of a reduced output: its elements when lanes run along rows, else its rows."""
    width = output(site, position).width
    return (rows[:, None] * width + np.arange(width)).reshape(-1) if lanes.last else rows


def summed(
    value: Callable[..., Values], slack: Callable[[float, Array, Array], Array], axes: Axes = reduced_axes
) -> Op:
    """A reduction that rounds; integers natively, wrapping."""

    def judge(site: Site, claimed: Values, lanes: Values) -> float:
        x = widen(lanes)
        z = value(x)
        if not is_float(claimed.dtype):
            return compare_equal(claimed, z.astype(claimed.dtype))
        room = slack(unit(claimed.dtype), z, x)
        return compare(claimed, z, np.nan_to_num(room, nan=0.0, posinf=0.0) + second_rounding(z, claimed.dtype))

    return reduction(Reduction(judge=judge, axes=axes))


def selected(value: Callable[..., Values], empty: float, axes: Axes = reduced_axes) -> Op:
    """A reduction that picks one element of the lane; of an empty lane it is `empty`, or an integer's limit."""

    def judge(site: Site, claimed: Values, lanes: Values) -> float:
        x = widen(lanes)
        return compare_equal(claimed, value(x, axis=-1, initial=_limit(x.dtype, empty)).astype(claimed.dtype))

    return reduction(Reduction(judge=judge, axes=axes, exact=True))


def _limit(dtype: np.dtype, towards: float) -> float:
    """The value of a dtype nearest to an infinity."""
    if dtype == np.bool_:
        return towards > 0
    if np.issubdtype(dtype, np.integer):
        return int(np.iinfo(dtype).max if towards > 0 else np.iinfo(dtype).min)
    return towards


def _alpha(x: Array) -> float:
    return accumulation(x.shape[-1])


def _sum(x: Values) -> Values:
    return np.asarray(np.sum(x, axis=-1, dtype=x.dtype))


def _mean(x: Values) -> Values:
    mean: Values = _sum(x) / max(x.shape[-1], 1)
    return mean if x.dtype == np.float64 else np.trunc(mean)


def _sum_square(x: Values) -> Values:
    return _sum(x * x)


def _log_sum_exp(x: Array) -> Array:
    top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    return np.asarray(np.log(np.sum(np.exp(x - top), axis=-1)) + top[..., 0])


def _sum_slack(u: float, z: Array, x: Array) -> Array:
    return np.asarray(_alpha(x) * u * np.sum(np.abs(x), axis=-1))


def _mean_slack(u: float, z: Array, x: Array) -> Array:
    return np.asarray((_alpha(x) + 2.0) * u * np.sum(np.abs(x), axis=-1) / max(x.shape[-1], 1))


def _relative_slack(u: float, z: Array, x: Array) -> Array:
    """Of a product, or of a sum of terms of one sign followed by at most four roundings."""
    return np.asarray((_alpha(x) + 4.0) * u * np.abs(z))


def _log_sum_slack(u: float, z: Array, x: Array) -> Array:
    lost = _alpha(x) * np.sum(np.abs(x), axis=-1) / np.abs(np.sum(x, axis=-1))
    return np.asarray(u * (lost + 4.0 * (1.0 + np.abs(z))))


def _log_sum_exp_slack(u: float, z: Array, x: Array) -> Array:
    """Of exponentials with or without the largest entry taken out first; the logarithm of their sum is below log K."""
    return np.asarray(u * (_alpha(x) + 16.0 + 4.0 * np.log(max(x.shape[-1], 1)) + 4.0 * np.abs(z)))


def _compare_norm(site: Site, claimed: Values, lanes: Values) -> float:
    p = site.node.attributes.get("p", 2)
    z = np.sum(np.abs(widen(lanes)) ** p, axis=-1) ** (1.0 / p)
    slack = (_alpha(lanes) + 32.0) * unit(claimed.dtype) * z
    return compare(claimed, z, slack + second_rounding(z, claimed.dtype))


def _compare_position(best: Callable[..., Values]) -> Callable[[Site, Values, Values], float]:
    def judge(site: Site, claimed: Values, lanes: Values) -> float:
        x = widen(lanes)
        if not x.shape[-1]:
            raise Rejected(Reason.REEXECUTION, "an empty lane has no best element")
        if site.node.attributes.get("select_last_index", 0):
            return compare_equal(claimed, x.shape[-1] - 1 - best(x[..., ::-1], axis=-1))
        return compare_equal(claimed, best(x, axis=-1).astype(np.int64))

    return judge


_TABLE: dict[str, Op] = {
    "ReduceSum": summed(_sum, _sum_slack),
    "ReduceMean": summed(_mean, _mean_slack),
    "ReduceMax": selected(np.max, -np.inf),
    "ReduceMin": selected(np.min, np.inf),
    "ReduceProd": summed(lambda x: np.prod(x, axis=-1, dtype=x.dtype), _relative_slack),
    "ReduceL1": summed(lambda x: _sum(np.abs(x)), _relative_slack),
    "ReduceL2": summed(lambda x: np.sqrt(_sum_square(x)), _relative_slack),
    "ReduceSumSquare": summed(_sum_square, _relative_slack),
    "ReduceLogSum": summed(lambda x: np.log(_sum(x)), _log_sum_slack),
    "ReduceLogSumExp": summed(_log_sum_exp, _log_sum_exp_slack),
    "GlobalAveragePool": summed(_mean, _mean_slack, spatial_axes),
    "GlobalLpPool": reduction(Reduction(judge=_compare_norm, axes=spatial_axes)),
    "GlobalMaxPool": selected(np.max, -np.inf, spatial_axes),
    "ArgMax": reduction(Reduction(judge=_compare_position(np.argmax), axes=one_axis(0), exact=True)),
    "ArgMin": reduction(Reduction(judge=_compare_position(np.argmin), axes=one_axis(0), exact=True)),
}

OPS: dict[tuple[str, str], Op] = {("", name): op for name, op in _TABLE.items()}
