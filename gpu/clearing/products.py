"""Products on a device: few rows recomputed, entry by entry; many rows folded."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.clearing.folds import S, clear_folded
from gpu.clearing.operands import SUFFIX, Operands
from gpu.clearing.stand import Stand
from gpu.device import Device, Memory
from gpu.freivalds import coefficients, folds
from gpu.ops.call import Call, Tensor
from gpu.ops.matrices import Group, Layout, first_row, layout

LEAST = 2**16  # multiplications a product, below which its launches cost more than they save
MOST_TERMS = 2**18  # beyond, what kernels/recompute.cu takes off for its own errors is too much
MOST_ROWS = 24  # that it takes at once
COLUMNS, THREADS = 128, 128  # of a block
BLOCKS = 512  # that keep a device busy
SPLITS, SPLIT = 64, 256  # parts of k where columns are too few, and terms that are worth one

Array = npt.NDArray[Any]


def clear(call: Call, stand: Stand, mark: Memory, bias: Array) -> bool:
    """Judge the claimed rows of a product; `bias` (rows or 1, n or 1) is in float64."""
    form, spec = layout(call.site), call.site.outputs[0]
    left, right = call.inputs[form.left], call.inputs[form.right]
    if spec is None or left is None or right is None or {left.spec.dtype, right.spec.dtype} != {spec.dtype}:
        return False
    if spec.dtype not in SUFFIX or form.transposed_a or call.site.node.attributes.get("alpha", 1.0) != 1.0:
        return False
    if call.policy.challenges != S:
        return False
    groups = list(form.groups(call.rows[0]))
    if not 0 < form.a[-1] <= MOST_TERMS or len(call.rows[0]) * form.a[-1] * spec.width < max(1, LEAST * len(groups)):
        return False
    for group in groups:
        product = _operands(call, stand, form, group, (left, right, bias))
        if folds(product.shape, call.policy):
            clear_folded(product, call, stand.device, mark, f"{group.left}/{group.right}")
        else:
            recompute(product, stand.device, mark)
    return True


def recompute(product: Operands, device: Device, mark: Memory) -> None:
    """Every entry again, 24 rows at a time."""
    m, k, n = product.shape
    columns = -(-n // COLUMNS)
    splits = min(-(-k // SPLIT), -(-BLOCKS // columns), SPLITS)
    z, a = (device.empty((splits, min(m, MOST_ROWS), n), dtype) for dtype in (np.float64, np.float32))
    c, _, r, t = coefficients(product.dtype, k, product.rounds)
    for first in range(0, m, MOST_ROWS):
        rows = min(MOST_ROWS, m - first)
        own = slice(first, first + rows)
        bias, bias_rows = (product.bias[own], 2) if product.bias_rows > 1 else (product.bias, product.bias_rows)
        device.launch(
            *("recompute", f"multiply_{product.kind}", (columns, splits), THREADS),
            *(product.x, product.x_at, np.int64(first), np.int32(rows), np.int64(k)),
            *(product.w, np.int64(product.w_first), *map(np.int64, product.w_strides), np.int64(n), z, a),
        )
        device.launch(
            *("recompute", f"judge_products_{product.kind}", min(BLOCKS, -(-rows * n // THREADS)), THREADS),
            *(z, a, np.int32(splits), np.int32(rows), np.int64(k), np.int64(n), bias, np.int64(bias_rows)),
            *(product.y[own], *map(np.float64, (c, r, t)), mark),
        )


def _operands(call: Call, stand: Stand, form: Layout, group: Group, given: tuple[Tensor, Tensor, Array]) -> Operands:
    left, right, bias = given
    rows, width = form.b[-2:]
    own = bias[group.at] if len(bias) > 1 else bias
    n = rows if form.transposed_b else width
    return Operands(
        x=stand.hold(left),
        x_at=stand.places(left, group.x),
        w=stand.hold(right),
        w_first=first_row(right, group.right, rows) * width,
        w_strides=(1, width) if form.transposed_b else (width, 1),
        y=stand.device.array(call.claimed[0][group.at]),
        bias=stand.device.array(np.broadcast_to(own, (len(own), n))),
        bias_rows=len(own) if own.any() else 0,
        k=form.a[-1],
        dtype=left.spec.dtype,
    )
