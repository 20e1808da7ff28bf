"""Normalisations: a row-wise op whose output has the shape of its input, scaled and shifted or not.

A stage gives, for lanes of shape (..., K), the normalised lanes in float64 and the radius of an honest kernel's,
whatever its order of summation, one pass or two. Formulas beside each stage; u is the unit of `gpu.rounding.unit`.
The scaled result adds |scale| u_T |n| + u_T |n scale| for kernels that round the normalised value to the dtype T
of the tensor before they scale it (numerics-local section 3, RMSNorm; ONNX's stash_type says the same).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.clearing.rowwise import Kernel, clear_rows
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.ops.call import Call, Family, Infer, Measure, Op, RowIds, Site, Tensor, distinct, rows_of
from gpu.ops.indexing import (
    Index,
    Shape,
    absent,
    accepts,
    broadcast_index,
    elements_of,
    measured,
    normalize_axis,
    output,
    source,
    unknown,
    widen,
)
from gpu.ops.lanes import Lanes
from gpu.ops.reduction import one_axis, rank_one, spatial_axes
from gpu.profiles import profile_of
from gpu.rounding import (
    FORMATS,
    U32,
    Array,
    Interval,
    Values,
    accumulation,
    compare,
    compare_equal,
    is_float,
    round_to,
    second_rounding,
    unit,
)
from proof.errors import Malformed
from proof.graph import Node, Spec

EXPONENTIAL = 16.0  # u: error of a kernel's exponential, and the division after it

Stage = Callable[..., tuple[Array, Array]]  # (u, lanes, **attributes) -> normalised lanes, radius


def softmax(u: float, x: Array) -> tuple[Array, Array]:
    """n u (2 |x - max| + alpha(K) + 16): the rounding of x - max, the exponential, the sum, the division."""
    distance = x - np.max(x, axis=-1, keepdims=True)
    powers = np.exp(distance)
    n = powers / np.sum(powers, axis=-1, keepdims=True)
    reach = np.where(n > 0, np.abs(distance), 0.0)
    return n, n * u * (2.0 * reach + accumulation(x.shape[-1]) + EXPONENTIAL)


def log_softmax(u: float, x: Array) -> tuple[Array, Array]:
    """u (alpha(K) + 16 + 4 (|x - max| + log sum)), absolute."""
    distance = x - np.max(x, axis=-1, keepdims=True)
    total = np.log(np.sum(np.exp(distance), axis=-1, keepdims=True))
    size = np.where(np.isfinite(distance), np.abs(distance), 0.0) + np.abs(total)
    return distance - total, u * (accumulation(x.shape[-1]) + EXPONENTIAL + 4.0 * size)


def hardmax(u: float, x: Array) -> tuple[Array, Array]:
    best = np.argmax(x, axis=-1)[..., None] == np.arange(x.shape[-1])
    return best.astype(np.float64), np.zeros(x.shape)


def standardised(u: float, x: Array, *, epsilon: float) -> tuple[Array, Array]:
    """(x - mean) / sqrt(var + eps).

    mean off by (alpha(K) + 2) u mean|x|; var, also as E[x^2] - mean^2, by 3 (alpha(K) + 4) u mean x^2, which moves
    1 / sqrt(var + eps) by at most the factor `drift`; each of x and mean is rounded once more on the way.
    """
    mean, _, rstd, mean_error, drift = moments(u, x, epsilon)
    n = (x - mean) * rstd
    shift = mean_error + 4.0 * u * (np.abs(x) + np.abs(mean))
    return n, rstd * shift * (1.0 + drift) + np.abs(n) * (drift + 4.0 * u)


def moments(u: float, x: Array, epsilon: float) -> tuple[Array, Array, Array, Array, Array]:
    """mean, var, 1 / sqrt(var + eps), the error of the mean, and the relative error of the third; each (..., 1)."""
    alpha = accumulation(x.shape[-1])
    mean = np.mean(x, axis=-1, keepdims=True)
    total = np.mean((x - mean) ** 2, axis=-1, keepdims=True) + epsilon
    error = 3.0 * (alpha + 4.0) * u * np.mean(x * x, axis=-1, keepdims=True)
    least = np.maximum(np.maximum(total - error, epsilon), np.finfo(np.float64).tiny)
    drift = np.maximum(np.sqrt(total / least) - 1.0, 1.0 - np.sqrt(total / (total + error)))
    mean_error = (alpha + 2.0) * u * np.mean(np.abs(x), axis=-1, keepdims=True)
    return mean, total - epsilon, 1.0 / np.sqrt(total), mean_error, drift + 4.0 * u


def root_mean_square(u: float, x: Array, *, epsilon: float) -> tuple[Array, Array]:
    """x / sqrt(mean x^2 + eps), relative error (alpha(K) / 2 + 8) u."""
    n = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return n, np.abs(n) * u * (accumulation(x.shape[-1]) / 2.0 + 8.0)


def mean_variance(u: float, x: Array) -> tuple[Array, Array]:
    """ONNX's function body: (x - mean) / (sqrt(var) + 1e-9)."""
    n, error = standardised(u, x, epsilon=0.0)
    deviation = np.std(x, axis=-1, keepdims=True)
    shrink = deviation / (deviation + 1e-9)
    return np.where(deviation > 0, n * shrink, 0.0), np.nan_to_num(error * shrink)


def lp_normalised(u: float, x: Array, *, p: int) -> tuple[Array, Array]:
    """x over its norm, 0 where the norm is 0; relative error (alpha(K) + 4) u."""
    norm = np.sum(np.abs(x), axis=-1, keepdims=True) if p == 1 else np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    n = np.where(norm > 0, x / np.where(norm > 0, norm, 1.0), x * norm)
    return n, np.abs(n) * u * (accumulation(x.shape[-1]) + 4.0)


def inverse_deviation(u: float, x: Array, *, epsilon: float) -> tuple[Array, Array]:
    _, _, rstd, _, drift = moments(u, x, epsilon)
    return rstd, rstd * drift


def lane_mean(u: float, x: Array, *, epsilon: float) -> tuple[Array, Array]:
    mean, _, _, error, _ = moments(u, x, epsilon)
    return mean, error


def inverse_root_mean_square(u: float, x: Array, *, epsilon: float) -> tuple[Array, Array]:
    inverse = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return inverse, inverse * u * (accumulation(x.shape[-1]) / 2.0 + 8.0)


def _own_shape(site: Site) -> Shape:
    return rank_one(source(site, 0).shape)


def _parameter_shape(site: Site, position: int) -> Shape:
    return source(site, position).shape


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Outputs after the first are statistics, one entry a lane. `view`: the shape in which a parameter broadcasts."""

    stage: Stage
    axes: Callable[[Site], tuple[int, ...]]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    statistics: tuple[Stage, ...] = ()
    shape: Callable[[Site], Shape] = _own_shape
    stashed: bool = False  # whether ONNX computes the stage in float32 (stash_type), float64 tensors included
    scale: int | None = None
    bias: int | None = None
    view: Callable[[Site, int], Shape] = _parameter_shape
    refuses: Callable[[Node], str | None] = accepts
    infer: Infer | None = None
    exact: bool = False
    replayed: bool = False  # whether a rounding profile says where its kernels round
    kernel: Kernel | None = None  # what judges it on a device, along rows
    values: tuple[int, ...] = ()


def normalisation(row: Normalisation) -> Op:
    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        lanes = Lanes(row.shape(site), row.axes(site))
        frames = distinct(lanes.place(rows)[0]) if position == 0 else rows
        needed = {i: spec for i, spec in unknown(site) if position == 0 or i == 0}
        return {
            i: distinct(lanes.rows(frames)) if i == 0 else rows_of(_beside(row, site, i, rows), spec)
            for i, spec in needed.items()
        }

    def check(call: Call) -> Measure:
        lanes = Lanes(row.shape(call.site), row.axes(call.site))

        def block(position: int, rows: RowIds, claimed: Values) -> float:
            with np.errstate(all="ignore"):
                if position:
                    return _compare_statistic(row, call, lanes, position, rows, claimed)
                return max(
                    _compare_normalised(row, call, claimed[chosen], rows[chosen], spread)
                    for chosen, spread in _spread(row, call, lanes, rows, claimed.dtype)
                )

        return measured(call, block, lambda position: lanes.cost if position else 1)

    def interval(call: Call) -> Interval:
        lanes = Lanes(row.shape(call.site), row.axes(call.site))
        shape, dtype = (len(call.rows[0]), output(call.site).width), output(call.site).dtype
        bounds = [np.empty(shape, dtype) for _ in range(3)]
        for chosen, (n, _) in _spread(row, call, lanes, call.rows[0], dtype):
            found = _scaled(row, call, n, call.rows[0][chosen], dtype)
            for bound, values in zip(bounds, found, strict=True):
                bound[chosen] = values
        return Interval(*bounds)

    def clear(call: Call, stand: Stand, mark: Memory) -> bool:
        assert row.kernel is not None
        shape = row.shape(call.site)
        if row.axes(call.site) != (len(shape) - 1,) or shape != _own_shape(call.site):
            return False
        parameters = (_optional(call, row.scale), _optional(call, row.bias))
        epsilon = float(_attributes(row, call.site).get("epsilon", 0.0))
        return clear_rows(call, stand, mark, row.kernel, parameters, epsilon)

    return Op(
        family=Family.ROWWISE,
        reach=reach,
        check=check,
        clear=clear if row.kernel else None,
        interval=interval if row.replayed else None,
        exact=row.exact,
        values=row.values,
        refuses=row.refuses,
        infer=row.infer,
    )


def _optional(call: Call, position: int | None) -> Tensor | None:
    return None if position is None or absent(call.site, position) else call.inputs[position]


def _beside(row: Normalisation, site: Site, position: int, rows: RowIds) -> npt.NDArray[np.int64]:
    """Elements of a parameter beside the elements of these rows."""
    return broadcast_index(elements_of(rows, output(site)), row.shape(site), row.view(site, position))


def _attributes(row: Normalisation, site: Site) -> dict[str, Any]:
    return {name: site.node.attributes.get(name, default) for name, default in row.attributes.items()}


def _lanes_of(call: Call, lanes: Lanes, frames: RowIds) -> Values:
    tensor = call.inputs[0]
    if tensor is None:
        raise ValueError(f"{call.site.node} has no input")
    return widen(lanes.take(tensor, frames))


def _compare_statistic(
    row: Normalisation, call: Call, lanes: Lanes, position: int, rows: RowIds, claimed: Values
) -> float:
    z, error = row.statistics[position - 1](
        _stage_unit(row, claimed.dtype), _lanes_of(call, lanes, rows), **_attributes(row, call.site)
    )
    z, error = z.reshape(claimed.shape), error.reshape(claimed.shape)
    return compare(claimed, z, error + second_rounding(z, claimed.dtype))


def _spread(
    row: Normalisation, call: Call, lanes: Lanes, rows: RowIds, dtype: np.dtype
) -> Iterator[tuple[Index, tuple[Values, Values]]]:
    """For some of the rows at a time: which, and their normalised elements with the radius."""
    u = _stage_unit(row, dtype)
    for frames, chosen, frame, at in lanes.group(rows):
        n, error = row.stage(u, _lanes_of(call, lanes, frames), **_attributes(row, call.site))
        yield chosen, (lanes.spread(n)[frame, at], lanes.spread(error)[frame, at])


def _stage_unit(row: Normalisation, dtype: np.dtype) -> float:
    if not is_float(dtype):
        return 0.0
    return U32 if row.stashed else unit(dtype)


def _compare_normalised(
    row: Normalisation, call: Call, claimed: Values, rows: RowIds, spread: tuple[Values, Values]
) -> float:
    z, error = spread
    if not is_float(claimed.dtype):
        return compare_equal(claimed, z)
    u = max(FORMATS[claimed.dtype].u, unit(claimed.dtype)) if claimed.dtype == np.float64 else FORMATS[claimed.dtype].u
    if row.scale is not None and not absent(call.site, row.scale):
        scale = _parameter(row, call, row.scale, rows)
        form = FORMATS[claimed.dtype]
        inner = np.maximum(u * np.abs(z), 2.0 ** (form.e_min - form.p))  # below normal numbers the spacing stays
        error = np.abs(scale) * (error + inner) + u * np.abs(z * scale)
        z = z * scale
    if row.bias is not None and not absent(call.site, row.bias):
        bias = _parameter(row, call, row.bias, rows)
        error = error + u * (np.abs(z) + np.abs(bias))
        z = z + bias
    return compare(claimed, z, np.nan_to_num(error, nan=0.0, posinf=0.0) + second_rounding(z, claimed.dtype))


def _scaled(row: Normalisation, call: Call, n: Values, rows: RowIds, dtype: np.dtype) -> tuple[Values, Values, Values]:
    """Low, nearest and high of kernels that round the normalised value to the dtype before they scale it."""
    error = profile_of(call.policy).norm * U32 * np.abs(n)
    around_n = [round_to(value, dtype).astype(np.float64) for value in (n - error, n, n + error)]
    scale = 1.0 if row.scale is None or absent(call.site, row.scale) else _parameter(row, call, row.scale, rows)
    ends = [round_to(scale * value, dtype) for value in around_n]
    return np.minimum(ends[0], ends[2]), ends[1], np.maximum(ends[0], ends[2])


def _parameter(row: Normalisation, call: Call, position: int, rows: RowIds) -> Array:
    tensor = call.inputs[position]
    if tensor is None:
        raise ValueError(f"{call.site.node} has no input {position}")
    return tensor.elements(_beside(row, call.site, position, rows)).astype(np.float64)


def _trailing_axes(default: int) -> Callable[[Site], tuple[int, ...]]:
    """Every axis from `axis` on."""

    def axes(site: Site) -> tuple[int, ...]:
        rank = len(_own_shape(site))
        return tuple(range(normalize_axis(site.node.attributes.get("axis", default), rank), rank))

    return axes


def _softmax_axes(site: Site) -> tuple[int, ...]:
    """Until opset 12 a tensor was seen as a matrix, cut at `axis`."""
    return _trailing_axes(1)(site) if site.node.since < 13 else one_axis(-1)(site)


def _listed_axes(site: Site) -> tuple[int, ...]:
    rank = len(_own_shape(site))
    return tuple(sorted(normalize_axis(axis, rank) for axis in site.node.attributes.get("axes", (0, 2, 3))))


def _grouped_shape(site: Site) -> Shape:
    batch, channels, *rest = source(site, 0).shape
    if not rest:
        raise Malformed(f"{site.node}: a tensor of batch and channels alone has no groups of positions")
    groups = int(site.node.attributes["num_groups"])
    return (batch, groups, channels // groups, *rest)


def _grouped_axes(site: Site) -> tuple[int, ...]:
    return tuple(range(2, len(_grouped_shape(site))))


def _grouped_view(site: Site, position: int) -> Shape:
    """One value a group until opset 20, one a channel since."""
    _, groups, channels, *rest = _grouped_shape(site)
    return (groups, channels if site.node.since >= 21 else 1, *(1 for _ in rest))


def _channel_view(site: Site, position: int) -> Shape:
    return (*source(site, position).shape, *(1 for _ in output(site).shape[2:]))


def _simplified_specs(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    """SimplifiedLayerNormalization is onnxruntime's, though it stands in ONNX's domain: no schema says its outputs."""
    x = inputs[0]
    if x is None:
        raise Malformed(f"{node} has no first input")
    axis = normalize_axis(node.attributes.get("axis", -1), len(x.shape))
    statistic = Spec(np.dtype(np.float32), (*x.shape[:axis], *(1 for _ in x.shape[axis:])))
    return (x, statistic)[: len(node.outputs)]


_EPSILON = {"epsilon": float(np.float32(1e-5))}
_LAYER = Normalisation(
    stage=standardised,
    axes=_trailing_axes(-1),
    attributes=_EPSILON,
    stashed=True,
    statistics=(lane_mean, inverse_deviation),
    scale=1,
    bias=2,
    kernel=Kernel("normalise"),
)
_RMS = Normalisation(
    stage=root_mean_square,
    axes=_trailing_axes(-1),
    attributes=_EPSILON,
    stashed=True,
    statistics=(inverse_root_mean_square,),
    scale=1,
    replayed=True,
    infer=_simplified_specs,
    kernel=Kernel("normalise", root=True),
)

_TABLE: dict[str, Normalisation] = {
    "Softmax": Normalisation(stage=softmax, axes=_softmax_axes, kernel=Kernel("soften")),
    "LogSoftmax": Normalisation(stage=log_softmax, axes=_softmax_axes, kernel=Kernel("log_soften")),
    "Hardmax": Normalisation(stage=hardmax, axes=_softmax_axes, exact=True),
    "LayerNormalization": _LAYER,
    "RMSNormalization": _RMS,
    "SimplifiedLayerNormalization": _RMS,
    "InstanceNormalization": Normalisation(
        stage=standardised, axes=spatial_axes, attributes=_EPSILON, scale=1, bias=2, view=_channel_view
    ),
    "GroupNormalization": Normalisation(
        stage=standardised,
        axes=_grouped_axes,
        attributes=_EPSILON,
        shape=_grouped_shape,
        stashed=True,
        scale=1,
        bias=2,
        view=_grouped_view,
    ),
    "MeanVarianceNormalization": Normalisation(stage=mean_variance, axes=_listed_axes),
    "LpNormalization": Normalisation(stage=lp_normalised, axes=one_axis(-1), attributes={"p": 2}),
}

OPS: dict[tuple[str, str], Op] = {("", name): normalisation(row) for name, row in _TABLE.items()}
