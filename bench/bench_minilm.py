"""The whole protocol on the real MiniLM: run, commit, open, verify, side by side in one run.

`run` is the plain model without recording, on all cores; ratios are medians over its median. Verifying is one thread,
reading the proof file included, so its share of the CPU time is given too.
"""

from dataclasses import replace
from time import process_time

import pytest
import world

from proof import bundle
from proof.messages import Challenge
from prover import prove, sentences
from prover.engines.onnxruntime import Recorder, plain
from verifier.verify import verify

TEXT = "Compute is rented from strangers, so what they return is checked before anybody is paid. " * 40
SHAPES = [(1, 128), (1, 512), (8, 128), (8, 512)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def stage(request):
    batch, length = request.param
    world_ = replace(world.minilm(), inputs=sentences.tokenised([TEXT] * batch, length))
    return Stage(world_, f"MiniLM {batch} x {length} tokens")


class Stage:
    """One shape with everything that the steps hand on; filled step by step."""

    def __init__(self, subject, group):
        self.world, self.group, self.median = subject, group, {}
        session = plain(subject.source)
        self.run = lambda: session(subject.inputs)
        self.plan = subject.model.plan({name: array.shape for name, array in subject.inputs.items()})

    def timed(self, benchmark, name, step, rounds=5):
        benchmark.group = self.group
        result = benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
        self.median[name] = benchmark.stats.stats.median
        benchmark.extra_info["of the run"] = round(self.median[name] / self.median["run"], 4)
        return result


def bench_1_run(benchmark, stage):
    stage.timed(benchmark, "run", stage.run)


def bench_2_run_and_record(benchmark, stage):
    recorder = Recorder(stage.world.source, stage.world.model, stage.plan)
    stage.trace = stage.timed(benchmark, "record", lambda: recorder.run(stage.world.inputs), rounds=3)


def bench_3_commit(benchmark, stage):
    stage.committed = stage.timed(benchmark, "commit", lambda: prove.commit(stage.world.model, stage.trace))
    benchmark.extra_info["trace MB"] = round(sum(a.nbytes for a in stage.trace.values()) / 1e6, 1)


@pytest.mark.parametrize("policy", ["spot", "standard"])
def bench_4_open(benchmark, stage, policy):
    bound = stage.committed.commitment
    challenge = Challenge(bound.digest(), policy, world.SEED)
    proof = stage.timed(benchmark, f"open {policy}", lambda: prove.answer(stage.committed, bound, challenge))
    size = sum(opening.rows.nbytes + opening.siblings.nbytes for opening in proof.openings.values())
    benchmark.extra_info["proof MB"] = round(size / 1e6, 2)
    benchmark.extra_info["of the trace"] = round(size / sum(a.nbytes for a in stage.trace.values()), 4)
    stage.proofs = getattr(stage, "proofs", {}) | {policy: proof}


@pytest.mark.parametrize("policy", ["spot", "standard"])
def bench_5_verify(benchmark, stage, policy, tmp_path):
    path = tmp_path / "proof.safetensors"
    bundle.write_proof(path, stage.proofs[policy])

    def check():
        return verify(bundle.read_proof(path), stage.world.model, world.CHECK_SEED, task=None)

    verdict = stage.timed(benchmark, f"verify {policy}", check)
    assert verdict.verdict == "accepted"
    started = process_time()
    check()
    checked, started = process_time() - started, process_time()
    stage.run()
    benchmark.extra_info["of the run's CPU time"] = round(checked / (process_time() - started), 4)
