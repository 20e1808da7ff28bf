"""Elementary functions in float64, as ONNX defines them."""

from functools import reduce

import numpy as np
import numpy.typing as npt
from scipy.special import erf

from gpu.rounding import Array, Values


def sigmoid(x: Array) -> Array:
    decay = np.exp(-np.abs(x))
    return np.where(x < 0, decay, 1.0) / (1.0 + decay)


def softplus(x: Array) -> Array:
    return np.logaddexp(x, 0.0)


def softsign(x: Array) -> Array:
    return x / (1.0 + np.abs(x))


def swish(x: Array, *, alpha: float) -> Array:
    return x * sigmoid(alpha * x)


def mish(x: Array) -> Array:
    return np.asarray(x * np.tanh(softplus(x)))


def gelu(x: Array, *, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return np.asarray(0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))))
    return np.asarray(0.5 * x * (1.0 + erf(x / np.sqrt(2.0))))


def biased_gelu(x: Array, bias: Array) -> Array:
    return gelu(x + bias)


def fast_gelu(x: Array, bias: Array | None = None) -> Array:
    return gelu(x if bias is None else x + bias, approximate="tanh")


def leaky_relu(x: Array, *, alpha: float) -> Array:
    return np.where(x < 0, alpha * x, x)


def prelu(x: Values, slope: Values) -> Values:
    return np.where(x < 0, slope * x, x)


def relu(x: Values) -> Values:
    return np.asarray(np.maximum(x, x.dtype.type(0)))


def elu(x: Array, *, alpha: float) -> Array:
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0.0)), x)


def celu(x: Array, *, alpha: float) -> Array:
    return np.maximum(x, 0.0) + np.minimum(alpha * np.expm1(np.minimum(x / alpha, 0.0)), 0.0)


def selu(x: Array, *, alpha: float, gamma: float) -> Array:
    return gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def thresholded_relu(x: Array, *, alpha: float) -> Array:
    return np.where(x > alpha, x, np.where(np.isnan(x), x, 0.0))


def hard_sigmoid(x: Array, *, alpha: float, beta: float) -> Array:
    return np.clip(alpha * x + beta, 0.0, 1.0)


def hard_swish(x: Array) -> Array:
    return x * np.clip(x / 6.0 + 0.5, 0.0, 1.0)


def shrink(x: Values, *, lambd: float, bias: float) -> Values:
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))


def clip(x: Values, *bounds: Values | None, **stored: float | None) -> Values:
    """Bounds are inputs, or in old opsets attributes; the upper one wins."""
    given = (*bounds, None, None)
    low, high = (stored[name] if value is None else value for name, value in zip(("min", "max"), given, strict=False))
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def divide(x: Values, y: Values) -> Values:
    """Floats as IEEE, integers towards zero."""
    if x.dtype == np.float64:
        return x / y
    quotient, remainder = np.divmod(x, y)
    return np.asarray(quotient + ((remainder != 0) & ((x < 0) != (y < 0))).astype(x.dtype))


def modulo(x: Values, y: Values, *, fmod: int) -> Values:
    """The sign of the divisor, or with `fmod` the sign of the dividend."""
    return np.fmod(x, y) if fmod else np.mod(x, y)


def power(x: Values, y: Values) -> Values:
    """Integers go through float64 and lose their fraction."""
    raised = np.power(x.astype(np.float64), y.astype(np.float64))
    if x.dtype == np.float64:
        return raised
    fits = np.abs(raised) < 2.0**63
    return np.where(fits, np.trunc(np.where(fits, raised, 0)), np.iinfo(np.int64).min).astype(np.int64).astype(x.dtype)


def shift(x: Values, by: Values, *, direction: str) -> Values:
    return np.left_shift(x, by) if direction == "LEFT" else np.right_shift(x, by)


def infinite(x: Array, *, detect_negative: int, detect_positive: int) -> npt.NDArray[np.bool_]:
    return (np.isposinf(x) & bool(detect_positive)) | (np.isneginf(x) & bool(detect_negative))


def largest(*inputs: Values) -> Values:
    return reduce(np.maximum, inputs)


def smallest(*inputs: Values) -> Values:
    return reduce(np.minimum, inputs)


def total(*inputs: Values) -> Values:
    return reduce(np.add, inputs)


def average(*inputs: Values) -> Values:
    return total(*inputs) / len(inputs)


def normalized(x: Array, scale: Array, bias: Array, mean: Array, variance: Array, *, epsilon: float) -> Array:
    """BatchNormalization with given statistics."""
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias
