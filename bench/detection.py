"""How often a cheat on a decoder is met, by the rows that are drawn: results/detection.json, and a table to print.

One recorded trace a cheat. Which rows of which node fail when they are checked is found once; a challenge detects
the cheat iff it draws one of them, as gpu.reach draws, or if something that is checked whole fails. The first
challenges are also put to verify itself, which must agree. Strength F and, with a profile, P.
"""

import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.provenance import provenance
from gpu import hashing
from gpu.ops.call import Call, RowIds, Tensor, every_row
from gpu.plan import Plan, registry_row
from gpu.rounding import compare_interval
from proof import sampling
from proof.attestation import sign_commitment
from proof.errors import Rejected
from proof.graph import Node, dtype_name
from proof.messages import Challenge, Task, TensorClaim
from proof.policy import POLICIES, Policy, policy
from proof.sampling import Draw
from prover import prove, smollm2
from prover.decoder_cheats import CHEATS, Scene, Trace
from prover.demo_llm import profile, request, scene
from prover.stage import PAYER, REWARD
from verifier.verify import verify

Array = npt.NDArray[Any]

RESULTS = Path(__file__).parent / "results" / "detection.json"
PACKAGES = ("numpy", "numba", "torch", "transformers", "ml-dtypes")
ROWS = {"one": 1, "spot": 4, "standard": 16}
BLOCK = 16  # rows checked together, as many as a policy opens
KEY = bytes.fromhex("11" * 32)

console = Console(stderr=True)


@dataclass
class Found:
    """What of a trace fails: rows by tensor, and the first node at which any draw meets a failing one."""

    rows: dict[str, RowIds] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # by tensor, of its first failing row
    whole: str | None = None

    def detected(self, plan: Plan, rules: Policy, seed: bytes) -> bool:
        return bool(self.whole) or any(
            np.isin(drawn(plan, n, rules, seed), rows).any() for n, rows in self.rows.items()
        )

    def at(self) -> str:
        return self.whole or (max(self.rows, key=lambda name: len(self.rows[name])) if self.rows else "")


def drawn(plan: Plan, name: str, rules: Policy, seed: bytes) -> RowIds:
    """The rows of a tensor that a challenge has checked."""
    node = next(node for node in plan.nodes if name in node.outputs)
    sample = registry_row(node).sample
    return (
        sample(plan.sites[node.index], rules, seed)
        if sample
        else sampling.drawn(seed, rules.rows, plan.specs[name].rows)
    )


class Examination:
    """Every node of one trace, its rows checked alone where a block of them fails."""

    def __init__(self, plan: Plan, trace: Mapping[str, Array], rules: Policy) -> None:
        self.plan, self.rules = plan, rules
        self.tensors = {}
        for name, spec in plan.specs.items():
            value = plan.known.get(name, trace.get(name))
            if value is not None:
                self.tensors[name] = Tensor(spec, np.ascontiguousarray(value).reshape(spec.rows, spec.width))

    def found(self, trace: Mapping[str, Array], inputs: Mapping[str, Array], passed: Mapping[str, Array]) -> Found:
        """What of the trace fails; a node between tensors of the honest run, which `passed`, is not checked again."""
        for name, value in inputs.items():
            if not _same(trace[name], value):
                return Found(whole=name)
        for name in self.plan.derived:
            if not _same(trace[name], self.plan.known[name]):
                return Found(whole=name)
        found = Found()
        for node in self.plan.nodes:
            name = node.outputs[0]
            between = [name for name in (*node.inputs, *node.outputs) if name and name not in self.plan.known]
            if name in self.plan.derived or all(n in passed and _same(trace[n], passed[n]) for n in between):
                continue
            blocks = np.split(rows := every_row(self.plan.specs[name]), range(BLOCK, len(rows), BLOCK))
            failing = [row for block in blocks for row in self._failing(node, block, found)]
            if len(failing) == len(rows):
                return Found(reasons=found.reasons, whole=name)
            if failing:
                found.rows[name] = np.array(failing)
        return found

    def _failing(self, node: Node, rows: RowIds, found: Found) -> Iterator[int]:
        try:
            self._check(node, rows)
        except Rejected as failure:
            found.reasons.setdefault(node.outputs[0], str(failure.reason))
            if len(rows) == 1:
                yield int(rows[0])
                return
            for half in np.array_split(rows, 2):
                yield from self._failing(node, half, found)

    def _check(self, node: Node, rows: RowIds) -> None:
        """As verify checks a node of a full commitment; the confirmations would tell if it were otherwise."""
        op, output = registry_row(node), self.tensors[node.outputs[0]]
        call = Call(
            site=self.plan.sites[node.index],
            inputs=tuple(self.tensors[name] if name else None for name in node.inputs),
            rows=(rows,),
            claimed=(output.take(rows),),
            policy=self.rules,
            draw=Draw(bytes(32), f"node/{node.index}"),
            outputs=(output,),
        )
        interval = op.interval(call) if op.interval is not None and self.rules.profile else None
        if interval is None:
            op.check(call)
        else:
            compare_interval(call.claimed[0], interval)


def _same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@dataclass
class Trial:
    """A trace committed to, for real verifications of it."""

    scene: Scene
    inputs: Mapping[str, Array]
    committed: prove.Committed

    def rejected(self, rules: Policy, seed: bytes) -> bool:
        task = self._task(rules.name)
        commitment = sign_commitment(replace(self.committed.commitment, task=task.id()), REWARD, KEY)
        proof = prove.answer(self.committed, commitment, Challenge(commitment.digest(), rules.name, seed), task)
        return verify(proof, self.scene.statement, secrets.token_bytes(32), task=task).verdict == "rejected"

    def _task(self, name: str) -> Task:
        asked = {i.name: self.inputs[i.name] for i in self.scene.statement.graph.inputs if i.name in self.inputs}
        claims = tuple(
            TensorClaim(name, dtype_name(array.dtype), array.shape, hashing.root(hashing.tensor_levels(array)))
            for name, array in asked.items()
        )
        return Task(self.scene.statement.id, claims, name, REWARD, PAYER, 2_000_000_000, bytes(32))


def measure(
    scene: Scene, inputs: Mapping[str, Array], trace: Trace, suffix: str, trials: int, confirm: int, passed: Trace
) -> dict[str, Any]:
    """Detections by rows drawn, and whether verify agrees."""
    committed = prove.commit(scene.statement, trace)
    plan = committed.plan
    found = Examination(plan, trace, policy("standard" + suffix)).found(trace, inputs, passed)
    share = max((len(rows) / plan.specs[name].rows for name, rows in found.rows.items()), default=0.0)
    told: dict[str, Any] = {"at": found.at(), "share": 1.0 if found.whole else share, "detected": {}}
    trial, agreed = Trial(scene, inputs, committed), 0
    for i, (name, rows) in enumerate(ROWS.items()):
        rules, seeds = policy(name + suffix), [secrets.token_bytes(32) for _ in range(trials)]
        met = [found.detected(plan, rules, seed) for seed in seeds]
        told["detected"][str(rows)] = sum(met)
        real = range(confirm // len(ROWS) + (i < confirm % len(ROWS)))
        agreed += sum(trial.rejected(rules, seeds[j]) == met[j] for j in real)
    return told | {"confirmed": [agreed, confirm]}


def bounded(scene: Scene, inputs: Mapping[str, Array], trace: Trace, suffix: str, trials: int) -> dict[str, Any]:
    """Detections where only the ends of segments are committed to, by real verifications."""
    told: dict[str, Any] = {"trials": trials, "detected": {}}
    for name, rows in ROWS.items():
        rules = policy(name + suffix)
        trial = Trial(scene, inputs, prove.commit(scene.statement, trace, rules=rules))
        told["detected"][str(rows)] = sum(trial.rejected(rules, secrets.token_bytes(32)) for _ in range(trials))
    return told


def table(results: Mapping[str, Any]) -> str:
    """Rows for README.md: detections under P, or F where there is no profile, at 1, 4 and 16 rows."""
    lines = ["| cheat | rows that fail | F: q = 1 | 4 | 16 | P: q = 1 | 4 | 16 | boundary: q = 1 | 4 | 16 |"]
    lines.append("|---" * 11 + "|")
    for cheat, strengths in results["cheats"].items():
        rates = [
            f"{strengths[s]['detected'][str(q)] / strengths[s].get('trials', results['trials']):.0%}"
            if s in strengths
            else "-"
            for s in ("F", "P", "boundary")
            for q in ROWS.values()
        ]
        shares = " / ".join(f"{e['share']:.0%} of `{e['at']}`" for e in strengths.values() if "share" in e)
        lines.append(f"| {cheat} | {shares} | {' | '.join(rates)} |")
    return "\n".join(lines)


def main(
    trials: Annotated[int, typer.Option(help="Challenges a cheat, strength and number of rows.")] = 200,
    confirm: Annotated[int, typer.Option(help="Of those, also verified in full, a cheat and strength.")] = 21,
    only: Annotated[str, typer.Option(help="Cheats whose names hold this.")] = "",
    boundary: Annotated[int, typer.Option(help="Real verifications of a boundary commitment, a cheat and rows.")] = 12,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    started = time.perf_counter()
    folder = smollm2.folder(Path("demo-llm") / "smollm2")
    worker, inputs, kept = scene(folder), request(folder), profile()
    suffixes = {"F": ""} | ({"P": "+" + kept} if kept else {})
    ends = f"+{kept}+boundary" if kept else None
    for suffix in (*suffixes.values(), *filter(None, [ends])):
        POLICIES["one" + suffix] = replace(policy("spot" + suffix), name="one" + suffix, rows=1)
    cheats: dict[str, Any] = {}
    disagreed, results = 0, provenance("python bench/detection.py", PACKAGES)
    for name in (name for name in ("honest", *CHEATS) if only in name):
        trace = dict(worker.honest(inputs) if name == "honest" else CHEATS[name](worker)(inputs))
        honest = {} if name == "honest" else worker.honest(inputs)
        cheats[name] = {
            s: measure(worker, inputs, trace, suffix, trials, confirm, honest) for s, suffix in suffixes.items()
        }
        if ends and boundary and cheats[name]["P"]["share"] in (0.0, 1.0):  # where every row is wrong, or none
            cheats[name]["boundary"] = bounded(worker, inputs, trace, ends, boundary)
        disagreed += sum(confirm - entry["confirmed"][0] for s, entry in cheats[name].items() if s in suffixes)
        results |= {
            "seconds": round(time.perf_counter() - started),
            "profile": kept,
            "trials": trials,
            "tokens": {"prompt": len(inputs["prompt"]), "answer": len(worker.honest(inputs)["answer"])},
            "cheats": cheats,
        }
        out.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"{time.perf_counter() - started:6.0f} s  {name}: {json.dumps(cheats[name])}", highlight=False)
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)
    if disagreed or any(any(entry["detected"].values()) for entry in cheats.get("honest", {}).values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
