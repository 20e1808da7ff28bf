"""Index arithmetic shared by the op families.

Elements of a tensor are numbered in C order; row r of width c holds the elements r c … r c + c - 1.
Work is cut into blocks of rows, so that a fully opened tensor never needs several copies of itself.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from gpu.ops.call import Call, Measure, RowIds, Site, Tensor
from gpu.rounding import Values, is_float
from proof.graph import Node, Spec

Index = npt.NDArray[np.int64]
Shape = tuple[int, ...]

BLOCK = 1 << 20  # elements worked on at a time


def blocks(rows: RowIds, elements_per_row: int) -> Iterator[slice]:
    """Cut rows into slices of about BLOCK elements, one row at least."""
    step = max(1, BLOCK // max(elements_per_row, 1))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def elements_of(rows: RowIds, spec: Spec) -> Index:
    """Flat indices of the elements of these rows, shape (len(rows), width)."""
    return rows[:, None] * spec.width + np.arange(spec.width, dtype=np.int64)


def unravel(flat: Index, shape: Shape) -> list[Index]:
    """Coordinates of flat indices, one array an axis."""
    coordinates: list[Index] = []
    for size in reversed(shape):
        flat, at = np.divmod(flat, max(size, 1))
        coordinates.append(at)
    return coordinates[::-1]


def ravel(coordinates: Sequence[Index], shape: Shape) -> Index:
    """Flat indices of coordinates; the coordinates broadcast against each other."""
    flat: Index = np.zeros((), np.int64)
    for at, size in zip(coordinates, shape, strict=True):
        flat = flat * size + at
    return flat


def broadcast_index(flat: Index, out: Shape, shape: Shape) -> Index:
    """The element of a tensor of `shape` that broadcasting to `out` puts at these elements of `out`."""
    if shape == out:
        return flat
    shape = (1,) * (len(out) - len(shape)) + shape
    kept = [at if size != 1 else np.zeros_like(at) for at, size in zip(unravel(flat, out), shape, strict=True)]
    return ravel(kept, shape) + np.zeros_like(flat)


def normalize_axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def along(flat: Index, shape: Shape, axis: int) -> tuple[Index, Index, Index]:
    """Each flat index as (outer, position on the axis, inner)."""
    rest, inner = np.divmod(flat, max(prod(shape[axis + 1 :]), 1))
    outer, at = np.divmod(rest, max(shape[axis], 1))
    return outer, at, inner


def joined(outer: Index, at: Index, inner: Index, shape: Shape, axis: int) -> Index:
    """The inverse of `along`."""
    return (outer * shape[axis] + at) * prod(shape[axis + 1 :]) + inner


def widen(values: Values) -> Values:
    """Floats as float64; integers and booleans as they are."""
    return values.astype(np.float64) if is_float(values.dtype) else values


def absent(site: Site, position: int) -> bool:
    return position >= len(site.inputs) or site.inputs[position] is None


def source(site: Site, position: int) -> Spec:
    """Spec of an input that is there."""
    spec = site.inputs[position]
    if spec is None:
        raise ValueError(f"{site.node} has no input {position}")
    return spec


def output(site: Site, position: int = 0) -> Spec:
    """Spec of an output that is there."""
    spec = site.outputs[position]
    if spec is None:
        raise ValueError(f"{site.node} has no output {position}")
    return spec


def known(site: Site, position: int) -> Values | None:
    return None if absent(site, position) else site.known[position]


def known_tensor(site: Site, position: int) -> Tensor | None:
    """Input `position` where its value follows from model and shapes."""
    value = known(site, position)
    if value is None:
        return None
    spec = source(site, position)
    return Tensor(spec, value.reshape(spec.rows, spec.width))


def unknown(site: Site) -> list[tuple[int, Spec]]:
    """Inputs whose rows have to be opened."""
    return [
        (position, spec)
        for position, spec in enumerate(site.inputs)
        if spec is not None and site.known[position] is None
    ]


def integers(site: Site, name: str, position: int) -> list[int] | None:
    """A list that older opsets take from an attribute and newer ones from an input; None where it is in neither."""
    value = known(site, position) if name not in site.node.attributes else site.node.attributes[name]
    return None if value is None else [int(item) for item in np.asarray(value).reshape(-1)]


def accepts(node: Node) -> str | None:
    """For ops of which every form can be checked."""
    return None


def measured(call: Call, compare_block: Callable[[int, RowIds, Values], float], cost: Callable[[int], int]) -> Measure:
    """Check every output block by block: `compare_block(position, rows, claimed)`, `cost(position)` elements a row."""
    entries, ratio = 0, 0.0
    for position, spec in enumerate(call.site.outputs):
        if spec is None:
            continue
        rows, claimed = call.rows[position], call.claimed[position]
        for part in blocks(rows, cost(position)) if claimed.size else ():
            ratio = max(ratio, compare_block(position, rows[part], claimed[part]))
        entries += claimed.size
    return Measure(entries, ratio)
