"""Broadcasting matrix products by rows: which rows of the operands an output row multiplies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.ops.call import RowIds, Site, Tensor, distinct

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Output rows `at` (positions among the asked ones) that multiply rows `x` of the left operand by matrix `w`."""

    at: Ints
    x: Ints  # row of the output matrix; a row of the left operand's matrix, or a column where that is transposed
    left: int  # matrix of the left operand; -1: `x` already counts rows over all its matrices
    right: int


@dataclass(frozen=True)
class Layout:
    """The two operands of a broadcasting product: input positions, shapes with rank >= 2, transposition."""

    left: int
    right: int
    a: tuple[int, ...]
    b: tuple[int, ...]
    transposed_a: bool = False
    transposed_b: bool = False

    @property
    def rows(self) -> int:
        return self.a[-1] if self.transposed_a else self.a[-2]

    def groups(self, rows: RowIds) -> Iterator[Group]:
        """The output rows, by the matrices they need."""
        batch = np.broadcast_shapes(self.a[:-2], self.b[:-2])
        number, i = np.divmod(rows, self.rows)
        left, right = _matrix(self.a[:-2], batch)[number], _matrix(self.b[:-2], batch)[number]
        if not self.transposed_a:
            i, left = left * self.rows + i, np.full_like(left, -1)
        key = left * (prod(self.b[:-2]) + 1) + right
        for value in distinct(key):
            at = np.flatnonzero(key == value)
            yield Group(at, i[at], int(left[at[0]]), int(right[at[0]]))

    def reach(self, rows: RowIds) -> Mapping[int, RowIds]:
        """Rows of both operands that these output rows need."""
        groups = list(self.groups(rows))
        if self.transposed_a:
            left = [_block(group.left, self.a[-2]) for group in groups]
        else:
            left = [group.x for group in groups]
        return {
            self.left: _union(left),
            self.right: _union([_block(group.right, self.b[-2]) for group in groups]),
        }

    def operands(self, group: Group, inputs: tuple[Tensor | None, ...]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """x (rows, k) and w (k, n) of a group."""
        a, b = inputs[self.left], inputs[self.right]
        assert a is not None
        assert b is not None
        x = block(a, group.left, self.a[-2]).T[group.x] if self.transposed_a else a.take(group.x)
        w = block(b, group.right, self.b[-2])
        return x, w.T if self.transposed_b else w


def _matrix(own: tuple[int, ...], batch: tuple[int, ...]) -> Ints:
    """For each matrix of the broadcast batch, the number of the operand's matrix."""
    return np.broadcast_to(np.arange(prod(own)).reshape(own), batch).reshape(-1)


def _union(parts: list[Ints]) -> Ints:
    return distinct(np.concatenate([np.zeros(0, np.int64), *parts]))


def _block(number: int, rows: int) -> Ints:
    return np.arange(number * rows, (number + 1) * rows, dtype=np.int64)


def block(tensor: Tensor, number: int, rows: int) -> npt.NDArray[Any]:
    """Matrix `number` of a tensor of matrices with this many rows, without a copy where they lie together."""
    first = first_row(tensor, number, rows)
    return tensor.data[first : first + rows]


def first_row(tensor: Tensor, number: int, rows: int) -> int:
    """Where the rows of matrix `number` begin among those at hand. Raises KeyError where one was not opened."""
    first = number * rows
    if tensor.index is None:
        return first
    at = int(np.searchsorted(tensor.index, first))
    if not np.array_equal(tensor.index[at : at + rows], np.arange(first, first + rows)):
        raise KeyError("a row that was not opened")
    return at


def layout(site: Site, left: int = 0, right: int = 1) -> Layout:
    """NumPy's matmul rules over inputs `left` and `right`; a transposition is swapped in where `right` is a vector."""
    first, second = site.inputs[left], site.inputs[right]
    assert first is not None
    assert second is not None
    a, b = first.shape, second.shape
    flip_a = bool(site.node.attributes.get("transA", 0)) and len(a) > 1
    flip_b = bool(site.node.attributes.get("transB", 0)) and len(b) > 1
    if len(b) > 1:
        return Layout(left, right, a if len(a) > 1 else (1, *a), b, flip_a, flip_b)
    if len(a) == 1:
        return Layout(left, right, (1, *a), (1, *b), False, True)
    return Layout(right, left, (1, *b), a, False, not flip_a)


def product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a product under NumPy's matmul rules."""
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))
