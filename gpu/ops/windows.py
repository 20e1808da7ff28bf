"""Windows: the taps of the input that one output element weighs, axis by axis (pooling, resizing, LRN).

An axis of n output positions and T taps has an index and a weight for each, of shape (n, T); the weight of a tap in the
padding is 0. Taps of the leading axes choose rows, those of the last axis columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu.ops.call import RowIds, Tensor, distinct
from gpu.ops.indexing import Index, Shape, unravel
from gpu.rounding import Array, Values

Taps = tuple[Index, Array]


def straight(size: int) -> Taps:
    """Every position is its own only tap."""
    return np.arange(size, dtype=np.int64)[:, None], np.ones((size, 1))


def bounded(index: Index, size: int) -> Taps:
    """Taps that count where they lie inside an axis of `size` elements."""
    inside = (index >= 0) & (index < size)
    return np.clip(index, 0, max(size - 1, 0)), inside.astype(np.float64)


@dataclass(frozen=True)
class Windows:
    """Windows over a tensor of `shape` (rank at least 1), with the taps of every axis."""

    shape: Shape
    taps: Sequence[Taps]

    @property
    def cost(self) -> int:
        """Elements weighed for an output row."""
        return int(np.prod([index.shape[1] for index, _ in self.taps])) * len(self.taps[-1][0])

    def rows(self, rows: RowIds) -> tuple[Index, Array]:
        """Input rows behind output rows and their weights, shape (len(rows), R)."""
        found, weights = np.zeros((len(rows), 1), np.int64), np.ones((len(rows), 1))
        places = unravel(rows, tuple(len(index) for index, _ in self.taps[:-1]))
        for at, size, (index, weight) in zip(places, self.shape[:-1], self.taps[:-1], strict=True):
            shape = len(rows), found.shape[1] * index.shape[1]
            found = (found[:, :, None] * size + index[at][:, None, :]).reshape(shape)
            weights = (weights[:, :, None] * weight[at][:, None, :]).reshape(shape)
        return found, weights

    def needed(self, rows: RowIds) -> RowIds:
        found, weights = self.rows(rows)
        return distinct(found[weights != 0])

    def take(self, tensor: Tensor, rows: RowIds) -> tuple[Values, Array]:
        """Elements and weights of the windows of output rows, shape (len(rows), output width, taps)."""
        found, weights = self.rows(rows)
        values = np.zeros((*found.shape, self.shape[-1]), tensor.data.dtype)
        values[weights != 0] = tensor.take(found[weights != 0])
        columns, column_weights = self.taps[-1]
        count = len(rows), len(columns), -1
        elements = np.moveaxis(values[:, :, columns], 1, 2).reshape(count)
        together = weights[:, None, :, None] * column_weights[None, :, None, :]
        return elements, together.reshape(count)

    def places(self, rows: RowIds) -> Index:
        """Flat input indices of the same windows."""
        found, _ = self.rows(rows)
        columns = self.taps[-1][0]
        flat = found[:, None, :, None] * self.shape[-1] + columns[None, :, None, :]
        return flat.reshape(len(rows), len(columns), -1)
