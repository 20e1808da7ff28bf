"""Pointwise ops on a device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu.clearing.operands import SUFFIX
from gpu.clearing.stand import LEAST, Stand
from gpu.device import Memory
from gpu.ops.call import Call, RowIds, Tensor

THREADS, BLOCKS = 128, 1024
MOST = 2**31  # entries that 32 bits count


@dataclass(frozen=True)
class Kernel:
    """A kernel of pointwise.cu without its dtype; with what one of a single operand takes besides.

    `given`: the dtype of its operands, where that is not the output's.
    """

    name: str
    factor: float = 0.0
    units: float = 0.0
    given: np.dtype | None = None


def clear_pointwise(
    call: Call, stand: Stand, mark: Memory, kernel: Kernel, beside: Sequence[tuple[Tensor, RowIds]]
) -> bool:
    """Judge the claimed rows; `beside` has each operand with its row beside every one of them."""
    claimed, spec = call.claimed[0], call.site.outputs[0]
    if spec is None or spec.dtype not in SUFFIX or not LEAST <= claimed.size <= MOST:
        return False
    dtype = kernel.given or spec.dtype
    if any(tensor.spec.dtype != dtype or tensor.spec.width not in (1, spec.width) for tensor, _ in beside):
        return False
    given: list[object] = []
    for tensor, rows in beside:
        given += [stand.hold(tensor), stand.places(tensor, rows)]
        if len(beside) > 1:
            given.append(np.int32(tensor.spec.width != spec.width))
    units = () if len(beside) > 1 else (np.float64(kernel.factor), np.float64(kernel.units))
    stand.device.launch(
        *("pointwise", f"{kernel.name}_{SUFFIX[spec.dtype]}", min(BLOCKS, -(-claimed.size // THREADS)), THREADS),
        *(*given, np.uint32(len(claimed)), np.uint32(spec.width), *units, stand.device.array(claimed), mark),
    )
    return True
