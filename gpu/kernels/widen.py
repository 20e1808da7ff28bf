"""What kernels read: float64, float32, int8 and uint8, and bfloat16 as its bits. Numba has no 16-bit floats."""

from typing import Any

import ml_dtypes
import numba
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


def bits(array: Raw) -> Raw:
    """`array` as `raw` gives it, but a bfloat16 as uint16, for kernels that `widen` what they read."""
    if array.dtype != ml_dtypes.bfloat16:
        return raw(array)
    view = np.ascontiguousarray(array).view(np.uint16)
    view.flags.writeable = False
    return view


@numba.njit(nogil=True, cache=True, error_model="numpy")
def widen(values, row):  # type: ignore[no-untyped-def]
    """`row` = values; integers of 16 bits are those of a bfloat16."""
    if values.itemsize == 2:
        for d in range(len(values)):
            row[d] = np.uint32(np.uint32(values[d]) << np.uint32(16)).view(np.float32)
    else:
        for d in range(len(values)):
            row[d] = values[d]
