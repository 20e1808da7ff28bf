"""Attention held to a rounding profile: PyTorch's own kernels pass entry by entry, a cheaper computation does not."""

import ml_dtypes
import numpy as np
import pytest

from gpu.kernels.attention_radius import attend as radius_of
from gpu.ops import attention
from gpu.ops.call import Call
from gpu.rounding import FORMATS, Interval, compare_interval
from proof.errors import Reason, Rejected
from proof.policy import policy
from proof.sampling import Draw
from tests.gpu.nodes import Case, assembled, claims, opened

torch = pytest.importorskip("torch")

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {torch.bfloat16: BF16, torch.float16: np.dtype(np.float16)}
NARROW = [torch.bfloat16, torch.float16]
HEADS, GROUPS, WIDTH = 6, 2, 64
SCALE = WIDTH**-0.5
OP = attention.OPS["", "Attention"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(dtype, length, peaked=1.5, seed=0):
    """Queries, keys and values of one sequence; a larger `peaked` puts more weight on fewer keys."""
    make = torch.Generator().manual_seed(seed)
    shapes = (HEADS, length, WIDTH), (GROUPS, length, WIDTH), (GROUPS, length, WIDTH)
    q, k, v = (torch.randn(1, *shape, generator=make) for shape in shapes)
    return (q * peaked).to(dtype), k.to(dtype), v.to(dtype)


def repeated(x):
    return x.repeat_interleave(HEADS // GROUPS, dim=1)


def eager(q, k, v, scale=SCALE, mask=None):
    """As eager_attention_forward of Hugging Face does."""
    scores = torch.matmul(q, repeated(k).transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), repeated(v))


def sdpa(q, k, v, scale=SCALE, mask=None):
    return torch.nn.functional.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=scale)


KERNELS = {"torch-eager": eager, "torch-sdpa": sdpa}


def hidden(seen, dtype):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def prefill(kernel, q, k, v, scale=SCALE, window=None):
    length = q.shape[2]
    if kernel is sdpa and window is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, repeated(k), repeated(v), is_causal=True, scale=scale
        )
    t = torch.arange(length)
    seen = (t[None] <= t[:, None]) & (t[:, None] - t[None] < (window or length))
    return kernel(q, k, v, scale, hidden(seen, q.dtype))


def decode(kernel, q, k, v, scale=SCALE, first=0):
    """The queries from `first` on, one at a time, over a cache that grows."""
    steps = range(first, q.shape[2])
    return torch.cat([kernel(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], scale) for t in steps], dim=2)


def array(x):
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(BF16)
    return x.contiguous().numpy()


def run_of(q, k, v, y, mask=None):
    inputs = [array(x) for x in (q, k, v)] + ([mask] if mask is not None else [])
    return assembled(Case("Attention", inputs, {"is_causal": 1, "scale": SCALE}, opset=24), [array(y)])


def call_of(run, profile, rows=None):
    rows = np.arange(run.outputs[0].size // WIDTH) if rows is None else rows
    return Call(
        run.site, opened(OP, run, (rows,)), (rows,), tuple(claims(run, (rows,))), policy(profile), Draw(bytes(32), "")
    )


def determined(run, profile, rows=None):
    """The share of entries left no choice; raises Rejected."""
    call = call_of(run, f"full+{profile}", rows)
    return compare_interval(call.claimed[0], OP.interval(call)) / call.claimed[0].size


def wrong(run, profile, rows=None):
    """The share of rows that are refused."""
    call = call_of(run, f"full+{profile}", rows)
    between = OP.interval(call)
    y, low, high = (value.astype(np.float64) for value in (call.claimed[0], between.low, between.high))
    return float((~((low <= y) & (y <= high))).any(axis=1).mean())


@pytest.mark.parametrize("length", [1, 33, 301])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("profile", KERNELS)
@pytest.mark.parametrize("peaked", [1.0, 6.0])
def test_pytorch_is_within_its_profile_in_prefill_and_in_decode(profile, dtype, length, peaked):
    q, k, v = tensors(dtype, length, peaked, seed=length)
    for y in (prefill(KERNELS[profile], q, k, v), decode(KERNELS[profile], q, k, v)):
        share = determined(run_of(q, k, v, y), profile)
        assert length < 100 or share > 0.4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("profile", KERNELS)
def test_rows_over_several_blocks_of_keys_are_within_their_profile(profile, dtype):
    """Under a few large scores, what fp32 leaves open in the maximum shows when it moves from block to block."""
    length, first = 1150, 1142
    q, k, v = tensors(dtype, length, 12.0, seed=1162)
    y = prefill(KERNELS[profile], q, k, v)
    y[:, :, first:] = decode(KERNELS[profile], q, k, v, first=first)
    rows = np.array(
        [head * length + t for head in (3, 4) for t in (510, 515, 638, *range(1024, length, 8), *range(first, length))]
    )
    determined(run_of(q, k, v, y), profile, rows)


def quantised(x):
    size = x.abs().amax(-1, keepdim=True) / 127
    return (torch.round(x / size) * size).to(x.dtype)


def sparse(q, k, v):
    scores = (q.float() @ repeated(k).float().transpose(2, 3)) * SCALE
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    kept = scores >= scores.topk(64, dim=-1).values[..., -1:]
    return prefill_with(q, k, v, kept)


def prefill_with(q, k, v, kept):
    return torch.nn.functional.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=kept, scale=SCALE)


def noisy(kernel, q, k, v, size):
    """Noise of `size` beside the root mean square of a row, added and rounded."""
    y = prefill(kernel, q, k, v).float()
    rms = y.square().mean(-1, keepdim=True).sqrt()
    return (y + size * rms * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).to(q.dtype)


CHEATS = {
    "scale x 1.001": lambda kernel, q, k, v: prefill(kernel, q, k, v, SCALE * 1.001),
    "cache in int8": lambda kernel, q, k, v: prefill(kernel, q, quantised(k), quantised(v)),
    "64 keys": lambda kernel, q, k, v: sparse(q, k, v),
    "window of 64 keys": lambda kernel, q, k, v: prefill(kernel, q, k, v, window=64),
    "noise": lambda kernel, q, k, v: noisy(kernel, q, k, v, 1e-3),
}


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("profile", KERNELS)
def test_a_cheaper_computation_is_refused_in_nearly_every_row(profile, dtype, cheat):
    length = 200
    q, k, v = tensors(dtype, length, 2.0)
    y = CHEATS[cheat](KERNELS[profile], q, k, v)
    if (cheat, dtype, profile) == ("scale x 1.001", torch.bfloat16, "torch-eager"):
        assert torch.equal(y, prefill(eager, q, k, v))  # scores are rounded to 8 bits: that scale is the same one
        return
    run = run_of(q, k, v, y)
    rows = np.array([head * length + t for head in range(HEADS) for t in range(100, length)])
    assert wrong(run, profile, rows) > 0.9


@pytest.mark.parametrize(("declared", "used"), [("torch-eager", sdpa), ("torch-sdpa", eager)])
def test_another_kernel_is_not_the_declared_one(declared, used):
    q, k, v = tensors(torch.bfloat16, 100, 2.0)
    with pytest.raises(Rejected) as caught:
        determined(run_of(q, k, v, prefill(used, q, k, v)), declared)
    assert caught.value.reason is Reason.REEXECUTION


@pytest.mark.parametrize("profile", KERNELS)
def test_the_edges_of_an_interval_are_accepted_and_nothing_beyond(profile):
    q, k, v = tensors(torch.bfloat16, 60)
    run = run_of(q, k, v, prefill(KERNELS[profile], q, k, v))
    between = OP.interval(call_of(run, f"full+{profile}"))
    for edge, away in ((between.low, -1), (between.high, 1)):
        assert compare_interval(edge, between) > 0
        bits = edge.view(np.int16)
        beyond = (bits + np.where(bits < 0, -away, away).astype(np.int16)).view(BF16)
        for entry in ((0, 0), (17, 5), (359, 63)):
            moved = edge.copy()
            moved[entry] = beyond[entry]
            with pytest.raises(Rejected):
                compare_interval(moved, between)


@pytest.mark.parametrize("profile", KERNELS)
def test_a_sliding_window_is_held_to_the_profile_and_masked_keys_never_matter(profile):
    length, window = 90, 20
    q, k, v = tensors(torch.bfloat16, length)
    t = np.arange(length)
    mask = t[:, None] - t[None] < window
    y = prefill(KERNELS[profile], q, k, v, window=window)
    rows = np.array([head * length + at for head in range(HEADS) for at in range(60, 90)])
    run = run_of(q, k, v, y, mask)
    honest = OP.interval(call_of(run, f"full+{profile}", rows))
    assert compare_interval(call_of(run, f"full+{profile}", rows).claimed[0], honest) > 0
    k[:, :, :40], v[:, :, :40] = 1e4, torch.nan
    again = OP.interval(call_of(run_of(q, k, v, y, mask), f"full+{profile}", rows))
    assert same(honest, again)
    assert OP.check(call_of(run_of(q, k, v, y, mask), "full", rows)).ratio <= 1.0


def same(left: Interval, right: Interval) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("low", "nearest", "high"))


def test_some_rows_of_a_few_heads_have_the_intervals_they_have_among_all():
    q, k, v = tensors(torch.float16, 50)
    run = run_of(q, k, v, prefill(sdpa, q, k, v))
    rows = np.array([53, 77, 99, 150, 160, 299])
    every, some = (OP.interval(call_of(run, "full+torch-sdpa", chosen)) for chosen in (None, rows))
    assert same(Interval(every.low[rows], every.nearest[rows], every.high[rows]), some)


def test_a_row_that_sees_a_key_or_value_that_is_no_number_is_refused():
    for number in (torch.nan, torch.inf, -torch.inf):
        for which in (1, 2):
            parts = list(tensors(torch.bfloat16, 20))
            y = prefill(sdpa, *parts)
            parts[which][0, 0, 10, 3] = number
            run = run_of(*parts, y)
            assert OP.check(call_of(run, "full", np.arange(10))).ratio <= 1.0
            with pytest.raises(Rejected) as caught:
                OP.check(call_of(run, "full", np.array([12])))
            assert caught.value.reason is Reason.NONFINITE


def radius_reference(q, k, v, bias, bounds, dtype):
    """The definition of numerics-local section 3, F."""
    exact = bounds.scale * (q @ k.T)
    error = bounds.product * abs(bounds.scale) * (np.abs(q) @ np.abs(k).T) + bounds.score * np.abs(exact)
    if bounds.softcap > 0:
        exact = bounds.softcap * np.tanh(exact / bounds.softcap)
        error = error + 2 * bounds.score * np.abs(exact) + bounds.cap * bounds.softcap
    low, exact, high = exact - error + bias, exact + bias, exact + error + bias
    for rounded in {np.dtype(np.float32), dtype} if FORMATS[dtype].p < 24 else {dtype}:
        low = np.minimum(low, low.astype(rounded).astype(np.float64))
        high = np.maximum(high, high.astype(rounded).astype(np.float64))
    top = exact.max(axis=1)[:, None]
    spread = bounds.exponent * np.abs(np.where(exact > -np.inf, exact - top, 0.0))
    weight = np.exp(exact - top)
    least = np.exp(low - top - spread) * (1 - bounds.exponential)
    most = np.exp(high - top + spread) * (1 + bounds.exponential)
    share = weight / weight.sum(1)[:, None]
    z = share @ v
    moved = np.maximum(most - weight, weight - least)
    away = np.einsum("rt,rtd->rd", moved, np.abs(v[None] - z[:, None])) / least.sum(1)[:, None]
    return z, away + bounds.sums * (share @ np.abs(v))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(np.float64)], ids=str)
def test_the_kernel_of_the_radius_is_its_definition(dtype, softcap):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((rows, width)).astype(dtype) for rows, width in ((5, 24), (70, 24), (70, 40)))
    bias = np.where(rng.random((5, 70)) < 0.3, -np.inf, rng.standard_normal((5, 70)))
    y = np.zeros((1, 1, 5, 40), dtype)
    run = assembled(Case("Attention", [x[None, None] for x in (q, k, v)], {"softcap": softcap}, opset=24), [y])
    bounds = attention.bounds(call_of_any(run), 24, 70, dtype)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    for found, wanted in zip(
        radius_of(wide[0], k, v, bias, bounds, dtype), radius_reference(*wide, bias, bounds, dtype), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-15)


def call_of_any(run):
    return Call(run.site, (), (), (), policy("full"), Draw(bytes(32), ""))
