"""Everything that is drawn: rows, vectors and entries, from a 32-byte seed and a label.

The source is the BLAKE3 XOF keyed for Tag.DRAW over seed || label in UTF-8, read as little-endian words.
Only IEEE 754 operations that round correctly (+ - * / sqrt) touch a number, never a mathematical library,
so that a seed gives the same bits on every machine.
"""

from dataclasses import dataclass, field
from math import factorial, prod

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from proof.digest import KEYS, Tag

SEED_BYTES = 32

Shape = int | tuple[int, ...]
Words = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

LN_2 = float.fromhex("0x1.62e42fefa39efp-1")
HALF_PI = float.fromhex("0x1.921fb54442d18p+0")
# Taylor coefficients in the argument's square, highest first: 2 atanh(s) / s, cos(x), sin(x) / x.
ATANH = [2 / (2 * k + 1) for k in range(11, -1, -1)]
COS = [(-1) ** k / factorial(2 * k) for k in range(9, -1, -1)]
SIN = [(-1) ** k / factorial(2 * k + 1) for k in range(9, -1, -1)]


def xof(seed: bytes, label: str, nbytes: int) -> bytes:
    """The first `nbytes` of the stream; a longer read begins with a shorter one."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    return blake3(seed + label.encode(), key=KEYS[Tag.DRAW]).digest(length=nbytes)


def words(seed: bytes, label: str, count: int) -> Words:
    return np.frombuffer(xof(seed, label, 8 * count), "<u8").astype(np.uint64)


def select(seed: bytes, q: int | None, n: int) -> Int64s:
    """The sorted unique rows that `q` draws open in a tensor of `n` rows; all of them if `q` is None.

    Row i is floor(u_i n) with u_i in [0, 1) of 64 bits, the same u_i for every n: tensors that share an
    axis of rows open the same positions.
    """
    if q is None:
        return np.arange(n, dtype=np.int64)
    return np.unique(_scale(words(seed, "rows", q), n)) if n else np.zeros(0, np.int64)


def drawn(seed: bytes, q: int | None, n: int) -> Int64s:
    """The rows that a challenge has checked: those that `select` gives, and the last one, on which an end depends."""
    rows = select(seed, q, n)
    return rows if not n or rows[-1] == n - 1 else np.append(rows, n - 1)


def entries(seed: bytes, label: str, count: int, bound: int) -> Int64s:
    """`count` integers in [0, bound), each value off uniform by less than 2^-64."""
    return _scale(words(seed, label, count), bound)


def words31(seed: bytes, label: str, shape: Shape) -> Int64s:
    """Uniform integers in [0, 2^31): the upper bits of 32-bit words."""
    stream = np.frombuffer(xof(seed, label, 4 * _count(shape)), "<u4")
    return (stream >> 1).astype(np.int64).reshape(shape)


def normals(seed: bytes, label: str, shape: Shape) -> npt.NDArray[np.float32]:
    """Standard normals by Box and Muller (1958) in float64, rounded to float32, at most 8.6 in size.

    Words 2i and 2i + 1 give the pair 2i, 2i + 1: r cos(t), r sin(t) with r = sqrt(-2 ln u), u in (0, 1] the
    upper 53 bits plus one of the first word, t uniform on the circle from the upper 53 bits of the second.
    """
    count = _count(shape)
    pairs = words(seed, label, count + count % 2).reshape(-1, 2) >> np.uint64(11)
    radius = np.sqrt(-2 * _log((pairs[:, 0] + np.uint64(1)).astype(np.float64) * 2.0**-53))
    points = radius[:, None] * _circle(pairs[:, 1])
    return points.reshape(-1)[:count].astype(np.float32).reshape(shape)


def gumbels(seed: bytes, label: str, count: int, at: Int64s | None = None) -> Float64s:
    """`count` standard Gumbel variables, or those of them `at` some places: -ln(-ln u), u = (w + 1/2) / 2^32 for each
    32-bit word w of the stream."""
    stream = np.frombuffer(xof(seed, label, 4 * count), "<u4")[slice(None) if at is None else at]
    return -_log(-_log((stream.astype(np.float64) + 0.5) * 2.0**-32))


@dataclass(frozen=True)
class Draw:
    """The functions above for one seed, with labels inside one scope, such as a node of the graph."""

    seed: bytes = field(repr=False)
    scope: str

    def normals(self, label: str, shape: Shape) -> npt.NDArray[np.float32]:
        return normals(self.seed, f"{self.scope}/{label}", shape)

    def words31(self, label: str, shape: Shape) -> Int64s:
        return words31(self.seed, f"{self.scope}/{label}", shape)

    def entries(self, label: str, count: int, bound: int) -> Int64s:
        return entries(self.seed, f"{self.scope}/{label}", count, bound)


def _count(shape: Shape) -> int:
    return shape if isinstance(shape, int) else prod(shape)


def _scale(u: Words, n: int) -> Int64s:
    """floor(u n / 2^64) for 0 < n < 2^63, the product in four 32-bit halves."""
    if not 0 < n < 2**63:
        raise ValueError(f"nothing to draw from in [0, {n})")
    half, mask = np.uint64(32), np.uint64(2**32 - 1)
    u_high, u_low, n_high, n_low = u >> half, u & mask, np.uint64(n >> 32), np.uint64(n) & mask
    middle = u_high * n_low + (u_low * n_low >> half)
    other = u_low * n_high + (middle & mask)
    product: Words = u_high * n_high + (middle >> half) + (other >> half)
    return product.astype(np.int64)


def _log(x: Float64s) -> Float64s:
    """ln x = e ln 2 + 2 atanh((m - 1) / (m + 1)) for x = m 2^e, m in [sqrt(1/2), sqrt 2)."""
    m, e = np.frexp(x)
    low = m * m < 0.5
    m, e = np.where(low, m + m, m), e - low
    s = (m - 1) / (m + 1)
    result: Float64s = e * LN_2 + s * np.polyval(ATANH, s * s)
    return result


def _circle(turns: Words) -> Float64s:
    """Points (n, 2) on the unit circle at `turns` / 2^53 of a turn, counted from -pi/4."""
    quarter = turns >> np.uint64(51)
    part = (turns & np.uint64(2**51 - 1)).astype(np.float64) * 2.0**-51
    x = (part - 0.5) * HALF_PI
    cos, sin = np.polyval(COS, x * x), x * np.polyval(SIN, x * x)
    odd, back = quarter % 2 == 1, quarter >= 2
    point = np.stack([np.where(odd, -sin, cos), np.where(odd, cos, sin)], axis=1)
    return np.where(back[:, None], -point, point)
