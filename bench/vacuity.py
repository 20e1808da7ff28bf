"""Whether a check accepts anything: two numbers for every row of the registry, written to results/vacuity.json.

`honest`: rows and entries computed by ONNX Runtime (16-bit ones also by its float32 kernels, rounded once), and how many
nodes the check refused. `gross`, `row`, `entry`: forgeries [accepted, tried]. A gross forgery is at least 10 % off
in norm over all opened rows; a row has Gaussian noise of a relative size added, an entry is moved by it. What rounding
takes back to the honest value is not a try. Exits 1 on a gross forgery accepted, an honest node refused, or a row untried.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu.ops.call import Call
from gpu.ops.registry import REGISTRY
from gpu.rounding import is_float
from proof.errors import Rejected
from proof.graph import dtype_name
from proof.policy import policy
from proof.sampling import Draw
from tests.gpu import test_attention, test_contraction, test_movement, test_pointwise, test_random_nodes, test_rowwise
from tests.gpu.nodes import BF16, Array, Case, Run, assembled, claims, opened, run, sampled, same

RESULTS = Path(__file__).parent / "results" / "vacuity.json"
PACKAGES = ("numpy", "scipy", "numba", "onnx", "onnxruntime", "ml-dtypes")
SEED, ROUNDS, TRIES, FOLDED = 20, 6, 60, 25  # passes over the tables, random cases a maker, folded products
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
HONEST = ("nodes", "rows", "entries", "refused")
SIZES = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5")
GROSS = 0.1
FIXED = {"Cast", "CastLike", "Resize", "Upsample"}  # attributes or float32 parameters of theirs name the format

Random = np.random.Generator
Forge = Callable[[Array, Random], Array]
Tally = Counter[tuple[str, ...]]  # ("honest", what) and (kind, forgery, "accepted" | "tried")
Tallies = dict[tuple[str, str], Tally]  # by op and dtype


def rms(claim: Array) -> float:
    wide = claim.astype(np.float64)
    return float(np.sqrt(np.mean(np.where(np.isfinite(wide), wide, 0.0) ** 2)))


def random_like(claim: Array, rng: Random) -> Array:
    if is_float(claim.dtype):
        return (rng.standard_normal(claim.shape) * rms(claim)).astype(claim.dtype)
    return rng.permutation(claim.reshape(-1)).reshape(claim.shape)


def noisy_row(claim: Array, rng: Random, size: float) -> Array:
    forged, i = claim.copy(), rng.integers(len(claim))
    noise = rng.standard_normal(claim.shape[1]) * rms(claim[i]) * size
    forged[i] = (claim[i].astype(np.float64) + noise).astype(claim.dtype)
    return forged


def moved_entry(claim: Array, rng: Random, size: float) -> Array:
    forged, at = claim.copy(), np.unravel_index(rng.integers(claim.size), claim.shape)
    forged[at] = float(claim[at]) * (1.0 + size * rng.choice([-1.0, 1.0]))
    return forged


FORGERIES: dict[tuple[str, str], Forge] = {
    ("gross", "random"): random_like,
    ("gross", "zeros"): lambda claim, rng: np.zeros_like(claim),
    ("gross", "shifted"): lambda claim, rng: np.roll(claim, 1, axis=1),
    ("gross", "swapped rows"): lambda claim, rng: np.roll(claim, 1, axis=0),
    ("gross", "negated"): lambda claim, rng: ~claim if claim.dtype == np.bool_ else -claim,
    **{("row", size): lambda claim, rng, s=float(size): noisy_row(claim, rng, s) for size in SIZES},
    **{("entry", size): lambda claim, rng, s=float(size): moved_entry(claim, rng, s) for size in SIZES},
}


def differs(kind: str, forged: Array, claim: Array) -> bool:
    """Whether it is a forgery at all."""
    if kind != "gross":
        return not same(forged, claim)
    wide, honest = (np.nan_to_num(x.astype(np.float64), posinf=1e30, neginf=-1e30) for x in (forged, claim))
    return bool(np.linalg.norm(wide - honest) > GROSS * np.linalg.norm(honest))


def accepts(worker: Run, rows: tuple[Array, ...], claimed: list[Array], rng: Random) -> bool:
    op, draw = REGISTRY[worker.site.node.domain, worker.site.node.op], Draw(rng.bytes(32), "node/0")
    try:
        op.check(Call(worker.site, opened(op, worker, rows), rows, tuple(claimed), policy("standard"), draw))
    except Rejected:
        return False
    return True


def measure(worker: Run, rng: Random, count: int | None) -> Iterator[tuple[str, Tally]]:
    """By dtype of an output: the honest node with every row, and forgeries of this output among `count` opened rows."""
    whole, rows = sampled(worker, rng, None), sampled(worker, rng, count)
    refused, honest = not accepts(worker, whole, claims(worker, whole), rng), claims(worker, rows)
    for i, claim in enumerate(honest):
        first = {("honest", "nodes"): 1, ("honest", "refused"): int(refused)} if i == 0 else {}
        size = worker.outputs[i].size
        tally: Tally = Counter({("honest", "rows"): len(whole[i]), ("honest", "entries"): size} | first)
        for (kind, name), forge in FORGERIES.items():
            if not claim.size or (kind != "gross" and not is_float(claim.dtype)):
                continue
            forged = forge(claim, rng)
            if differs(kind, forged, claim):
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
    yield run(case)
    if case.outputs > 1 or case.op in FIXED or not any(x is not None and x.dtype == F32 for x in case.inputs):
        return
    for dtype in (F16, BF16):
        narrow = [x.astype(dtype) if x is not None and x.dtype == F32 else x for x in case.inputs]
        wide = [x.astype(F32) if x is not None and x.dtype == dtype else x for x in narrow]
        (output,) = run(replace(case, inputs=wide)).outputs
        if output.dtype == F32:
            yield assembled(replace(case, inputs=narrow), [output.astype(dtype)])


def unary(rng: Random) -> Case:
    op = str(rng.choice(list(test_pointwise.UNARY)))
    make, since = test_pointwise.UNARY[op]
    return Case(op, [make(*test_random_nodes.shape(rng, top=12))], opset=max(since, 13))


def floats(rng: Random, *shapes: tuple[int, ...]) -> list[Array]:
    return [rng.standard_normal(shape).astype(F32) for shape in shapes]


def attended(rng: Random) -> Case:
    batch, groups, queries, keys, width, ratio = (int(n) for n in rng.integers(1, 7, 6))
    inputs = floats(rng, (batch, groups * ratio, queries, 8 * width), *[(batch, groups, 8 * keys, 8 * width)] * 2)
    return Case("Attention", inputs, {"is_causal": int(rng.integers(2))}, opset=test_attention.OPSET)


def rotated(rng: Random) -> Case:
    batch, heads, length, half = (int(n) for n in rng.integers(1, 9, 4))
    inputs = floats(rng, (batch, heads, length, 2 * half), *[(batch, length, half)] * 2)
    return Case("RotaryEmbedding", inputs, {"interleaved": int(rng.integers(2))}, opset=test_attention.OPSET)


def folded(rng: Random) -> Case:
    """A product whose rows, all opened, are folded (T1) and spot-checked (T3)."""
    m, k, n = (int(size) for size in rng.integers(100, 200, 3))
    if rng.random() < 0.3:
        return Case("MatMulInteger", [rng.integers(0, 256, shape, np.uint8) for shape in ((m, k), (k, n))])
    return Case("MatMul", floats(rng, (m, k), (k, n)), constant=(1,))


TABLES = [test_movement.CASES, test_pointwise.CASES, test_rowwise.CASES, test_contraction.CASES]
TABLES += [test_attention.cases(F32), test_attention.cases(F16)]
MAKERS = [*test_random_nodes.MAKERS, *[unary] * 4, *[test_contraction.random_case] * 2, attended, rotated]


def sweep(cases: Iterable[Case], rng: Random, count: int | None) -> Tallies:
    tallies: Tallies = defaultdict(Counter)
    for case in cases:
        name = f"{case.domain}.{case.op}".lstrip(".")
        for worker in runs(case):
            for dtype, tally in measure(worker, rng, count):
                tallies[name, dtype].update(tally)
    return tallies


def tree(tallies: Tallies, label: Callable[[str], str]) -> dict[str, Any]:
    """As JSON: label of the op -> dtype -> honest counts, and [accepted, tried] of every forgery."""
    found: dict[str, Any] = defaultdict(dict)
    for name in sorted({(label(op), dtype) for op, dtype in tallies}):
        tally = sum((part for (op, dtype), part in tallies.items() if (label(op), dtype) == name), Counter())
        entry: dict[str, Any] = {"honest": {what: tally["honest", what] for what in HONEST}}
        for kind, forgery in FORGERIES:
            if tally[kind, forgery, "tried"]:
                counts = [tally[kind, forgery, result] for result in ("accepted", "tried")]
                entry.setdefault(kind, {})[forgery] = counts
        found[name[0]][name[1]] = entry
    return found


def gross(entry: Mapping[str, Any]) -> list[int]:
    return [sum(counts[i] for counts in entry.get("gross", {}).values()) for i in (0, 1)]


def share(entry: Mapping[str, Any], kind: str, size: str) -> str:
    accepted, tried = entry.get(kind, {}).get(size, (0, 0))
    return f"{accepted / tried:.1%}" if tried else "-"


def shown(title: str, groups: Mapping[str, Any]) -> Table:
    table = Table("", "dtype", "honest rows", "refused", "gross accepted", *SIZES, title=title)
    for group, dtypes in groups.items():
        for dtype, entry in dtypes.items():
            cells = [f"{share(entry, 'row', size)} · {share(entry, 'entry', size)}" for size in SIZES]
            counts = f"{entry['honest']['rows']:,}", str(entry["honest"]["refused"])
            table.add_row(group, dtype, *counts, "{} of {:,}".format(*gross(entry)), *cells)
    return table


def provenance(seconds: float) -> dict[str, Any]:
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    return {
        "command": "python bench/vacuity.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": {"cpu": model.partition(": ")[2], "cores": os.cpu_count(), "system": platform.system()},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "seed": SEED,
        "seconds": round(seconds),
    }


def main() -> int:
    rng, console, started = np.random.default_rng(SEED), Console(), time.perf_counter()
    np.seterr(all="ignore")  # forgeries overflow
    cases = [fresh(case, rng) for _ in range(ROUNDS) for table in TABLES for case in table]
    cases += [maker(rng) for maker in MAKERS for _ in range(TRIES)]
    ops = sweep(cases, rng, policy("standard").rows)
    products = sweep((folded(rng) for _ in range(FOLDED)), rng, None)
    names = {f"{domain}.{op}".lstrip("."): str(row.family) for (domain, op), row in REGISTRY.items()}
    results = {"families": tree(ops, names.__getitem__), "folded": tree(products, str), "ops": tree(ops, str)}
    entries = [entry for group in results.values() for dtypes in group.values() for entry in dtypes.values()]
    untried = [op for op in names if not any(gross(entry)[1] for entry in results["ops"].get(op, {}).values())]
    failed = untried or any(gross(entry)[0] or entry["honest"]["refused"] for entry in entries)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(provenance(time.perf_counter() - started) | results, indent=1) + "\n")
    console.print(shown("relative deviations accepted: of a whole row · of one entry", results["families"]))
    console.print(shown("products with every row opened: T1 and 256 entries", results["folded"]))
    console.print(f"{len(names) - len(untried)} of {len(names)} ops tried; untried: {', '.join(untried) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
