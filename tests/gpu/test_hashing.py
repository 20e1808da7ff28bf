"""Fast row digests and trees against their definitions in proof/, bit for bit, and every lie about counts."""

import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu import hashing
from proof import merkle
from proof.digest import Tag, tagged
from proof.errors import Reason, Rejected

WIDTHS = [0, 1, 3, 28, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2048, 3072, 3073, 5120, 8191, 8192, 8193, 20001]
DTYPES = [np.bool_, np.int8, np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64]


def noise(*shape, dtype=np.uint8, seed=0):
    data = np.random.default_rng(seed).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return data.reshape(-1).view(dtype).reshape(shape)


def defined(array):
    rows = array.reshape(math.prod(array.shape[:-1]), array.shape[-1] if array.ndim else 1)
    return b"".join(tagged(Tag.ROW, row.tobytes()) for row in rows)


def digests(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def tree_of(leaves):
    return merkle.build(merkle.BLAKE3, [bytes(leaf) for leaf in leaves])


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_width_and_count_have_the_digests_of_the_definition(width):
    for rows in (1, 2, 7, 8, 9, 17):
        array = np.random.default_rng(rows).integers(0, 256, (rows, width), np.uint8)
        assert hashing.row_digests(array).tobytes() == defined(array)


@given(st.integers(0, 40), st.integers(0, 2500), st.integers(0, 2**32))
@settings(deadline=None)
def test_row_digests_are_those_of_the_definition(rows, width, seed):
    array = np.random.default_rng(seed).integers(0, 256, (rows, width), np.uint8)
    assert hashing.row_digests(array).tobytes() == defined(array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 7), (2, 3, 4, 33), (0, 4)])
def test_every_dtype_and_rank(dtype, shape):
    array = noise(*shape, dtype=dtype)
    assert hashing.row_digests(array).tobytes() == defined(array)


def test_rows_without_elements_have_the_digest_of_no_bytes():
    assert hashing.row_digests(np.zeros((3, 0), np.float32)).tobytes() == 3 * tagged(Tag.ROW, b"")


def test_layout_and_alignment_are_no_matter():
    array = noise(12, 40, dtype=np.float32)
    expected = defined(array)
    unaligned = np.frombuffer(b"!" + array.tobytes(), np.uint8)[1:].view(np.float32).reshape(array.shape)
    spread = np.zeros((12, 80), np.float32)[:, ::2]
    spread[:] = array
    for same in (np.asfortranarray(array), unaligned, spread, array[::-1][::-1]):
        assert hashing.row_digests(same).tobytes() == expected


def test_rows_are_read_to_their_end_and_no_further(tmp_path):
    """Behind the rows lies a page that the file has lost: whoever reads it is killed."""
    path = tmp_path / "rows"
    np.random.default_rng(3).integers(0, 256, 2 * mmap.PAGESIZE, np.uint8).tofile(path)
    page = np.memmap(path, np.uint8, "r")[: mmap.PAGESIZE]
    os.truncate(path, mmap.PAGESIZE)
    for width in (1, 28, 61, 64, 100, 1000, 1100, 4000):
        rows = page[page.size % width :].reshape(-1, width)
        assert hashing.row_digests(rows).tobytes() == defined(rows)


@pytest.mark.parametrize("size", [*range(34), 1000])
def test_levels_are_those_of_the_definition(size):
    leaves = digests(size)
    assert [level.tobytes() for level in hashing.levels(leaves)] == [b"".join(level) for level in tree_of(leaves)]


def test_a_large_tree_has_the_root_of_the_definition():
    leaves = digests(hashing.SHARE // 16 + 3)
    assert hashing.root(hashing.levels(leaves)) == merkle.root_hash(tree_of(leaves))


def test_a_tensor_without_rows_has_the_root_of_the_empty_tree():
    levels = hashing.tensor_levels(np.zeros((0, 4), np.float32))
    none = np.zeros(0, np.int64)
    assert hashing.root(levels) == merkle.BLAKE3.empty
    assert hashing.multiproof(levels, none).shape == (0, 32)
    assert hashing.multiproof_root(0, none, levels[0][:0], levels[0][:0]) == merkle.BLAKE3.empty


@given(st.integers(1, 200), st.data())
@settings(deadline=None)
def test_multiproofs_are_those_of_the_definition_and_lead_to_the_root(size, data):
    index = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    leaves = digests(size, seed=size)
    tree, levels = tree_of(leaves), hashing.levels(leaves)
    siblings = hashing.multiproof(levels, index)
    assert siblings.tobytes() == b"".join(merkle.multiproof(tree, index.tolist()))
    assert hashing.multiproof_root(size, index, leaves[index], siblings) == hashing.root(levels)


@given(st.integers(0, 20), st.lists(st.integers(-2, 21), max_size=6), st.integers(0, 6), st.integers(0, 12))
@settings(deadline=None)
def test_any_counts_are_judged_as_the_definition_judges_them(size, index, opened, listed):
    leaves, siblings = digests(opened, seed=1), digests(listed, seed=2)

    def defined_root():
        return merkle.multiproof_root(merkle.BLAKE3, size, index, [*map(bytes, leaves)], [*map(bytes, siblings)])

    def fast_root():
        return hashing.multiproof_root(size, np.array(index, np.int64), leaves, siblings)

    assert outcome(fast_root) == outcome(defined_root)


def outcome(root):
    try:
        return root()
    except Rejected as rejection:
        return rejection.reason


LIES = {
    "a leaf too few": lambda c: c | {"digests": c["digests"][1:]},
    "a leaf too many": lambda c: c | {"digests": np.concatenate([c["digests"], c["digests"][:1]])},
    "a sibling too few": lambda c: c | {"siblings": c["siblings"][:-1]},
    "a sibling too many": lambda c: c | {"siblings": np.concatenate([c["siblings"], c["siblings"][:1]])},
    "siblings of 31 bytes": lambda c: c | {"siblings": c["siblings"][:, 1:]},
    "flat siblings": lambda c: c | {"siblings": c["siblings"].reshape(-1)},
    "unsorted leaves": lambda c: c | {"index": c["index"][::-1]},
    "a leaf twice": lambda c: c | {"index": c["index"][[0, 0, 2]]},
    "outside the tree": lambda c: c | {"index": c["index"] + 100},
    "before the tree": lambda c: c | {"index": c["index"] - 4},
    "nothing opened": lambda c: c | {"index": c["index"][:0], "digests": c["digests"][:0]},
}


def claim():
    index = np.array([3, 10, 99])
    levels = hashing.levels(digests(100))
    opened = {"size": 100, "index": index, "digests": levels[0][index]}
    return hashing.root(levels), opened | {"siblings": hashing.multiproof(levels, index)}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_no_lie_about_counts_has_a_root(lie):
    _, opened = claim()
    with pytest.raises(Rejected) as rejection:
        hashing.multiproof_root(**lie(opened))
    assert rejection.value.reason is Reason.OPENING


@pytest.mark.parametrize("part", ["digests", "siblings"])
def test_every_byte_counts_and_nothing_given_is_changed(part):
    root, opened = claim()
    before = {name: np.copy(value) for name, value in opened.items()}
    for at in range(0, opened[part].size, 7):
        opened[part].reshape(-1)[at] ^= 1
        assert hashing.multiproof_root(**opened) != root
        opened[part].reshape(-1)[at] ^= 1
    assert hashing.multiproof_root(**opened) == root
    assert all(np.array_equal(opened[name], value) for name, value in before.items())


def test_threads_agree_and_load_what_was_compiled():
    """Another process, with three threads, makes the same tree without compiling the kernel again."""
    block = (
        "import numpy as np\n"
        "from gpu import blake3, hashing\n"
        "array = np.arange(60_013 * 25, dtype=np.float32).reshape(-1, 25)\n"
        "print(hashing.root(hashing.tensor_levels(array)).hex(), sum(blake3.digest_rows.stats.cache_misses.values()))\n"
    )
    array = np.arange(60_013 * 25, dtype=np.float32).reshape(-1, 25)
    root = merkle.root_hash(tree_of(tagged(Tag.ROW, row.tobytes()) for row in array))
    assert hashing.root(hashing.tensor_levels(array)) == root
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"NUMBA_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == [root.hex(), "0"]
