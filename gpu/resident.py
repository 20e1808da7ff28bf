"""Tensors where an engine left them: rows somewhere on a device, in one piece or in many."""

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.device import Device, Memory
from proof.graph import Spec

Array = npt.NDArray[Any]
RowIds = npt.NDArray[np.int64]
Three = tuple[int, int, int]

THREADS = 128


@dataclass(frozen=True)
class Segment:
    """Row (i, j, k) of `dims` is `width` bytes at address + (i, j, k) @ strides (bytes), and row first + (i, j, k) @
    places of its tensor. `owner` keeps the memory alive."""

    address: int
    dims: Three
    strides: Three
    width: int
    first: int
    places: Three
    owner: object

    @property
    def rows(self) -> int:
        return prod(self.dims)


@dataclass(frozen=True)
class Resident:
    """A whole tensor on a device, its rows in segments that cover each of them once."""

    device: Device
    dtype: np.dtype
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        held, width = sum(segment.rows for segment in self.segments), self.spec.width * self.dtype.itemsize
        if held != self.rows or any(segment.rows and segment.width != width for segment in self.segments):
            raise ValueError(f"segments of {held} rows are no tensor of {self.dtype}{list(self.shape)}")

    @classmethod
    def of(cls, device: Device, array: Array) -> "Resident":
        """A copy of `array` on the device."""
        return cls.at(device, device.array(array), array.dtype, array.shape)

    @classmethod
    def at(cls, device: Device, memory: Memory, dtype: np.dtype, shape: tuple[int, ...]) -> "Resident":
        """A tensor that lies in `memory`, C-contiguous."""
        spec = Spec(dtype, shape)
        width = spec.width * dtype.itemsize
        segment = Segment(device.pointer(memory), (1, 1, spec.rows), (0, 0, width), width, 0, (0, 0, 1), memory)
        return cls(device, dtype, shape, (segment,))

    @property
    def spec(self) -> Spec:
        return Spec(self.dtype, self.shape)

    @property
    def rows(self) -> int:
        return self.spec.rows

    def take(self, rows: RowIds) -> Array:
        """Rows by number, (len(rows), width): they alone travel to the host."""
        size = self.spec.width * self.dtype.itemsize
        if not len(rows) or not size:
            return np.zeros((len(rows), self.spec.width), self.dtype)
        found = self.device.empty((len(rows), size), np.uint8)
        at = self.device.array(self._addresses()[rows])
        self.device.launch("gather", "gather_rows", len(rows), THREADS, at, np.int64(size), found)
        return self.device.numpy(found).view(self.dtype)

    def numpy(self) -> Array:
        return self.take(np.arange(self.rows)).reshape(self.shape)

    def _addresses(self) -> RowIds:
        alike = defaultdict(list)  # a generation has very many segments, of few forms
        for segment in self.segments:
            alike[segment.dims, segment.strides, segment.places].append((segment.first, segment.address))
        addresses = np.empty(self.rows, np.int64)
        for (dims, strides, places), starts in alike.items():
            first, address = np.array(starts, np.int64).T
            addresses[first[:, None] + _grid(dims, places)] = address[:, None] + _grid(dims, strides)
        return addresses


def _grid(dims: Three, steps: Three) -> RowIds:
    """(i, j, k) @ steps for each (i, j, k) of `dims`, in C order."""
    i, j, k = (np.arange(count, dtype=np.int64) * step for count, step in zip(dims, steps, strict=True))
    return (i[:, None, None] + j[:, None] + k).reshape(-1)
