"""An adversary that walks every tolerance: it passes each check, and a profile leaves it next to nothing."""

import decoders
import numpy as np
import pytest
import torch

from bench import adversary, runs
from prover.engines.torch import Recorder


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> adversary.Run:
    torch.manual_seed(1)
    config = decoders.CONFIGS["llama, tied"] | {"num_hidden_layers": 3, "initializer_range": 0.2}
    network, statement = decoders.made(tmp_path_factory.mktemp(request.param), config)
    network.set_attn_implementation(request.param)
    ids = np.random.default_rng(1).integers(3, decoders.WORDS, 20)
    trace = Recorder(network, statement).generate(runs.asked(ids, 1, temperature=0.0))
    return adversary.Run(runs.plan_of(statement, trace), trace)


def profile_of(run: adversary.Run, request: pytest.FixtureRequest) -> str:
    return f"torch-{request.node.callspec.params['run']}"


def test_it_stays_inside_every_tolerance_and_gains_little_under_a_profile(run, request):
    shifts = {}
    for strength, profile in (("F", None), ("P", profile_of(run, request))):
        rules = runs.exhaustive(profile)
        bent = adversary.bent(run, rules)
        assert adversary.accepted(run, bent, rules) == []
        shifts[strength] = adversary.shift(run, bent)
    assert shifts["F"] > 0
    assert abs(shifts["P"]) < 0.1 * shifts["F"]


def test_what_strength_f_lets_pass_the_profile_refuses(run, request):
    bent = adversary.bent(run, runs.exhaustive(None), iterations=1)
    refused = adversary.accepted(run, bent, runs.exhaustive(profile_of(run, request)))
    assert len(refused) > 10


def test_gradients_are_those_of_differences(run):
    """Against a finite difference: the last layer's output, moved along its gradient."""
    _, first, second = run.margin(run.trace["logits"])
    slope = adversary.gradients(run, run.trace, first, second)["layers.2.down"]
    norm = np.linalg.norm(slope)
    moved = run.trace["layers.2.down"].astype(np.float64) + 0.05 * slope / norm
    x = run.trace["layers.2.residual"].astype(np.float64) + moved
    before = run.trace["layers.2.output"].astype(np.float64)
    weight = run.plan.known["model.embed_tokens.weight"].astype(np.float64)
    scale = run.plan.known["model.norm.weight"].astype(np.float64)

    def gap(hidden: np.ndarray) -> float:
        logits = hidden[-1] / np.sqrt(np.mean(hidden[-1] ** 2) + 1e-5) * scale @ weight.T
        return float(logits[second] - logits[first])

    base = gap(run.trace["layers.2.residual"].astype(np.float64) + run.trace["layers.2.down"].astype(np.float64))
    assert before.shape == x.shape
    assert gap(x) - base == pytest.approx(0.05 * norm, rel=0.1)
