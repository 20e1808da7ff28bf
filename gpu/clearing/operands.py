"""A matrix product on a device: what the kernels of products read, whatever op it came from."""

from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16

from gpu.device import Memory

SUFFIX = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(bfloat16): "bf16"}


@dataclass(frozen=True)
class Operands:
    """The claim y = x w + bias, of one dtype: x (m, k), w (k, n), y (m, n), rounded `rounds` times.

    Row i of x is row x_at[i] of `x`, which is C-contiguous with k columns. Entry (l, j) of w lies w_first + (l, j) @
    w_strides elements into `w`, one of the strides being 1. `bias` has 0 rows (where it is zero; the array is then
    not read), 1 row (for all of y) or m.
    """

    x: Memory  # (rows at hand, k)
    x_at: Memory  # int64 (m,)
    w: Memory
    w_strides: tuple[int, int]  # elements
    w_first: int
    y: Memory  # (m, n), C-contiguous
    bias: Memory  # float64 (bias_rows, n)
    bias_rows: int
    k: int
    dtype: np.dtype  # of x, w and y; one of SUFFIX
    rounds: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, k, n)"""
        return self.y.shape[0], self.k, self.y.shape[1]

    @property
    def kind(self) -> str:
        """How its kernels are called: NAME_bf16, NAME_f16, NAME_f32."""
        return SUFFIX[self.dtype]
