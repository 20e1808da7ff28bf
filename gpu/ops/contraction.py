"""Matrix products: every output row is x w for rows x of one operand and a matrix w of the other.

Rows that share a matrix are one `Product`, which gpu/freivalds.py recomputes or folds, whichever is cheaper.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.clearing import products
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.freivalds import PROFILES, Product, check, folds
from gpu.kernels.partial import partial_sums
from gpu.ops import convolution, einsum, integers
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site
from gpu.ops.matrices import layout, product_shape
from gpu.profiles import profile_of
from gpu.rounding import U32, Interval, around, compare_equal
from proof.graph import Node, Spec

FLUSHED = 2.0**-133  # what a kernel loses that flushes subnormal products
SHORT = 256  # terms: below, other orders of adding meet larger partial sums, by 1 / sqrt(terms)


def _reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    reached = dict(layout(site).reach(rows))
    if len(site.inputs) > 2 and site.inputs[2] is not None:
        shape = site.inputs[2].shape
        reached[2] = rows if len(shape) == 2 and shape[0] > 1 else np.zeros(min(1, len(rows)), np.int64)
    return reached


def _check(call: Call) -> Measure:
    form, rows, claimed = layout(call.site), call.rows[0], call.claimed[0]
    alpha, bias = float(call.site.node.attributes.get("alpha", 1.0)), _bias(call)
    worst = 0.0
    for group in form.groups(rows):
        x, w = form.operands(group, call.inputs)
        y, added = claimed[group.at], bias[group.at] if len(bias) > 1 else bias
        if y.dtype not in PROFILES:
            exact = (x.astype(np.int64) @ w.astype(np.int64)) * int(alpha) + added.astype(np.int64)
            compare_equal(y, exact.astype(y.dtype))
            continue
        scaled = x if alpha == 1.0 else x.astype(np.float64) * alpha
        product = Product(scaled, w, y, added, label=f"{group.left}/{group.right}")
        worst = max(worst, check(product, call.policy, call.draw, len(rows)))
    return Measure(claimed.size, worst)


def _interval(call: Call) -> Interval | None:
    """Every entry again with the size of its partial sums; None where `check` is closer (fp32), folds, or scales."""
    form, rows, spec = layout(call.site), call.rows[0], call.site.outputs[0]
    assert spec is not None
    factors = [float(call.site.node.attributes.get(name, 1.0)) for name in ("alpha", "beta")]
    if spec.dtype not in PROFILES or spec.dtype == np.float64 or factors != [1.0, 1.0]:
        return None
    if call.claimed and spec.dtype == np.float32:
        return None
    bias, gamma = _bias(call), profile_of(call.policy).gamma * U32
    z, size = np.empty((len(rows), spec.width)), np.empty((len(rows), spec.width))
    for group in form.groups(rows):
        x, w = form.operands(group, call.inputs)
        if call.claimed and folds((*x.shape, w.shape[1]), call.policy):
            return None
        own = bias[group.at] if len(bias) > 1 else bias
        added = np.broadcast_to(own, (len(own), w.shape[1]))
        z[group.at], parts = partial_sums(x.astype(np.float64), w, added)
        size[group.at] = parts * max(1.0, (SHORT / max(x.shape[1], 1)) ** 0.5)
    return around(z, gamma * size + FLUSHED, spec.dtype)


def _bias(call: Call) -> npt.NDArray[np.float64]:
    """beta C for the checked rows, (rows or 1, n or 1)."""
    c = call.inputs[2] if len(call.inputs) > 2 else None
    if c is None:
        return np.zeros((1, 1))
    beta = float(call.site.node.attributes.get("beta", 1.0))
    own = len(c.spec.shape) == 2 and c.spec.shape[0] > 1
    return beta * c.take(call.rows[0] if own else np.zeros(1, np.int64)).astype(np.float64)


def _refuses_fused(node: Node) -> str | None:
    for name in ("transBatchA", "transBatchB"):
        if node.attributes.get(name, 0):
            return f"{name} is not supported"
    return None


def _infer_fused(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    a, b = inputs[:2]
    assert a is not None
    assert b is not None
    left, right = (
        (*spec.shape[:-2], *spec.shape[:-3:-1]) if node.attributes.get(name, 0) else spec.shape
        for spec, name in ((a, "transA"), (b, "transB"))
    )
    return (Spec(a.dtype, product_shape(left, right)),)


def _clear(call: Call, stand: Stand, mark: Memory) -> bool:
    return products.clear(call, stand, mark, _bias(call))


def _product(**row: Any) -> Op:
    return Op(family=Family.CONTRACTION, reach=_reach, check=_check, interval=_interval, clear=_clear, **row)


OPS: dict[tuple[str, str], Op] = {
    ("", "MatMul"): _product(),
    ("", "Gemm"): _product(),
    ("com.microsoft", "FusedMatMul"): _product(refuses=_refuses_fused, infer=_infer_fused),
    **integers.OPS,
    **convolution.OPS,
    **einsum.OPS,
}
