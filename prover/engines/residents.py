"""What a generation leaves behind: torch's tensors, a step a part, kept on a device until rows are asked for.

Steps are joined some at a time, so that tensors lie in few pieces. What is beyond `room` moves to pinned host memory,
the oldest first; it is hashed and opened from there.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch

from gpu.device import Device
from gpu.resident import Resident, Segment

Tensor = Any  # torch's
Run = dict[str, Tensor]  # parts of tensors, of the same tokens
Room = int | Literal["a quarter"] | None  # bytes; a quarter of what is free when a run begins; None: no bound

JOINED = 16  # steps
JOINED_BYTES = 1 << 28
BLOCK = 1 << 28  # bytes of pinned memory asked for at once, powers of two: CuPy rounds to them
ALIGNED = 64
DTYPES = {
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float16: np.dtype(np.float16),
    torch.float32: np.dtype(np.float32),
}


@dataclass(frozen=True)
class Peak:
    """Bytes of rows that a run kept on the device at most, and bytes that it moved to the host."""

    device: int
    host: int


class Kept:
    """The steps of one run. On the device lie at most `room` bytes and the newest step, or layer of a long one."""

    def __init__(self, device: Device | None, room: Room, axis: Callable[[str], int]) -> None:
        """`axis` says where a tensor has its tokens. Without a device nothing is joined, moved or counted."""
        free = device.free() // 4 if device and room == "a quarter" else None
        self._device, self._axis = device, axis
        self._room = free if room == "a quarter" else room
        self._batch = JOINED_BYTES if self._room is None else min(JOINED_BYTES, self._room // 4)
        self._runs: list[Run] = []
        self._sizes: list[int] = []  # of the runs, as far as they lie on the device
        self._steps: list[Run] = []  # not joined yet
        self._form: object = None  # of those
        self._new = self._peak = self._moved = 0
        self._measured: dict[object, int] = {}
        self._block: Any = np.empty(0, np.uint8)

    @property
    def peak(self) -> Peak:
        return Peak(self._peak, self._moved)

    @property
    def bounded(self) -> bool:
        return self._room is not None

    def add(self, step: Run) -> None:
        """Keep a step, and see that no more than `room` bytes stay on the device."""
        if not step:
            return
        if self._device is None:
            self._steps.append(step)
            return
        form = tuple(step), next(iter(step.values())).shape
        if form != self._form:
            self._join()
        self._steps.append(step)
        self._form, self._new = form, self._new + self._size(form, step)
        self._peak = max(self._peak, self._held)
        if len(self._steps) == JOINED or self._new >= self._batch:
            self._join()
        while self._room is not None and self._held > self._room:
            self._move(self._device)

    def parts(self) -> dict[str, list[Tensor]]:
        """The parts of each tensor, in order."""
        if self._device:
            self._join()
        found: dict[str, list[Tensor]] = {}
        for run in [*self._runs, *self._steps]:
            for name, part in run.items():
                found.setdefault(name, []).append(part)
        return found

    @property
    def _held(self) -> int:
        return sum(self._sizes) + self._new

    def _size(self, form: object, step: Run) -> int:
        """Bytes that a step holds; steps of the same form are measured once."""
        if form not in self._measured:
            stores = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in step.values()}
            self._measured[form] = sum(stores.values())
        return self._measured[form]

    def _join(self) -> None:
        """Make one run of the steps that wait, which are of one form; a lone step is left as it is."""
        steps, size = self._steps, self._new
        if not steps:
            return
        run = steps[0]
        if len(steps) > 1:
            run = _joined(steps, self._axis)
            size = sum(part.nbytes for part in run.values())
        self._runs.append(run)
        self._sizes.append(size)
        self._steps, self._new = [], 0

    def _move(self, device: Device) -> None:
        """Copy the oldest run on the device to pinned memory. torch frees its own copy behind the copying."""
        if not self._sizes:
            self._join()
        at = len(self._runs) - len(self._sizes)
        run = self._runs[at]
        left = sum(_aligned(part) for part in run.values())
        for name, part in run.items():
            if len(self._block) < _aligned(part):
                self._block = device.pinned(max(_aligned(part), min(1 << (left - 1).bit_length(), BLOCK)))
            to, self._block = self._block[: part.nbytes], self._block[_aligned(part) :]
            run[name] = torch.from_numpy(to).view(part.dtype).view(part.shape).copy_(part, non_blocking=True)
            left -= _aligned(part)
            self._moved += part.nbytes
        self._sizes.pop(0)


def _joined(steps: Sequence[Run], axis: Callable[[str], int]) -> Run:
    """Steps of one form as one: tensors of a shape are joined together, as each operation costs the same."""
    alike = defaultdict(list)
    for name, part in steps[0].items():
        alike[part.shape, part.dtype, axis(name)].append(name)
    run: Run = {}
    for (_, _, tokens), names in alike.items():
        flat = torch.cat([step[name] for name in names for step in steps])
        parts = flat.unflatten(0, (len(names), len(steps), -1)).movedim(1, tokens - 1)
        run.update(zip(names, parts.flatten(tokens - 1, tokens), strict=True))
    return run


@dataclass(frozen=True)
class Parts:
    """A tensor in parts along `axis`; what moves its elements moves those of the parts, as NumPy would."""

    shape: tuple[int, ...]
    axis: int
    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Tensor], axis: int) -> "Parts":
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return cls(tuple(shape), axis, tuple(parts))

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, shape: tuple[int, ...]) -> "Parts":
        """Raises ValueError where the parts do not stay whole."""
        before, count = math.prod(self.shape[: self.axis]), self.shape[self.axis]
        places = [i for i, size in enumerate(shape) if size == count and math.prod(shape[:i]) == before]
        if not places or math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} in parts along axis {self.axis} cannot be reshaped to {shape}")
        axis = places[0]
        own = [(*shape[:axis], part.shape[self.axis], *shape[axis + 1 :]) for part in self.parts]
        return Parts(shape, axis, tuple(part.reshape(to) for part, to in zip(self.parts, own, strict=True)))

    def transpose(self, perm: Sequence[int]) -> "Parts":
        shape = tuple(self.shape[i] for i in perm)
        return Parts(shape, list(perm).index(self.axis), tuple(part.permute(*perm) for part in self.parts))

    def __getitem__(self, rows: slice) -> "Parts":
        """A window of the axis that has the parts, which must be the first."""
        if self.axis:
            raise ValueError(f"{self.shape} is in parts along axis {self.axis}, not along its rows")
        start, stop, _ = rows.indices(self.shape[0])
        return Parts.of(window(self.parts, 0, start, stop), 0)

    def resident(self, device: Device) -> Resident:
        """Where the rows lie, nothing copied unless a row's elements do not follow each other."""
        segments, first = [], 0
        places = _strides(self.shape[:-1])
        for part in self.parts:
            whole = part if part.stride(-1) == 1 or part.shape[-1] == 1 else part.contiguous()
            steps = [stride * whole.itemsize for stride in whole.stride()[:-1]]
            segments.append(
                Segment(
                    address=whole.data_ptr(),
                    dims=_three(whole.shape[:-1], 1),
                    strides=_three(steps, 0),
                    width=whole.shape[-1] * whole.itemsize,
                    first=first * places[self.axis],
                    places=_three(places, 0),
                    owner=whole,
                )
            )
            first += part.shape[self.axis]
        return Resident(device, DTYPES[self.parts[0].dtype], self.shape, tuple(segments))


def window(parts: Sequence[Tensor], axis: int, start: int, stop: int) -> list[Tensor]:
    """What of `parts` lies from `start` to `stop`, counted over all of them; of the first at least an empty part."""
    found, at = [], 0
    for part in parts:
        count = part.shape[axis]
        low, high = max(start - at, 0), min(stop - at, count)
        if low < high:
            found.append(part if high - low == count else part.narrow(axis, low, high - low))
        at += count
    return found or [parts[0].narrow(axis, 0, 0)]


def settled(network: Any) -> None:
    """Wait for all that torch was asked to do."""
    if network.device.type == "cuda":
        torch.cuda.synchronize(network.device)


def _aligned(part: Tensor) -> int:
    return -(-int(part.nbytes) // ALIGNED) * ALIGNED


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of rows in C order."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _three(values: Sequence[int], blank: int) -> tuple[int, int, int]:
    i, j, k = [blank] * (3 - len(values)) + list(values)
    return i, j, k
