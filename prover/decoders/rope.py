"""Frequencies of rotary embeddings in float32, by the formulas of Transformers (modeling_rope_utils.py)."""

from collections.abc import Callable, Mapping
from math import pi
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.errors import Malformed

Parameters = Mapping[str, Any]
Frequencies = npt.NDArray[np.float32]


def frequencies(parameters: Parameters, width: int) -> Frequencies:
    """One for each pair of a head's `width` elements, (width / 2,). Raises Malformed naming what it cannot follow."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in SCALINGS:
        raise Malformed(f"rope_type {kind!r} is not supported: only {', '.join(SCALINGS)}")
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise Malformed("partial_rotary_factor is not supported: every element of a head is turned")
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    base = _number(parameters, "rope_theta")
    powers = np.power(base, exponents, dtype=np.float64).astype(np.float32)
    return SCALINGS[kind](np.float32(1) / powers, parameters)


def _linear(plain: Frequencies, parameters: Parameters) -> Frequencies:
    return plain / np.float32(_number(parameters, "factor"))


def _llama3(plain: Frequencies, parameters: Parameters) -> Frequencies:
    """Long waves slowed by the factor, short ones kept, those in between a mixture."""
    factor, low, high, context = (
        _number(parameters, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    waves = np.float32(2 * pi) / plain
    long, short = waves > np.float32(context / low), waves < np.float32(context / high)
    slowed = np.where(long, plain / np.float32(factor), plain)
    share = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    mixed = (np.float32(1) - share) * slowed / np.float32(factor) + share * slowed
    return np.where(long | short, slowed, mixed)


SCALINGS: dict[str, Callable[[Frequencies, Parameters], Frequencies]] = {
    "default": lambda plain, parameters: plain,
    "linear": _linear,
    "llama3": _llama3,
}


def _number(parameters: Parameters, name: str) -> float:
    value = parameters.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise Malformed(f"{name} of the rotary embedding is {value!r}, not a positive number")
    return float(value)
