"""Lanes: the groups of elements that a row-wise op reduces together, along any axes of a tensor.

A frame is one setting of the leading axes that are kept; it has R rows, the settings of the leading axes that are
reduced. Its lanes are the columns of those rows, or all their elements when the last axis is reduced too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from gpu.ops.call import RowIds, Tensor
from gpu.ops.indexing import Index, Shape, blocks, ravel, unravel
from gpu.rounding import Values


@dataclass(frozen=True)
class Lanes:
    """The lanes of a tensor of `shape` (rank at least 1) along `axes` (not negative)."""

    shape: Shape
    axes: tuple[int, ...]

    @property
    def last(self) -> bool:
        """Whether lanes run along rows."""
        return len(self.shape) - 1 in self.axes

    @property
    def length(self) -> int:
        """Elements of a lane."""
        return prod(self.shape[axis] for axis in self.axes)

    @property
    def cost(self) -> int:
        """Elements of a frame."""
        return self.shape[-1] * prod(self.shape[axis] for axis in self.axes if axis < len(self.shape) - 1)

    def rows(self, frames: RowIds) -> RowIds:
        """Row numbers of frames, shape (len(frames), R)."""
        lead = self.shape[:-1]
        kept = [axis for axis in range(len(lead)) if axis not in self.axes]
        reduced = [axis for axis in range(len(lead)) if axis in self.axes]
        first = self._row(frames, kept)
        offsets = self._row(np.arange(prod(lead[axis] for axis in reduced)), reduced)
        return first[:, None] + offsets

    def _row(self, flat: Index, axes: list[int]) -> Index:
        """The row at these coordinates of some leading axes, the others 0."""
        lead = self.shape[:-1]
        coordinates = [np.zeros_like(flat)] * len(lead)
        for axis, at in zip(axes, unravel(flat, tuple(lead[axis] for axis in axes)), strict=True):
            coordinates[axis] = at
        return ravel(coordinates, lead) + np.zeros_like(flat)

    def place(self, rows: RowIds) -> tuple[RowIds, RowIds]:
        """Each row as (frame, position in the frame)."""
        lead = self.shape[:-1]
        coordinates = unravel(rows, lead)
        kept = [axis for axis in range(len(lead)) if axis not in self.axes]
        reduced = [axis for axis in range(len(lead)) if axis in self.axes]

        def at(axes: list[int]) -> RowIds:
            return ravel([coordinates[axis] for axis in axes], tuple(lead[axis] for axis in axes)) + np.zeros_like(rows)

        return at(kept), at(reduced)

    def group(self, rows: RowIds) -> Iterator[tuple[RowIds, Index, Index, Index]]:
        """Rows by the frames they belong to, in blocks of frames.

        Gives frames; which of `rows` belong to them; and for each of those its frame, counted from 0, and place in it.
        """
        frame, at = self.place(rows)
        frames, inverse = np.unique(frame, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        for part in blocks(frames, self.cost):
            first, last = np.searchsorted(inverse[order], (part.start, part.stop))
            chosen = order[first:last]
            yield frames[part], chosen, inverse[chosen] - part.start, at[chosen]

    def take(self, tensor: Tensor, frames: RowIds) -> Values:
        """The lanes of frames, shape (len(frames), lanes a frame, length)."""
        rows = self.rows(frames)
        values = tensor.take(rows.reshape(-1)).reshape(*rows.shape, self.shape[-1])
        return values.reshape(len(frames), 1, -1) if self.last else np.moveaxis(values, 1, 2)

    def spread(self, values: Values) -> Values:
        """From lanes back to rows: (frames, lanes a frame, length) to (frames, R, width)."""
        if self.last:
            return values.reshape(len(values), -1, self.shape[-1])
        return np.moveaxis(values, 2, 1)
