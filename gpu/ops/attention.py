"""Attention: opened query rows recomputed in float64, within the radius of any honest kernel.

Source: numerics-local section 3, "Attention, F". Engines may scale before or after the product, round scores,
probabilities and sums to the dtype or not, and add in any order; the unnormalised weight of a key then lies in an
interval, and the output moves by at most sum_t max(high - w, w - low) |v_t - z| / sum_t low.
Semantics: Attention-23 and -24: causal masks are aligned to the cache, a row without any key is zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from gpu.clearing import attention as clearing
from gpu.clearing.stand import Stand
from gpu.device import Memory
from gpu.kernels.attention import replay
from gpu.kernels.attention_radius import Bounds, attend
from gpu.ops import heads as groups
from gpu.ops import rotary
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, Tensor, distinct, every_row
from gpu.profiles import profile_of
from gpu.rounding import FORMATS, U32, Array, Interval, Values, around, compare, compare_equal
from proof.errors import Reason, Rejected
from proof.graph import Node, Spec

Ints = npt.NDArray[np.int64]

MASK, PAST_KEY, PAST_VALUE, LENGTHS = 3, 4, 5, 6  # input positions after Q, K, V


@dataclass(frozen=True)
class Queries:
    """Query rows of one head: positions `at` among the asked output rows, numbers `i` in the sequence."""

    at: Ints
    batch: int
    head: int
    i: Ints


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention node. `packed`: heads lie side by side in a row (3-D), not as a dimension (4-D)."""

    batch: int
    queries: int
    keys: int  # new ones, without the past
    past: int
    heads: int
    groups: int  # heads of K and V
    packed: bool
    causal: bool

    def select(self, rows: RowIds) -> Iterator[Queries]:
        batch, i = np.divmod(rows, self.queries)
        at = np.arange(len(rows))
        if self.packed:
            at, i = np.tile(at, self.heads), np.tile(i, self.heads)
            batch = np.concatenate([batch * self.heads + head for head in range(self.heads)])
        for value in distinct(batch):
            here = np.flatnonzero(batch == value)
            yield Queries(at[here], int(value) // self.heads, int(value) % self.heads, i[here])

    def group(self, head: int) -> int:
        return head // (self.heads // self.groups)

    def visible(self, queries: Queries) -> int:
        """Keys, past ones first, that these queries may see."""
        total = self.past + self.keys
        return min(total, int(queries.i.max()) + self.past + 1) if self.causal else total

    def key_rows(self, queries: Queries) -> tuple[Ints, Ints]:
        """Rows of K (or V), and of the past, that hold the visible keys."""
        visible, group = self.visible(queries), self.group(queries.head)
        first = queries.batch if self.packed else queries.batch * self.groups + group
        past = (queries.batch * self.groups + group) * self.past + np.arange(min(self.past, visible))
        return first * self.keys + np.arange(max(visible - self.past, 0)), past

    def mask_rows(self, queries: Queries, mask: Spec) -> Ints:
        lead = (1,) * (4 - len(mask.shape)) + mask.shape[:-1]
        table = np.broadcast_to(np.arange(mask.rows).reshape(lead), (self.batch, self.heads, self.queries))
        rows: Ints = table[queries.batch, queries.head, queries.i]
        return rows

    def columns(self, array: npt.NDArray[Any], number: int, count: int) -> npt.NDArray[Any]:
        """The columns of head `number` out of `count`."""
        width = array.shape[1] // count
        return array[:, number * width : (number + 1) * width] if self.packed else array


def heads_of(site: Site) -> Heads:
    q, k = site.inputs[:2]
    assert q is not None
    assert k is not None
    past = site.inputs[PAST_KEY] if len(site.inputs) > PAST_KEY else None
    packed = len(q.shape) == 3
    return Heads(
        batch=q.shape[0],
        queries=q.shape[-2],
        keys=k.shape[-2],
        past=0 if past is None else past.shape[2],
        heads=site.node.attributes["q_num_heads"] if packed else q.shape[1],
        groups=site.node.attributes["kv_num_heads"] if packed else k.shape[1],
        packed=packed,
        # Where the keys' count is data, which ones a query sees is known only at the check.
        causal=bool(site.node.attributes.get("is_causal", 0)) and _spec(site, LENGTHS) is None,
    )


def _spec(site: Site, position: int) -> Spec | None:
    return site.inputs[position] if position < len(site.inputs) else None


def _reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    heads = heads_of(site)
    if position > 0:
        return _reach_cache(heads, site, position, rows)
    needed: dict[int, list[Ints]] = {0: [rows], 1: [], 2: [], MASK: [], PAST_KEY: [], PAST_VALUE: [], LENGTHS: []}
    mask, lengths = _spec(site, MASK), _spec(site, LENGTHS)
    for queries in heads.select(rows):
        new, past = heads.key_rows(queries)
        for position, wanted in ((1, new), (2, new), (PAST_KEY, past), (PAST_VALUE, past)):
            needed[position].append(wanted)
        if mask is not None:
            needed[MASK].append(heads.mask_rows(queries, mask))
    if lengths is not None:
        needed[LENGTHS].append(every_row(lengths))
    present = {i: parts for i, parts in needed.items() if _spec(site, i) is not None}
    return {i: distinct(np.concatenate([np.zeros(0, np.int64), *parts])) for i, parts in present.items()}


def _cache_rows(heads: Heads, rows: RowIds) -> tuple[npt.NDArray[np.bool_], Ints, Ints, Ints]:
    """For rows of a present key or value: whether it is of the past, its row there or in K, and its head."""
    matrix, t = np.divmod(rows, heads.past + heads.keys)
    old = t < heads.past
    first = matrix // heads.groups if heads.packed else matrix
    return old, matrix * heads.past + t, first * heads.keys + t - heads.past, matrix % heads.groups


def _reach_cache(heads: Heads, site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    old, past, new, _ = _cache_rows(heads, rows)
    reached = {position: distinct(new[~old])}
    if _spec(site, position + 3) is not None:
        reached[position + 3] = distinct(past[old])
    return reached


def _check(call: Call) -> Measure:
    heads = heads_of(call.site)
    entries, worst = call.claimed[0].size, _check_output(call, heads)
    for position in range(1, len(call.claimed)):
        if call.site.outputs[position] is not None:
            _check_cache(call, heads, position)
            entries += call.claimed[position].size
    return Measure(entries, worst)


def _clear(call: Call, stand: Stand, mark: Memory) -> bool:
    """Have a device judge the output of a node without a cache."""
    heads = heads_of(call.site)
    mask = call.inputs[MASK] if len(call.inputs) > MASK else None
    if heads.past or any(call.site.outputs[1:]) or (mask is not None and mask.spec.width > heads.keys):
        return False
    k, v = (_tensor(call, i).spec.width // (heads.groups if heads.packed else 1) for i in (1, 2))
    asked = [_asked(call, heads, queries, (k, v)) for queries in heads.select(call.rows[0])]
    return clearing.clear(call, stand, mark, asked, (k, v))


def _asked(call: Call, heads: Heads, queries: Queries, sizes: tuple[int, int]) -> clearing.Asked:
    """Where the rows of one head lie, and how many keys they see."""
    q, mask, (k, v) = _tensor(call, 0), call.inputs[MASK] if len(call.inputs) > MASK else None, sizes
    head, group = (queries.head, heads.group(queries.head)) if heads.packed else (0, 0)
    visible, limits = heads.visible(queries), _limits(call, heads, queries)
    new, _ = heads.key_rows(queries)
    first = [int(_tensor(call, i).places(new)[0]) if visible else 0 for i in (1, 2)]
    return clearing.Asked(
        q=q.places(call.rows[0][queries.at]) * q.spec.width + head * k,
        y=queries.at * call.claimed[0].shape[1] + head * v,
        mask=limits * 0 if mask is None else mask.places(heads.mask_rows(queries, mask.spec)) * mask.spec.width,
        limits=limits,
        k=first[0] * _tensor(call, 1).spec.width + group * k,
        v=first[1] * _tensor(call, 2).spec.width + group * v,
        visible=visible,
        bounds=bounds(call, k, visible, call.claimed[0].dtype),
    )


def _check_cache(call: Call, heads: Heads, position: int) -> None:
    """present_key (1) and present_value (2) repeat the past and the new rows."""
    old, past, new, group = _cache_rows(heads, call.rows[position])
    expected = np.empty_like(call.claimed[position])
    if old.any():
        expected[old] = _tensor(call, position + 3).take(past[old])
    rows = _tensor(call, position).take(new[~old])
    if heads.packed:
        width = expected.shape[1]
        rows = np.take_along_axis(rows, group[~old][:, None] * width + np.arange(width), axis=1)
    expected[~old] = rows
    compare_equal(call.claimed[position], expected)


def _interval(call: Call) -> Interval | None:
    """The rows under a rounding profile. None in fp32, where no bit is determined and `check` is closer, and where no
    profile says what a node does: a cache, float masks, softcap."""
    site, heads, rows = call.site, heads_of(call.site), call.rows[0]
    out, mask = site.outputs[0], _spec(site, MASK)
    assert out is not None
    unsaid = heads.past or _spec(site, LENGTHS) is not None or site.node.attributes.get("softcap", 0.0)
    if unsaid or FORMATS[out.dtype].p >= 24 or (mask is not None and mask.dtype != np.bool_) or any(site.outputs[1:]):
        return None
    profile = profile_of(call.policy)
    z, radius = np.empty((len(rows), out.width)), np.empty((len(rows), out.width))
    for queries in heads.select(rows):
        q = heads.columns(_tensor(call, 0).take(rows[queries.at]), queries.head, heads.heads)
        k, v = (_own_keys(call, heads, queries, position) for position in (1, 2))
        allowed = _bias(call, heads, queries, len(k)) == 0.0
        if not (allowed.any(1).all() and np.isfinite(q).all()):
            return None
        found = replay(
            q.astype(np.float64),
            k,
            v,
            allowed,
            _scale(call, q.shape[1]),
            eager=profile.attention == "eager",
            units=(profile.scores, profile.gamma, profile.exponential),
        )
        for target, values in zip((z, radius), found, strict=True):
            width = values.shape[1]
            columns = slice(queries.head * width, (queries.head + 1) * width) if heads.packed else slice(None)
            target[queries.at, columns] = values
    return around(z, radius, out.dtype)


def _tensor(call: Call, position: int) -> Tensor:
    tensor = call.inputs[position]
    assert tensor is not None
    return tensor


def _check_output(call: Call, heads: Heads) -> float:
    worst = 0.0
    claimed = call.claimed[0]
    for queries in heads.select(call.rows[0]):
        q = heads.columns(_tensor(call, 0).take(call.rows[0][queries.at]), queries.head, heads.heads)
        k, v = _keys(call, heads, queries, 1), _keys(call, heads, queries, 2)
        y = heads.columns(claimed[queries.at], queries.head, heads.heads)
        worst = max(worst, _check_rows(call, q.astype(np.float64), k, v, _bias(call, heads, queries, len(k)), y))
    return worst


def _own_keys(call: Call, heads: Heads, queries: Queries, position: int) -> npt.NDArray[Any]:
    new, _ = heads.key_rows(queries)
    return heads.columns(_tensor(call, position).take(new), heads.group(queries.head), heads.groups)


def _keys(call: Call, heads: Heads, queries: Queries, position: int) -> npt.NDArray[Any]:
    _, past = heads.key_rows(queries)
    rows = _own_keys(call, heads, queries, position)
    if heads.past:
        rows = np.concatenate([_tensor(call, position + 3).take(past), rows])
    return rows


def _limits(call: Call, heads: Heads, queries: Queries) -> Ints:
    """Keys, from the first on, that each query may see, the past among them; a mask may hide more of them.

    Raises Rejected where a sequence has more keys than there are, or less than none.
    """
    total, offset = heads.past + heads.keys, heads.past
    lengths, count = call.inputs[LENGTHS] if len(call.inputs) > LENGTHS else None, total
    if lengths is not None:
        count = int(lengths.whole().reshape(-1)[queries.batch])
        offset = count - heads.queries
        if not 0 <= count <= total:
            raise Rejected(Reason.REEXECUTION, f"a sequence of {count} keys where there are {total}")
    causal = call.site.node.attributes.get("is_causal", 0)
    return np.clip(queries.i + offset + 1, 0, count) if causal else np.full(len(queries.i), count, np.int64)


def _bias(call: Call, heads: Heads, queries: Queries, visible: int) -> Array:
    """What is added to the scores, (queries, keys): 0 or -inf, and a float mask's values."""
    total = heads.past + heads.keys
    bias = np.where(np.arange(visible) < _limits(call, heads, queries)[:, None], 0.0, -np.inf)
    mask = call.inputs[MASK] if len(call.inputs) > MASK else None
    if mask is not None:
        given = mask.take(heads.mask_rows(queries, mask.spec))
        added = np.where(given, 0.0, -np.inf) if given.dtype == np.bool_ else given.astype(np.float64)
        if added.shape[1] not in (1, total):
            added = np.pad(added, ((0, 0), (0, total - added.shape[1])), constant_values=-np.inf)
        bias = bias + added[:, :visible]
    return bias


def _check_rows(call: Call, q: Array, k: Values, v: Values, bias: Array, claimed: Values) -> float:
    """Compare rows (r, width) with softmax(scale q k + bias) v, as any honest kernel may round it."""
    if np.isnan(bias).any() or not np.isfinite(q).all():
        raise Rejected(Reason.NONFINITE, "NaN or infinity in queries or mask")
    # Without any key a row is zero, and so it is in engines that take the lowest number for -inf.
    lowest: Any = bias.max(axis=1, initial=-np.inf) <= -FORMATS[claimed.dtype].largest
    empty: Any = lowest & ((claimed == 0).all(1) | (bias == -np.inf).all(1))
    z, slack = np.zeros(claimed.shape), np.zeros(claimed.shape)
    if not empty.all():
        allowed = bounds(call, q.shape[1], len(k), claimed.dtype)
        z[~empty], slack[~empty] = attend(q[~empty], k, v, bias[~empty], allowed, claimed.dtype)
    if not np.isfinite(slack).all():
        raise Rejected(Reason.NONFINITE, "NaN or infinity in keys or values, or scores overflow")
    return compare(claimed, z, slack)


def bounds(call: Call, width: int, keys: int, dtype: np.dtype) -> Bounds:
    """What honest kernels may do: sqrt(scale), q and k times it, the product and its scaling rounded to the dtype."""
    u, unit, soft = FORMATS[dtype].u, min(U32, FORMATS[dtype].u), _soft_unit(call, dtype)
    return Bounds(
        scale=_scale(call, width),
        softcap=float(call.site.node.attributes.get("softcap", 0.0)),
        product=_alpha(width) * unit + 4 * u,
        score=2 * u,
        cap=16 * unit,
        exponent=soft,
        exponential=(2048 if u > U32 else 64) * unit,
        sums=(2 * _alpha(keys) + 10) * unit + soft,
    )


def _scale(call: Call, width: int) -> float:
    given = call.site.node.attributes.get("scale")
    return 1.0 / float(np.sqrt(width)) if given is None else float(given)


def _soft_unit(call: Call, dtype: np.dtype) -> float:
    """The unit roundoff in which the softmax may be computed and its result be rounded."""
    precision = call.site.node.attributes.get("softmax_precision")
    if not precision:
        return FORMATS[dtype].u
    return float(max(FORMATS[dtype].u, FORMATS[np.dtype(onnx.helper.tensor_dtype_to_np_dtype(precision))].u))


def _alpha(terms: int) -> float:
    """Rounding errors of a sum of `terms`, in units of the sum of magnitudes (numerics-local section 2)."""
    return float(min(terms + 2, 16 + 2 * np.sqrt(terms)))


def _refuses(node: Node) -> str | None:
    if len(node.outputs) > 3 and node.outputs[3]:
        return "output qk_matmul_output is not supported"
    if any(node.attributes.get(name, -1) >= 0 for name in ("left_window_size", "right_window_size")):
        return "sliding windows are not supported"
    return None


OPS: dict[tuple[str, str], Op] = {
    ("", "Attention"): Op(
        family=Family.ATTENTION,
        reach=_reach,
        check=_check,
        interval=_interval,
        clear=_clear,
        refuses=_refuses,
        sample=groups.sample,
    ),
    **rotary.OPS,
}
