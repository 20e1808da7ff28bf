"""Whether honest work is refused: every op of whole generations by SmolLM2, in three dtypes and two attentions.

Each row of each node is checked at strength F and under the profile, products entry by entry; a refusal is counted and
told. Written to results/honest.json: op rows, entries, the share that the profile determines, the largest ratios.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import runs
from bench.provenance import provenance
from gpu.ops.call import Call, Op
from gpu.plan import Plan, registry_row
from gpu.rounding import compare_interval
from proof.errors import Rejected
from prover import smollm2

RESULTS = Path(__file__).parent / "results" / "honest.json"
PACKAGES = ("numpy", "numba", "torch", "transformers", "ml-dtypes")
DTYPES = ("bfloat16", "float16", "float32")
ATTENTIONS = ("eager", "sdpa")
BLOCK = 64  # rows checked together: a refusal is told by the block
VOCABULARY = 49152


def measure(plan: Plan, trace: runs.Trace, profile: str) -> dict[str, Any]:
    """Both strengths over one trace, by op."""
    tally: dict[str, Counter[str]] = {}
    largest: dict[str, float] = {}
    refused = []
    for node in runs.computed(plan):
        op, counts = registry_row(node), tally.setdefault(node.op, Counter())
        total = plan.specs[node.outputs[0]].rows
        for first in range(0, total, BLOCK):
            rows = np.arange(first, min(first + BLOCK, total))
            counts["rows"] += len(rows)
            try:
                found = op.check(runs.call(plan, node, trace, runs.exhaustive(None), rows))
                largest[node.op] = max(largest.get(node.op, 0.0), found.ratio)
                counts["entries"] += found.entries
                counts["determined"] += _determined(op, runs.call(plan, node, trace, runs.exhaustive(profile), rows))
            except Rejected as rejection:
                refused.append(f"{node}, rows from {first}: {rejection.detail}")
    return {
        "rows": sum(counts["rows"] for counts in tally.values()),
        "refused": refused,
        "ops": {op: dict(counts) | {"largest": largest.get(op, 0.0)} for op, counts in sorted(tally.items())},
    }


def _determined(op: Op, checked: Call) -> int:
    interval = op.interval(checked) if op.interval is not None else None
    return 0 if interval is None else compare_interval(checked.claimed[0], interval)


def measured(folder: Path, attention: str, prompt: int, tokens: int) -> dict[str, Any]:
    """One generation after a prompt of random tokens, and a batch of three of other lengths."""
    rng = np.random.default_rng(7)
    recorder = runs.recorder(folder, attention)
    lengths = [prompt // 4, prompt // 3, prompt // 8]
    wanted = [runs.asked(rng.integers(10, VOCABULARY, length), tokens, seed=length) for length in (prompt, *lengths)]
    traces = [recorder.generate(wanted[0]), *recorder.generate_batch(wanted[1:])]
    parts = [measure(runs.plan_of(recorder.statement, trace), trace, f"torch-{attention}") for trace in traces]
    ops: dict[str, Any] = {}
    for op in parts[0]["ops"]:
        every = [part["ops"][op] for part in parts]
        ops[op] = {key: sum(e.get(key, 0) for e in every) for key in ("rows", "entries", "determined")}
        ops[op]["largest"] = max(e["largest"] for e in every)
    refused = [line for part in parts for line in part["refused"]]
    return {"rows": sum(part["rows"] for part in parts), "refused": refused, "ops": ops}


def shown(results: dict[str, Any]) -> Table:
    table = Table("dtype", "attention", "op rows", "refused", "determined", "attention determined")
    for name, entry in results.items():
        entries = sum(op["entries"] for op in entry["ops"].values())
        fixed = sum(op["determined"] for op in entry["ops"].values())
        of = entry["ops"]["Attention"]
        shares = (f"{fixed / entries:.2%}", f"{of['determined'] / of['entries']:.2%}")
        table.add_row(*name.split("/"), f"{entry['rows']:,}", str(len(entry["refused"])), *shares)
    return table


def main(
    folder: Annotated[Path, typer.Option(help="Where the converted models lie.")] = Path("demo"),
    prompt: int = 96,
    tokens: int = 24,
    write: bool = True,
) -> None:
    console = Console()
    results, started = {}, time.perf_counter()
    for dtype in DTYPES:
        with console.status(f"converting SmolLM2 to {dtype}") as status:
            model = smollm2.folder(folder / f"smollm2-{dtype}", dtype)
            for attention in ATTENTIONS:
                status.update(f"{dtype} {attention}")
                results[f"{dtype}/{attention}"] = measured(model, attention, prompt, tokens)
    console.print(shown(results))
    refused = [line for entry in results.values() for line in entry["refused"]]
    for line in refused[:20]:
        console.print(line, highlight=False)
    if write:
        seconds = round(time.perf_counter() - started)
        found = provenance("python bench/honest.py", PACKAGES) | {"seconds": seconds, "settings": results}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    raise typer.Exit(int(bool(refused)))


if __name__ == "__main__":
    typer.run(main)
