"""Changes of number format: Cast, QuantizeLinear, DequantizeLinear.

Cast to an integer cuts off the fraction; outside the integer's range ONNX leaves the result open and engines either
saturate, wrap, or give the lowest integer: any of the three is accepted. QuantizeLinear rounds a quotient half to even;
the quotient itself may be off by 2 u |x / scale|, which matters beside a tie only.
"""

import numpy as np

from gpu.ops.call import Site
from gpu.ops.indexing import (
    Index,
    normalize_axis,
    output,
    ravel,
    source,
    unravel,
    widen,
)
from gpu.rounding import FORMATS, Values, compare, compare_between, compare_equal, is_float, second_rounding, unit
from proof.errors import Malformed, Reason, Rejected
from proof.graph import Node, Spec


def compare_cast(site: Site, claimed: Values, x: Values) -> float:
    dtype = claimed.dtype
    if dtype == x.dtype:
        return compare_equal(claimed, x)
    if is_float(dtype):
        z = x.astype(np.float64)
        return compare(claimed, z, second_rounding(z, dtype))
    if is_float(x.dtype) and dtype != np.bool_:
        return _compare_truncated(claimed, x.astype(np.float64))
    return compare_equal(claimed, (x != 0) if dtype == np.bool_ else x.astype(dtype))


def _compare_truncated(claimed: Values, x: Values) -> float:
    limits = np.iinfo(claimed.dtype)
    whole = np.trunc(np.where(np.isnan(x), 0.0, x))
    inside = (whole >= float(limits.min)) & (whole < float(limits.max) + 1.0) & ~np.isnan(x)
    exact = np.where(inside, whole, 0.0).astype(claimed.dtype)
    short = np.where(np.abs(whole) < 2.0**63, whole, 0.0).astype(np.int64).astype(claimed.dtype)
    open_choice = (
        (claimed == limits.min) | (claimed == np.where(whole < 0, limits.min, limits.max)) | (claimed == short)
    )
    if (~inside & ~open_choice).any():
        raise Rejected(Reason.REEXECUTION, "a value outside the integer's range became none of those engines give")
    return compare_equal(np.where(inside, claimed, 0).astype(claimed.dtype), exact)


def compare_quantized(site: Site, claimed: Values, x: Values, scale: Values, *zero: Values) -> float:
    limits = np.iinfo(claimed.dtype)
    z = widen(x) / widen(scale)
    doubt = 2.0 * unit(np.dtype(np.float32)) * np.abs(z)
    offset = zero[0].astype(np.float64) if zero and zero[0] is not None else 0.0
    low = np.clip(np.rint(z - doubt) + offset, limits.min, limits.max)
    high = np.clip(np.rint(z + doubt) + offset, limits.min, limits.max)
    return compare_between(claimed, low, high)


def compare_dequantized(site: Site, claimed: Values, x: Values, scale: Values, *zero: Values) -> float:
    offset = zero[0].astype(np.float64) if zero and zero[0] is not None else 0.0
    z = (x.astype(np.float64) - offset) * widen(scale)
    wide = (
        FORMATS[claimed.dtype].u * np.abs(z) if x.dtype.itemsize > 1 else 0.0
    )  # the integer is rounded before the product
    return compare(claimed, z, wide + second_rounding(z, claimed.dtype))


def quantization_index(site: Site, position: int, flat: Index) -> Index:
    """Scale and zero point beside an element: one for all, one an index of `axis`, or one a block along it."""
    out, spec = output(site).shape, source(site, position)
    if position == 0 or spec.size == 1:
        return flat if position == 0 else np.zeros_like(flat)
    axis = normalize_axis(site.node.attributes.get("axis", 1), len(out))
    coordinates = unravel(flat, out)
    block = site.node.attributes.get("block_size", 0)
    if not block:
        return coordinates[axis]
    coordinates[axis] = coordinates[axis] // block
    return ravel(coordinates, spec.shape)


def quantized_spec(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    zero = inputs[2] if len(inputs) > 2 else None
    return (Spec(zero.dtype if zero else np.dtype(np.uint8), _present(node, inputs[0]).shape),)


def dequantized_spec(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    return (Spec(_present(node, inputs[1]).dtype, _present(node, inputs[0]).shape),)


def _present(node: Node, spec: Spec | None) -> Spec:
    if spec is None:
        raise Malformed(f"{node} lacks an input")
    return spec
