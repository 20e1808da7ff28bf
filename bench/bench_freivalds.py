"""Freivalds' test against the product it checks, rows recomputed at the shapes of MiniLM, and the integer test.

extra_info: `product_ms`, the float32 product by BLAS measured in the same run (of 16-bit operands: of their float32
values), and `times_cheaper`, the ratio of the medians. BLAS runs with
OPENBLAS_NUM_THREADS threads, the checks with one.
"""

from functools import cache
from statistics import median
from time import perf_counter

import ml_dtypes
import numpy as np
import pytest

from gpu.freivalds import Product, check, check_entries, check_integers, check_rows, exact_product
from gpu.kernels import fold
from gpu.kernels.entries import statistics, statistics_reference
from proof.policy import policy
from proof.sampling import Draw

FULL, STANDARD = policy("full"), policy("standard")
DRAW = Draw(bytes(32), "bench")
SIZES = [1024, 2048, 4096]
DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
MINILM = [(384, 384)] * 24 + [(384, 1536)] * 6 + [(1536, 384)] * 6


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@cache
def factors(size):
    """Two matrices, their product, and the median of five times that BLAS took, in seconds."""
    x, w, times = normal(1, size, size), normal(2, size, size), []
    for _ in range(5):
        start = perf_counter()
        y = x @ w
        times.append(perf_counter() - start)
    return x, w, y, median(times)


def product_of(size, dtype):
    x, w, y, _ = factors(size)
    if dtype != np.float32:
        x, w = x.astype(dtype), w.astype(dtype)
        y = (x.astype(np.float32) @ w.astype(np.float32)).astype(dtype)
    return Product(x, w, y)


def measure(benchmark, size, call, rounds=7):
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    seconds = factors(size)[-1]
    benchmark.extra_info["product_ms"] = round(seconds * 1e3, 1)
    benchmark.extra_info["times_cheaper"] = round(seconds / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_t1_of_all_rows(benchmark, size, dtype):
    product = product_of(size, DTYPES[dtype])
    measure(benchmark, size, lambda: check_rows(product, FULL, DRAW, size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_t1_and_t3(benchmark, size, dtype):
    product = product_of(size, DTYPES[dtype])
    measure(benchmark, size, lambda: (check_rows(product, FULL, DRAW, size), check_entries(product, FULL, DRAW)))


@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folding", [fold.fold, fold.fold_reference], ids=["numba", "numpy"])
def bench_fold(benchmark, size, dtype, folding):
    w = product_of(size, DTYPES[dtype]).w
    vectors, weights = np.random.default_rng(3).standard_normal((8, size)), np.ones(size)
    measure(benchmark, size, lambda: folding(w, vectors, weights, 16, DTYPES[dtype]), 5)


@pytest.mark.parametrize("rows", [4, 16])
def bench_rows_of_minilm(benchmark, rows):
    """36 matrices, 10.6 million weights."""
    products = []
    for i, (k, n) in enumerate(MINILM):
        x, w = normal(i, rows, k), normal(100 + i, k, n)
        products.append(Product(x, w, x @ w))
    benchmark.pedantic(lambda: [check(product, STANDARD, DRAW) for product in products], rounds=7, warmup_rounds=1)
    macs = sum(rows * k * n for k, n in MINILM)
    benchmark.extra_info["gmacs_per_second"] = round(macs / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("kernel", ["moments", "all", "numpy"])
def bench_row_statistics(benchmark, kernel):
    x, w, bias = normal(1, 16, 384).astype(np.float64), normal(2, 384, 1536), np.zeros((1, 1536))
    calls = {
        "moments": lambda: statistics(x, w, bias, full=False),
        "all": lambda: statistics(x, w, bias),
        "numpy": lambda: statistics_reference(x, w, bias),
    }
    benchmark.pedantic(calls[kernel], rounds=7, warmup_rounds=1)
    benchmark.extra_info["gmacs_per_second"] = round(x.size * 1536 / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("size", SIZES)
def bench_integers(benchmark, size):
    """uint8 times int8, all rows, two challenges of 31 bits; the exact product by float64 BLAS beside it."""
    rng = np.random.default_rng(4)
    x, w = rng.integers(0, 256, (size, size), np.uint8), rng.integers(-128, 128, (size, size), np.int8)
    zeros = np.full((1, 1), 7), np.zeros((1, 1), np.int64)
    start = perf_counter()
    y = exact_product(x, w, zeros).astype(np.int32)
    seconds = perf_counter() - start
    benchmark.pedantic(lambda: check_integers(x, w, y, zeros, FULL, DRAW, "bench"), rounds=5, warmup_rounds=1)
    benchmark.extra_info["product_ms"] = round(seconds * 1e3, 1)
    benchmark.extra_info["times_cheaper"] = round(seconds / benchmark.stats.stats.median, 1)
