"""Tensors where an engine left them: rows somewhere on a device, in one piece or in many."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu.device import Device, Memory

Array = npt.NDArray[Any]
RowIds = npt.NDArray[np.int64]
Three = tuple[int, int, int]

WARP_ROWS = 128  # threads of a block that gathers a row


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

    def places_of(self) -> RowIds:
        """The tensor's row of each own row, in order."""
        return self.first + self._grid(self.places)

    def addresses(self) -> RowIds:
        return self.address + self._grid(self.strides)

    def _grid(self, steps: Three) -> RowIds:
        i, j, k = (np.arange(count, dtype=np.int64) * step for count, step in zip(self.dims, steps, strict=True))
        return (i[:, None, None] + j[:, None] + k).reshape(-1)


@dataclass(frozen=True)
class Resident:
    """A whole tensor on a device, its rows in segments that cover each of them once."""

    device: Device
    dtype: np.dtype
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        held, width = sum(segment.rows for segment in self.segments), self.width * self.dtype.itemsize
        if held != self.rows or any(segment.rows and segment.width != width for segment in self.segments):
            raise ValueError(f"segments of {held} rows are no tensor of {self.dtype}{list(self.shape)}")

    @classmethod
    def of(cls, device: Device, array: Array) -> "Resident":
        """A copy of `array` on the device."""
        return cls.at(device, device.array(array), array.dtype, array.shape)

    @classmethod
    def at(cls, device: Device, memory: Memory, dtype: np.dtype, shape: tuple[int, ...]) -> "Resident":
        """A tensor that lies in `memory`, C-contiguous."""
        rows, width = prod(shape[:-1]), (shape[-1] if shape else 1) * dtype.itemsize
        segment = Segment(device.pointer(memory), (1, 1, rows), (0, 0, width), width, 0, (0, 0, 1), memory)
        return cls(device, dtype, shape, (segment,))

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    def take(self, rows: RowIds) -> Array:
        """Rows by number, (len(rows), width): they alone travel to the host."""
        size = self.width * self.dtype.itemsize
        if not len(rows) or not size:
            return np.zeros((len(rows), self.width), self.dtype)
        found = self.device.empty((len(rows), size), np.uint8)
        at = self.device.array(self._addresses()[rows])
        self.device.launch("gather", "gather_rows", len(rows), WARP_ROWS, at, np.int64(size), found)
        return self.device.numpy(found).view(self.dtype)

    def numpy(self) -> Array:
        return self.take(np.arange(self.rows)).reshape(self.shape)

    def _addresses(self) -> RowIds:
        addresses = np.empty(self.rows, np.int64)
        for segment in self.segments:
            addresses[segment.places_of()] = segment.addresses()
        return addresses


def digest_table(segments: Sequence[Segment], firsts: Sequence[int], rows_a_block: Sequence[int]) -> tuple[Array, int]:
    """The table of kernels/rows.cu, and how many blocks it takes. `firsts`: where each segment's tensor begins."""
    table = np.zeros((len(segments), 16), np.int64)
    blocks = 0
    for line, segment, first, rows in zip(table, segments, firsts, rows_a_block, strict=True):
        line[:14] = (
            *(segment.address, *segment.dims, *segment.strides, segment.width),
            *(first + segment.first, *segment.places, blocks, rows),
        )
        blocks += -(-segment.rows // rows)
    return table, blocks
