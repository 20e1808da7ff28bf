"""RotaryEmbedding-23: pairs of elements of each head turned by the angle of their position."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.clearing.rotary import Turn, clear_rotary
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, distinct, every_row
from gpu.rounding import FORMATS, U32, Array, Interval, compare, compare_equal, determined, round_to
from proof.errors import Reason, Rejected

Ints = npt.NDArray[np.int64]

X, COS, SIN, POSITIONS = range(4)


def _places(site: Site, rows: RowIds) -> Ints:
    """The place (batch, sequence) of each row of x, flattened."""
    x = site.inputs[X]
    assert x is not None
    if len(x.shape) == 3:
        return rows
    _, heads, length, _ = x.shape
    return rows // (heads * length) * length + rows % length


def _given_positions(site: Site) -> bool:
    return len(site.inputs) > POSITIONS and site.inputs[POSITIONS] is not None


def _reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    """Which rows of the tables a position takes is data, so all of them are needed where positions are given."""
    places = distinct(_places(site, rows))
    if not _given_positions(site):
        return {X: rows, COS: places, SIN: places}
    cos, positions = site.inputs[COS], site.inputs[POSITIONS]
    assert cos is not None
    assert positions is not None
    table = every_row(cos) if len(rows) else rows
    return {X: rows, COS: table, SIN: table, POSITIONS: distinct(places // max(positions.width, 1))}


def _check(call: Call) -> Measure:
    claimed = call.claimed[0]
    given, c, s, turned = _operands(call)
    y = claimed.reshape(given.shape)
    compare_equal(y[..., turned:], given[..., turned:])
    first, second = _pairs(call.site, given[..., :turned].astype(np.float64))
    real, imaginary = _pairs(call.site, y[..., :turned])
    unit = _unit(claimed.dtype)
    worst = max(
        compare(real, c * first - s * second, unit * (np.abs(c * first) + np.abs(s * second))),
        compare(imaginary, s * first + c * second, unit * (np.abs(s * first) + np.abs(c * second))),
    )
    return Measure(claimed.size, worst)


def _unit(dtype: np.dtype) -> float:
    return FORMATS[dtype].u + U32 * (dtype.itemsize < 8)


def _clear(call: Call, stand: Stand, mark: Memory) -> bool:
    interleaved = bool(call.site.node.attributes.get("interleaved", 0))
    x = call.site.inputs[X]
    if x is None or x.dtype not in FORMATS:
        return False
    return clear_rotary(call, stand, mark, Turn(_numbers(call), _heads(call.site), interleaved, _unit(x.dtype)))


def _interval(call: Call) -> Interval:
    """Both products rounded, then their sum, as a kernel does that multiplies whole tensors."""
    given, c, s, turned = _operands(call)
    dtype, result = given.dtype, given.copy()
    first, second = _pairs(call.site, given[..., :turned].astype(np.float64))
    real, imaginary = _pairs(call.site, result[..., :turned])
    for target, left, right in ((real, c * first, -s * second), (imaginary, c * second, s * first)):
        target[...] = round_to(round_to(left, dtype).astype(np.float64) + round_to(right, dtype), dtype)
    return determined(result.reshape(len(call.rows[0]), -1))


def _operands(call: Call) -> tuple[npt.NDArray[Any], Array, Array, int]:
    """x (rows, heads, width), cosines and sines (rows, 1, half), and how many elements of a head are turned."""
    x, cos, sin = call.inputs[:3]
    assert x is not None
    assert cos is not None
    assert sin is not None
    rows, numbers, heads = call.rows[0], _numbers(call), _heads(call.site)
    given = x.take(rows).reshape(len(rows), heads, x.spec.width // heads)
    c, s = (table.take(numbers)[:, None, :].astype(np.float64) for table in (cos, sin))
    return given, c, s, 2 * c.shape[-1]


def _heads(site: Site) -> int:
    x = site.inputs[X]
    assert x is not None
    return int(site.node.attributes.get("num_heads", 0)) if len(x.shape) == 3 else 1


def _numbers(call: Call) -> Ints:
    """The row of the tables for each checked row. Raises Rejected where a position lies outside them."""
    numbers, cos = _places(call.site, call.rows[0]), call.inputs[COS]
    assert cos is not None
    if _given_positions(call.site):
        positions = call.inputs[POSITIONS]
        assert positions is not None
        numbers = positions.elements(numbers).astype(np.int64)
        numbers = np.where(numbers < 0, numbers + cos.spec.rows, numbers)
        if ((numbers < 0) | (numbers >= cos.spec.rows)).any():
            raise Rejected(Reason.REEXECUTION, f"a position lies outside a table of {cos.spec.rows}")
    return numbers


def _pairs(site: Site, turned: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The two elements of every pair: neighbours where interleaved, else of the two halves."""
    if site.node.attributes.get("interleaved", 0):
        return turned[..., 0::2], turned[..., 1::2]
    half = turned.shape[-1] // 2
    return turned[..., :half], turned[..., half:]


OPS: dict[tuple[str, str], Op] = {
    ("", "RotaryEmbedding"): Op(family=Family.ATTENTION, reach=_reach, check=_check, interval=_interval, clear=_clear),
}
