"""Products of integers: exact as int32, or requantised through a float multiplier.

Zero points are a scalar, one per row of the left operand, or one per column of the right one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.clearing import integers as clearing
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.freivalds import check_integers, exact_product
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, every_row
from gpu.ops.matrices import Group, Layout, layout, product_shape
from gpu.ops.requantisation import REQUANTISATION, compare_requantised
from gpu.rounding import compare
from proof.graph import Node, Spec

Ints = npt.NDArray[np.int64]


def _reach(right: int) -> Callable[[Site, int, RowIds], Mapping[int, RowIds]]:
    """Rows of both operands, and all of every scale and zero point."""

    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        small = {i: every_row(spec) for i, spec in enumerate(site.inputs) if spec is not None and i not in (0, right)}
        return small | dict(layout(site, 0, right).reach(rows))

    return reach


def _value(call: Call, position: int, default: float = 0.0) -> npt.NDArray[Any]:
    """A scale or zero point, as it was given; absent ones are `default`."""
    tensor = call.inputs[position] if position < len(call.inputs) else None
    return np.full(1, default) if tensor is None else tensor.whole()


def _along_rows(value: npt.NDArray[Any], group: Group) -> npt.NDArray[Any]:
    """A parameter of the left operand for a group's rows, (rows or 1, 1)."""
    flat = value.reshape(-1)
    return flat.reshape(1, 1) if flat.size == 1 else flat[group.x % flat.size][:, None]


def _along_columns(value: npt.NDArray[Any], group: Group) -> npt.NDArray[Any]:
    """A parameter of the right operand for a group's matrix, (1, n or 1)."""
    if value.ndim < 2:
        return value.reshape(1, -1)
    matrices = value.reshape(-1, value.shape[-1])
    return matrices[[group.right % len(matrices)]]


def _zeros(call: Call, form: Layout, group: Group, positions: Mapping[int, int]) -> tuple[Ints, Ints]:
    """Zero points of x and of w; `positions` says which input holds each operand's."""
    x_zero = _along_rows(_value(call, positions[form.left]), group)
    w_zero = _along_columns(_value(call, positions[form.right]), group)
    return x_zero.astype(np.int64), w_zero.astype(np.int64)


def _check_matmul(call: Call) -> Measure:
    """MatMulInteger(A, B, a_zero_point, b_zero_point)."""
    form, claimed = layout(call.site), call.claimed[0]
    for group in form.groups(call.rows[0]):
        x, w = form.operands(group, call.inputs)
        zeros = _zeros(call, form, group, {0: 2, 1: 3})
        check_integers(x, w, claimed[group.at], zeros, call.policy, call.draw, f"{group.left}/{group.right}")
    return Measure(claimed.size)


def _clear_matmul(call: Call, stand: Stand, mark: Memory) -> bool:
    form = layout(call.site)
    groups = [(group, _zeros(call, form, group, {0: 2, 1: 3})) for group in form.groups(call.rows[0])]
    return clearing.clear_products(call, stand, mark, form, groups)


def _check_quantised(call: Call) -> Measure:
    """QLinearMatMul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)."""
    form, claimed = layout(call.site, 0, 3), call.claimed[0]
    scales = {0: _value(call, 1), 3: _value(call, 4)}
    y_scale, y_zero = _value(call, 6), _value(call, 7)
    for group in form.groups(call.rows[0]):
        x, w = form.operands(group, call.inputs)
        product = exact_product(x, w, _zeros(call, form, group, {0: 2, 3: 5}))
        scale = _along_rows(scales[form.left], group).astype(np.float64) * _along_columns(scales[form.right], group)
        scale = scale / _along_rows(y_scale, group)
        compare_requantised(claimed[group.at], product, scale, _along_rows(y_zero, group))
    return Measure(claimed.size)


def _check_scaled(call: Call) -> Measure:
    """MatMulIntegerToFloat(A, B, a_scale, b_scale, a_zero_point, b_zero_point, bias)."""
    form, claimed, worst = layout(call.site), call.claimed[0], 0.0
    scales = {0: _value(call, 2), 1: _value(call, 3)}
    bias = _value(call, 6).reshape(1, -1).astype(np.float64)
    for group in form.groups(call.rows[0]):
        x, w = form.operands(group, call.inputs)
        product = exact_product(x, w, _zeros(call, form, group, {0: 4, 1: 5}))
        scale = _along_rows(scales[form.left], group).astype(np.float64) * _along_columns(scales[form.right], group)
        slack = REQUANTISATION * (np.abs(product * scale) + np.abs(bias))
        worst = max(worst, compare(claimed[group.at], product * scale + bias, slack))
    return Measure(claimed.size, worst)


def _infer_scaled(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    a, b, scale = inputs[:3]
    assert a is not None
    assert b is not None
    assert scale is not None
    return (Spec(scale.dtype, product_shape(a.shape, b.shape)),)


def _op(check: Callable[[Call], Measure], right: int = 1, **row: Any) -> Op:
    return Op(family=Family.CONTRACTION, reach=_reach(right), check=check, **row)


OPS: dict[tuple[str, str], Op] = {
    ("", "MatMulInteger"): _op(_check_matmul, clear=_clear_matmul),
    ("", "QLinearMatMul"): _op(_check_quantised, right=3),
    ("com.microsoft", "MatMulIntegerToFloat"): _op(_check_scaled, infer=_infer_scaled),
}
