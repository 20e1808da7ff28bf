"""Convolutions as matrix products: kernels (channels, k) times patches (k, positions), k = channel and tap.

An output row is one batch entry, one channel and one position on every spatial axis but the last. Rows of one
batch entry and group share patches; where their channels and positions form a grid they are one product.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.freivalds import WIDEST_FOLD, Product, check, check_integers, exact_product
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, Tensor, distinct, every_row
from gpu.ops.requantisation import compare_requantised
from gpu.rounding import Array

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Output rows `at` (positions among the asked ones): every channel with every position, channels first."""

    at: Ints
    batch: int
    group: int
    channels: Ints
    positions: Ints  # on all spatial axes but the last, flattened


@dataclass(frozen=True)
class Geometry:
    """What of a convolution decides which input elements meet which taps."""

    source: tuple[int, ...]  # N, C, spatial
    target: tuple[int, ...]  # N, M, spatial
    groups: int
    taps: tuple[Ints, ...]  # per spatial axis (output coordinate, tap) -> input coordinate, -1 outside
    transposed: bool

    @property
    def channels_in(self) -> int:
        return self.source[1] // self.groups

    @property
    def channels_out(self) -> int:
        return self.target[1] // self.groups

    @cached_property
    def above(self) -> int:
        """Positions on all spatial axes but the last: rows a channel has."""
        return prod(self.target[2:-1])

    def grids(self, rows: RowIds) -> Iterator[Grid]:
        channel, position = np.divmod(rows, self.above)
        batch, channel = np.divmod(channel, self.target[1])
        block = batch * self.groups + channel // self.channels_out
        for value in distinct(block):
            yield from self._split(np.flatnonzero(block == value), channel, position, int(value))

    def _split(self, at: Ints, channel: Ints, position: Ints, block: int) -> Iterator[Grid]:
        batch, group = divmod(block, self.groups)
        channels, positions = distinct(channel[at]), distinct(position[at])
        if len(at) == len(channels) * len(positions):
            table = at.reshape(len(channels), len(positions))
            step = max(1, WIDEST_FOLD // max(1, self.target[-1]))
            for start in range(0, len(positions), step):
                part = slice(start, start + step)
                yield Grid(table[:, part].reshape(-1), batch, group, channels, positions[part])
            return
        for value in positions:
            here = at[position[at] == value]
            yield Grid(here, batch, group, channel[here], np.array([value]))

    def source_rows(self, grid: Grid) -> Ints:
        """(positions, channels, taps above the last axis) -> input row, -1 outside."""
        inside, offset = np.ones((len(grid.positions), 1), np.bool_), np.zeros((len(grid.positions), 1), np.int64)
        coordinates = np.unravel_index(grid.positions, self.target[2:-1]) if self.target[2:-1] else ()
        for coordinate, taps, size in zip(coordinates, self.taps, self.source[2:], strict=False):
            step = taps[coordinate][:, None, :]
            inside = (inside[:, :, None] & (step >= 0)).reshape(len(offset), -1)
            offset = (offset[:, :, None] * size + step).reshape(len(offset), -1)
        first = grid.batch * self.source[1] + grid.group * self.channels_in
        channels = first + np.arange(self.channels_in)
        rows = channels[None, :, None] * prod(self.source[2:-1]) + offset[:, None, :]
        return np.where(inside[:, None, :], rows, -1)

    def patches(self, grid: Grid, x: Tensor, fill: int = 0) -> npt.NDArray[Any]:
        """(k, positions * last axis), outside elements `fill`."""
        rows = self.source_rows(grid)
        values = np.full((*rows.shape, x.spec.width + 1), fill, x.data.dtype)
        values[rows >= 0, :-1] = x.take(rows[rows >= 0])
        gathered = values[..., self.taps[-1]]  # positions, channels, taps above, last output axis, last taps
        return np.ascontiguousarray(gathered.transpose(1, 2, 4, 0, 3)).reshape(self.k, -1)

    @property
    def k(self) -> int:
        return int(self.channels_in * prod(taps.shape[1] for taps in self.taps))

    def kernel_rows(self, grid: Grid) -> Ints:
        """(channels of the grid, rows of the kernel tensor that make up one channel's kernel)."""
        above = prod(taps.shape[1] for taps in self.taps[:-1])
        if not self.transposed:
            straight: Ints = grid.channels[:, None] * self.channels_in * above + np.arange(self.channels_in * above)
            return straight
        inner = grid.channels - grid.group * self.channels_out
        outer = grid.group * self.channels_in + np.arange(self.channels_in)
        first = (outer[None, :] * self.channels_out + inner[:, None]) * above
        rows: Ints = (first[:, :, None] + np.arange(above)).reshape(len(inner), -1)
        return rows

    def kernels(self, grid: Grid, w: Tensor) -> npt.NDArray[Any]:
        """(channels of the grid, k)."""
        rows = self.kernel_rows(grid)
        return w.take(rows.reshape(-1)).reshape(len(rows), -1)


def geometry(site: Site, weights: int = 1) -> Geometry:
    """Taps from attributes (Conv-22, ConvTranspose-22); output shape as inferred."""
    x, w, y = site.inputs[0], site.inputs[weights], site.outputs[0]
    assert x is not None
    assert w is not None
    assert y is not None
    transposed = site.node.op == "ConvTranspose"
    axes = len(x.shape) - 2
    strides = site.node.attributes.get("strides", (1,) * axes)
    dilations = site.node.attributes.get("dilations", (1,) * axes)
    taps = []
    for axis in range(axes):
        size, out, width = x.shape[2 + axis], y.shape[2 + axis], w.shape[2 + axis]
        stride, reach = strides[axis], (width - 1) * dilations[axis] + 1
        offset = np.arange(width) * dilations[axis]
        if transposed:
            total = stride * (size - 1) + reach + _at(site, "output_padding", axis) - out
            begin = _begin(site, axis, max(total, 0))
            place, remainder = np.divmod(np.arange(out)[:, None] + begin - offset, stride)
            place = np.where(remainder == 0, place, -1)
        else:
            begin = _begin(site, axis, max((out - 1) * stride + reach - size, 0))
            place = np.arange(out)[:, None] * stride + offset - begin
        taps.append(np.where((place >= 0) & (place < size), place, -1))
    return Geometry(x.shape, y.shape, int(site.node.attributes.get("group", 1)), tuple(taps), transposed)


def _at(site: Site, name: str, axis: int) -> int:
    values = site.node.attributes.get(name)
    return values[axis] if values else 0


def _begin(site: Site, axis: int, total: int) -> int:
    """Padding before the axis, of `total` where it follows from the output's size."""
    auto = site.node.attributes.get("auto_pad", "NOTSET")
    if auto == "SAME_UPPER":
        return total // 2
    if auto == "SAME_LOWER" or (auto == "NOTSET" and site.node.attributes.get("output_shape")):
        return total - total // 2
    return _at(site, "pads", axis) if auto == "NOTSET" else 0


def _reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    weights = 3 if site.node.op == "QLinearConv" else 1
    form = geometry(site, weights)
    grids = list(form.grids(rows))
    needed = {i: every_row(spec) for i, spec in enumerate(site.inputs) if spec is not None}
    needed[0] = _union([form.source_rows(grid) for grid in grids])
    needed[weights] = _union([form.kernel_rows(grid) for grid in grids])
    return needed


def _union(parts: list[Ints]) -> RowIds:
    rows = distinct(np.concatenate([np.zeros(0, np.int64), *(part.reshape(-1) for part in parts)]))
    return rows[rows >= 0]


def _check(call: Call) -> Measure:
    form, claimed, worst = geometry(call.site), call.claimed[0], 0.0
    x, w, bias = _tensor(call, 0), _tensor(call, 1), _optional(call, 2)
    for grid in form.grids(call.rows[0]):
        added = 0.0 if bias is None else bias.whole()[grid.channels].astype(np.float64)[:, None]
        y = claimed[grid.at].reshape(len(grid.channels), -1)
        label = f"{grid.batch}/{grid.group}/{grid.positions[0]}"
        product = Product(form.kernels(grid, w), form.patches(grid, x), y, added, label=label)
        worst = max(worst, check(product, call.policy, call.draw, len(claimed) * form.above))
    return Measure(claimed.size, worst)


def _check_integer(call: Call) -> Measure:
    """ConvInteger(x, w, x_zero_point, w_zero_point)."""
    form, claimed = geometry(call.site), call.claimed[0]
    x, w = _tensor(call, 0), _tensor(call, 1)
    for grid in form.grids(call.rows[0]):
        kernels, patches, zeros = _integer_product(call, form, grid, (x, w), (2, 3))
        y = claimed[grid.at].reshape(len(grid.channels), -1)
        label = f"{grid.batch}/{grid.group}/{grid.positions[0]}"
        check_integers(kernels, patches, y, zeros, call.policy, call.draw, label)
    return Measure(claimed.size)


def _check_quantised(call: Call) -> Measure:
    """QLinearConv(x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point, B)."""
    form, claimed = geometry(call.site, 3), call.claimed[0]
    x, w, bias = _tensor(call, 0), _tensor(call, 3), _optional(call, 8)
    for grid in form.grids(call.rows[0]):
        product = exact_product(*_integer_product(call, form, grid, (x, w), (2, 5)))
        if bias is not None:
            product = product + bias.whole()[grid.channels].astype(np.int64)[:, None]
        scale = _scalar(call, 1) * _per_channel(call, 4, grid).astype(np.float64) / _scalar(call, 6)
        y = claimed[grid.at].reshape(len(grid.channels), -1)
        compare_requantised(y, product, scale, _tensor(call, 7).whole().reshape(1, 1))
    return Measure(claimed.size)


def _integer_product(
    call: Call, form: Geometry, grid: Grid, tensors: tuple[Tensor, Tensor], zeros: tuple[int, int]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], tuple[Ints, Ints]]:
    """Kernels, patches and their zero points; outside elements are the input's zero point, which counts as zero."""
    x_zero, w_zero = _optional(call, zeros[0]), _per_channel(call, zeros[1], grid).astype(np.int64)
    zero = 0 if x_zero is None else int(x_zero.whole().reshape(()))
    patches = form.patches(grid, tensors[0], zero)
    return form.kernels(grid, tensors[1]), patches, (w_zero, np.full((1, 1), zero))


def _tensor(call: Call, position: int) -> Tensor:
    tensor = call.inputs[position]
    assert tensor is not None
    return tensor


def _optional(call: Call, position: int) -> Tensor | None:
    return call.inputs[position] if position < len(call.inputs) else None


def _scalar(call: Call, position: int) -> float:
    return float(_tensor(call, position).whole().reshape(()))


def _per_channel(call: Call, position: int, grid: Grid) -> Array:
    """A scale or zero point of the kernels, (channels or 1, 1); an absent one is 0."""
    tensor = _optional(call, position)
    if tensor is None:
        return np.zeros((1, 1))
    flat = tensor.whole().reshape(-1)
    return flat.reshape(1, 1) if flat.size == 1 else flat[grid.channels][:, None]


def _op(check: Any) -> Op:
    return Op(family=Family.CONTRACTION, reach=_reach, check=check)


OPS: dict[tuple[str, str], Op] = {
    ("", "Conv"): _op(_check),
    ("", "ConvTranspose"): _op(_check),
    ("", "ConvInteger"): _op(_check_integer),
    ("", "QLinearConv"): _op(_check_quantised),
}
