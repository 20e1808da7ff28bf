"""Rotary embedding on a device."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu.clearing.operands import SUFFIX
from gpu.clearing.stand import LEAST, Stand
from gpu.device import Memory
from gpu.ops.call import Call

THREADS, BLOCKS = 128, 1024
MOST = 2**31  # entries that 32 bits count


@dataclass(frozen=True)
class Turn:
    """Row by row the row of the tables; `heads` side by side in a row of x; pairs are neighbours if `interleaved`."""

    table_rows: npt.NDArray[np.int64]
    heads: int
    interleaved: bool
    unit: float  # of the radius, beside the magnitudes of both products


def clear_rotary(call: Call, stand: Stand, mark: Memory, turn: Turn) -> bool:
    claimed, (x, cos, sin) = call.claimed[0], call.inputs[:3]
    if x is None or cos is None or sin is None or not LEAST <= claimed.size <= MOST:
        return False
    if x.spec.dtype not in SUFFIX or {claimed.dtype, cos.spec.dtype, sin.spec.dtype} != {x.spec.dtype}:
        return False
    if turn.heads < 1 or x.spec.width % turn.heads or 2 * cos.spec.width > x.spec.width // turn.heads:
        return False
    if sin.spec.width != cos.spec.width or (turn.table_rows >= min(cos.spec.rows, sin.spec.rows)).any():
        return False
    stand.device.launch(
        *("rotary", f"turn_pairs_{SUFFIX[x.spec.dtype]}", min(BLOCKS, -(-claimed.size // THREADS)), THREADS),
        *(stand.hold(x), stand.places(x, call.rows[0])),
        *map(np.uint32, (len(claimed), x.spec.width, turn.heads)),
        *(stand.hold(cos), stand.places(cos, turn.table_rows), stand.hold(sin), stand.places(sin, turn.table_rows)),
        *(
            np.uint32(cos.spec.width),
            np.int32(turn.interleaved),
            np.float64(turn.unit),
            stand.device.array(claimed),
            mark,
        ),
    )
    return True
