"""An exact integer product taken to 8 bits again by a float multiplier."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.rounding import U32, Array
from proof.errors import Reason, Rejected

REQUANTISATION = 8 * U32  # relative: int32 to float, the product and quotient of three scales, times, and spare


def compare_requantised(
    claimed: npt.NDArray[Any], product: npt.NDArray[np.int64], scale: Array, zero: npt.NDArray[Any]
) -> None:
    """Check saturate(round(product scale) + zero): any integer that float arithmetic may round to is accepted.

    Raises Rejected(NONFINITE | REEXECUTION).
    """
    exact = product * scale
    if not np.isfinite(exact).all():
        raise Rejected(Reason.NONFINITE, "a scale is zero, NaN or infinite")
    limits = np.iinfo(claimed.dtype)
    slack = REQUANTISATION * np.abs(exact)
    low = np.clip(np.rint(exact - slack) + zero, limits.min, limits.max)
    high = np.clip(np.rint(exact + slack) + zero, limits.min, limits.max)
    wrong = (claimed < low) | (claimed > high)
    if wrong.any():
        where = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        raise Rejected(Reason.REEXECUTION, f"{claimed[where]} where the product requantises to {low[where]:g}")
