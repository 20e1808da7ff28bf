"""What one node's check is given, and what a registry row is.

Rows of a tensor of shape (..., c) are numbered in C order; `RowIds` are sorted unique int64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpu.rounding import Interval
from proof.graph import Node, Spec
from proof.policy import Policy
from proof.sampling import Draw

if TYPE_CHECKING:
    from gpu.clearing.stand import Stand

RowIds = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class Family(StrEnum):
    MOVEMENT = "movement"
    POINTWISE = "pointwise"
    ROWWISE = "rowwise"
    CONTRACTION = "contraction"
    ATTENTION = "attention"
    DECODING = "decoding"


@dataclass(frozen=True)
class Tensor:
    """The part of a tensor that is at hand: `data[i]` is row `index[i]`; `index` None means every row."""

    spec: Spec
    data: Array  # (len(index), width)
    index: RowIds | None = None

    def take(self, rows: RowIds) -> Array:
        """Rows by number, any order, repeats allowed; shape (len(rows), width).

        A row that was not opened is a bug in `reach`: KeyError, never a verdict.
        """
        return self.data[self.places(rows)]

    def places(self, rows: RowIds) -> RowIds:
        """Where rows lie in `data`. Raises KeyError as `take` does."""
        if self.index is None:
            return rows
        at = np.searchsorted(self.index, rows)
        at = np.minimum(at, max(len(self.index) - 1, 0))
        if len(rows) and (not len(self.index) or (self.index[at] != rows).any()):
            raise KeyError("a row that was not opened")
        return at

    def elements(self, flat: npt.NDArray[np.int64]) -> Array:
        """Elements by flat C-order index, in the shape of `flat`."""
        if self.index is None:
            return self.data.reshape(-1)[flat]
        row, column = np.divmod(flat, self.spec.width)
        rows, inverse = np.unique(row, return_inverse=True)
        return self.take(rows)[inverse.reshape(row.shape), column]

    def whole(self) -> Array:
        """The full array in its own shape; every row must be at hand."""
        if self.index is None:
            return self.data.reshape(self.spec.shape)
        return self.take(np.arange(self.spec.rows)).reshape(self.spec.shape)


@dataclass(frozen=True)
class Site:
    """One node in a concrete run: specs of its tensors, and values known from model and shapes."""

    node: Node
    inputs: tuple[Spec | None, ...]  # None: optional input that is absent
    outputs: tuple[Spec | None, ...]
    known: tuple[Array | None, ...]  # per input: its value where the model and the shapes determine it

    def attribute(self, name: str, default: object = None) -> object:
        return self.node.attributes.get(name, default)


@dataclass(frozen=True)
class Measure:
    """What a check covered: claimed entries (every one of them, or `verify` stops), and the largest
    |claimed - exact| / radius seen. Rows under a fold count with all their entries. `determined`: entries whose bits
    a rounding profile left no choice. `ambiguous`: tokens that another choice of equal standing could replace."""

    entries: int
    ratio: float = 0.0
    determined: int = 0
    ambiguous: int = 0


@dataclass(frozen=True)
class Call:
    """One check: the node, what is at hand of its inputs, and per output the rows to check as they are committed."""

    site: Site
    inputs: tuple[Tensor | None, ...]
    rows: tuple[RowIds, ...]  # per output (empty for an absent optional output)
    claimed: tuple[Array, ...]  # per output (len(rows), width), in the committed dtype
    policy: Policy
    draw: Draw  # randomness of this node, unknown to the prover when it committed
    outputs: tuple[Tensor | None, ...] = ()  # what is opened of each output, checked or not


Reach = Callable[[Site, int, RowIds], Mapping[int, RowIds]]
"""(site, output position, rows of that output) -> rows needed per input position; known inputs need not be named."""

Sample = Callable[[Site, Policy, bytes], RowIds]
"""(site, policy, challenge seed) -> rows of output 0 that are checked."""

Infer = Callable[[Node, tuple[Spec | None, ...]], tuple[Spec, ...]]


@dataclass(frozen=True, kw_only=True)
class Op:
    """A registry row.

    `check` raises Rejected or returns what it measured. `exact`: outputs are determined bit for bit by IEEE or integer
    semantics, so constant subgraphs of it are folded. `values`: inputs whose values must be known from model and
    shapes. `refuses`: why a node (unsupported attribute, dtype) cannot be checked, or None. `infer`: output specs, only
    for ops of other domains than ai.onnx, whose schemas the onnx package does not have.
    `interval`: what output 0 may be under the profile of the call's policy, from inputs alone; None where `check` is
    the way. `sample`: rows to check instead of those that every tensor of as many rows opens. `answers`: graph inputs
    that are the worker's to give, because this node ties them to the rest. `clear`: has a device judge the claims of a
    call into a mark (kernels/judge.cuh), by the same formula as `check`; False where it has no kernel for them.
    """

    family: Family
    reach: Reach
    check: Callable[[Call], Measure]
    exact: bool = False
    values: tuple[int, ...] = ()
    refuses: Callable[[Node], str | None] = field(default=lambda node: None)
    infer: Infer | None = None
    interval: Callable[[Call], Interval | None] | None = None
    sample: Sample | None = None
    answers: tuple[int, ...] = ()
    clear: Callable[[Call, "Stand", Any], bool] | None = None


def every_row(spec: Spec) -> RowIds:
    return np.arange(spec.rows, dtype=np.int64)


def distinct(values: npt.NDArray[np.int64]) -> RowIds:
    """The sorted unique values, flat: np.unique hashes integers first, which costs thirty times as much."""
    ordered = np.sort(values, axis=None, kind="stable")
    kept = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=kept[1:])
    return ordered[kept]


def rows_of(flat: npt.NDArray[np.int64], spec: Spec) -> RowIds:
    """The rows that hold the elements with these flat indices."""
    return distinct(flat // max(spec.width, 1))
