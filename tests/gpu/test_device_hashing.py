"""Row digests and trees made on a device against those of the CPU, bit for bit: any width, stride, dtype and count."""

from itertools import permutations

import ml_dtypes
import numpy as np
import pytest
from host_device import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu import forest, hashing
from gpu.resident import Resident, Segment

KIB = 1024
WIDTHS = [0, 1, 3, 28, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2048, 3072, 3073, 8192, 28672]
LONG = [KIB * 512, KIB * 512 + 1, KIB * 600 + 5, KIB * 1024, KIB * 1024 + 64, KIB * 2048, KIB * 2100]
DTYPES = [np.bool_, np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.int64]


def noise(*shape, dtype=np.uint8, seed=0):
    data = np.random.default_rng(seed).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return data.reshape(-1).view(dtype).reshape(shape)


def same(levels, array):
    wanted = hashing.tensor_levels(array)
    assert len(levels) == len(wanted)
    assert all(np.array_equal(*pair) for pair in zip(levels, wanted, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_trees_of_any_width_and_count(device, width):
    arrays = [np.random.default_rng(n).integers(0, 256, (n, width), np.uint8) for n in (0, 1, 2, 3, 7, 33)]
    for levels, array in zip(forest.plant([Resident.of(device, a) for a in arrays]), arrays, strict=True):
        same(levels, array)


@pytest.mark.parametrize("width", LONG)
def test_rows_longer_than_a_block_of_threads_reduces_at_once(device, width):
    array = np.random.default_rng(width).integers(0, 256, (2, width), np.uint8)
    same(forest.plant([Resident.of(device, array)])[0], array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 7), (2, 3, 4, 33), (0, 4), (1000, 2)])
def test_every_dtype_and_rank(device, dtype, shape):
    array = noise(*shape, dtype=dtype)
    same(forest.plant([Resident.of(device, array)])[0], array)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1500)), max_size=6))
@settings(deadline=None, max_examples=30)
def test_many_tensors_at_once(sizes):
    arrays = [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)]
    residents = [Resident.of(HostDevice(), array) for array in arrays]
    for levels, array in zip(forest.plant(residents), arrays, strict=True):
        same(levels, array)
    for digests, array in zip(forest.row_digests(residents), arrays, strict=True):
        assert np.array_equal(digests, hashing.row_digests(array))


def test_the_steps_of_a_generation_are_one_tensor_of_heads_first_rows(device):
    """(heads, tokens, c) made of a prefill (tokens, heads, c) seen from its heads, and of single steps."""
    heads, width, counts = 3, 5, (7, 1, 1, 2)
    parts = [noise(count, heads, width, dtype=np.float32, seed=i) for i, count in enumerate(counts)]
    total, segments, start = sum(counts), [], 0
    for part in parts:
        memory, row = device.array(part), 4 * width
        segments.append(
            Segment(
                device.pointer(memory), (1, heads, len(part)), (0, row, heads * row), row, start, (0, total, 1), memory
            )
        )
        start += len(part)
    whole = np.concatenate(parts).transpose(1, 0, 2)
    resident = Resident(device, np.dtype(np.float32), whole.shape, tuple(segments))
    same(forest.plant([resident])[0], np.ascontiguousarray(whole))
    assert np.array_equal(resident.numpy(), whole)
    rows = np.array([20, 0, 32, 20, 10, 11])
    assert np.array_equal(resident.take(rows), whole.reshape(-1, width)[rows])
    assert resident.take(rows[:0]).shape == (0, width)


@pytest.mark.parametrize("order", [*permutations(range(3))])
@pytest.mark.parametrize("cut", [(slice(None),) * 3, (slice(1, 3), slice(None, None, -1), slice(0, 5, 2))], ids=str)
def test_any_view_of_three_axes(device, order, cut):
    """Rows of a permuted, sliced, turned view, described by its strides alone."""
    whole = device.array(noise(4, 3, 5, 7, dtype=np.float32))
    host = device.numpy(whole)
    view = host[cut].transpose(*order, 3)
    start = view.__array_interface__["data"][0] - host.__array_interface__["data"][0]
    a, b, c = view.shape[:3]
    segment = Segment(device.pointer(whole) + start, (a, b, c), view.strides[:3], 28, 0, (b * c, c, 1), whole)
    resident = Resident(device, host.dtype, view.shape, (segment,))
    same(forest.plant([resident])[0], view)
    assert np.array_equal(resident.numpy(), view)


def test_a_row_may_lie_once_for_many(device):
    memory = device.array(noise(1, 40))
    segment = Segment(device.pointer(memory), (2, 1, 3), (0, 0, 0), 40, 0, (3, 0, 1), memory)
    resident = Resident(device, np.dtype(np.uint8), (6, 40), (segment,))
    same(forest.plant([resident])[0], np.repeat(noise(1, 40), 6, axis=0))


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [-160, 100, 132, 160, 161])
def test_rows_lie_anywhere(device, offset, stride):
    memory = device.array(np.random.default_rng(0).integers(0, 256, 4000, np.uint8))
    start = offset + (2000 if stride < 0 else 0)
    segment = Segment(device.pointer(memory) + start, (1, 1, 9), (0, 0, stride), 100, 0, (0, 0, 1), memory)
    host = device.numpy(memory)
    wanted = np.stack([host[start + i * stride :][:100] for i in range(9)])
    same(forest.plant([Resident(device, np.dtype(np.uint8), (9, 100), (segment,))])[0], wanted)


def test_opened_rows_lead_to_the_root_of_a_planted_tree(device):
    array = noise(300, 24, dtype=np.float32)
    levels = forest.plant([Resident.of(device, array)])[0]
    index = np.array([0, 17, 18, 299])
    siblings = hashing.multiproof(levels, index)
    found = hashing.multiproof_root(300, index, hashing.row_digests(array[index]), siblings)
    assert found == hashing.root(levels)


def test_segments_that_do_not_make_the_tensor_are_refused(device):
    memory = device.zeros(64, np.uint8)
    segment = Segment(device.pointer(memory), (1, 1, 4), (0, 0, 16), 16, 0, (0, 0, 1), memory)
    for shape, segments in (((5, 16), (segment,)), ((4, 8), (segment,)), ((4, 16), ()), ((4, 16), (segment, segment))):
        with pytest.raises(ValueError, match="are no tensor of"):
            Resident(device, np.dtype(np.uint8), shape, segments)
