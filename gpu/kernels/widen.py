"""What kernels read: float64, float32, int8 and uint8. Numba has no 16-bit floats: they are widened before."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[Any]

READABLE = frozenset(map(np.dtype, (np.float64, np.float32, np.int8, np.uint8)))
NARROW = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16)))


def raw(array: Raw) -> Raw:
    """`array` as a kernel takes it: C-contiguous, read-only, of a readable dtype, values unchanged."""
    plain = np.ascontiguousarray(array).view(np.ndarray)
    if plain.dtype not in READABLE:
        plain = plain.astype(np.float32 if plain.dtype in NARROW else np.float64)
    view = plain.view()
    view.flags.writeable = False
    return view
