"""Rounding profiles: PyTorch's own kernels stay inside the intervals, and little else does."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch.nn import functional

from gpu.kernels.partial import partial_sums, partial_sums_reference
from gpu.ops.call import Call
from gpu.ops.heads import sample
from gpu.ops.registry import REGISTRY
from gpu.rounding import BFLOAT16, FORMATS, Interval, compare_interval, round_to
from proof.errors import Reason, Rejected
from proof.policy import Policy, policy
from proof.sampling import Draw
from tests.gpu.nodes import Case, assembled, check, claims, opened, sampled

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, HEADS, GROUPS, WIDTH = 37, 6, 2, 64
EPSILON = 1e-5


def strict(kind):
    return Policy("strict", None, challenges=2**40, profile=f"torch-{kind}")


def array(tensor: torch.Tensor) -> Any:
    dense = tensor.contiguous()
    return dense.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else dense.numpy()


@dataclass
class Honest:
    """One op as PyTorch computes it."""

    case: Case
    result: torch.Tensor

    @property
    def op(self):
        return REGISTRY[self.case.domain, self.case.op]

    def call(self, rules):
        worker = assembled(self.case, [array(self.result)])
        rows = sampled(worker, np.random.default_rng(0), None)
        claimed = tuple(claims(worker, rows))
        return Call(worker.site, opened(self.op, worker, rows), rows, claimed, rules, Draw(bytes(32), ""))

    def interval(self, kind="sdpa"):
        call = self.call(strict(kind))
        return self.op.interval(call), call.claimed[0]


def normal(rng, dtype, *shape, size=1.0):
    return (torch.from_numpy(rng.standard_normal(shape)) * size).to(dtype)


def linear(rng, dtype):
    x, w, b = normal(rng, dtype, TOKENS, 300, size=3), normal(rng, dtype, 90, 300, size=0.1), normal(rng, dtype, 90)
    return Honest(Case("Gemm", [array(x), array(w), array(b)], {"transB": 1}), functional.linear(x, w, b))


def short_sums(rng, dtype):
    x, w = normal(rng, dtype, TOKENS, 32, size=3), normal(rng, dtype, 90, 32)
    return Honest(Case("Gemm", [array(x), array(w)], {"transB": 1}), functional.linear(x, w))


def one_row(rng, dtype):
    x, w = normal(rng, dtype, 1, 576), normal(rng, dtype, 90, 576, size=0.1)
    return Honest(Case("Gemm", [array(x), array(w)], {"transB": 1}), functional.linear(x, w))


def norm(rng, dtype):
    x, weight = normal(rng, dtype, TOKENS, 96, size=4), normal(rng, dtype, 96)
    wide = x.float()
    inner = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    attributes = {"axis": -1, "epsilon": EPSILON, "stash_type": 1}
    return Honest(Case("RMSNormalization", [array(x), array(weight)], attributes, opset=24), weight * inner.to(dtype))


def rotary(rng, dtype):
    x = normal(rng, dtype, 1, HEADS, TOKENS, WIDTH, size=5)
    angles = torch.from_numpy(rng.uniform(0, 50, (1, TOKENS, WIDTH // 2))).float()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    result = x * torch.cat([cos, cos], -1)[:, None] + turned * torch.cat([sin, sin], -1)[:, None]
    return Honest(Case("RotaryEmbedding", [array(x), array(cos), array(sin)], opset=24), result)


def silu(rng, dtype):
    x = normal(rng, dtype, TOKENS, 200, size=6)
    return Honest(Case("Swish", [array(x)], opset=24), functional.silu(x))


def gelu(rng, dtype):
    x = normal(rng, dtype, TOKENS, 200, size=3)
    return Honest(Case("Gelu", [array(x)], {"approximate": "tanh"}), functional.gelu(x, approximate="tanh"))


def gated(rng, dtype):
    a, b = normal(rng, dtype, TOKENS, 64), normal(rng, dtype, TOKENS, 64, size=9)
    return Honest(Case("Mul", [array(a), array(b)]), a * b)


def residual(rng, dtype):
    a, b = normal(rng, dtype, TOKENS, 64, size=9), normal(rng, dtype, TOKENS, 64, size=0.1)
    return Honest(Case("Add", [array(a), array(b)]), a + b)


def cosine(rng, dtype):
    x = torch.from_numpy(rng.uniform(0, 5000, (TOKENS, 64))).float()
    return Honest(Case("Cos", [array(x)]), x.cos())


def converted(rng, dtype):
    x = normal(rng, torch.float32, TOKENS, 64, size=9)
    to = helper.np_dtype_to_tensor_dtype(array(x.to(dtype)).dtype)
    return Honest(Case("Cast", [array(x)], {"to": to}), x.to(dtype))


def transposed(rng, dtype):
    x = normal(rng, dtype, 1, TOKENS, HEADS, WIDTH)
    return Honest(Case("Transpose", [array(x)], {"perm": [0, 2, 1, 3]}), x.transpose(1, 2))


def heads(rng, dtype, queries=TOKENS, keys=TOKENS):
    q = normal(rng, dtype, 1, HEADS, queries, WIDTH, size=3)
    k, v = (normal(rng, dtype, 1, GROUPS, keys, WIDTH, size=2) for _ in range(2))
    return q, k, v


def attention_case(q, k, v, **attributes):
    scale = float(q.shape[-1] ** -0.5)
    return Case("Attention", [array(q), array(k), array(v)], {"is_causal": 1, "scale": scale, **attributes}, opset=24)


def flash(rng, dtype, tokens=TOKENS):
    q, k, v = heads(rng, dtype, tokens, tokens)
    result = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return Honest(attention_case(q, k, v), result)


def eager(rng, dtype, tokens=TOKENS):
    q, k, v = heads(rng, dtype, tokens, tokens)
    wide_k, wide_v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    lowest = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)
    scores = torch.matmul(q, wide_k.transpose(2, 3)) * q.shape[-1] ** -0.5 + lowest
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
    return Honest(attention_case(q, k, v), torch.matmul(weights, wide_v))


PRODUCTS = linear, short_sums, one_row, flash
OTHERS = norm, rotary, silu, gelu, gated, residual, cosine, converted, transposed
OPS = {f.__name__: f for f in PRODUCTS + OTHERS}
REPLAYED = [(f.__name__, kind) for f in OPS.values() for kind in KINDS if f in OTHERS or kind != "fp32"]


@pytest.mark.parametrize(("name", "kind"), REPLAYED)
def test_what_torch_computes_lies_inside(name, kind):
    interval, claimed = OPS[name](np.random.default_rng(1), KINDS[kind]).interval()
    compare_interval(claimed, interval)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_every_number_lies_inside(dtype):
    """The most negative ones included, where an exponential overflows and zero is what a kernel returns."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()][None]
    interval, claimed = Honest(Case("Swish", [array(x)], opset=24), functional.silu(x)).interval()
    compare_interval(claimed, interval)


def test_products_are_left_to_the_check_where_that_is_closer_or_folds():
    assert linear(np.random.default_rng(1), torch.float32).interval()[0] is None
    assert flash(np.random.default_rng(1), torch.float32).interval()[0] is None
    honest = linear(np.random.default_rng(1), torch.bfloat16)
    folding = Policy("folding", None, challenges=2, profile="torch-sdpa", entries=16)
    assert honest.op.interval(honest.call(folding)) is None
    replayed = honest.op.interval(replace(honest.call(folding), claimed=()))
    assert np.array_equal(replayed.nearest, honest.interval()[0].nearest)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_eager_attention_lies_inside_its_own_profile(kind):
    interval, claimed = eager(np.random.default_rng(2), KINDS[kind]).interval("eager")
    compare_interval(claimed, interval)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize(("worker", "declared"), [(eager, "sdpa"), (flash, "eager")])
def test_one_kernel_does_not_pass_for_the_other(kind, worker, declared):
    interval, claimed = worker(np.random.default_rng(3), KINDS[kind]).interval(declared)
    with pytest.raises(Rejected):
        compare_interval(claimed, interval)


def test_a_normalised_value_too_small_for_fp16_is_rounded_coarsely():
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, 0], x[0, 1:] = 60000.0, torch.linspace(0.01, 1.0, 63)
    weight = torch.full((64,), 7.3, dtype=torch.float16)
    wide = x.float()
    inner = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    attributes = {"axis": -1, "epsilon": EPSILON, "stash_type": 1}
    case = Case("RMSNormalization", [array(x), array(weight)], attributes, opset=24)
    worker = assembled(case, [array(weight * inner.half())])
    check(REGISTRY["", "RMSNormalization"], worker, sampled(worker, np.random.default_rng(0), None))
    interval, claimed = Honest(case, weight * inner.half()).interval()
    compare_interval(claimed, interval)


def test_flash_attention_over_several_blocks_of_keys_lies_inside():
    interval, claimed = flash(np.random.default_rng(4), torch.bfloat16, 1030).interval()
    assert compare_interval(claimed, interval) > 0.9 * claimed.size


@pytest.mark.parametrize("keys", [1, 7, 64, 515])
def test_a_step_of_decoding_lies_inside(keys):
    """One query over all keys, as a step with a cache runs; its row is the last of a causal run."""
    rng = np.random.default_rng(keys)
    q, k, v = heads(rng, torch.bfloat16, keys, keys)
    last = functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    worker = flash(rng, torch.bfloat16, keys)
    worker.case = attention_case(q, k, v)
    interval, _ = worker.interval()
    rows = np.arange(keys - 1, HEADS * keys, keys)
    bounds = (interval.low[rows], interval.nearest[rows], interval.high[rows])
    compare_interval(array(last).reshape(HEADS, WIDTH), Interval(*bounds))


@pytest.mark.parametrize(
    ("name", "share"), [("linear", 0.9), ("norm", 0.99), ("rotary", 1.0), ("silu", 0.99), ("flash", 0.85)]
)
def test_a_profile_determines_most_bits_of_bfloat16(name, share):
    interval, claimed = OPS[name](np.random.default_rng(5), torch.bfloat16).interval()
    assert compare_interval(claimed, interval) >= share * claimed.size


LIES = {
    "another scale": lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=1.001 * q.shape[-1] ** -0.5
    ),
    "no mask": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "a window": lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-8)
    ),
    "values in 8 bits": lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, in_8_bits(v), is_causal=True, enable_gqa=True
    ),
    "noise of 1e-3": lambda q, k, v: noisy(
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 1e-3
    ),
}


def in_8_bits(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale).to(x.dtype)


def noisy(x, size):
    return (x.double() * (1 + size * torch.from_numpy(np.random.default_rng(9).standard_normal(x.shape)))).to(x.dtype)


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_no_other_attention_passes(lie):
    q, k, v = heads(np.random.default_rng(6), torch.bfloat16)
    interval, claimed = Honest(attention_case(q, k, v), lie(q, k, v)).interval()
    with pytest.raises(Rejected) as rejection:
        compare_interval(claimed, interval)
    assert rejection.value.reason is Reason.REEXECUTION


def test_keys_that_a_query_does_not_see_never_matter():
    q, k, v = heads(np.random.default_rng(7), torch.bfloat16)
    window = np.tril(np.ones((TOKENS, TOKENS), np.bool_)) & ~np.tril(np.ones((TOKENS, TOKENS), np.bool_), -8)
    bent_k, bent_v = k.clone(), v.clone()
    bent_k[:, :, :4], bent_v[:, :, :4] = 1e30, -1e30
    found = []
    for keys, values in ((k, v), (bent_k, bent_v)):
        case = attention_case(q, keys, values)
        masked = Case("Attention", [*case.inputs, window], case.attributes, opset=24)
        interval, _ = Honest(masked, torch.zeros_like(q)).interval()
        found.append(interval.nearest.reshape(HEADS, TOKENS, WIDTH)[:, 12:])
    assert np.array_equal(*found)


@pytest.mark.parametrize(("name", "kind"), REPLAYED)
def test_the_ends_pass_and_what_lies_beyond_them_does_not(name, kind):
    interval, claimed = OPS[name](np.random.default_rng(8), KINDS[kind]).interval()
    compare_interval(interval.nearest, interval)
    for end, toward in ((interval.low, -np.inf), (interval.high, np.inf)):
        compare_interval(end, interval)
        further = np.nextafter(end, end.dtype.type(toward))
        for at in (0, 0), (-1, -1), (len(end) // 2, end.shape[1] // 2):
            beyond = end.copy()
            beyond[at] = further[at]
            with pytest.raises(Rejected):
                compare_interval(beyond, interval)
    lost = claimed.copy()
    lost[0, 0] = np.nan
    with pytest.raises(Rejected) as rejection:
        compare_interval(lost, interval)
    assert rejection.value.reason is Reason.NONFINITE


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in REPLAYED if name != "flash"])
def test_a_profile_accepts_nothing_that_no_honest_kernel_gives(name, kind):
    honest = OPS[name](np.random.default_rng(8), KINDS[kind])
    interval, _ = honest.interval()
    for end in (interval.low, interval.high):
        honest.op.check(replace(honest.call(policy("full")), claimed=(end,)))


def nearest(value, dtype):
    form = FORMATS[dtype]
    exponent = max(int(np.frexp(value)[1]) - 1, form.e_min)
    quantum = 2.0 ** (exponent - form.p + 1)
    return np.rint(value / quantum) * quantum


@settings(max_examples=300)
@given(st.floats(-(2.0**60), 2.0**60), st.sampled_from([BFLOAT16, np.dtype(np.float32)]), st.booleans())
def test_rounding_is_to_nearest_even_and_once(value, dtype, between):
    value = np.float64(value)
    if between:  # on the middle between two numbers of the format, or just beside it
        value = nearest(value, dtype) * (1 + 2.0 ** -FORMATS[dtype].p) * (1 + 2.0**-52)
    assert round_to(np.array([value]), dtype).astype(np.float64)[0] == nearest(value, dtype)


@pytest.mark.parametrize("shape", [(3, 50, 70), (1, 16, 5), (5, 100, 300), (2, 7, 9)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_partial_sums_are_those_of_their_definition(shape, order):
    m, k, n = shape
    rng = np.random.default_rng(10)
    x, w, bias = rng.standard_normal((m, k)), rng.standard_normal((k, n)), rng.standard_normal((1, n))
    found = partial_sums(x, np.asarray(w.astype(np.float32), order=order), bias)
    wanted = partial_sums_reference(x, w.astype(np.float32), bias)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_policy_checks_as_many_heads_as_it_says_at_the_same_positions():
    q, k, v = heads(np.random.default_rng(11), torch.bfloat16)
    site = assembled(attention_case(q, k, v), [array(q)]).site
    rows = sample(site, policy("standard"), bytes(32))
    head, position = np.divmod(rows, TOKENS)
    assert len(set(head // (HEADS // GROUPS))) == 1
    assert len(set(head)) == HEADS // GROUPS
    assert all(set(position[head == h]) == set(position) for h in set(head))
    drawn = {int(sample(site, policy("spot"), bytes([i] * 32))[0] // TOKENS) // (HEADS // GROUPS) for i in range(40)}
    assert drawn == set(range(GROUPS))
    assert np.array_equal(sample(site, policy("full"), bytes(32)), np.arange(HEADS * TOKENS))
