"""One token checked with a key, at the shapes of Llama-3-8B and 70B, from a key of the right size and random rows.

`test_algebra` is T1 for every product: both sides folded, by two threads, matrices in the order of the graph. `fused`
takes q, k, v and gate, up as one matrix each, as numerics-matmul section 8 counts; verifier/ checks them one by one.
extra_info: `key_mb` that a token reads, and `memory_ms`, the median that two threads need to read it and no more.
T3, the judgement of the folds and hashing are apart; attention and what else lies between products are not in here.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import ml_dtypes
import numpy as np
import pytest

from gpu import hashing
from gpu.freivalds import PREFIXES, WIDEST_FOLD, Product, judge_rows, quantile_of, recompute
from gpu.kernels.keyed import ERROR, fold_left, fold_right

BF16 = np.dtype(ml_dtypes.bfloat16)
WORDS, KV = 128256, 1024
SHAPES = {"8b": (4096, 14336, 32), "70b": (8192, 28672, 80)}  # width, inner width, layers
LAYERS = {"all layers and logits": None, "10 layers": 10}
THREADS = 2


def matrices(width, inner, fused):
    """(k, n) of the products of a layer."""
    if fused:
        return [(width, width + 2 * KV), (width, width), (width, 2 * inner), (inner, width)]
    return [(width, width), (width, KV), (width, KV), (width, width), (width, inner), (width, inner), (inner, width)]


class Token:
    """Rows of one token, and the key's part for them: per matrix x, u, nu, y, d and where y lies in r."""

    def __init__(self, name, s, fused, audited):
        width, inner, layers = SHAPES[name]
        rng = np.random.default_rng(8)
        self.r = rng.standard_normal((s, WORDS), dtype=np.float32)
        row = rng.standard_normal(max(2 * inner, WORDS)).astype(BF16)[None]
        d = np.ones(WORDS, np.float32)
        source = rng.standard_normal(2**20 + inner * s, dtype=np.float32)
        self.parts = []

        def add(k, n, start=0):
            at = int(rng.integers(0, 2**20))
            u = source[at : at + s * k].reshape(s, k).copy()
            self.parts.append((row[:, :k].copy(), u, source[at : at + k] ** 2, row[:, :n].copy(), d[:n].copy(), start))

        for _ in range(layers):
            for shape in matrices(width, inner, fused):
                add(*shape)
        self.layers = [self.parts[i : i + 4 if fused else i + 7] for i in range(0, len(self.parts), 4 if fused else 7)]
        if audited is None:
            for start in range(0, WORDS, WIDEST_FOLD):
                add(width, min(WIDEST_FOLD, WORDS - start), start)
        self.audited, self.turn = audited, 0

    def next(self):
        """The matrices of one check: other layers each time, so that none of them is left in a cache."""
        if self.audited is None:
            return self.parts
        first = self.turn * self.audited % len(self.layers)
        self.turn += 1
        chosen = (self.layers * 2)[first : first + self.audited]
        return [part for layer in chosen for part in layer]


def fold_all(parts, r):
    return [(fold_right(x, u, nu, PREFIXES), fold_left(y, r, start, d)) for x, u, nu, y, d, start in parts]


def read_all(parts):
    return sum(float(u.sum()) + float(nu.sum()) for _, u, nu, *_ in parts)


def by_threads(pool, work, parts, *arguments):
    """Two halves of about as many bytes."""
    sizes = np.cumsum([u.size for _, u, *_ in parts])
    half = int(np.searchsorted(sizes, sizes[-1] / THREADS))
    halves = parts[:half], parts[half:]
    return list(pool.map(lambda half: work(half, *arguments), halves))


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(THREADS) as threads:
        yield threads


@pytest.mark.parametrize("fused", [False, True], ids=["as verified", "fused"])
@pytest.mark.parametrize("s", [8, 4])
@pytest.mark.parametrize("audited", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", SHAPES)
def test_algebra(benchmark, pool, name, audited, s, fused):
    token = Token(name, s, fused, audited)
    benchmark.group = f"{name}, {audited or 'all'}"
    benchmark.pedantic(
        lambda parts: by_threads(pool, fold_all, parts, token.r),
        setup=lambda: ((token.next(),), {}),
        rounds=25,
        warmup_rounds=2,
    )
    reads = []
    for _ in range(15):
        parts, start = token.next(), time.perf_counter()
        by_threads(pool, read_all, parts)
        reads.append(time.perf_counter() - start)
    benchmark.extra_info["key_mb"] = round(sum(u.nbytes + nu.nbytes for _, u, nu, *_ in parts) / 1e6, 1)
    benchmark.extra_info["memory_ms"] = round(median(reads) * 1e3, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_judgement(benchmark, name):
    """The comparison of the folds of every product of a token, here of one side with itself."""
    token = Token(name, 8, False, None)
    quantile, none = quantile_of(8, 40, len(token.parts)), np.zeros((1, 8))
    sides = [right for right, _ in fold_all(token.parts, token.r)]
    products = [
        Product(x, np.broadcast_to(np.float32(0), (x.shape[1], y.shape[1])), y) for x, _, _, y, _, _ in token.parts
    ]

    def judge():
        for product, side, (*_, d, _) in zip(products, sides, token.parts, strict=True):
            judge_rows(product, side, side, none, d, quantile, ERROR)

    benchmark.pedantic(judge, rounds=9, warmup_rounds=1)


@pytest.mark.parametrize("name", SHAPES)
def test_columns(benchmark, name):
    """T3: eight secret columns of every matrix of one layer."""
    width, inner, _ = SHAPES[name]
    rng = np.random.default_rng(9)
    products = []
    for k, _ in matrices(width, inner, fused=False):
        x, w = (rng.standard_normal(shape, dtype=np.float32).astype(BF16) for shape in ((1, k), (8, k)))
        products.append(Product(x, w.T, (x.astype(np.float64) @ w.T.astype(np.float64)).astype(BF16)))
    benchmark.pedantic(lambda: [recompute(product) for product in products], rounds=25, warmup_rounds=2)


@pytest.mark.parametrize("name", SHAPES)
def test_hashing(benchmark, name):
    """The leaves of what a token opens: each row that a product takes or gives, once."""
    width, inner, layers = SHAPES[name]
    opened = layers * [width, width, KV, KV, width, width, width, inner, inner, inner, width] + [width, WORDS]
    rows = [np.ones((1, n), BF16) for n in opened]
    benchmark.pedantic(lambda: [hashing.row_digests(row) for row in rows], rounds=9, warmup_rounds=1)
    benchmark.extra_info["opened_mb"] = round(2 * sum(opened) / 1e6, 1)
