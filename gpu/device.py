"""Where arithmetic runs: the only question about hardware.

A device holds arrays and launches the kernels of gpu/kernels/*.cu on them. On the CPU there is none: NumPy and Numba
work on NumPy arrays. Arrays of a device are opaque but for `shape`, `dtype`, `nbytes` and slices of the first axis.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpu.kernels import source
from proof.errors import Malformed

Array = npt.NDArray[Any]
Memory = Any  # an array of a device
Scalar = np.generic | Memory

DEFAULT = "auto"
CHOICES = (DEFAULT, "cpu", "cuda")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Device(Protocol):
    """One stream of work: launches and copies are done in the order they were asked for."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str:
        """What PyTorch and ONNX Runtime call it."""

    def free(self) -> int:
        """Bytes of its memory that nobody holds."""

    def array(self, values: Array) -> Memory:
        """A copy on the device, C-contiguous; bfloat16 and booleans as their bits, uint16 and uint8."""

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Memory: ...

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Memory: ...

    def numpy(self, memory: Memory) -> Array:
        """A copy on the host. Waits for all work before it."""

    def pointer(self, memory: Memory) -> int: ...

    def pinned(self, nbytes: int) -> Array:
        """Host memory (uint8) that the device's kernels read and write at its own address."""

    def launch(self, file: str, kernel: str, grid: int | tuple[int, int], block: int, *args: Scalar) -> None:
        """Run a kernel on `grid` blocks of `block` threads. Arguments are arrays of this device and NumPy scalars of
        exactly the parameters' types. A grid of 0 runs nothing."""


class Cuda:
    """The current CUDA device, through CuPy, on the default stream: there PyTorch and ONNX Runtime queue too."""

    place = "cuda"

    def __init__(self) -> None:
        """Raises Malformed where there is no CuPy, no driver or no device."""
        try:
            import cupy  # noqa: PLC0415  # machines without CUDA import this file

            cupy.cuda.runtime.getDeviceCount()
            self._cupy = cupy
            self.name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
        except ImportError as error:
            raise Malformed("no CuPy: pip install 'assay[cuda]', or run on the CPU with ASSAY_DEVICE=cpu") from error
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise Malformed(f"no CUDA device: {error}; run on the CPU with ASSAY_DEVICE=cpu") from error
        self._modules: dict[str, Any] = {}

    def free(self) -> int:
        return int(self._cupy.cuda.runtime.memGetInfo()[0]) + int(self._cupy.get_default_memory_pool().free_bytes())

    def array(self, values: Array) -> Memory:
        return self._cupy.asarray(bits(values))

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Memory:
        return self._cupy.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Memory:
        return self._cupy.zeros(shape, dtype)

    def numpy(self, memory: Memory) -> Array:
        array: Array = self._cupy.asnumpy(memory)
        return array

    def pointer(self, memory: Memory) -> int:
        return int(memory.data.ptr)

    def pinned(self, nbytes: int) -> Array:
        memory = self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
        return np.frombuffer(memory, np.uint8, nbytes)

    def launch(self, file: str, kernel: str, grid: int | tuple[int, int], block: int, *args: Scalar) -> None:
        x, y = grid if isinstance(grid, tuple) else (grid, 1)
        if x and y:
            self._kernel(file, kernel)((int(x), int(y)), (block,), args)

    def _kernel(self, file: str, kernel: str) -> Any:
        if file not in self._modules:
            self._modules[file] = self._cupy.RawModule(code=source.text(file), options=source.OPTIONS)
        return self._modules[file].get_function(kernel)


def bits(values: Array) -> Array:
    """`values` C-contiguous, in a dtype that every device has."""
    plain = np.ascontiguousarray(values).view(np.ndarray).reshape(values.shape)
    if plain.dtype == BFLOAT16:
        return plain.view(np.uint16)
    return plain.view(np.uint8) if plain.dtype == np.bool_ else plain


@cache
def select(choice: str) -> Device | None:
    """The device that `choice` asks for: none for `cpu`; for `auto` the CUDA device, if there is one.

    Raises Malformed for another word, and for `cuda` where there is none.
    """
    if choice not in CHOICES:
        raise Malformed(f"ASSAY_DEVICE is {choice!r}: use one of {', '.join(CHOICES)}")
    if choice == "cpu":
        return None
    try:
        return Cuda()
    except Malformed:
        if choice == "cuda":
            raise
        return None


def from_env(environ: Mapping[str, str]) -> Device | None:
    """The device that ASSAY_DEVICE asks for. Raises Malformed as `select` does."""
    return select(environ.get("ASSAY_DEVICE", DEFAULT))
