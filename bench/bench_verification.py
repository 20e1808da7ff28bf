"""What a proof of SmolLM2's answer holds and what checking it costs, by policy; one thread, the proof in memory.

extra_info: kB retained a token by the worker, kB opened a position, and ms a position for the openings (hashing) and
for each family of ops. A policy checks its rows and the last one of every tensor.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import world

from bench import runs
from gpu.boundary import committed
from gpu.plan import registry_row
from gpu.reach import selection
from proof.messages import Challenge
from proof.policy import policy
from prover import prove, smollm2
from verifier import checks
from verifier.verify import verify

PROMPT, TOKENS = 100, 64
POLICIES = ("spot+torch-sdpa", "standard", "standard+torch-sdpa", "standard+torch-sdpa+boundary")


@pytest.fixture(scope="module")
def run():
    recorder = runs.recorder(smollm2.folder(Path("demo-llm/smollm2")), "sdpa")
    prompt = np.random.default_rng(3).integers(10, 49152, PROMPT)
    return recorder.statement, recorder.generate(runs.asked(prompt, TOKENS))


@pytest.mark.parametrize("name", POLICIES)
def bench_verify(benchmark, run, name):
    model, trace = run
    rules, positions = policy(name), policy(name).rows + 1
    made = prove.commit(model, trace, rules=rules)
    challenge = Challenge(made.commitment.digest(), name, world.SEED)
    proof = prove.answer(made, made.commitment, challenge)
    benchmark.group = f"SmolLM2 bf16, {PROMPT} + {TOKENS} tokens"
    verdict = benchmark.pedantic(lambda: verify(proof, model, world.CHECK_SEED, task=None), rounds=3, warmup_rounds=1)
    assert verdict.verdict == "accepted"
    opened = sum(opening.rows.nbytes + opening.siblings.nbytes for opening in proof.openings.values())
    retained = sum(trace[tensor].nbytes for tensor in committed(made.plan, rules))
    benchmark.extra_info |= {
        "retained kB a token": round(retained / 1e3 / len(trace["ids"]), 1),
        "proof MB": round(opened / 1e6, 2),
        "opened kB a position": round(opened / 1e3 / positions, 1),
        "ms a position": round(1e3 * benchmark.stats.stats.median / positions, 1),
        "determined": round(sum(verdict.determined.values()) / sum(verdict.entries.values()), 4),
    }
    if not rules.boundary:
        benchmark.extra_info |= {f"{part} ms a position": ms for part, ms in parts(model, proof, rules).items()}


def parts(model, proof, rules):
    """ms a position of the openings, and of the nodes of each family by themselves."""
    plan = checks.shapes(proof.commitment, model, rules)
    chosen = selection(plan, proof.challenge)
    spent = Counter()
    started = perf_counter()
    checks.openings(proof, plan, chosen)
    spent["hashing"] = perf_counter() - started
    for family in dict.fromkeys(str(registry_row(node).family) for node in plan.nodes):
        nodes = tuple(node for node in plan.nodes if str(registry_row(node).family) == family)
        started = perf_counter()
        means = checks.Means(rules, world.CHECK_SEED)
        checks.nodes(proof, replace(plan, nodes=nodes), chosen, means, checks.Coverage())
        spent[family] = perf_counter() - started
    return {part: round(1e3 * seconds / (rules.rows + 1), 2) for part, seconds in spent.items()}
