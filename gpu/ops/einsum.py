"""Einsum of one or two operands. Output rows that take the same part of the right operand are one product.

Labels: `batch` ones name an output row, `last` the place in it, `summed` the terms of each entry. The right
operand is one that has the last label; the other is spread along the summed labels that it lacks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.freivalds import PROFILES, Product, check, check_terms
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, distinct, rows_of
from gpu.rounding import compare_equal
from proof.graph import Node

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Equation:
    """Labels of the operands and of the output; sizes of the operands' dimensions and of each label."""

    operands: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    output: str
    sizes: Mapping[str, int]

    @property
    def batch(self) -> str:
        return self.output[:-1]

    @property
    def last(self) -> str:
        return self.output[-1:]

    @property
    def summed(self) -> str:
        return "".join(sorted(set("".join(self.operands)) - set(self.output)))

    @property
    def right(self) -> int:
        return next((i for i, labels in enumerate(self.operands) if self.last in labels), len(self.operands) - 1)

    @property
    def shared(self) -> bool:
        """Whether the last label is in both operands, so that every entry has terms of its own."""
        return all(self.last in labels for labels in self.operands) and len(self.operands) > 1

    def rows(self, rows: RowIds) -> dict[str, Ints]:
        """Values of the batch labels, each (rows,)."""
        shape = [self.sizes[label] for label in self.batch]
        return dict(zip(self.batch, np.unravel_index(rows, shape), strict=True)) if shape else {}

    def flat(self, operand: int, labels: str, fixed: Mapping[str, Ints]) -> Ints:
        """(rows, sizes of `labels`): element numbers of an operand; `fixed` gives the other labels by row."""
        spaces = [self.sizes[label] for label in labels]
        number = np.zeros((1, *(1 for _ in spaces)), np.int64)
        stride = 1
        for label, own in zip(reversed(self.operands[operand]), reversed(self.shapes[operand]), strict=True):
            if own == 1:
                continue
            if label in labels:
                shape = [1, *(size if other == label else 1 for other, size in zip(labels, spaces, strict=True))]
                value = np.arange(self.sizes[label]).reshape(shape)
            else:
                value = fixed[label].reshape(-1, *(1 for _ in spaces))
            number, stride = number + value * stride, stride * own
        return np.broadcast_to(number, (number.shape[0], *spaces))

    def groups(self, rows: RowIds) -> Iterator[tuple[Ints, dict[str, Ints]]]:
        """Positions of the rows that share their part of the right operand, and their batch labels."""
        fixed = self.rows(rows)
        key = np.zeros(len(rows), np.int64)
        for label in self.batch:
            if label in self.operands[self.right]:
                key = key * self.sizes[label] + fixed[label]
        for value in distinct(key):
            at = np.flatnonzero(key == value)
            yield at, {label: values[at] for label, values in fixed.items()}


def equation_of(site: Site) -> Equation:
    text = str(site.node.attributes.get("equation")).replace(" ", "")
    left, _, output = text.partition("->")
    shapes = [spec.shape for spec in site.inputs if spec is not None]
    terms = left.split(",")
    spare = "".join(chr(0x100 + i) for i in range(max((len(shape) for shape in shapes), default=0)))
    hidden = max(
        (len(shape) - len(term.replace("...", "")) for shape, term in zip(shapes, terms, strict=True)), default=0
    )
    if "->" not in text:
        counts = left.replace(",", "").replace(".", "")
        output = ("..." if "..." in left else "") + "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
    operands: list[str] = []
    sizes: dict[str, int] = {}
    for shape, term in zip(shapes, terms, strict=True):
        own = len(shape) - len(term.replace("...", ""))
        labels = term.replace("...", spare[hidden - own : hidden])
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = size if size != 1 else sizes.get(label, 1)
        operands.append(labels)
    return Equation(tuple(operands), tuple(shapes), output.replace("...", spare[:hidden]), sizes)


def _reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    equation = equation_of(site)
    open_labels = equation.summed + equation.last
    reached = {}
    for i, labels in enumerate(equation.operands):
        spec = site.inputs[i]
        assert spec is not None
        own = "".join(label for label in open_labels if label in labels)
        parts = [rows_of(equation.flat(i, own, fixed), spec) for _, fixed in equation.groups(rows)]
        reached[i] = distinct(np.concatenate([np.zeros(0, np.int64), *parts]))
    return reached


def _gather(call: Call, equation: Equation, operand: int, labels: str, fixed: Mapping[str, Ints]) -> npt.NDArray[Any]:
    """(rows, sizes of `labels`) of an operand, spread along labels that it lacks."""
    tensor = call.inputs[operand]
    assert tensor is not None
    own = "".join(label for label in labels if label in equation.operands[operand])
    values = tensor.elements(equation.flat(operand, own, fixed))
    shape = [equation.sizes[label] if label in own else 1 for label in labels]
    return np.broadcast_to(
        values.reshape(len(values), *shape), (len(values), *(equation.sizes[label] for label in labels))
    )


def _check(call: Call) -> Measure:
    equation, claimed, worst = equation_of(call.site), call.claimed[0], 0.0
    check_group = _check_shared if equation.shared else _check_product
    for at, fixed in equation.groups(call.rows[0]):
        worst = max(worst, check_group(call, equation, fixed, claimed[at], str(call.rows[0][at[0]])))
    return Measure(claimed.size, worst)


def _check_product(call: Call, equation: Equation, fixed: dict[str, Ints], y: npt.NDArray[Any], label: str) -> float:
    terms = prod(equation.sizes[label] for label in equation.summed)
    first = {name: values[:1] for name, values in fixed.items()}
    w = _gather(call, equation, equation.right, equation.summed + equation.last, first).reshape(terms, y.shape[1])
    if len(equation.operands) == 1:
        x = np.ones((len(y), terms), w.dtype)
    else:
        x = _gather(call, equation, 1 - equation.right, equation.summed, fixed)
        x = np.broadcast_to(x, (len(y), *x.shape[1:])).reshape(len(y), terms)
    if y.dtype not in PROFILES:
        compare_equal(y, (x.astype(np.int64) @ w.astype(np.int64)).astype(y.dtype))
        return 0.0
    return check(Product(x, w, y, label=label), call.policy, call.draw, len(call.rows[0]))


def _check_shared(call: Call, equation: Equation, fixed: dict[str, Ints], y: npt.NDArray[Any], label: str) -> float:
    """Both operands have the last label: every entry is a sum of products of its own."""
    labels = equation.last + equation.summed
    x, w = (_gather(call, equation, operand, labels, fixed) for operand in (0, 1))
    shape = (y.size, prod(equation.sizes[label] for label in equation.summed))
    x, w = (np.broadcast_to(factor, (len(y), *factor.shape[1:])).reshape(shape) for factor in (x, w))
    if y.dtype not in PROFILES:
        compare_equal(y.reshape(-1), (x.astype(np.int64) * w.astype(np.int64)).sum(1).astype(y.dtype))
        return 0.0
    return check_terms(x, w, y.reshape(-1))


def _refuses(node: Node) -> str | None:
    count = len(str(node.attributes.get("equation", "")).split(","))
    return f"{count} operands: at most two are supported" if count > 2 else None


OPS: dict[tuple[str, str], Op] = {
    ("", "Einsum"): Op(family=Family.CONTRACTION, reach=_reach, check=_check, refuses=_refuses),
}
