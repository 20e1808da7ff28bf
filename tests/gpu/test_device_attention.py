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


def attend(q, k, v, bias, scale=None, softcap=0.0):
    """softmax(scale q k + bias) v in float32, rounded once; a row without any key is zero."""
    wide_q, wide_k, wide_v = (x.astype(np.float32) for x in (q, k, v))
    times = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, times, axis=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.transpose(0, 1, 3, 2) * np.float32(scale or q.shape[-1] ** -0.5)
    scores = (np.float32(softcap) * np.tanh(scores / np.float32(softcap)) if softcap else scores) + bias
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
    total = weights.sum(-1, keepdims=True)
    return ((weights / np.where(total == 0, 1, total)) @ wide_v).astype(q.dtype)


def packed(x):
    """(batch, heads, rows, width) as (batch, rows, heads width)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def hidden(batch, queries, keys, causal, lengths):
    """-inf at the keys that a query does not see, else 0: (batch, 1, queries, keys)."""
    i, t = np.arange(queries)[:, None], np.arange(keys)
    count = np.full(batch, keys) if lengths is None else lengths
    offset = 0 if lengths is None else (count - queries)[:, None, None]
    unseen = (t >= count[:, None, None]) | (causal & (t > i + offset))
    return np.where(unseen, -np.inf, 0.0).astype(np.float32)[:, None]


def run_of(sizes, dtype, causal=1, seed=0, spread=1.0, **form):
    """An honest run; `form` has attributes, and a mask, lengths or `packed`."""
    batch, heads, groups, queries, keys, d, e = sizes
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((batch, heads, queries, d)) * np.minimum(spread, 1e4)).astype(dtype)
    k = rng.standard_normal((batch, groups, keys, d)).astype(dtype)
    v = rng.standard_normal((batch, groups, keys, e)).astype(dtype)
    form = dict(form)
    mask, lengths, flat = form.pop("mask", None), form.pop("lengths", None), form.pop("packed", False)
    bias, inputs = hidden(batch, queries, keys, causal, lengths), [q, k, v]
    if mask is not None:
        bias = bias + (np.where(mask, 0, -np.inf) if mask.dtype == np.bool_ else mask).astype(np.float32)
        inputs.append(mask if mask.dtype == np.bool_ else mask.astype(dtype))
    if lengths is not None:
        inputs += [None] * (6 - len(inputs)) + [lengths]
    y = attend(q, k, v, bias, form.get("scale"), form.get("softcap", 0.0))
    if flat:
        form |= {"q_num_heads": heads, "kv_num_heads": groups}
        inputs[:3], y = map(packed, inputs[:3]), packed(y)
    return assembled(Case("Attention", inputs, {"is_causal": causal, **form}, opset=24), [y])


FORMS = {
    "packed": {"packed": True},
    "packed, of every key": {"packed": True, "causal": 0},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "a negative scale": {"scale": -0.3},
    "a mask": {"mask": np.random.default_rng(0).random((9, 9)) > 0.4, "causal": 0},
    "a mask of heads": {"mask": np.random.default_rng(1).random((2, 4, 9, 9)) > 0.3},
    "a mask of rows": {"mask": np.arange(9)[:, None] != 4, "causal": 0},
    "added scores": {"mask": np.random.default_rng(2).standard_normal((4, 9, 9)).astype(np.float32)},
    "a mask of infinities": {"mask": np.where(np.tri(9), 0, -np.inf).astype(np.float32), "causal": 0},
    "lengths": {"lengths": np.array([3, 9]), "causal": 0},
    "lengths, causal": {"lengths": np.array([4, 9]), "causal": 1},
    "lengths and a mask": {"lengths": np.array([4, 9]), "mask": np.random.default_rng(3).random((9, 9)) > 0.2},
}


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
    for column in (0, 11):
        for power in range(-4, 14, 2):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_cleared_and_lies_are_not(device, form, dtype):
    run = run_of(SIZES["two groups"], dtype, **form)
    rows = (np.arange(run.site.outputs[0].rows),)
    honest = claims(run, rows)
    assert accepts(OP, call_of(OP, run, rows, honest)) is not None
    assert agree(device, OP, call_of(OP, run, rows, honest))
    for name, lie in lies(honest[0], np.random.default_rng(4)).items():
        call = call_of(OP, run, rows, [lie])
        assert not agree(device, OP, call) or (name == "one entry" and dtype != np.float32), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_at_the_radius_the_reference_accepts_what_is_cleared(device, form, dtype):
    run = run_of(SIZES["two groups"], dtype, **form)
    total = run.site.outputs[0].rows
    rows = (np.unique(np.random.default_rng(5).integers(0, total, 3)),)
    honest = claims(run, rows)[0]
    value = honest[0, -1].astype(np.float64)
    least, most = 0.0, max(1.0, abs(value))
    for _ in range(30):  # the largest step that the reference accepts, and those beside it
        bent, middle = honest.copy(), (least + most) / 2
        bent[0, -1] = value + middle
        least, most = (middle, most) if accepts(OP, call_of(OP, run, rows, [bent])) else (least, middle)
    for factor in (1 - 1e-4, 1 - 1e-7, 1, 1 + 1e-7, 1 + 1e-4):
        bent = honest.copy()
        bent[0, -1] = value + least * factor
        agree(device, OP, call_of(OP, run, rows, [bent]))


def test_a_masked_key_is_not_read_and_others_are(device):
    seen = np.ones((5, 5), np.bool_)
    seen[:, 3] = False
    for hidden, cleared in ((3, True), (2, False)):
        run = run_of(SIZES["one group"], np.dtype(np.float32), causal=0, mask=seen)
        run.inputs[1][0, 0, hidden] = np.nan
        run.inputs[2][0, 0, hidden] = np.inf
        rows = (np.arange(20),)
        assert agree(device, OP, call_of(OP, run, rows, claims(run, rows))) == cleared


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left(device, at, value):
    mask = np.zeros((5, 5), np.float32)
    run = run_of(SIZES["one group"], np.dtype(np.float32), mask=mask)
    run.inputs[at][..., 1, 1] = value
    rows = (np.arange(20),)
    cleared = agree(device, OP, call_of(OP, run, rows, claims(run, rows)))
    assert not cleared


def test_nan_in_a_mask_is_left_even_behind_the_query(device):
    mask = np.zeros((5, 5), np.float32)
    mask[0, 3] = np.nan
    run = run_of(SIZES["one group"], np.dtype(np.float32), mask=mask)
    honest = attend(*run.inputs[:3], np.where(np.tri(5), 0, -np.inf).astype(np.float32)).reshape(20, 8)
    for rows, accepted in ((np.arange(20), False), (np.array([0, 4]), False), (np.array([1, 4, 9]), True)):
        call = call_of(OP, run, (rows,), [honest[rows]])
        assert (accepts(OP, call) is not None) == accepted
        assert agree(device, OP, call) == accepted


def test_rows_that_only_the_lowest_number_hides_are_left_or_agreed_on(device):
    for dtype in DTYPES[:2]:
        mask = np.zeros((9, 9))
        mask[2], mask[3, 4:] = np.finfo(dtype).min, np.finfo(dtype).min
        run = run_of(SIZES["two groups"], dtype, mask=mask.astype(dtype), causal=0)
        for rows in (np.arange(72), np.setdiff1d(np.arange(72), np.arange(2, 72, 9))):
            cleared = agree(device, OP, call_of(OP, run, (rows,), claims(run, (rows,))))
            assert cleared == (len(rows) < 72)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-40, 1e-4, 30.0, 3e4])
def test_queries_of_any_size_are_agreed_on(device, dtype, spread):
    for seed in range(2):
        run = run_of(SIZES["two groups"], dtype, spread=spread, seed=seed)
        rows = (np.arange(run.site.outputs[0].rows),)
        cleared = agree(device, OP, call_of(OP, run, rows, claims(run, rows)))
        assert cleared or spread > 1


def test_work_in_parts_gives_the_same(device, monkeypatch):
    run = run_of(SIZES["more keys than a block"], BF16)
    rows = (np.arange(run.site.outputs[0].rows),)
    whole = call_of(OP, run, rows, claims(run, rows))
    assert agree(device, OP, whole)
    for name, value in (("PAIRS", 30), ("MOST_ROWS", 9), ("SPLITS", 1)):
        monkeypatch.setattr(attention, name, value)
        assert agree(device, OP, whole)


def test_other_forms_and_what_is_too_small_are_not_taken(device, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 4, 8)).astype(np.float32) for _ in range(3))
    present = [np.concatenate([x, x], axis=2) for x in (k, v)]
    wide = [x.astype(np.float64) for x in (q, k, v)]
    for inputs, outputs in (
        ([q, k, v, None, k, v], [q, *present]),
        (wide, wide[:1]),
        ([q, k, v, *[None] * 3, [5]], [q]),
    ):
        inputs = [np.array(x) if isinstance(x, list) else x for x in inputs]
        run = assembled(Case("Attention", inputs, {}, len(outputs), opset=24), outputs)
        rows = tuple(np.arange(spec.rows) for spec in run.site.outputs)
        assert not taken(device, OP, call_of(OP, run, rows, claims(run, rows)))
    run = run_of(SIZES["one group"], BF16)
    none = np.zeros(0, np.int64)
    assert not taken(device, OP, call_of(OP, run, (none,), claims(run, (none,))))
    monkeypatch.setattr(attention, "LEAST", 20 * 5 * 16 + 1)
    rows = (np.arange(20),)
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
