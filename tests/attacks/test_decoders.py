"""Lies of a worker that generates text: another network, another request, words from elsewhere. Each has its reason."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from world import Trace, World

from gpu.plan import Model
from proof.errors import Malformed, Reason
from prover import cheats, decoder_cheats
from prover.decoder_cheats import Scene
from prover.decoders import graph
from prover.engines.torch import Recorder

FREIVALDS, REEXECUTION, NONFINITE, INPUT = Reason.FREIVALDS, Reason.REEXECUTION, Reason.NONFINITE, Reason.INPUT
PRODUCT = {FREIVALDS, REEXECUTION}
WORDS, PROMPT, TOKENS = 97, 40, 24

CHEATS = {  # where each is met, and why
    "int8 weights": ("layers.0.q", PRODUCT),
    "fp8 weights": ("layers.0.q", PRODUCT),
    "int4 weights": ("layers.0.q", PRODUCT),
    "a LoRA adapter": ("layers.0.q", PRODUCT),
    "a quarter of the layers skipped": ("layers.3.q", PRODUCT),
    "a window on attention": ("layers.0.attention", {REEXECUTION}),
    "another rotary base": ("cos", {REEXECUTION}),
    "another prompt": (None, {INPUT}),
    "another prompt under the task's": ("embedding", {REEXECUTION}),
    "another temperature": ("tokens", {REEXECUTION}),
    "another seed": ("tokens", {REEXECUTION}),
    "a text by int4 weights": ("tokens", {REEXECUTION}),
    "another tail": ("logits", PRODUCT),
    "tokens never generated": ("tokens", {REEXECUTION}),
    "an answer cut short": ("tokens", {REEXECUTION}),
    "an end put in": ("logits", PRODUCT),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Four layers of random weights, in bfloat16; large ones, so that logits differ."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    onnx.save(graph.build(folder), folder / "model.onnx")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()
    return Scene(network, Model.open(folder / "model.onnx"), Recorder)


def request(scene: Scene, **changes: object) -> World:
    rng = np.random.default_rng(0)
    asked = {
        "prompt": rng.integers(3, WORDS, PROMPT),
        "temperature": np.float32(0.7),
        "top_k": np.int64(40),
        "top_p": np.float32(0.95),
        "seed": rng.integers(0, 256, 32, np.uint8),
        "max_tokens": np.int64(TOKENS),
    }
    inputs = {name: np.asarray(value) for name, value in (asked | changes).items()}
    return World(b"", scene.statement, inputs, policy="full")


@pytest.fixture(scope="module")
def asked(scene: Scene) -> World:
    return request(scene)


@pytest.fixture(scope="module")
def honest(scene: Scene, asked: World) -> Trace:
    return scene.honest(asked.inputs)


@pytest.mark.parametrize("policy", ["spot", "standard", "full", "standard+torch-sdpa", "full+torch-sdpa"])
def test_the_honest_worker_is_accepted(asked, honest, policy):
    bent = replace(asked, policy=policy)
    verdict = bent.judge(bent.prove(honest))
    assert (verdict.verdict, verdict.detail) == ("accepted", "")
    assert verdict.nodes_checked == len(asked.model.nodes)


def test_every_cheat_is_tried():
    assert CHEATS.keys() == decoder_cheats.CHEATS.keys()


@pytest.mark.parametrize("policy", ["full", "full+torch-sdpa"])
@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_refused_where_it_cheats(scene, asked, cheat, policy):
    node, reasons = CHEATS[cheat]
    bent = replace(asked, policy=policy)
    verdict = bent.judge(bent.prove(dict(decoder_cheats.CHEATS[cheat](scene)(asked.inputs))))
    assert (verdict.verdict, verdict.node) == ("rejected", node), verdict.detail
    assert verdict.reason in reasons


@pytest.mark.parametrize("cheat", ["int8 weights", "a LoRA adapter", "tokens never generated", "an answer cut short"])
def test_what_touches_every_row_is_refused_whichever_rows_are_drawn(scene, asked, cheat):
    trace = dict(decoder_cheats.CHEATS[cheat](scene)(asked.inputs))
    bent = replace(asked, policy="spot+torch-sdpa")
    for draw in range(8):
        assert bent.judge(bent.prove(trace, bytes([draw] * 32))).verdict == "rejected"


def third_token(trace: Trace, token: int) -> Trace:
    """Another token in the answer and everything that only repeats it; what the network saw stays."""
    answer = trace["answer"].copy()
    answer[2] = token
    ids = np.concatenate([trace["prompt"], answer[:-1]])
    return trace | {"answer": answer, "fed": answer[:-1], "ids": ids, "tokens": answer[:, None]}


BENT = {  # of the honest trace
    "NaN among the logits": (lambda t: cheats.bent(t, "logits", _with_nan), "logits", {NONFINITE, FREIVALDS}),
    "infinite logits": (lambda t: cheats.bent(t, "logits", _infinite), "logits", {NONFINITE, FREIVALDS}),
    "other tokens returned than fed back": (
        lambda t: cheats.bent(t, "tokens", lambda a: np.roll(a, 1, 0)),
        "tokens",
        {REEXECUTION},
    ),
    "another token fed back than answered": (
        lambda t: cheats.bent(t, "fed", lambda a: np.roll(a, 1)),
        "fed",
        {REEXECUTION},
    ),
    "a prompt other than the one that ran": (
        lambda t: cheats.bent(t, "ids", lambda a: np.roll(a, 1)),
        "ids",
        {REEXECUTION},
    ),
    "a token the network never saw": (lambda t: third_token(t, int(t["answer"][2]) ^ 1), "embedding", {REEXECUTION}),
    "a token outside the vocabulary": (lambda t: third_token(t, WORDS + 5), "embedding", {REEXECUTION}),
    "a token counted from the end": (
        lambda t: third_token(t, int(t["answer"][2]) - WORDS),
        "tokens",
        {REEXECUTION},
    ),
}


def _with_nan(logits: np.ndarray) -> np.ndarray:
    logits[3, 5] = ml_dtypes.bfloat16(np.nan)
    return logits


def _infinite(logits: np.ndarray) -> np.ndarray:
    logits[:, 5] = ml_dtypes.bfloat16(np.inf)
    return logits


@pytest.mark.parametrize("policy", ["full", "full+torch-sdpa"])
@pytest.mark.parametrize("lie", BENT)
def test_a_bent_answer_is_refused_where_it_is_bent(asked, honest, lie, policy):
    bend, node, reasons = BENT[lie]
    bent = replace(asked, policy=policy)
    verdict = bent.judge(bent.prove(bend(dict(honest))))
    assert (verdict.verdict, verdict.node) == ("rejected", node), verdict.detail
    assert verdict.reason in reasons


@pytest.mark.parametrize("name", ["seed", "temperature", "top_k", "max_tokens"])
def test_settings_of_another_task_are_refused_as_inputs(scene, asked, name):
    """Honest work, for somebody else."""
    value = asked.inputs[name]
    other = value ^ 255 if name == "seed" else (value / 2).astype(value.dtype)
    verdict = asked.judge(asked.prove(scene.honest(dict(asked.inputs) | {name: other})))
    assert verdict.reason is INPUT


def test_the_trace_of_another_task_under_its_seed_is_refused(scene, asked):
    other = request(scene, seed=asked.inputs["seed"] ^ 1)
    assert asked.judge(other.prove(scene.honest(other.inputs))).reason is Reason.BINDING


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_of_one_token_is_proven_and_another_one_refused(scene, temperature):
    short = request(scene, max_tokens=np.int64(1), temperature=np.float32(temperature))
    honest = scene.honest(short.inputs)
    assert honest["answer"].shape == (1,)
    assert short.judge(short.prove(honest)).verdict == "accepted"
    lie = honest["answer"] ^ 1
    verdict = short.judge(short.prove(honest | {"answer": lie, "tokens": lie[:, None]}))
    assert (verdict.reason, verdict.node) == (REEXECUTION, "tokens")


def test_an_answer_of_no_tokens_has_no_plan(scene, asked):
    shapes = {name: array.shape for name, array in asked.inputs.items()}
    with pytest.raises(Malformed):
        scene.statement.plan(shapes | {"answer": (0,)})


def test_an_end_token_ends_an_answer(scene, asked, honest):
    """The honest text up to a token that the statement takes for an end, which nothing may follow."""
    text = honest["answer"].copy()
    text[5] = scene.eos
    verdict = asked.judge(asked.prove(dict(scene.recorder.forward(dict(asked.inputs) | {"answer": text}))))
    assert (verdict.reason, verdict.node) == (REEXECUTION, "tokens")
    assert "goes on after token 5" in verdict.detail
