"""Where the elements of a moved tensor come from: one function an op, from output elements to input elements.

`flat` are flat indices of output elements, shape (rows, width); the answers have the same shape. Names and attributes
are ONNX's, old opsets included. An index in the data that points outside its tensor is Rejected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from gpu.ops.call import Site, Tensor
from gpu.ops.indexing import (
    Index,
    along,
    broadcast_index,
    integers,
    joined,
    known,
    normalize_axis,
    output,
    ravel,
    source,
    unravel,
)
from proof.errors import Malformed, Reason, Rejected

FILL = -1  # source of an element that no input holds
PAD_MODES = ("constant", "reflect", "edge", "wrap")

Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Pull:
    """Origin of output elements: element `flat` of input `source`, or `fill` where source is FILL."""

    source: Index | int
    flat: Index
    fill: npt.ArrayLike = 0

    def of(self, position: int) -> npt.NDArray[np.bool_]:
        """The elements that come from this input."""
        return np.broadcast_to(np.asarray(self.source) == position, self.flat.shape)


Puller = Callable[[Site, int, Inputs, Index], Pull]


def never(site: Site, position: int) -> bool:
    return False


def same_width(site: Site, position: int) -> bool:
    return output(site, position).width == source(site, 0).width


def keeps_last(site: Site, position: int) -> bool:
    order = _permutation(site)
    return bool(order) and order[-1] == len(order) - 1


def off_axis(site: Site, position: int) -> bool:
    rank = len(source(site, 0).shape)
    return normalize_axis(site.node.attributes.get("axis", 0), rank) != rank - 1


def unsliced(site: Site, position: int) -> bool:
    last = len(source(site, 0).shape) - 1
    return same_width(site, position) and all(axis != last or step == 1 for axis, _, step in _slices(site))


def same(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    return Pull(0, flat)


def dropout(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    training = known(site, 2)
    if training is not None and training.reshape(-1)[0]:
        raise Malformed(f"{site.node} is random: it was exported in training mode")
    return Pull(0, flat) if position == 0 else Pull(FILL, flat, fill=1)


def transpose(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    order, spec = _permutation(site), source(site, 0)
    coordinates = unravel(flat, output(site).shape)
    return Pull(0, ravel([coordinates[order.index(axis)] for axis in range(len(order))], spec.shape) + 0 * flat)


def _permutation(site: Site) -> list[int]:
    rank = len(source(site, 0).shape)
    return list(site.node.attributes.get("perm", range(rank)[::-1]))


def slice_(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, coordinates = source(site, 0).shape, unravel(flat, output(site).shape)
    for axis, start, step in _slices(site):
        coordinates[axis] = start + step * coordinates[axis]
    return Pull(0, ravel(coordinates, shape))


def _slices(site: Site) -> list[tuple[int, int, int]]:
    """(axis, first element, step) of every sliced axis."""
    shape = source(site, 0).shape
    starts, ends = integers(site, "starts", 1) or [], integers(site, "ends", 2) or []
    axes = integers(site, "axes", 3)
    axes = list(range(len(starts))) if axes is None else [normalize_axis(axis, len(shape)) for axis in axes]
    steps = integers(site, "steps", 4) or [1] * len(starts)
    return [
        (axis, slice(start, end, step).indices(shape[axis])[0], step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    ]


def split(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    spec = source(site, 0)
    axis = normalize_axis(site.node.attributes.get("axis", 0), len(spec.shape))
    sizes = integers(site, "split", 1)
    if sizes is None:
        parts = site.node.attributes.get("num_outputs", len(site.node.outputs))
        sizes = [-(-spec.shape[axis] // parts)] * parts
    outer, at, inner = along(flat, output(site, position).shape, axis)
    return Pull(0, joined(outer, at + sum(sizes[:position]), inner, spec.shape, axis))


def concat(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    axis = normalize_axis(site.node.attributes.get("axis", 1), len(output(site).shape))
    outer, at, inner = along(flat, output(site).shape, axis)
    sizes = np.array([source(site, i).shape[axis] for i in range(len(site.inputs))], np.int64)
    ends = np.cumsum(sizes)
    which = np.searchsorted(ends, at, side="right").astype(np.int64)
    stride = prod(output(site).shape[axis + 1 :])
    return Pull(which, (outer * sizes[which] + at - (ends - sizes)[which]) * stride + inner)


def expand(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    return Pull(0, broadcast_index(flat, output(site).shape, source(site, 0).shape))


def tile(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape = source(site, 0).shape
    coordinates = [at % max(size, 1) for at, size in zip(unravel(flat, output(site).shape), shape, strict=True)]
    return Pull(0, ravel(coordinates, shape) + 0 * flat)


def _read(inputs: Inputs, position: int, flat: Index) -> Index:
    """Elements of a steering input as integers."""
    tensor = inputs[position]
    if tensor is None:
        raise ValueError(f"steering input {position} is not at hand")
    return tensor.elements(flat).astype(np.int64)


def _read_all(inputs: Inputs, position: int) -> Index:
    tensor = inputs[position]
    if tensor is None:
        raise ValueError(f"steering input {position} is not at hand")
    return tensor.whole().astype(np.int64)


def _inside(index: Index, size: int | Index) -> Index:
    """Indices counted from the end made positive. Raises Rejected for one outside."""
    wrapped = np.where(index < 0, index + size, index)
    if ((wrapped < 0) | (wrapped >= size)).any():
        raise Rejected(Reason.REEXECUTION, f"an index lies outside an axis of {size} elements")
    return wrapped


def _gathered(site: Site, flat: Index) -> tuple[int, Index, Index, Index]:
    """The axis, and each element as (outer, element of the indices, inner)."""
    shape = source(site, 0).shape
    axis = normalize_axis(site.node.attributes.get("axis", 0), len(shape))
    rest, inner = np.divmod(flat, max(prod(shape[axis + 1 :]), 1))
    outer, choice = np.divmod(rest, max(source(site, 1).size, 1))
    return axis, outer, choice, inner


def gather_steering(site: Site, flat: Index) -> Index:
    return _gathered(site, flat)[2]


def gather(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    axis, outer, choice, inner = _gathered(site, flat)
    shape = source(site, 0).shape
    return Pull(0, joined(outer, _inside(_read(inputs, 1, choice), shape[axis]), inner, shape, axis))


def as_output(site: Site, flat: Index) -> Index:
    return flat


def gather_elements(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, coordinates = source(site, 0).shape, unravel(flat, output(site).shape)
    axis = normalize_axis(site.node.attributes.get("axis", 0), len(shape))
    coordinates[axis] = _inside(_read(inputs, 1, flat), shape[axis])
    return Pull(0, ravel(coordinates, shape))


def gather_nd_steering(site: Site, flat: Index) -> Index:
    depth = source(site, 1).width
    tail = prod(source(site, 0).shape[site.node.attributes.get("batch_dims", 0) + depth :])
    return (flat // max(tail, 1))[..., None] * depth + np.arange(depth)


def gather_nd(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, batch = source(site, 0).shape, site.node.attributes.get("batch_dims", 0)
    chosen = _read(inputs, 1, gather_nd_steering(site, flat))
    depth = chosen.shape[-1]
    tail = prod(shape[batch + depth :])
    choice, inner = np.divmod(flat, max(tail, 1))
    lead = unravel(choice, source(site, 1).shape[:-1])[:batch]
    picked = [_inside(chosen[..., i], shape[batch + i]) for i in range(depth)]
    return Pull(0, ravel([*lead, *picked], shape[: batch + depth]) * tail + inner)


def scatter_elements(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    spec, updates = source(site, 0), source(site, 2)
    axis = normalize_axis(site.node.attributes.get("axis", 0), len(spec.shape))
    coordinates = unravel(np.arange(updates.size), updates.shape)
    coordinates[axis] = _inside(_read_all(inputs, 1).reshape(-1), spec.shape[axis])
    return _overwritten(ravel(coordinates, spec.shape), spec.size, 1, flat)


def scatter_nd(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, depth = source(site, 0).shape, source(site, 1).width
    index = _read_all(inputs, 1).reshape(-1, depth)
    places = ravel([_inside(index[:, i], shape[i]) for i in range(depth)], shape[:depth])
    return _overwritten(places, prod(shape[:depth]), prod(shape[depth:]), flat)


def _overwritten(places: Index, count: int, tail: int, flat: Index) -> Pull:
    """Update u replaces the `tail` elements at place places[u] of `count`; of two for one place the last stays."""
    update = np.full(count, FILL)
    update[places] = np.arange(places.size)
    place, inner = np.divmod(flat, max(tail, 1))
    chosen = update[place]
    return Pull(np.where(chosen < 0, 0, 2), np.where(chosen < 0, flat, chosen * tail + inner))


def pad(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, before = source(site, 0).shape, _pads(site)
    mode = site.node.attributes.get("mode", "constant")
    coordinates = [at - pad for at, pad in zip(unravel(flat, output(site).shape), before, strict=True)]
    outside = np.zeros(flat.shape, np.bool_)
    for axis, size in enumerate(shape):
        outside |= (coordinates[axis] < 0) | (coordinates[axis] >= size)
        coordinates[axis] = _folded(coordinates[axis], size, mode)
    inner = ravel(coordinates, shape) + 0 * flat
    if mode != "constant":
        return Pull(0, inner)
    if len(site.inputs) > 2 and site.inputs[2] is not None:
        return Pull(np.where(outside, 2, 0), np.where(outside, 0, inner))
    return Pull(np.where(outside, FILL, 0), inner, fill=site.node.attributes.get("value", 0))


def _pads(site: Site) -> list[int]:
    """Elements put before each axis."""
    rank = len(source(site, 0).shape)
    pads = integers(site, "pads", 1) or list(site.node.attributes.get("paddings", ()))
    axes = integers(site, "axes", 3)
    before = [0] * rank
    for i, axis in enumerate(range(rank) if axes is None else axes):
        before[normalize_axis(axis, rank)] = pads[i]
    return before


def _folded(at: Index, size: int, mode: str) -> Index:
    if mode == "wrap":
        return at % max(size, 1)
    if mode == "reflect" and size > 1:
        at = np.abs(at) % (2 * size - 2)
        return np.minimum(at, 2 * size - 2 - at)
    return np.clip(at, 0, max(size - 1, 0))


def center_crop_pad(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, wanted = source(site, 0).shape, output(site).shape
    coordinates, outside = unravel(flat, wanted), np.zeros(flat.shape, np.bool_)
    for axis, (size, target) in enumerate(zip(shape, wanted, strict=True)):
        shift = (size - target) // 2 if size > target else -((target - size) // 2)
        moved = coordinates[axis] + shift
        outside |= (moved < 0) | (moved >= size)
        coordinates[axis] = np.clip(moved, 0, max(size - 1, 0))
    return Pull(np.where(outside, FILL, 0), ravel(coordinates, shape) + 0 * flat)


def depth_to_space(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, b = source(site, 0).shape, int(site.node.attributes["blocksize"])
    n, c, y, x = unravel(flat, output(site).shape)
    cell, channels = (y % b) * b + x % b, shape[1] // (b * b)
    column_first = site.node.attributes.get("mode", "DCR") == "CRD"
    depth = c * b * b + cell if column_first else cell * channels + c
    return Pull(0, ravel([n, depth, y // b, x // b], shape))


def space_to_depth(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, b = source(site, 0).shape, int(site.node.attributes["blocksize"])
    n, depth, y, x = unravel(flat, output(site).shape)
    column_first = site.node.attributes.get("mode", "DCR") == "CRD"
    cell, c = (depth % (b * b), depth // (b * b)) if column_first else (depth // shape[1], depth % shape[1])
    return Pull(0, ravel([n, c, y * b + cell // b, x * b + cell % b], shape))


def reverse_sequence(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape, coordinates = source(site, 0).shape, unravel(flat, output(site).shape)
    time, batch = site.node.attributes.get("time_axis", 0), site.node.attributes.get("batch_axis", 1)
    lengths = _read_all(inputs, 1)[coordinates[batch]]
    if (lengths > shape[time]).any():
        raise Rejected(Reason.REEXECUTION, f"a sequence length is above {shape[time]}")
    at = coordinates[time]
    coordinates[time] = np.where(at < lengths, lengths - 1 - at, at)
    return Pull(0, ravel(coordinates, shape))


def trilu(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    *_, row, column = unravel(flat, output(site).shape)
    k = int(_read_all(inputs, 1).reshape(-1)[0]) if len(inputs) > 1 and inputs[1] is not None else 0
    kept = column - row >= k if site.node.attributes.get("upper", 1) else column - row <= k
    return Pull(np.where(kept, 0, FILL), flat)


def _hot(site: Site, flat: Index) -> tuple[Index, Index]:
    """Each element as (element of the indices, position on the new axis)."""
    shape = output(site).shape
    axis = normalize_axis(site.node.attributes.get("axis", -1), len(shape))
    outer, at, inner = along(flat, shape, axis)
    return outer * prod(shape[axis + 1 :]) + inner, at


def one_hot_steering(site: Site, flat: Index) -> Index:
    return _hot(site, flat)[0]


def one_hot(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    shape = output(site).shape
    depth = shape[normalize_axis(site.node.attributes.get("axis", -1), len(shape))]
    choice, at = _hot(site, flat)
    index = _read(inputs, 0, choice)
    return Pull(2, (np.where(index < 0, index + depth, index) == at).astype(np.int64))


def compress(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    kept, spec, axis = np.flatnonzero(np.asarray(known(site, 1))), source(site, 0), site.node.attributes.get("axis")
    if axis is None:
        return Pull(0, kept[flat])
    axis = normalize_axis(axis, len(spec.shape))
    outer, at, inner = along(flat, output(site).shape, axis)
    return Pull(0, joined(outer, kept[at], inner, spec.shape, axis))


def non_zero(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    places = np.nonzero(np.asarray(known(site, 0)))
    return Pull(FILL, flat, fill=np.stack(places).reshape(-1)[flat])


def shape(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    start, end = site.node.attributes.get("start", 0), site.node.attributes.get("end")
    return Pull(FILL, flat, fill=np.array(source(site, 0).shape[start:end], np.int64)[flat])


def size(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    return Pull(FILL, flat, fill=source(site, 0).size)


def constant(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    (value,) = (value for name, value in site.node.attributes.items() if name.startswith("value"))
    return Pull(FILL, flat, fill=np.asarray(value).reshape(-1)[flat])


def constant_of_shape(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    return Pull(FILL, flat, fill=np.asarray(site.node.attributes.get("value", 0.0)).reshape(-1)[0])


def eye_like(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    row, column = unravel(flat, output(site).shape)
    return Pull(FILL, flat, fill=column - row == site.node.attributes.get("k", 0))


def range_(site: Site, position: int, inputs: Inputs, flat: Index) -> Pull:
    start, _, delta = (np.asarray(known(site, i)).reshape(-1)[0] for i in range(3))
    return Pull(FILL, flat, fill=start + flat.astype(start.dtype) * delta)
