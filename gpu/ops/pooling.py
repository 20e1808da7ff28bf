"""Ops over windows: pooling, local response normalisation, and resizing as a weighted sum of neighbours.

Radii: (alpha(K) + 4) u sum|w x| for a weighted sum of K taps; Resize adds what coordinates in fp32 do to its weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu.ops import resizing
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site
from gpu.ops.indexing import accepts, measured, output, source, widen
from gpu.ops.windows import Taps, Windows, bounded, straight
from gpu.rounding import Array, Values, accumulation, compare, compare_equal, is_float, second_rounding, unit
from proof.errors import Reason, Rejected
from proof.graph import Node

Judge = Callable[[Site, Values, Values, Array], float]


@dataclass(frozen=True, kw_only=True)
class Window:
    """`judge(site, claimed, elements, weights)`: windows of shape (rows, width, taps), claimed (rows, width)."""

    taps: Callable[[Site], list[Taps]]
    judge: Judge
    refuses: Callable[[Node], str | None] = accepts
    values: tuple[int, ...] = ()
    exact: bool = False


def window(row: Window) -> Op:
    def windows(site: Site) -> Windows:
        return Windows(source(site, 0).shape or (1,), row.taps(site))

    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        return {0: windows(site).needed(rows)}

    def check(call: Call) -> Measure:
        site, slid, tensor = call.site, windows(call.site), call.inputs[0]
        if tensor is None:
            raise ValueError(f"{site.node} has no input")
        if not tensor.spec.size and any(claimed.size for claimed in call.claimed):
            raise Rejected(Reason.REEXECUTION, "an empty tensor has no windows")

        def block(position: int, rows: RowIds, claimed: Values) -> float:
            elements, weights = slid.take(tensor, rows)
            with np.errstate(all="ignore"):
                if position:
                    return _compare_best(claimed, elements, weights, slid.places(rows))
                return row.judge(site, claimed, elements, weights)

        return measured(call, block, lambda position: slid.cost)

    return Op(family=Family.ROWWISE, reach=reach, check=check, refuses=row.refuses, values=row.values, exact=row.exact)


def _pooled_axes(site: Site) -> list[tuple[Taps, npt.NDArray[np.int64]]]:
    """Of each spatial axis the taps, and for each position how many taps lie in the padded tensor."""
    shape, out, attributes = source(site, 0).shape, output(site).shape, site.node.attributes
    kernel = attributes["kernel_shape"]
    ones = (1,) * len(kernel)
    strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
    axes = []
    for i, size in enumerate(kernel):
        span = (out[2 + i] - 1) * strides[i] + (size - 1) * dilations[i] + 1
        before, after = _padding(site, i, span - shape[2 + i])
        at = np.arange(out[2 + i])[:, None] * strides[i] - before + np.arange(size) * dilations[i]
        axes.append((bounded(at, shape[2 + i]), np.sum((at >= -before) & (at < shape[2 + i] + after), axis=1)))
    return axes


def _padding(site: Site, axis: int, missing: int) -> tuple[int, int]:
    """Padding before and after a spatial axis; `missing` is what its windows need beyond the tensor."""
    mode, spatial = site.node.attributes.get("auto_pad", "NOTSET"), len(site.node.attributes["kernel_shape"])
    if mode == "NOTSET":
        pads = site.node.attributes.get("pads", (0,) * 2 * spatial)
        return pads[axis], pads[spatial + axis]
    total = 0 if mode == "VALID" else max(missing, 0)
    return (total // 2, total - total // 2) if mode == "SAME_UPPER" else (total - total // 2, total // 2)


def _pool_taps(site: Site) -> list[Taps]:
    return [straight(size) for size in source(site, 0).shape[:2]] + [taps for taps, _ in _pooled_axes(site)]


def _mean_taps(site: Site) -> list[Taps]:
    """Weights that divide by the number of taps inside, or inside the padded tensor with count_include_pad."""
    padded = site.node.attributes.get("count_include_pad", 0)
    taps = [straight(size) for size in source(site, 0).shape[:2]]
    for (index, weight), count in _pooled_axes(site):
        divisor = count if padded else np.sum(weight, axis=1)
        taps.append((index, weight / np.maximum(divisor, 1)[:, None]))
    return taps


def _response_taps(site: Site) -> list[Taps]:
    shape, size = source(site, 0).shape, int(site.node.attributes["size"])
    channels = np.arange(shape[1])[:, None] - (size - 1) // 2 + np.arange(size)
    return [straight(n) if axis != 1 else bounded(channels, n) for axis, n in enumerate(shape)]


def _filled(elements: Values, weights: Array) -> Values:
    """Elements in float64 or natively, the lowest value in the padding."""
    x = widen(elements)
    return np.where(weights != 0, x, -np.inf if x.dtype == np.float64 else np.iinfo(x.dtype).min)


def _compare_max(site: Site, claimed: Values, elements: Values, weights: Array) -> float:
    return compare_equal(claimed, np.max(_filled(elements, weights), axis=-1).astype(claimed.dtype))


def _compare_best(claimed: Values, elements: Values, weights: Array, places: Values) -> float:
    """Indices of the maxima, the first of equals."""
    best = np.argmax(_filled(elements, weights), axis=-1)
    return compare_equal(claimed, np.take_along_axis(places, best[..., None], axis=-1)[..., 0])


def _weighed(claimed: Values, elements: Values, weights: Array, doubt: float = 0.0) -> float:
    """A weighted sum; `doubt` is the error of the weights, relative to the largest."""
    x = elements.astype(np.float64)
    terms = np.where(weights != 0, weights * x, 0.0)
    z, u = np.sum(terms, axis=-1), unit(claimed.dtype)
    slack = (accumulation(x.shape[-1]) + 4.0) * u * np.sum(np.abs(terms), axis=-1) + doubt * np.sum(np.abs(x), axis=-1)
    return compare(claimed, z, np.nan_to_num(slack, nan=0.0, posinf=0.0) + second_rounding(z, claimed.dtype))


def _compare_mean(site: Site, claimed: Values, elements: Values, weights: Array) -> float:
    return _weighed(claimed, elements, weights)


def _compare_norm(site: Site, claimed: Values, elements: Values, weights: Array) -> float:
    p = site.node.attributes.get("p", 2)
    z = np.sum(np.where(weights != 0, np.abs(elements.astype(np.float64)), 0.0) ** p, axis=-1) ** (1.0 / p)
    slack = (accumulation(elements.shape[-1]) + 32.0) * unit(claimed.dtype) * z
    return compare(claimed, z, slack + second_rounding(z, claimed.dtype))


def _compare_response(site: Site, claimed: Values, elements: Values, weights: Array) -> float:
    """x / (bias + alpha / size sum of squares) ** beta."""
    attributes, x = site.node.attributes, elements.astype(np.float64)
    size, beta = int(attributes["size"]), attributes.get("beta", 0.75)
    energy = np.sum(np.where(weights != 0, x * x, 0.0), axis=-1)
    base = attributes.get("bias", 1.0) + attributes.get("alpha", 1e-4) / size * energy
    z = x[..., (size - 1) // 2] / base**beta
    slack = (beta * (accumulation(size) + 4.0) + 32.0) * unit(claimed.dtype) * np.abs(z)
    return compare(claimed, z, slack + second_rounding(z, claimed.dtype))


def _compare_resized(site: Site, claimed: Values, elements: Values, weights: Array) -> float:
    if resizing.mode(site) == "nearest":
        return compare_equal(claimed, elements[..., 0])
    if not is_float(claimed.dtype):
        return resizing.compare_integers(claimed, elements, weights)
    return _weighed(claimed, elements, weights, resizing.weight_error(site) * unit(claimed.dtype))


def _column_major(node: Node) -> str | None:
    return "numbers its indices by column (storage_order=1)" if node.attributes.get("storage_order", 0) else None


_RESIZE = Window(taps=resizing.taps, judge=_compare_resized, refuses=resizing.refuses, values=(1, 2, 3))

_TABLE: dict[str, Window] = {
    "MaxPool": Window(taps=_pool_taps, judge=_compare_max, refuses=_column_major, exact=True),
    "AveragePool": Window(taps=_mean_taps, judge=_compare_mean),
    "LpPool": Window(taps=_pool_taps, judge=_compare_norm),
    "LRN": Window(taps=_response_taps, judge=_compare_response),
    "Resize": _RESIZE,
    "Upsample": _RESIZE,
}

OPS: dict[tuple[str, str], Op] = {("", name): window(row) for name, row in _TABLE.items()}
