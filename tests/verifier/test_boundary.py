"""A commitment to the ends of segments: what it holds, what is replayed, and which lies it still meets."""

from collections.abc import Callable
from dataclasses import replace

import decoders
import numpy as np
import pytest
import torch
import world
from world import Array, Trace, World

from gpu.boundary import committed
from gpu.plan import Model
from gpu.rounding import BFLOAT16, compare_closing
from proof.errors import Malformed, Reason, Rejected
from proof.policy import policy
from prover import prove
from prover.engines.torch import Recorder

BOUNDARY, EVERYTHING = "standard+torch-eager+boundary", "standard+torch-eager"
INSIDE = ("q", "k", "o", "gate", "up", "activated", "gated", "down", "input_norm", "post_norm")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Trace]:
    torch.manual_seed(3)
    network, statement = decoders.llama(tmp_path_factory.mktemp("boundary"), layers=3)
    rng = np.random.default_rng(3)
    asked = {
        "prompt": rng.integers(3, decoders.WORDS, 20),
        "temperature": np.float32(0.8),
        "top_k": np.int64(0),
        "top_p": np.float32(1),
        "seed": rng.integers(0, 256, 32, np.uint8),
        "max_tokens": np.int64(10),
    }
    inputs = {name: np.asarray(value) for name, value in asked.items()}
    return World(b"", statement, inputs, policy=BOUNDARY), Recorder(network, statement).generate(inputs)


def test_it_holds_the_ends_and_nothing_that_lies_between(honest):
    subject, trace = honest
    names = set(committed(prove.plan_of(subject.model, trace), policy(BOUNDARY)))
    wanted = {"prompt", "answer", "seed", "tokens", "logits"}
    for layer in range(3):
        ends = ("q_rope", "k_rope", "v_split", "attention", "residual", "output")
        wanted |= {f"layers.{layer}.{end}" for end in ends}
    assert wanted <= names
    assert not names & {f"layers.{layer}.{name}" for layer in range(3) for name in INSIDE}


@pytest.mark.parametrize("amount", ["spot", "standard", "full"])
def test_honest_work_is_accepted_and_every_node_counted(honest, amount):
    subject, trace = honest
    subject = replace(subject, policy=f"{amount}+torch-eager+boundary")
    for seed in range(3):
        verdict = subject.judge(subject.prove(trace, bytes([seed] * 32)))
        assert (verdict.verdict, verdict.node, verdict.detail) == ("accepted", None, "")
        assert verdict.nodes_checked == len(subject.model.nodes)


def test_the_proof_opens_less(honest):
    subject, trace = honest
    sizes = [
        sum(opening.rows.nbytes for opening in replace(subject, policy=name).prove(trace).openings.values())
        for name in (BOUNDARY, EVERYTHING)
    ]
    assert sizes[0] < 0.6 * sizes[1]


def scaled(by: float) -> Callable[[Array], Array]:
    return lambda array: (array.astype(np.float64) * by).astype(array.dtype)


LIES: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "a layer's output": ("layers.1.output", scaled(1.05)),
    "the sum before the second norm": ("layers.0.residual", scaled(0.95)),
    "attention": ("layers.2.attention", scaled(1.01)),
    "keys": ("layers.1.k_rope", scaled(1.05)),
    "values": ("layers.1.v_split", scaled(0.95)),
    "queries": ("layers.1.q_rope", scaled(1.05)),
    "logits": ("logits", scaled(1.05)),
    "zeros": ("layers.1.output", np.zeros_like),
    "not a number": ("layers.1.output", lambda array: np.full_like(array, np.nan)),
}


@pytest.mark.parametrize(("name", "bend"), LIES.values(), ids=LIES.keys())
def test_no_lie_about_an_end_passes(honest, name, bend):
    subject, trace = honest
    verdict = subject.judge(subject.prove(trace | {name: bend(trace[name])}))
    assert verdict.verdict == "rejected"
    assert verdict.reason in {Reason.REEXECUTION, Reason.NONFINITE}


def test_weights_in_four_bits_are_met(honest, tmp_path):
    subject, _ = honest
    torch.manual_seed(3)
    network, _ = decoders.llama(tmp_path, layers=3)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("proj.weight"):
                scale = weight.abs().amax(1, keepdim=True) / 7
                weight.copy_((weight / scale).round() * scale)
    verdict = subject.judge(subject.prove(Recorder(network, subject.model).generate(subject.inputs)))
    assert (verdict.verdict, verdict.reason) == ("rejected", Reason.REEXECUTION)


@pytest.mark.parametrize(("made", "asked"), [(BOUNDARY, EVERYTHING), (EVERYTHING, BOUNDARY)])
def test_a_commitment_for_the_other_policy_is_refused(honest, made, asked):
    subject, trace = honest
    proof = replace(subject, policy=made).prove(trace)
    task = replace(subject, policy=asked).task
    bent = prove.commit(subject.model, trace, rules=policy(made)).commitment
    signed = world.sign_commitment(replace(bent, task=task.id()), task.reward, subject.key)
    challenge = replace(proof.challenge, commitment=signed.digest(), policy=asked)
    verdict = replace(subject, policy=asked).judge(replace(proof, task=task, commitment=signed, challenge=challenge))
    assert (verdict.verdict, verdict.reason) == ("rejected", Reason.SHAPE)


def test_a_model_with_an_op_that_is_not_replayed_is_refused_by_name():
    subject = world.small()
    plan = subject.model.plan({name: array.shape for name, array in subject.inputs.items()})
    with pytest.raises(Malformed, match="cannot be recomputed"):
        committed(plan, replace(policy(BOUNDARY), name="strange"))


def test_closing_lets_single_roundings_pass_and_no_more():
    rng = np.random.default_rng(0)
    row = (3 * rng.standard_normal((4, 576))).astype(BFLOAT16)
    compare_closing(row, row)
    flipped = row.copy()
    flipped[:, ::40] = (row[:, ::40].astype(np.float64) * (1 + 2.0**-7)).astype(BFLOAT16)
    assert 0 < compare_closing(flipped, row) < 1
    one = row.copy()
    one[2, 5] = BFLOAT16.type(float(one[2, 5]) + 1.0)
    with pytest.raises(Rejected):
        compare_closing(one, row)
    with pytest.raises(Rejected):
        compare_closing((row.astype(np.float64) * 1.02).astype(BFLOAT16), row)


def test_a_recorder_keeps_no_more_than_was_asked(honest):
    subject, trace = honest
    kept = prove.commit(subject.model, trace, rules=policy(BOUNDARY))
    names = [claim.name for claim in kept.commitment.tensors]
    again = prove.commit(subject.model, {name: trace[name] for name in names}, rules=policy(BOUNDARY))
    assert again.commitment.root() == kept.commitment.root()


def test_the_model_takes_a_task_without_its_answer(honest):
    subject, _ = honest
    assert Model.of(subject.model.graph).answers == {"answer"}
    assert [entry["name"] for entry in subject.model.report()["answers"]] == ["answer"]
    assert "answer" not in [entry["name"] for entry in subject.model.report()["inputs"]]
