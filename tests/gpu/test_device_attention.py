"""Attention on a device: rows over short and long prefixes, grouped heads; lies are left to the reference."""

import ml_dtypes
import numpy as np
import pytest

from gpu.clearing import attention
from gpu.ops.registry import REGISTRY
from gpu.rounding import half_ulp
from tests.gpu.clearing import accepts, agree, call_of, lies, taken
from tests.gpu.nodes import Case, assembled, claims

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
OP = REGISTRY["", "Attention"]
SIZES = {  # batch, heads, groups, queries, keys, width of Q and K, of V
    "one key": (1, 1, 1, 1, 1, 1, 1),
    "one group": (1, 4, 1, 5, 5, 8, 8),
    "two groups": (2, 4, 2, 9, 9, 16, 12),
    "as many groups": (1, 3, 3, 7, 7, 64, 64),
    "more keys than queries": (1, 2, 2, 4, 11, 8, 8),
    "more keys than a block": (1, 2, 1, 3, 1100, 80, 40),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(attention, "LEAST", 0)


def attend(q, k, v, causal, scale=None):
    """softmax(scale q k) v in float32, rounded once."""
    wide_q, wide_k, wide_v = (x.astype(np.float32) for x in (q, k, v))
    times = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, times, axis=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.transpose(0, 1, 3, 2) * np.float32(scale or q.shape[-1] ** -0.5)
    if causal:
        scores[..., ~np.tri(*scores.shape[-2:], dtype=np.bool_)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return ((weights / weights.sum(-1, keepdims=True)) @ wide_v).astype(q.dtype)


def run_of(sizes, dtype, causal=1, seed=0, spread=1.0, **attributes):
    batch, heads, groups, queries, keys, d, e = sizes
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((batch, heads, queries, d)) * np.minimum(spread, 1e4)).astype(dtype)
    k = rng.standard_normal((batch, groups, keys, d)).astype(dtype)
    v = rng.standard_normal((batch, groups, keys, e)).astype(dtype)
    case = Case("Attention", [q, k, v], {"is_causal": causal, **attributes}, opset=24)
    return assembled(case, [attend(q, k, v, causal, attributes.get("scale"))])


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_honest_rows_are_cleared_and_lies_are_not(device, sizes, dtype, causal):
    run = run_of(sizes, dtype, causal)
    total = run.site.outputs[0].rows
    rows = (np.unique(np.random.default_rng(1).integers(0, total, 5)),)
    honest = claims(run, rows)
    assert taken(device, OP, call_of(OP, run, rows, honest))
    assert agree(device, OP, call_of(OP, run, rows, honest))
    for name, lie in lies(honest[0], np.random.default_rng(2)).items():
        call = call_of(OP, run, rows, [lie])
        assert not agree(device, OP, call) or (name == "one entry" and dtype != np.float32), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 40.0, 3e4])
def test_entries_around_the_edge_are_cleared_only_where_the_reference_accepts_them(device, dtype, spread):
    run = run_of(SIZES["two groups"], dtype, spread=spread)
    rows = (np.array([3, 20, 50, 71]),)
    honest = claims(run, rows)[0]
    seen = set()
    for column in (0, 5, 11):
        for power in range(-4, 14):
            for sign in (-1, 1):
                bent = honest.copy()
                value = bent[2, column].astype(np.float64)
                bent[2, column] = value + sign * 2.0**power * half_ulp(value, dtype)
                call = call_of(OP, run, rows, [bent])
                seen.add((agree(device, OP, call), accepts(OP, call) is not None))
    assert (True, False) not in seen
    assert (False, False) in seen or dtype == BF16


def test_a_key_that_a_query_does_not_see_is_not_read(device):
    run = run_of(SIZES["one group"], np.dtype(np.float32))
    run.inputs[1][0, 0, 4] = np.nan
    run.inputs[2][0, 0, 4] = np.inf
    rows = (np.array([0, 3, 8]),)  # queries 0, 3 and 3
    assert agree(device, OP, call_of(OP, run, rows, claims(run, rows)))
    rows = (np.array([4]),)
    assert not agree(device, OP, call_of(OP, run, rows, claims(run, rows)))


def test_scores_that_overflow_are_left(device):
    run = run_of(SIZES["one group"], np.dtype(np.float16), scale=1e6)
    rows = (np.array([3, 8]),)
    call = call_of(OP, run, rows, claims(run, rows))
    assert accepts(OP, call) is None
    assert not agree(device, OP, call)


def test_work_in_parts_gives_the_same(device, monkeypatch):
    run = run_of(SIZES["two groups"], BF16)
    rows = (np.arange(run.site.outputs[0].rows),)
    whole = call_of(OP, run, rows, claims(run, rows))
    assert agree(device, OP, whole)
    monkeypatch.setattr(attention, "MOST", 30)
    assert agree(device, OP, whole)


def test_other_forms_are_not_taken(device):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 4, 8)).astype(np.float32) for _ in range(3))
    mask = np.ones((4, 4), np.bool_)
    for inputs, attributes in (([q, k, v, mask], {}), ([q, k, v], {"softcap": 2.0})):
        run = assembled(Case("Attention", inputs, attributes, opset=24), [q])
        rows = (np.arange(8),)
        assert not taken(device, OP, call_of(OP, run, rows, claims(run, rows)))
