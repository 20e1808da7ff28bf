"""Draws: frozen vectors, the distributions they claim, and independence of labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from proof import sampling
from proof.digest import KEYS, Tag
from proof.sampling import Draw

FROZEN = json.loads((Path(__file__).parents[1] / "vectors/sampling.json").read_text())
SEED = bytes(range(32))
SEEDS = st.binary(min_size=32, max_size=32)


def uniform(values, bound, bins=64):
    """Chi-squared statistic of `values` over equal bins, in standard deviations above its mean."""
    counts = np.bincount(values * bins // bound, minlength=bins)
    expected = len(values) / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("case", FROZEN["select"], ids=lambda case: f"{case['q']} of {case['n']}")
def test_rows_are_frozen(case):
    rows = sampling.select(bytes.fromhex(case["seed"]), case["q"], case["n"])
    assert rows.tolist() == case["rows"]


def test_vectors_and_entries_are_frozen():
    seed = bytes.fromhex(FROZEN["seed"])
    assert sampling.xof(seed, "label", 40).hex() == FROZEN["xof"]
    assert sampling.words31(seed, "label", 6).tolist() == FROZEN["words31"]
    assert sampling.entries(seed, "label", 6, 10**12).tolist() == FROZEN["entries"]
    normals = sampling.normals(seed, "label", 7)
    assert [float(value).hex() for value in normals] == FROZEN["normals"]
    many = sampling.normals(seed, "label", 100_001)
    assert blake3(many.astype("<f4").tobytes()).hexdigest() == FROZEN["blake3 of 100001 normals"]


def test_the_stream_is_a_keyed_xof():
    assert sampling.xof(SEED, "é", 99) == blake3(SEED + "é".encode(), key=KEYS[Tag.DRAW]).digest(length=99)


def test_a_seed_has_32_bytes():
    with pytest.raises(ValueError, match="32 bytes"):
        sampling.xof(bytes(31), "label", 8)


@given(SEEDS, st.integers(1, 64), st.integers(0, 2**40))
def test_rows_are_sorted_unique_and_inside(seed, q, n):
    rows = sampling.select(seed, q, n)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert len(rows) == 0 if n == 0 else 0 < len(rows) <= min(q, n)
    assert ((rows >= 0) & (rows < n)).all()


@given(SEEDS, st.integers(1, 64), st.integers(1, 2**30), st.integers(1, 100))
def test_the_same_positions_open_at_every_size(seed, q, n, factor):
    """A tensor with `factor` rows where another has one opens inside the same ones."""
    rows, finer = sampling.select(seed, q, n), sampling.select(seed, q, n * factor)
    assert np.array_equal(rows, np.unique(finer // factor))


@given(SEEDS, st.integers(1, 2**63 - 1))
def test_entries_are_the_exact_product(seed, bound):
    words = sampling.words(seed, "label", 20).tolist()
    assert sampling.entries(seed, "label", 20, bound).tolist() == [word * bound >> 64 for word in words]


@given(SEEDS, st.integers(0, 40), st.integers(0, 40))
def test_a_longer_draw_begins_with_a_shorter_one(seed, short, more):
    draws = (sampling.normals, sampling.words31, lambda *args: sampling.entries(*args, 1000))
    for draw in draws:
        assert np.array_equal(draw(seed, "label", short + more)[:short], draw(seed, "label", short))


def test_every_row_is_drawn_without_policy_limit():
    assert sampling.select(SEED, None, 5).tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_drawn_from_nothing():
    with pytest.raises(ValueError, match="nothing to draw"):
        sampling.entries(SEED, "label", 1, 0)


@pytest.mark.parametrize("bound", [64, 1000, 2**31, 10**15])
def test_entries_are_uniform(bound):
    bins = 64 if bound % 64 == 0 else 50
    assert abs(uniform(sampling.entries(SEED, f"{bound}", 100_000, bound), bound, bins)) < 4.5


def test_words_are_uniform():
    words = sampling.words31(SEED, "words", 100_000)
    assert words.min() >= 0
    assert abs(uniform(words, 2**31)) < 4.5


def test_rows_are_uniform_over_challenges():
    seeds = (index.to_bytes(32, "little") for index in range(10_000))
    rows = np.concatenate([sampling.select(seed, 1, 50) for seed in seeds])
    assert abs(uniform(rows, 50, 50)) < 4.5


def test_a_cheat_on_half_of_the_rows_escapes_as_often_as_the_policy_says():
    seeds = (index.to_bytes(32, "big") for index in range(10_000))
    escaped = sum((sampling.select(seed, 4, 1000) >= 500).all() for seed in seeds)
    assert abs(escaped / 10_000 - 0.5**4) < 5 * math.sqrt(0.0625 * 0.9375 / 10_000)


def test_normals_are_standard_normal():
    normals = sampling.normals(SEED, "normals", (1000, 200)).astype(np.float64).reshape(-1)
    error = 1 / math.sqrt(normals.size)
    assert abs(normals.mean()) < 5 * error
    assert abs(normals.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((normals**3).mean()) < 5 * math.sqrt(15) * error
    assert abs((normals**4).mean() - 3) < 5 * math.sqrt(96) * error
    quantiles = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in np.sort(normals)])
    kolmogorov = np.abs(quantiles - (np.arange(normals.size) + 0.5) / normals.size).max()
    assert kolmogorov < 2.0 * error


def test_normals_of_a_pair_are_uncorrelated():
    pairs = sampling.normals(SEED, "normals", (100_000, 2)).astype(np.float64)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 / math.sqrt(100_000)
    assert abs((pairs[:, 0] ** 2 * pairs[:, 1] ** 2).mean() - 1) < 5 * math.sqrt(8) / math.sqrt(100_000)


def test_normals_are_box_and_muller_of_the_words():
    """Against the mathematical library, whose logarithm and cosine may be off by a rounding."""
    words = sampling.words(SEED, "label", 2000).reshape(-1, 2)
    expected = []
    for first, second in words.tolist():
        radius = math.sqrt(-2 * math.log(((first >> 11) + 1) / 2**53))
        angle = 2 * math.pi * (second >> 11) / 2**53 - math.pi / 4
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(sampling.normals(SEED, "label", 2000), expected, rtol=2**-23, atol=1e-14)


def test_normals_are_the_same_bits_in_plain_python():
    """Correctly rounded arithmetic leaves a machine, a vector unit or a compiler no choice."""

    def horner(coefficients, x):
        total = 0.0
        for coefficient in coefficients:
            total = total * x + coefficient
        return total

    words = sampling.words(SEED, "label", 2000).reshape(-1, 2)
    expected = []
    for first, second in words.tolist():
        m, e = math.frexp(((first >> 11) + 1) * 2.0**-53)
        m, e = (m + m, e - 1) if m * m < 0.5 else (m, e)
        s = (m - 1) / (m + 1)
        log = e * math.log(2) + s * horner([2 / (2 * k + 1) for k in range(11, -1, -1)], s * s)
        x = ((second >> 11) % 2**51 * 2.0**-51 - 0.5) * (math.pi / 2)
        cos = horner([(-1) ** k / math.factorial(2 * k) for k in range(9, -1, -1)], x * x)
        sin = x * horner([(-1) ** k / math.factorial(2 * k + 1) for k in range(9, -1, -1)], x * x)
        turned = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)][second >> 62]
        expected += [math.sqrt(-2 * log) * coordinate for coordinate in turned]
    assert np.array_equal(sampling.normals(SEED, "label", 2000), np.float32(expected))


def test_a_scope_keeps_its_labels_to_itself():
    one, two = Draw(SEED, "one"), Draw(SEED, "two")
    assert np.array_equal(one.normals("r", (2, 3)), sampling.normals(SEED, "one/r", (2, 3)))
    assert np.array_equal(one.words31("r", 4), sampling.words31(SEED, "one/r", 4))
    assert np.array_equal(one.entries("r", 4, 9), sampling.entries(SEED, "one/r", 4, 9))
    assert not np.array_equal(one.words31("r", 4), two.words31("r", 4))


def test_a_seed_is_not_shown():
    assert repr(SEED) not in repr(Draw(SEED, "node"))
