"""Pointwise: an output element follows from the input elements that broadcasting puts beside it.

A row of the table gives the exact value in float64 (integers and booleans: natively, wrapping) and how far an honest
result may lie beyond one rounding: `ulps` times u |z|, u = 2^-24 for formats of at most 32 bits (computed in fp32) and
2^-52 for fp64, or a `slack` with absolute terms. A format narrower than fp32 adds u |z| for its second rounding.
Bounds cover CUDA's stated errors of its functions and four times what ONNX Runtime 1.32's CPU kernels needed (behind
each row, in the unit of its bound) over 1.2 million inputs of 1e-6 to 100.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.special import erf

from gpu import rounding
from gpu.clearing.operands import SUFFIX
from gpu.clearing.pointwise import Kernel, clear_pointwise
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.ops import elementary
from gpu.ops.call import Call, Family, Infer, Measure, Op, RowIds, Site, Tensor, distinct, rows_of
from gpu.ops.conversion import (
    compare_cast,
    compare_dequantized,
    compare_quantized,
    dequantized_spec,
    quantization_index,
    quantized_spec,
)
from gpu.ops.indexing import (
    Index,
    Shape,
    accepts,
    blocks,
    broadcast_index,
    elements_of,
    measured,
    output,
    source,
    unknown,
    widen,
)
from gpu.profiles import Profile, profile_of
from gpu.rounding import (
    FORMATS,
    U32,
    Array,
    Interval,
    Values,
    around,
    compare,
    compare_equal,
    compare_nearest,
    is_float,
    round_to,
    second_rounding,
    unit,
)
from proof.graph import Node, Spec

Judge = Callable[..., float]  # (site, claimed, *inputs, None where absent) -> ratio; raises Rejected
Value = Callable[..., Values]

OVERFLOWING = -87.0  # from here down exp(-x) may leave float32


def _own_shape(site: Site, position: int) -> Shape:
    return source(site, position).shape


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """`view`: the shape an input broadcasts in. `index`: the element of an input beside one of the output instead.

    Of the inputs only the first `reads` are looked at (CastLike takes no more than the dtype of its second).
    `kernel`: what judges a node on a device.
    """

    judge: Judge
    bounds: Callable[..., Interval] | None = None  # (profile, site, dtype, *inputs) where a profile determines more
    reads: int | None = None
    exact: bool = False
    view: Callable[[Site, int], Shape] = _own_shape
    index: Callable[[Site, int, Index], Index] | None = None
    values: tuple[int, ...] = ()
    refuses: Callable[[Node], str | None] = accepts
    infer: Infer | None = None
    kernel: Callable[[Site], Kernel | None] | None = None


def pointwise(row: Pointwise) -> Op:
    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        return {i: _rows_beside(row, site, i, rows) for i, _ in unknown(site) if row.reads is None or i < row.reads}

    def check(call: Call) -> Measure:
        site = call.site

        def block(position: int, rows: RowIds, claimed: Values) -> float:
            operands = [
                None if tensor is None else _beside(row, site, i, tensor, rows)
                for i, tensor in enumerate(call.inputs[: row.reads])
            ]
            with np.errstate(all="ignore"):
                return row.judge(site, claimed, *operands)

        return measured(call, block, lambda position: output(site).width)

    def interval(call: Call) -> Interval:
        assert row.bounds is not None
        site, rows = call.site, call.rows[0]
        operands = [
            None if tensor is None else _beside(row, site, i, tensor, rows)
            for i, tensor in enumerate(call.inputs[: row.reads])
        ]
        with np.errstate(all="ignore"):
            found = row.bounds(profile_of(call.policy), site, output(site).dtype, *operands)
        shape = len(rows), output(site).width
        return Interval(*(np.broadcast_to(bound, shape) for bound in (found.low, found.nearest, found.high)))

    def clear(call: Call, stand: Stand, mark: Memory) -> bool:
        assert row.kernel is not None
        kernel, read = row.kernel(call.site), call.inputs[: row.reads]
        given = [(tensor, _lead(call.site, tensor.spec.shape, call.rows[0])) for tensor in read if tensor is not None]
        return kernel is not None and clear_pointwise(call, stand, mark, kernel, given)

    return Op(
        family=Family.POINTWISE,
        reach=reach,
        check=check,
        clear=clear if row.kernel else None,
        interval=interval if row.bounds else None,
        exact=row.exact,
        values=row.values,
        refuses=row.refuses,
        infer=row.infer,
    )


def _lead(site: Site, view: Shape, rows: RowIds) -> RowIds:
    """Rows of an input seen in shape `view` beside rows of the output."""
    return broadcast_index(rows, output(site).shape[:-1], view[:-1])


def _rows_beside(row: Pointwise, site: Site, position: int, rows: RowIds) -> RowIds:
    spec = source(site, position)
    if row.index is not None:
        found = [
            rows_of(row.index(site, position, elements_of(rows[part], output(site))), spec)
            for part in _parts(site, rows)
        ]
        return distinct(np.concatenate(found)) if found else rows[:0]
    view = row.view(site, position)
    lead = distinct(_lead(site, view, rows))
    return lead if view[-1:] == spec.shape[-1:] else rows_of(elements_of(lead, Spec(spec.dtype, view)), spec)


def _parts(site: Site, rows: RowIds) -> list[slice]:
    return list(blocks(rows, output(site).width))


def _beside(row: Pointwise, site: Site, position: int, tensor: Tensor, rows: RowIds) -> Values:
    """Elements of an input beside these output rows, shape (rows, width or 1)."""
    if row.index is not None:
        return tensor.elements(row.index(site, position, elements_of(rows, output(site))))
    view = row.view(site, position)
    lead = _lead(site, view, rows)
    if view[-1:] == tensor.spec.shape[-1:]:
        return tensor.take(lead)
    return tensor.elements(elements_of(lead, Spec(tensor.spec.dtype, view)))


def _chosen(site: Site, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, floats among the defaults in float32 as ONNX stores them."""
    return {name: site.node.attributes.get(name, _stored(default)) for name, default in defaults.items()}


def _stored(default: Any) -> Any:
    return float(np.float32(default)) if isinstance(default, float) else default


def determined(value: Value, kernel: str | None = None) -> Op:
    """One IEEE operation, the same bits on every engine; integers natively."""

    def judge(site: Site, claimed: Values, *inputs: Values) -> float:
        z = np.broadcast_to(value(*(widen(x) for x in inputs)), claimed.shape)
        return compare_nearest(claimed, z) if is_float(claimed.dtype) else compare_equal(claimed, z)

    def bounds(profile: Profile, site: Site, dtype: np.dtype, *inputs: Values) -> Interval:
        z = value(*(widen(x) for x in inputs))
        return rounding.determined(round_to(z, dtype) if is_float(dtype) else z.astype(dtype))

    on_device = (lambda site: Kernel(kernel)) if kernel else None
    return pointwise(Pointwise(judge=judge, bounds=bounds, exact=True, kernel=on_device))


def rounded(
    value: Value,
    *,
    ulps: float = 0.0,
    slack: Callable[..., Array] | None = None,
    attributes: Mapping[str, Any] | None = None,
    tight: Callable[..., Array] | None = None,
    **rest: Any,
) -> Op:
    """An op that rounds: floats within half an ulp and slack(u, z, *inputs, **attributes), integers exactly.

    `tight`: slack under a profile, which is its first argument.
    """

    def judge(site: Site, claimed: Values, *inputs: Values | None) -> float:
        chosen = _chosen(site, attributes or {})
        operands = [None if x is None else widen(x) for x in inputs]
        z = value(*operands, **chosen)
        if not is_float(claimed.dtype):
            return compare_equal(claimed, np.broadcast_to(z, claimed.shape))
        u = unit(claimed.dtype)
        room = slack(u, z, *operands, **chosen) if slack else ulps * u * np.abs(z)
        return compare(claimed, z, np.nan_to_num(room, nan=0.0, posinf=0.0) + second_rounding(z, claimed.dtype))

    def bounds(profile: Profile, site: Site, dtype: np.dtype, *inputs: Values) -> Interval:
        chosen = _chosen(site, attributes or {})
        operands = [widen(x) for x in inputs]
        z = value(*operands, **chosen)
        if not is_float(dtype):
            return rounding.determined(z.astype(dtype))
        u, bound = unit(dtype), partial(tight, profile) if tight else slack
        room = bound(u, z, *operands, **chosen) if bound else ulps * u * np.abs(z)
        return around(z, room + second_rounding(z, dtype), dtype)

    return pointwise(Pointwise(judge=judge, bounds=bounds, **rest))


def representable(value: Value, *, attributes: Mapping[str, Any] | None = None, **rest: Any) -> Op:
    """An op whose result needs no rounding: equality, in the dtype of the output."""

    def judge(site: Site, claimed: Values, *inputs: Values | None) -> float:
        chosen = _chosen(site, attributes or {})
        z = value(*(None if x is None else widen(x) for x in inputs), **chosen)
        exact = z.astype(claimed.dtype) if is_float(claimed.dtype) else z
        return compare_equal(claimed, np.broadcast_to(exact, claimed.shape))

    return pointwise(Pointwise(judge=judge, exact=True, **rest))


def _compare_chosen(site: Site, claimed: Values, condition: Values, x: Values, y: Values) -> float:
    return compare_equal(claimed, np.broadcast_to(np.where(condition, x, y), claimed.shape))


def _converted(profile: Profile, site: Site, dtype: np.dtype, x: Values) -> Interval:
    return rounding.determined(round_to(x.astype(np.float64), dtype) if is_float(dtype) else x.astype(dtype))


@dataclass(frozen=True)
class _BesideOne:
    """An absolute error: what is lost beside terms of size one."""

    units: float

    def __call__(self, u: float, z: Array, *inputs: Array, **attributes: Any) -> Array:
        return self.units * u * (1.0 + np.abs(z))


@dataclass(frozen=True)
class _BesideInput:
    """An error relative to the (biased) input: what a factor in [0, 1] of it loses."""

    units: float

    def __call__(self, u: float, z: Array, *inputs: Array | None, **attributes: Any) -> Array:
        return self.units * u * np.abs(elementary.total(*(x for x in inputs if x is not None)))


_GATED, _LOGISTIC = _BesideInput(16), _BesideOne(16)


def _one(name: str, slack: _BesideInput | _BesideOne, alpha: float | None = None) -> Callable[[Site], Kernel]:
    """The kernel of an op of one operand; `alpha` is what its attribute is by default, None where it has none."""

    def kernel(site: Site) -> Kernel:
        factor = 0.0 if alpha is None else float(site.node.attributes.get("alpha", _stored(alpha)))
        return Kernel(name, factor, slack.units)

    return kernel


def _gelu(site: Site) -> Kernel:
    return Kernel("gelu", float(site.node.attributes.get("approximate", "none") == "tanh"), _GATED.units)


def _cast(site: Site) -> Kernel | None:
    """From one float format to another."""
    given = source(site, 0).dtype
    if given not in SUFFIX or given == output(site).dtype:
        return None
    return Kernel(f"cast_{SUFFIX[given]}_to", given=given)


def _tanh_slack(u: float, z: Array, *inputs: Array, **attributes: Any) -> Array:
    """As beside the input, the constants of tanh's argument in float32 whatever the dtype."""
    return _GATED(max(u, U32), z, *inputs)


def _gelu_slack(u: float, z: Array, x: Array, *, approximate: str) -> Array:
    return _tanh_slack(u, z, x) if approximate == "tanh" else _GATED(u, z, x)


def _tight_swish(profile: Profile, u: float, z: Array, x: Array, *, alpha: float) -> Array:
    """Beside the result, or all of it from where exp(-alpha x) may overflow in fp32 and x / (1 + exp) be zero."""
    return np.where(alpha * x < OVERFLOWING, np.abs(z), profile.activation * u * np.abs(z))


def _tight_angle(profile: Profile, u: float, z: Array, x: Array) -> Array:
    return profile.trigonometric * u * np.abs(z)


def _sum_slack(u: float, z: Array, *inputs: Array) -> Array:
    return u * len(inputs) * elementary.total(*(np.abs(x) for x in inputs))


def _average_slack(u: float, z: Array, *inputs: Array) -> Array:
    return u * (len(inputs) + 1) * elementary.average(*(np.abs(x) for x in inputs))


def _hard_sigmoid_slack(u: float, z: Array, x: Array, *, alpha: float, beta: float) -> Array:
    return 2.0 * u * np.minimum(np.abs(alpha * x) + abs(beta), 1e30)


def _exponential_unit_slack(u: float, z: Array, x: Array, *, alpha: float, gamma: float = 1.0) -> Array:
    return np.where(x < 0, 8.0 * u * abs(alpha * gamma), 2.0 * u * np.abs(z))


def _tan_slack(u: float, z: Array, x: Array) -> Array:
    return 8.0 * u * (1.0 + z * z)


def _halved_slack(u: float, z: Array, x: Array) -> Array:
    """Of half an exponential, which overflows in fp32 before its half does."""
    return np.where(np.abs(z) > FORMATS[np.dtype(np.float32)].largest / 2.0, np.abs(z), 8.0 * u * np.abs(z))


def _normalized_slack(u: float, z: Array, x: Array, *parameters: Array, epsilon: float) -> Array:
    scale, bias, mean, variance = parameters
    factor = np.abs(scale) / np.sqrt(variance + epsilon)
    return 8.0 * u * ((np.abs(x) + np.abs(mean)) * factor + np.abs(bias))


def _channels(site: Site, position: int) -> Shape:
    """Inputs after the first hold one value a channel (axis 1)."""
    shape = source(site, position).shape
    return shape if position == 0 else (*shape, *(1 for _ in output(site).shape[2:]))


def _training(node: Node) -> str | None:
    if node.attributes.get("training_mode") or (node.since < 7 and not node.attributes.get("is_test")):
        return "is in training mode: only inference is checked"
    if any(node.outputs[1:]):
        return "returns training statistics: only inference is checked"
    return None if node.attributes.get("spatial", 1) else "normalises every position by itself (spatial=0)"


def _like_first(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    first = inputs[0]
    if first is None:
        raise ValueError(f"{node} has no first input")
    return (first,)


_SELU = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}
_QUANTIZE = Pointwise(judge=compare_quantized, exact=True, index=quantization_index)
_DEQUANTIZE = Pointwise(judge=compare_dequantized, exact=True, index=quantization_index)

_TABLE: dict[str, Op] = {
    "Add": determined(np.add, "add"),
    "Sub": determined(np.subtract, "subtract"),
    "Mul": determined(np.multiply, "multiply_elements"),
    "Div": determined(elementary.divide, "divide"),
    "Sqrt": determined(np.sqrt),
    "Reciprocal": rounded(lambda x: 1.0 / x, ulps=4),  # 0
    "Sum": rounded(elementary.total, slack=_sum_slack),
    "Mean": rounded(elementary.average, slack=_average_slack),
    "Pow": rounded(elementary.power, ulps=16),  # 0
    "Exp": rounded(np.exp, ulps=8),  # 0.5
    "Log": rounded(np.log, ulps=16),  # 3.4
    "Erf": rounded(erf, ulps=16),  # 0.6
    "Tanh": rounded(np.tanh, ulps=32),  # 4.2
    "Sigmoid": rounded(elementary.sigmoid, slack=_LOGISTIC, kernel=_one("sigmoid", _LOGISTIC)),  # 2.3
    "Softplus": rounded(elementary.softplus, slack=_BesideOne(8)),  # 1.1
    "Softsign": rounded(elementary.softsign, ulps=8),  # 1.5
    "Sin": rounded(np.sin, slack=_BesideOne(4), tight=_tight_angle),  # 0.5
    "Cos": rounded(np.cos, slack=_BesideOne(4), tight=_tight_angle),  # 0.5
    "Tan": rounded(np.tan, slack=_tan_slack),  # 0.2
    "Asin": rounded(np.arcsin, ulps=32),  # 7
    "Acos": rounded(np.arccos, ulps=32),  # 4
    "Atan": rounded(np.arctan, ulps=16),  # 3.8
    "Sinh": rounded(np.sinh, slack=_halved_slack),  # 1.6
    "Cosh": rounded(np.cosh, slack=_halved_slack),  # 1.6
    "Asinh": rounded(np.arcsinh, ulps=8),  # 1.2
    "Acosh": rounded(np.arccosh, ulps=8),  # 1.5
    "Atanh": rounded(np.arctanh, ulps=8),  # 1.3
    "Gelu": rounded(elementary.gelu, slack=_gelu_slack, attributes={"approximate": "none"}, kernel=_gelu),  # 2.2
    "Swish": rounded(
        elementary.swish, slack=_GATED, attributes={"alpha": 1.0}, tight=_tight_swish, kernel=_one("swish", _GATED, 1.0)
    ),  # 2.3
    "Mish": rounded(elementary.mish, slack=_BesideInput(16)),  # 3.9
    "HardSwish": rounded(elementary.hard_swish, slack=_BesideInput(4)),  # 0.7
    "HardSigmoid": rounded(
        elementary.hard_sigmoid, slack=_hard_sigmoid_slack, attributes={"alpha": 0.2, "beta": 0.5}
    ),  # 0.2
    "LeakyRelu": rounded(elementary.leaky_relu, attributes={"alpha": 0.01}),
    "PRelu": rounded(elementary.prelu),
    "Elu": rounded(elementary.elu, slack=_exponential_unit_slack, attributes={"alpha": 1.0}),  # 1
    "Celu": rounded(elementary.celu, slack=_exponential_unit_slack, attributes={"alpha": 1.0}),  # 1
    "Selu": rounded(elementary.selu, slack=_exponential_unit_slack, attributes=_SELU),  # 1.8
    "Shrink": rounded(elementary.shrink, attributes={"lambd": 0.5, "bias": 0.0}),
    "BatchNormalization": rounded(
        elementary.normalized,
        slack=_normalized_slack,
        attributes={"epsilon": 1e-5},
        view=_channels,
        refuses=_training,
    ),
    "ThresholdedRelu": representable(elementary.thresholded_relu, attributes={"alpha": 1.0}),
    "Relu": representable(elementary.relu),
    "Clip": representable(elementary.clip, attributes={"min": None, "max": None}),
    "Min": representable(elementary.smallest),
    "Max": representable(elementary.largest),
    "Mod": representable(elementary.modulo, attributes={"fmod": 0}),
    "Neg": representable(np.negative),
    "Abs": representable(np.abs),
    "Sign": representable(np.sign),
    "Floor": representable(np.floor),
    "Ceil": representable(np.ceil),
    "Round": representable(np.rint),
    "IsNaN": representable(np.isnan),
    "IsInf": representable(elementary.infinite, attributes={"detect_negative": 1, "detect_positive": 1}),
    "Equal": representable(np.equal),
    "Less": representable(np.less),
    "LessOrEqual": representable(np.less_equal),
    "Greater": representable(np.greater),
    "GreaterOrEqual": representable(np.greater_equal),
    "Not": representable(np.logical_not),
    "And": representable(np.logical_and),
    "Or": representable(np.logical_or),
    "Xor": representable(np.logical_xor),
    "BitwiseNot": representable(np.bitwise_not),
    "BitwiseAnd": representable(np.bitwise_and),
    "BitwiseOr": representable(np.bitwise_or),
    "BitwiseXor": representable(np.bitwise_xor),
    "BitShift": representable(elementary.shift, attributes={"direction": "LEFT"}),
    "Where": pointwise(Pointwise(judge=_compare_chosen, exact=True)),
    "Cast": pointwise(Pointwise(judge=compare_cast, bounds=_converted, exact=True, kernel=_cast)),
    "CastLike": pointwise(Pointwise(judge=compare_cast, exact=True, reads=1, kernel=_cast)),
    "QuantizeLinear": pointwise(_QUANTIZE),
    "DequantizeLinear": pointwise(_DEQUANTIZE),
}

_CONTRIBUTED: dict[str, Op] = {  # onnxruntime's com.microsoft domain
    "Gelu": rounded(elementary.gelu, slack=_GATED, infer=_like_first, kernel=_one("gelu", _GATED)),  # 2.2
    "BiasGelu": rounded(elementary.biased_gelu, slack=_BesideInput(16), infer=_like_first),
    "FastGelu": rounded(elementary.fast_gelu, slack=_tanh_slack, infer=_like_first),  # 2.2
    "QuantizeLinear": pointwise(replace(_QUANTIZE, infer=quantized_spec)),
    "DequantizeLinear": pointwise(replace(_DEQUANTIZE, infer=dequantized_spec)),
    "QuickGelu": rounded(
        elementary.swish,
        slack=_GATED,
        attributes={"alpha": 1.702},
        infer=_like_first,
        kernel=_one("swish", _GATED, 1.702),
    ),  # 2.2
}

OPS: dict[tuple[str, str], Op] = {
    **{("", name): op for name, op in _TABLE.items()},
    **{("com.microsoft", name): op for name, op in _CONTRIBUTED.items()},
}
