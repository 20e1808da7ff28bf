"""A secret key of a model: what its matrices are folded to, so that products are checked without the weights.

Source: numerics-matmul SPECIFICATION S3, S4, S5 and S7. One secret r serves every matrix. A product is checked on all
opened rows by T1 and by T3 on secret columns; a row of a table, which is moved and not computed, by its fold.
Theorem 8 holds as long as nobody learns more of a check than that it passed, and no more after one that did not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import numpy.typing as npt

from gpu.freivalds import PREFIXES, PROFILES, WIDEST_FOLD, Product, column_weights, judge_rows, quantile_of, recompute
from gpu.kernels.fold import Fold, fold
from gpu.kernels.keyed import ERROR, fold_left, fold_right
from gpu.kernels.widen import NARROW, Raw
from gpu.ops.call import Call, Family, Measure
from gpu.ops.matrices import layout
from gpu.plan import SHAPE_ONLY, Model, registry_row
from gpu.rounding import BFLOAT16, EVALUATION, Array, is_float
from proof.digest import Tag, tagged
from proof.errors import Malformed, Reason, Rejected
from proof.graph import Node
from proof.sampling import entries, normals

CHALLENGES = 8  # vectors: with fewer one lucky draw is too likely (S7)
COLUMNS = 8  # of each matrix, kept whole for T3
STREAMED = 2**21  # elements of a weight at hand at once
REFUSED = "a product or a row of a table fails its secret check"  # all that is said

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Role:
    """How a node uses a weight: as the right factor of its product, or as the table that it looks rows up in."""

    weight: str
    table: bool = False
    transposed: bool = False  # the weight lies as (n, k)
    wide: bool = False  # its product is what a token is chosen from: folded in blocks of columns


@dataclass(frozen=True)
class Matrix:
    """A weight as (k, n), folded in blocks of columns: u (blocks, s, k), nu (blocks, k), d (n,), and
    `columns` (c, k), which lie `at` (c,)."""

    u: Raw
    nu: Raw
    d: Array  # powers of two
    at: npt.NDArray[np.int64]
    columns: Raw


@dataclass(frozen=True)
class Table:
    """A weight (V, n) folded row by row: sums (V, s)."""

    sums: Array


@dataclass(frozen=True)
class Key:
    """`model` has no values for the weights in `roles`, by node index. `r` (s, N) is secret, and so is the rest."""

    model: Model
    seed: bytes = field(repr=False)
    roles: Mapping[int, Role]
    r: npt.NDArray[np.float32] = field(repr=False)
    parts: Mapping[Role, Matrix | Table] = field(repr=False)

    @property
    def id(self) -> bytes:
        """A commitment to the seed: a key that is revealed can be told from another."""
        return tagged(Tag.KEY, self.seed + self.model.id)

    def check(self, call: Call) -> Measure:
        """Check a node that has a role. Raises Rejected, which says nothing of how far off the claim is."""
        part = self.parts[self.roles[call.site.node.index]]
        if isinstance(part, Table):
            passed = _check_table(call, part, self.r)
        else:
            outcomes = [_check_product(product, part, self.r, call) for product in _products(call)]
            passed = all(outcomes)
        if not passed:
            raise Rejected(Reason.FREIVALDS, REFUSED)
        return Measure(call.claimed[0].size)


def roles(model: Model) -> dict[int, Role]:
    """The nodes to check by a key, by index. Raises Malformed for a product of weights that no key is made for."""
    known = _known(model)
    found = {node.index: role for node in model.nodes if (role := _role(model, node, known)) is not None}
    uses: dict[str, list[Role | None]] = {}
    for node in model.nodes:
        for name in {*node.inputs} & model.constants.keys():
            uses.setdefault(name, []).append(found.get(node.index))
    clear = {name for name, users in uses.items() if name in model.graph.outputs or None in users}
    clear |= {name for name, users in uses.items() if any(role and role.weight != name for role in users)}
    return {index: role for index, role in found.items() if role.weight not in clear}


def make(model: Model, seed: bytes, progress: Progress = lambda name: None) -> Key:
    """The key that `seed` gives, from the weights one after another. Raises Malformed for what cannot be keyed."""
    wanted = roles(model)
    if not wanted:
        raise Malformed("no product has a weight that a key would stand for")
    r = secret(model, wanted, seed)
    parts: dict[Role, Matrix | Table] = {}
    for role in dict.fromkeys(wanted.values()):
        progress(role.weight)
        parts[role] = _fold_table(model, role, r) if role.table else _fold_matrix(model, role, r, seed, len(parts))
    return Key(model, seed, wanted, r, parts)


def secret(model: Model, wanted: Mapping[int, Role], seed: bytes) -> npt.NDArray[np.float32]:
    """r (s, N), as long as the longest row that is folded."""
    return normals(seed, "key/normals", (CHALLENGES, max(_lengths(model, wanted))))


def _lengths(model: Model, wanted: Mapping[int, Role]) -> Iterator[int]:
    for role in wanted.values():
        shape = model.constants[role.weight].shape
        yield shape[0] if role.transposed else shape[1]


# ---- what is keyed


def _known(model: Model) -> set[str]:
    """Constants, and what follows from them or from shapes."""
    known = set(model.constants)
    for node in model.nodes:
        if (node.domain, node.op) in SHAPE_ONLY or all(name in known for name in node.inputs if name):
            known.update(node.outputs)
    return known


def _role(model: Model, node: Node, known: set[str]) -> Role | None:
    if registry_row(node).family is Family.CONTRACTION:
        return _factor(model, node, known)
    if (node.domain, node.op) != ("", "Gather") or node.inputs[0] not in model.constants or node.inputs[1] in known:
        return None
    table = model.constants[node.inputs[0]]
    looked_up = table.ndim == 2 and is_float(table.dtype) and node.attributes.get("axis", 0) in (0, -2)
    return Role(node.inputs[0], table=True) if looked_up else None


def _factor(model: Model, node: Node, known: set[str]) -> Role | None:
    factors = node.inputs[:2]
    if not known & {*factors} and node.op in ("MatMul", "Gemm", "FusedMatMul"):
        return None
    weight = model.constants.get(factors[1])
    plain = (node.domain, node.op) in (("", "MatMul"), ("", "Gemm")) and factors[0] not in known
    if not plain or weight is None or weight.ndim != 2 or not weight.size or weight.dtype not in PROFILES:
        raise Malformed(f"{node} multiplies {factors[1]!r}, which no key can be made for: verify with the model")
    read = [user.op for user in model.nodes if node.outputs[0] in user.inputs]
    wide = node.outputs[0] in model.graph.outputs or bool({*read} & {"Decode", "ArgMax", "TopK"})
    return Role(factors[1], transposed=bool(node.attributes.get("transB", 0)), wide=wide)


# ---- how it is made


def blocks(role: Role, n: int) -> range:
    return range(0, n, WIDEST_FOLD if role.wide else max(n, 1))


def _fold_matrix(model: Model, role: Role, r: npt.NDArray[np.float32], seed: bytes, number: int) -> Matrix:
    weight = model.constants[role.weight]
    k, n = weight.shape[::-1] if role.transposed else weight.shape
    starts = blocks(role, n)
    u, nu = np.zeros((len(starts), CHALLENGES, k)), np.zeros((len(starts), k))
    energy = np.zeros(n) if role.transposed else _column_energy(weight)
    for rows, values in _streamed(weight, [*starts, n] if role.transposed else [0, k]):
        if role.transposed:
            energy[rows] = np.mean(values**2, axis=1)
            scaled = values.T * column_weights(energy[rows])
            block = rows.start // WIDEST_FOLD if role.wide else 0
            u[block] += r[:, rows] @ scaled.T
            nu[block] += (scaled**2).sum(1)
            continue
        for block, start in enumerate(starts):
            part = slice(start, starts[block + 1] if block + 1 < len(starts) else n)
            scaled = values[:, part] * column_weights(energy)[part]
            u[block][:, rows] = r[:, part] @ scaled.T
            nu[block][rows] = (scaled**2).sum(1)
    kept = np.float32 if weight.dtype in NARROW else np.float64
    with np.errstate(over="ignore"):
        u, nu = u.astype(kept), nu.astype(kept)
    if not (np.isfinite(u).all() and np.isfinite(nu).all()):
        raise Malformed(f"weight {role.weight!r} holds NaN, infinity or values too large for a key")
    at = entries(seed, f"key/columns/{number}", COLUMNS, n)
    columns = np.stack([weight[j] if role.transposed else weight[:, j] for j in at.tolist()])
    return Matrix(u, nu, column_weights(energy), at, columns.view(np.ndarray))


def _fold_table(model: Model, role: Role, r: npt.NDArray[np.float32]) -> Table:
    table = model.constants[role.weight]
    vectors = r[:, : table.shape[1]].T.astype(np.float64)
    sums = np.empty((len(table), CHALLENGES))
    for rows, values in _streamed(table, [0, len(table)]):
        sums[rows] = values @ vectors
    if not np.isfinite(sums).all():
        raise Malformed(f"weight {role.weight!r} holds NaN or infinity")
    return Table(sums)


def _streamed(weight: Raw, cuts: list[int]) -> Iterator[tuple[slice, Array]]:
    """Rows of a weight in float64, few at a time, none of these parts across a cut."""
    step = max(1, STREAMED // max(weight.shape[1], 1))
    for first, last in zip(cuts, cuts[1:], strict=False):
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            part = np.asarray(weight[rows])
            yield rows, (part.astype(np.float32) if part.dtype in NARROW else part).astype(np.float64)


def _column_energy(weight: Raw) -> Array:
    total = np.zeros(weight.shape[1])
    for _, values in _streamed(weight, [0, len(weight)]):
        total += (values**2).sum(0)
    return total / max(len(weight), 1)


# ---- how it is checked


def _products(call: Call) -> Iterator[Product]:
    form, claimed, attributes = layout(call.site), call.claimed[0], call.site.node.attributes
    bias = call.inputs[2] if len(call.inputs) > 2 else None
    for group in form.groups(call.rows[0]):
        x, w = form.operands(group, call.inputs)
        added: Array = np.zeros((1, 1))
        if bias is not None:
            own = len(bias.spec.shape) == 2 and bias.spec.shape[0] > 1
            added = bias.take(call.rows[0][group.at] if own else np.zeros(1, np.int64)).astype(np.float64)
            added = float(attributes.get("beta", 1.0)) * np.broadcast_to(added, (len(added), w.shape[1]))
        alpha = float(attributes.get("alpha", 1.0))
        yield Product(x if alpha == 1.0 else x.astype(np.float64) * alpha, w, claimed[group.at], added)


def _check_product(product: Product, part: Matrix, r: npt.NDArray[np.float32], call: Call) -> bool:
    """T1 and T3 on every row, both to the end whatever they find, so that time tells nothing either."""
    m, k, n = product.shape
    if not (m and n):
        return True
    biased, bias = bool(np.any(product.bias)), np.asarray(product.bias)
    quantile = quantile_of(CHALLENGES, call.policy.delta_bits, len(call.rows[0]) * len(part.u))
    evaluation = ERROR if part.u.dtype == np.float32 else 0.0
    size, passed = (WIDEST_FOLD if len(part.u) > 1 else n), True
    for block, start in enumerate(range(0, n, size)):
        own = slice(start, start + size)
        d, added = part.d[own], bias[:, own] if biased else 0.0
        claim = Product(product.x, product.w[:, own], product.y[:, own], added)
        right, left = _right(product.x, part.u[block], part.nu[block]), _left(claim.y, r, start, d)
        shift = (added * d) @ r[:, own].T if biased else np.zeros((1, CHALLENGES))
        passed &= _passes(judge_rows, claim, right, left, shift, d, quantile, evaluation)
    spot = Product(product.x, part.columns.T, product.y[:, part.at], bias[:, part.at] if biased else 0.0)
    return _passes(recompute, spot) and passed


def _right(x: Raw, u: Raw, nu: Raw) -> Fold:
    blocks = min(PREFIXES, x.shape[1])
    if x.dtype == BFLOAT16:
        found = fold_right(x, u, nu, blocks)
        if _in_range(found.energy):
            return found
    return fold(x, u.astype(np.float64), nu.astype(np.float64), blocks)


def _left(y: Raw, r: npt.NDArray[np.float32], start: int, d: Array) -> Fold:
    if y.dtype == BFLOAT16:
        found = fold_left(y, r, start, d.astype(np.float32))
        if _in_range(found.energy) and _in_range(found.rounding):
            return found
    return fold(y, r[:, start : start + len(d)] * d, d**2, dtype=y.dtype)


def _in_range(energy: Array) -> bool:
    """Whether float32 neither overflowed nor lost what counts (S4)."""
    return bool(((energy >= 2.0**-100) & (energy <= 2.0**100)).all())


def _passes(judge: Callable[..., float], *arguments: object) -> bool:
    try:
        judge(*arguments)
    except Rejected:
        return False
    return True


def _check_table(call: Call, part: Table, r: npt.NDArray[np.float32]) -> bool:
    """Rows of a table are moved bit for bit, so their folds differ by no more than our own evaluation does."""
    indices, claimed = call.inputs[1], call.claimed[0].astype(np.float64)
    assert indices is not None
    chosen, count = indices.elements(call.rows[0]), len(part.sums)
    if ((chosen < -count) | (chosen >= count)).any():
        return False
    vectors = r[:, : claimed.shape[1]].T.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(claimed @ vectors - part.sums[chosen])
        slack = EVALUATION * sqrt(claimed.shape[1]) * (np.abs(claimed) @ np.abs(vectors))
        return bool((off <= slack).all())
