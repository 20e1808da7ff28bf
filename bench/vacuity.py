"""Whether a check accepts anything: two numbers for every row of the registry, written to results/vacuity.json.

`honest`: nodes, rows and entries computed by ONNX Runtime, and how many nodes the check refused. 16-bit nodes are also
computed by its float32 kernels and rounded once, unless that overflows, which a product is refused for. Forgeries
(forgeries.py) are [accepted, tried]. Exits 1 on a gross one accepted, an honest node refused, or an op untried.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.forgeries import FORGERIES, SIZES, Random, differs
from bench.provenance import provenance
from gpu.ops.call import Call
from gpu.ops.registry import REGISTRY
from gpu.rounding import is_float
from proof.errors import Rejected
from proof.graph import DTYPES, dtype_name
from proof.policy import policy
from proof.sampling import Draw
from tests.gpu import (
    test_attention,
    test_contraction,
    test_decoding,
    test_movement,
    test_pointwise,
    test_random_nodes,
    test_rowwise,
)
from tests.gpu.nodes import BF16, Array, Case, Run, assembled, claims, opened, returned, run, sampled

RESULTS = Path(__file__).parent / "results" / "vacuity.json"
PACKAGES = ("numpy", "scipy", "numba", "onnx", "onnxruntime", "ml-dtypes")
SEED, ROUNDS, TRIES, FOLDED = 20, 6, 60, 60  # passes over the tables, random cases a maker, folded products
FIXED = {"Cast", "CastLike", "Resize", "Upsample"}  # attributes or float32 parameters of theirs name the format

Tally = Counter[tuple[str, ...]]  # ("honest", what) and (kind, forgery, "accepted" | "tried")
Tallies = dict[tuple[str, str], Tally]  # by op and dtype


def accepts(worker: Run, rows: tuple[Array, ...], claimed: list[Array], rng: Random) -> bool:
    op, draw = REGISTRY[worker.site.node.domain, worker.site.node.op], Draw(rng.bytes(32), "node/0")
    try:
        whole = returned(worker, rows, claimed)
        op.check(Call(worker.site, opened(op, worker, rows), rows, tuple(claimed), policy("standard"), draw, whole))
    except Rejected:
        return False
    return True


def measure(worker: Run, rng: Random, count: int | None) -> Iterator[tuple[str, Tally]]:
    """By dtype of an output: the honest node with every row, and forgeries of this output among `count` opened rows."""
    whole, rows = sampled(worker, rng, None), sampled(worker, rng, count)
    refused, honest = not accepts(worker, whole, claims(worker, whole), rng), claims(worker, rows)
    for i, claim in enumerate(honest):
        node = {("honest", "nodes"): 1, ("honest", "refused"): int(refused)} if i == 0 else {}
        size = {("honest", "rows"): len(whole[i]), ("honest", "entries"): worker.outputs[i].size}
        tally: Tally = Counter(node | size)
        for (kind, name), forge in FORGERIES.items():
            applies = claim.size and (kind == "gross" or is_float(claim.dtype))
            if applies and differs(kind, forged := forge(claim, rng), claim):
                tally[kind, name, "tried"] += 1
                tally[kind, name, "accepted"] += accepts(worker, rows, [*honest[:i], forged, *honest[i + 1 :]], rng)
        yield dtype_name(claim.dtype), tally


def fresh(case: Case, rng: Random) -> Case:
    """The case with the floats of each input that is not a weight in another order."""
    moves = [x is not None and i not in case.constant and is_float(x.dtype) for i, x in enumerate(case.inputs)]
    mixed = [rng.permutation(x.flat).reshape(x.shape) if m else x for x, m in zip(case.inputs, moves, strict=True)]
    return replace(case, inputs=mixed)


def runs(case: Case) -> Iterator[Run]:
    """The case in ONNX Runtime, and where float32 goes in and out, its fp16 and bf16 forms rounded once."""
    if case.domain == test_decoding.DOMAIN:
        yield assembled(case, [case.inputs[test_decoding.ANSWER].reshape(-1, 1)])
        return
    yield run(case)
    if case.outputs > 1 or case.op in FIXED or not any(x is not None and x.dtype == np.float32 for x in case.inputs):
        return
    for dtype in (np.dtype(np.float16), BF16):
        narrow = [x.astype(dtype) if x is not None and x.dtype == np.float32 else x for x in case.inputs]
        wide = [x.astype(np.float32) if x is not None and x.dtype == dtype else x for x in narrow]
        (output,) = run(replace(case, inputs=wide)).outputs
        if output.dtype == np.float32 and (np.isfinite(output.astype(dtype)) == np.isfinite(output)).all():
            yield assembled(replace(case, inputs=narrow), [output.astype(dtype)])


def unary(rng: Random) -> Case:
    make, since = test_pointwise.UNARY[op := str(rng.choice(list(test_pointwise.UNARY)))]
    return Case(op, [make(*test_random_nodes.shape(rng, top=12))], opset=max(since, 13))


def floats(rng: Random, *shapes: tuple[int, ...]) -> list[Array]:
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def attended(rng: Random) -> Case:
    batch, groups, queries, keys, width, ratio = (int(n) for n in rng.integers(1, 7, 6))
    inputs = floats(rng, (batch, groups * ratio, queries, 8 * width), *[(batch, groups, 8 * keys, 8 * width)] * 2)
    return Case("Attention", inputs, {"is_causal": int(rng.integers(2))}, opset=test_attention.OPSET)


def rotated(rng: Random) -> Case:
    batch, heads, length, half = (int(n) for n in rng.integers(1, 9, 4))
    inputs = floats(rng, (batch, heads, length, 2 * half), *[(batch, length, half)] * 2)
    return Case("RotaryEmbedding", inputs, {"interleaved": int(rng.integers(2))}, opset=test_attention.OPSET)


def decoded(rng: Random) -> Case:
    """An answer by the rule: greedy or sampled."""
    return test_decoding.case(rng, int(rng.integers(1, 20)), temperature=float(rng.choice([0.0, 0.7, 1.3])))


def folded(rng: Random) -> Case:
    """A product whose rows, all opened, are folded (T1) and spot-checked (T3)."""
    m, k, n = (int(size) for size in rng.integers(100, 200, 3))
    if rng.random() < 0.3:
        return Case("MatMulInteger", [rng.integers(0, 256, shape, np.uint8) for shape in ((m, k), (k, n))])
    return Case("MatMul", floats(rng, (m, k), (k, n)))


TABLES = [test_movement.CASES, test_pointwise.CASES, test_rowwise.CASES, test_contraction.CASES]
TABLES += [test_attention.cases(np.float32), test_attention.cases(np.float16)]
MAKERS = [*test_random_nodes.MAKERS, *[unary] * 4, *[test_contraction.random_case] * 2, attended, rotated, decoded]


def sweep(cases: Iterable[Case], rng: Random, count: int | None) -> Tallies:
    tallies: Tallies = defaultdict(Counter)
    for case in cases:
        for worker in runs(case):
            for dtype, tally in measure(worker, rng, count):
                tallies[f"{case.domain}.{case.op}".lstrip("."), dtype].update(tally)
    return tallies


def tree(tallies: Tallies, label: Callable[[str, str], tuple[str, str]]) -> dict[str, Any]:
    """As JSON, under the two labels of op and dtype: honest counts, and [accepted, tried] of every forgery."""
    together: Tallies = defaultdict(Counter)
    for key, tally in tallies.items():
        together[label(*key)].update(tally)
    found: dict[str, Any] = defaultdict(dict)
    for (first, second), tally in sorted(together.items()):
        entry: dict[str, Any] = {"honest": {n: tally["honest", n] for n in ("nodes", "rows", "entries", "refused")}}
        for kind, name in FORGERIES:
            if tally[kind, name, "tried"]:
                entry.setdefault(kind, {})[name] = [tally[kind, name, result] for result in ("accepted", "tried")]
        found[first][second] = entry
    return found


def gross(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*entry.get("gross", {"": (0, 0)}).values(), strict=True)))


def shown(title: str, groups: Mapping[str, Any]) -> Table:
    table = Table("", "dtype", "honest rows", "refused", "gross accepted", *SIZES, title=title)
    for group, dtypes in groups.items():
        for dtype, entry in dtypes.items():
            pairs = [[entry.get(kind, {}).get(size) for kind in ("row", "entry")] for size in SIZES]
            cells = [" · ".join(f"{a[0] / a[1]:.1%}" if a else "-" for a in pair) for pair in pairs]
            rows, refused = entry["honest"]["rows"], entry["honest"]["refused"]
            table.add_row(group, dtype, f"{rows:,}", str(refused), "{} of {:,}".format(*gross(entry)), *cells)
    return table


def main() -> int:
    rng, started = np.random.default_rng(SEED), time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    np.seterr(all="ignore")  # forgeries overflow
    cases = [fresh(case, rng) for _ in range(ROUNDS) for table in TABLES for case in table]
    cases += [maker(rng) for maker in MAKERS for _ in range(TRIES)]
    ops = sweep(cases, rng, policy("standard").rows)
    products = sweep((folded(rng) for _ in range(FOLDED)), rng, None)
    registered = {f"{domain}.{op}".lstrip("."): str(row.family) for (domain, op), row in REGISTRY.items()}
    families = tree(ops, lambda op, dtype: (registered[op], dtype if is_float(DTYPES[dtype]) else "exact"))
    results = {"families": families, "folded": tree(products, lambda *key: key), "ops": tree(ops, lambda *key: key)}
    entries = [entry for group in results.values() for dtypes in group.values() for entry in dtypes.values()]
    untried = [op for op in registered if not any(gross(entry)[1] for entry in results["ops"].get(op, {}).values())]
    RESULTS.write_text(
        json.dumps(
            provenance(f"python bench/vacuity.py  # seed {SEED}", PACKAGES)
            | {"seconds": round(time.perf_counter() - started)}
            | results,
            indent=1,
        )
        + "\n"
    )
    console.print(shown("small forgeries accepted at 16 opened rows: of a row · of an entry", families))
    console.print(shown("the same with every row of a large product opened", results["folded"]))
    console.print(f"{len(registered)} ops registered; untried: {untried or 'none'}")
    return int(bool(untried) or any(gross(entry)[0] or entry["honest"]["refused"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
