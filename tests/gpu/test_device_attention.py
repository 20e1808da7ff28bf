"""Attention on a device: rows over short and long prefixes, grouped heads; lies are left to the reference."""

import ml_dtypes
import numpy as np
import pytest

from gpu.clearing import attention, rotary
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
    for module in (attention, rotary):
        monkeypatch.setattr(module, "LEAST", 0)


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


TURNS = {  # shapes of x, cosines and positions; attributes
    "positions": ((2, 4, 6, 8), (20, 4), (2, 6), {}),
    "interleaved": ((2, 4, 6, 8), (20, 4), (2, 6), {"interleaved": 1}),
    "a row each": ((2, 4, 6, 8), (2, 6, 4), None, {}),
    "heads side by side": ((2, 6, 32), (20, 4), (2, 6), {"num_heads": 4}),
    "half of a head": ((2, 4, 6, 8), (20, 2), (2, 6), {"rotary_embedding_dim": 4}),
}


def turned(x, cos, sin, positions, attributes):
    """RotaryEmbedding in float32: both products and their sum rounded to the dtype."""
    heads = attributes.get("num_heads", 1)
    c, s = ((table[positions] if positions is not None else table).astype(np.float32) for table in (cos, sin))
    wide = x.astype(np.float32)
    if x.ndim == 3:
        wide = wide.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    c, s, count = c[:, None], s[:, None], 2 * c.shape[-1]
    part, rest = wide[..., :count], wide[..., count:]
    if attributes.get("interleaved"):
        a, b = part[..., ::2], part[..., 1::2]
        part = np.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(part.shape)
    else:
        a, b = np.split(part, 2, axis=-1)
        part = np.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    made = np.concatenate([part, rest], axis=-1)
    return (made.transpose(0, 2, 1, 3).reshape(x.shape) if x.ndim == 3 else made).astype(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", TURNS.values(), ids=TURNS.keys())
def test_turned_rows_are_cleared_and_lies_are_not(device, form, dtype):
    rng = np.random.default_rng(3)
    shape, table, places, attributes = form
    x, angles = rng.standard_normal(shape).astype(dtype), rng.standard_normal(table)
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    positions = None if places is None else rng.integers(0, table[0], places)
    inputs = [x, cos, sin, *([] if positions is None else [positions])]
    run = assembled(Case("RotaryEmbedding", inputs, attributes, opset=24), [turned(x, cos, sin, positions, attributes)])
    op, rows = REGISTRY["", "RotaryEmbedding"], (np.unique(rng.integers(0, run.site.outputs[0].rows, 6)),)
    honest = claims(run, rows)
    assert accepts(op, call_of(op, run, rows, honest)) is not None
    assert agree(device, op, call_of(op, run, rows, honest))
    for name, lie in lies(honest[0], rng).items():
        assert not agree(device, op, call_of(op, run, rows, [lie])), name
    for column in range(0, honest[0].shape[1], 3):
        for steps in (-9, -3, -2, -1, 1, 2, 3, 9):
            bent = honest[0].copy()
            value = bent[1, column].astype(np.float64)
            bent[1, column] = value + steps * half_ulp(value, dtype)
            agree(device, op, call_of(op, run, rows, [bent]))
