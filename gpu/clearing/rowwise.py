"""Softmax and normalisations along rows, on a device."""

from dataclasses import dataclass

import numpy as np

from gpu.clearing.operands import SUFFIX
from gpu.clearing.stand import LEAST, Stand
from gpu.device import Memory
from gpu.ops.call import Call, Tensor

THREADS = 128
WIDEST = 2**17  # elements of a row: what kernels/rowwise.cu allows its sums is enough for so many


@dataclass(frozen=True)
class Kernel:
    """A kernel of rowwise.cu without its dtype; what one that normalises takes besides."""

    name: str
    root: bool = False


def clear_rows(
    call: Call,
    stand: Stand,
    mark: Memory,
    kernel: Kernel,
    parameters: tuple[Tensor | None, Tensor | None],
    epsilon: float,
) -> bool:
    """Judge the claimed rows of output 0, each from the same row of input 0; scale and bias are `parameters`."""
    claimed, spec, x = call.claimed[0], call.site.outputs[0], call.inputs[0]
    given = [tensor for tensor in (x, *parameters) if tensor is not None]
    if spec is None or x is None or any(call.site.outputs[1:]) or spec.dtype not in SUFFIX or claimed.size < LEAST:
        return False
    if any(tensor.spec.dtype != spec.dtype or tensor.spec.width != spec.width for tensor in given):
        return False
    if spec.width > WIDEST or any(tensor is not None and len(tensor.data) != 1 for tensor in parameters):
        return False
    held = [stand.hold(x if tensor is None else tensor) for tensor in parameters]
    scale, bias = zip(held, (np.int32(tensor is not None) for tensor in parameters), strict=True)
    more = (*scale, *bias, np.float64(epsilon), np.int32(kernel.root)) if kernel.name == "normalise" else ()
    stand.device.launch(
        *("rowwise", f"{kernel.name}_{SUFFIX[spec.dtype]}", len(claimed), THREADS),
        *(stand.hold(x), stand.places(x, call.rows[0]), np.int64(spec.width), stand.device.array(claimed)),
        *(*more, mark),
    )
    return True
