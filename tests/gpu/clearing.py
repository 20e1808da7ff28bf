"""A node's claims on a device beside the reference: what the one clears the other must accept."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from gpu.clearing.stand import Shelf, Stand
from gpu.ops.call import Call, Measure, Op
from proof.errors import Rejected
from proof.policy import policy
from proof.sampling import Draw
from tests.gpu.nodes import Run, opened, returned

RATIO = 1e-3  # relative: how far the reported ratios may be apart


def call_of(op: Op, run: Run, rows: Sequence, claimed: Sequence, rules: str = "standard") -> Call:
    return Call(
        site=run.site,
        inputs=opened(op, run, rows),
        rows=tuple(rows),
        claimed=tuple(claimed),
        policy=policy(rules),
        draw=Draw(bytes(32), "node/0"),
        outputs=returned(run, rows, claimed),
    )


def cleared(device, op: Op, call: Call) -> Measure | None:
    """What the device clears; None where it leaves something, or has no kernel (see `taken`)."""
    stand = Stand(Shelf(device, 1e9), call.site.node.index + 1)
    with suppress(Rejected):
        stand.offer(op, call)
    return stand.cleared(call.site.node.index)


def taken(device, op: Op, call: Call) -> bool:
    """Whether the device has a kernel for the call."""
    stand = Stand(Shelf(device, 1e9), call.site.node.index + 1)
    with suppress(Rejected):
        return bool(op.clear is not None and op.clear(call, stand, stand._marks[call.site.node.index]))
    return False


def accepts(op: Op, call: Call) -> Measure | None:
    try:
        return op.check(call)
    except Rejected:
        return None


def agree(device, op: Op, call: Call) -> bool:
    """Whether the device clears the call, having held it to what the reference says."""
    found = cleared(device, op, call)
    if found is None:
        return False
    wanted = accepts(op, call)
    assert wanted is not None, "the device clears what the reference rejects"
    assert found.entries == wanted.entries
    assert abs(found.ratio - wanted.ratio) <= RATIO * max(found.ratio, wanted.ratio)
    return True


def lies(claim: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Gross forgeries of some claimed rows; those that change nothing are left out."""
    wide = np.nan_to_num(claim.astype(np.float64), posinf=1.0, neginf=-1.0)
    size = np.sqrt(np.mean(wide**2)) or 1.0
    one, nan, infinite = wide.copy(), wide.copy(), wide.copy()
    at = np.unravel_index(int(np.argmax(np.abs(wide))), wide.shape)
    one[at], nan[at], infinite[at] = one[at] * 1.1 + 0.1 * size, np.nan, np.inf
    found = {
        "zeros": np.zeros_like(wide),
        "noise": rng.standard_normal(wide.shape) * size,
        "negated": -wide,
        "rows swapped": wide[::-1],
        "one entry": one,
        "NaN": nan,
        "infinity": infinite,
    }
    with np.errstate(all="ignore"):
        cast = {name: values.astype(claim.dtype) for name, values in found.items()}
    return {
        name: values
        for name, values in cast.items()
        if not np.array_equal(values.astype(np.float64), claim.astype(np.float64), equal_nan=True)
    }
