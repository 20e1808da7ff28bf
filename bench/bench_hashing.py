"""Row digests against the blake3 package: over the same bytes as one message, and called once a row.

`GB/s` in extra_info is bytes of rows over the median, `Mrows/s` rows. Threads are NUMBA_NUM_THREADS.
"""

import numba
import numpy as np
import pytest
from blake3 import blake3

from gpu import hashing
from proof.digest import KEYS, Tag, tagged

KEY = KEYS[Tag.ROW]
TOTAL = 1 << 26  # bytes, beyond the caches
WIDTHS = [28, 256, 1536, 2048, 6144, 1 << 16, TOTAL]  # bytes of a row


@pytest.fixture(params=WIDTHS, ids=lambda width: f"{width} B")
def rows(request, benchmark):
    benchmark.group = f"rows of {request.param} bytes"
    return np.random.default_rng(1).integers(0, 256, (TOTAL // request.param, request.param), np.uint8)


def timed(benchmark, step, array):
    benchmark.pedantic(step, args=(array,), rounds=5, warmup_rounds=1)
    median = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(array.nbytes / median / 1e9, 2)
    benchmark.extra_info["Mrows/s"] = round(len(array) / median / 1e6, 3)
    benchmark.extra_info["threads"] = numba.get_num_threads()


def test_row_digests(benchmark, rows):
    some = np.linspace(0, len(rows) - 1, 9).astype(int)
    assert hashing.row_digests(rows)[some].tobytes() == b"".join(tagged(Tag.ROW, rows[row].tobytes()) for row in some)
    timed(benchmark, hashing.row_digests, rows)


def test_tensor_levels(benchmark, rows):
    timed(benchmark, hashing.tensor_levels, rows)


def test_package_one_message(benchmark, rows):
    threads = numba.get_num_threads()
    timed(benchmark, lambda array: blake3(array.data, key=KEY, max_threads=threads).digest(), rows)


def test_package_row_by_row(benchmark, rows):
    some = rows[: max(1, len(rows) // 16)]
    timed(benchmark, lambda array: [blake3(row.data, key=KEY).digest() for row in array], some)


@pytest.mark.parametrize("opened", [4, 16, 400])
def test_opening_of_few_rows(benchmark, opened):
    """What the verifier does a tensor: digests of opened rows of 256 bytes, and the root they lead to."""
    benchmark.group = "opened rows of 256 bytes of a tensor of 40000"
    array = np.random.default_rng(2).standard_normal((40_000, 64)).astype(np.float32)
    levels, index = hashing.tensor_levels(array), np.linspace(0, 39_999, opened).astype(np.int64)
    siblings, few = hashing.multiproof(levels, index), array[index]

    def root():
        return hashing.multiproof_root(len(array), index, hashing.row_digests(few), siblings)

    assert benchmark(root) == hashing.root(levels)
    benchmark.extra_info["Mrows/s"] = round(opened / benchmark.stats.stats.median / 1e6, 3)
