"""The device's part in a verification: it clears nodes, and what it does not clear the reference judges.

A kernel clears an entry only where the reference would accept it for certain (kernels/judge.cuh). So the device can
neither pass what the CPU refuses nor refuse anything by itself: verdicts, reasons and words are the same without it.
What finds no room on it is the CPU's as well.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu import hashing
from gpu.device import Device, Memory
from gpu.forest import row_digests
from gpu.ops.call import Call, Measure, Op, RowIds, Tensor
from gpu.resident import Resident

Array = npt.NDArray[Any]

WORDS = 3  # of a mark: bits of the largest ratio, entries judged, entries left to the reference
LEAST = 2**12  # claimed entries below which a launch costs more than it saves
SHARE = 0.5  # of a device's free memory that may hold weights


class Shelf:
    """Copies of host arrays on a device, which nobody writes to meanwhile; beyond a budget the oldest are dropped."""

    def __init__(self, device: Device, budget: float) -> None:
        self.device = device
        self._budget, self._held = budget, 0
        self._copies: dict[tuple[object, ...], tuple[Array, Memory]] = {}  # with the array: its address stays its own

    def get(self, array: Array) -> Memory:
        key = (array.ctypes.data, array.shape, array.strides, array.dtype)
        kept = self._copies.pop(key, None)
        if kept is None:
            kept = array, self.device.array(array)
            self._held += kept[1].nbytes
        self._copies[key] = kept
        while self._held > self._budget and len(self._copies) > 1:
            self._held -= self._copies.pop(next(iter(self._copies)))[1].nbytes
        return kept[1]


def shelf_of(device: Device | None) -> Shelf | None:
    """Where a process keeps weights between verifications on this device."""
    return Shelf(device, SHARE * device.free()) if device else None


class Stand:
    """One verification on a device. `weights` outlives it, `nodes` is how many the graph has."""

    def __init__(self, weights: Shelf, nodes: int) -> None:
        self.device = weights.device
        self._weights, self._opened = weights, Shelf(weights.device, float("inf"))
        self._marks = self.device.zeros((nodes, WORDS), np.uint64)
        self._found: Array | None = None
        self._entries: dict[int, int] = {}  # claimed of each node that the device works on

    def hold(self, tensor: Tensor) -> Memory:
        """The rows at hand, (rows, width), on the device."""
        return (self._weights if tensor.index is None else self._opened).get(tensor.data)

    def row_digests(self, opened: Sequence[Array]) -> list[Array]:
        """Digests (rows, 32) of the rows of each tensor that was opened."""
        try:
            held = [Resident.at(self.device, self._opened.get(rows), rows.dtype, rows.shape) for rows in opened]
            return row_digests(held)
        except MemoryError:
            self._opened = Shelf(self.device, float("inf"))
            return [hashing.row_digests(rows) for rows in opened]

    def places(self, tensor: Tensor, rows: RowIds) -> Memory:
        """Where `rows` lie among those at hand, int64. Raises KeyError for one that was not opened."""
        return self.device.array(tensor.places(rows))

    def offer(self, op: Op, call: Call) -> None:
        """Have the device work on a node, if it can. Where an op's function raises, the node is not cleared."""
        index = call.site.node.index
        if op.clear is not None and op.clear(call, self, self._marks[index]):
            self._entries[index] = sum(values.size for values in call.claimed)

    def cleared(self, node: int) -> Measure | None:
        """What was covered of a node, every entry of it, if it is cleared. Waits for all that was offered."""
        if node not in self._entries:
            return None
        if self._found is None:
            self._found = self.device.numpy(self._marks)
        worst, judged, left = self._found[node]
        if left or judged != self._entries[node]:
            return None
        return Measure(self._entries[node], float(worst.view(np.float64)))
