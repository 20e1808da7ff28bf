"""Rows of attention on a device, each over the keys that its query sees."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu.clearing.operands import SUFFIX
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.kernels.attention_radius import Bounds
from gpu.ops.call import Call

LEAST = 2**12  # products of a query with a key below which a launch costs more than it saves
MOST = 2**23  # pairs of a query and a key that are at work at once
WIDEST = 256  # elements of a head
THREADS = 128
KEYS = 512  # that a block of threads sums at least
SPLITS = 64

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Queries with the keys they see: row `q` at hand, rows `k` and `v` at hand and the `count` - 1 after them, and the
    claimed row `y`. `bounds` are of all of them but for `sums`."""

    q: Ints
    k: Ints
    v: Ints
    count: Ints
    y: Ints
    sums: npt.NDArray[np.float64]
    bounds: Bounds

    def part(self, at: slice) -> "Pairs":
        return Pairs(self.q[at], self.k[at], self.v[at], self.count[at], self.y[at], self.sums[at], self.bounds)


def clear_attention(call: Call, stand: Stand, mark: Memory, pairs: Pairs) -> bool:
    """Judge the claimed rows of output 0. Q, K and V are (rows, width) a head."""
    spec, given = call.site.outputs[0], call.inputs[:3]
    if spec is None or spec.dtype not in SUFFIX or any(x is None or x.spec.dtype != spec.dtype for x in given):
        return False
    if any(x is None or x.spec.width > WIDEST for x in given) or pairs.bounds.softcap or pairs.count.sum() < LEAST:
        return False
    claimed = stand.device.array(call.claimed[0])
    step = max(1, MOST // int(pairs.count.max()))
    for first in range(0, len(pairs.q), step):
        _judge(call, stand, mark, pairs.part(slice(first, first + step)), claimed)
    return True


def _judge(call: Call, stand: Stand, mark: Memory, pairs: Pairs, claimed: Memory) -> None:
    device, (q, k, v) = stand.device, (stand.hold(x) for x in call.inputs[:3] if x is not None)
    r, most, d, e = len(pairs.q), int(pairs.count.max()), q.shape[1], v.shape[1]
    kind, bounds = SUFFIX[call.claimed[0].dtype], pairs.bounds
    at, k_first, v_first, count, y_at = map(device.array, (pairs.q, pairs.k, pairs.v, pairs.count, pairs.y))
    exact, low, high = (device.empty((r, most), np.float64) for _ in range(3))
    splits = max(1, min(SPLITS, most // KEYS))
    totals, z = device.empty((r, 2), np.float64), device.empty((r, 2, e), np.float64)
    parts = device.empty((r, splits, 2, e), np.float64)
    device.launch(
        *("attention", f"score_keys_{kind}", (-(-most // THREADS), r), THREADS),
        *(q, at, k, k_first, count, np.int64(most), np.int32(d)),
        *map(np.float64, (bounds.scale, bounds.product, bounds.score)),
        *(exact, low, high),
    )
    device.launch(
        *("attention", "weigh_keys", r, THREADS, exact, low, high, count, np.int64(most)),
        *(np.float64(bounds.exponent), np.float64(bounds.exponential), totals),
    )
    sums = v, v_first, count, np.int64(most), np.int32(e)
    device.launch("attention", f"sum_values_{kind}", (splits, r), THREADS, *sums, exact, parts)
    device.launch("attention", "join_values", r, THREADS, parts, np.int32(splits), np.int32(e), totals, z)
    device.launch("attention", f"move_values_{kind}", (splits, r), THREADS, *sums, high, z, parts)
    device.launch(
        *("attention", f"judge_attention_{kind}", r, THREADS, parts, np.int32(splits), np.int32(e), totals, z),
        *(device.array(pairs.sums), count, claimed, y_at, mark),
    )
