"""A generation recorded and committed to, beside the same tokens generated plainly; SmolLM2-135M in bfloat16.

Plain and recorded runs take turns, so that both meet the same machine. The target of what recording and commitment
add together is under 15 % of the plain run.
"""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu.plan import Model
from prover import prove, smollm2
from prover.engines.torch import Recorder

PROMPT, TOKENS = 100, 64
ROUNDS = 5
SETTINGS = {
    "greedy": {"temperature": np.float32(0), "top_k": np.int64(0), "top_p": np.float32(1)},
    "sampled": {"temperature": np.float32(0.7), "top_k": np.int64(40), "top_p": np.float32(0.95)},
}


class Stage:
    def __init__(self, folder, kind):
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=kind).eval()
        self.model = Model.open(folder / "model.onnx")
        self.recorder = Recorder(self.network, self.model)
        self.prompt = np.random.default_rng(0).integers(100, 40_000, PROMPT)

    def inputs(self, settings):
        own = {"prompt": self.prompt, "seed": np.zeros(32, np.uint8), "max_tokens": np.int64(TOKENS)}
        return {name: np.asarray(value) for name, value in (own | SETTINGS[settings]).items()}

    def plain(self):
        ids = torch.from_numpy(self.prompt)[None]
        mask = torch.ones_like(ids)
        out = self.network.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
        return out[0, PROMPT:].numpy()


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def stage(request):
    return Stage(smollm2.folder(Path("demo-llm") / "smollm2"), request.param)


def timed(benchmark, stage, step, what):
    """The median of `step`, its plain runs in between."""
    plain, count = [], len(stage.plain())

    def beside():
        started = time.perf_counter()
        stage.plain()
        plain.append(time.perf_counter() - started)

    benchmark.group = f"SmolLM2, {stage.network.config._attn_implementation}, prompt {PROMPT}, {count} tokens"
    result = benchmark.pedantic(step, setup=beside, rounds=ROUNDS)
    median, alone = benchmark.stats.stats.median, statistics.median(plain)
    benchmark.extra_info |= {
        "plain ms/token": round(1e3 * alone / count, 2),
        f"{what} ms/token": round(1e3 * median / count, 2),
        "of the plain run": round(median / alone, 3),
    }
    return result


@pytest.mark.parametrize("settings", SETTINGS)
def bench_1_generate_and_record(benchmark, stage, settings):
    asked = stage.inputs(settings)
    trace = timed(benchmark, stage, lambda: stage.recorder.generate(asked), "recorded")
    benchmark.extra_info["trace MB"] = round(sum(array.nbytes for array in trace.values()) / 1e6, 1)
    if settings == "greedy":
        assert np.array_equal(trace["answer"], stage.plain())
        stage.trace = trace


def bench_2_commit(benchmark, stage):
    timed(benchmark, stage, lambda: prove.commit(stage.model, stage.trace), "commit")
