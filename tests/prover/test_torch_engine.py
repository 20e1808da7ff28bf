"""Recording a generation: whole, of the network as it stands, and such that the verifier accepts it."""

import decoders
import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from world import World

from proof.errors import Malformed, Unavailable
from prover import prove
from prover.engines.torch import Recorder

ATTENTION = ("sdpa", "eager")
EOS = decoders.SIZES["eos_token_id"]
EVEN = 1e4  # a temperature that makes every token about as likely as any other


def inputs(prompt=9, tokens=12, temperature=0.0, seed=0):
    rng = np.random.default_rng(seed)
    asked = {
        "prompt": rng.integers(3, decoders.WORDS, prompt),
        "temperature": np.float32(temperature),
        "top_k": np.int64(0 if temperature in (0, EVEN) else 40),
        "top_p": np.float32(1 if temperature in (0, EVEN) else 0.95),
        "seed": rng.integers(0, 256, 32, np.uint8),
        "max_tokens": np.int64(tokens),
    }
    return {name: np.asarray(value) for name, value in asked.items()}


def assert_accepted(statement, asked, trace, policy):
    assert tuple(trace) == prove.plan_of(statement, trace).tensors
    world = World(b"", statement, asked, policy=policy)
    verdict = world.judge(world.prove(trace))
    assert (verdict.verdict, verdict.node, verdict.detail) == ("accepted", None, "")
    assert verdict.nodes_checked == len(statement.nodes)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return decoders.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def recorder(llama):
    return Recorder(*llama)


@pytest.fixture(params=ATTENTION)
def attention(request, llama):
    """The same network under one attention implementation and the other."""
    network, _ = llama
    own = network.config._attn_implementation
    network.set_attn_implementation(request.param)
    yield request.param
    network.set_attn_implementation(own)


@pytest.mark.parametrize("form", decoders.CONFIGS)
def test_every_form_is_recorded_as_the_verifier_recomputes_it(tmp_path, form):
    network, statement = decoders.made(tmp_path, decoders.CONFIGS[form])
    asked = inputs(temperature=0.7)
    for kind in ATTENTION:
        network.set_attn_implementation(kind)
        trace = Recorder(network, statement).generate(asked)
        for policy in ("standard", f"full+torch-{kind}"):
            assert_accepted(statement, asked, trace, policy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["llama", "qwen 3", "gemma 3"])
def test_other_dtypes(tmp_path, form, dtype):
    network, statement = decoders.made(tmp_path, decoders.CONFIGS[form], dtype)
    asked = inputs(temperature=0.7)
    for kind in ATTENTION:
        network.set_attn_implementation(kind)
        assert_accepted(statement, asked, Recorder(network, statement).generate(asked), f"full+torch-{kind}")


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 1), (1, 12), (20, 1), (20, 5)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_lengths_of_prompt_and_answer(llama, recorder, attention, prompt, tokens, temperature):
    asked = inputs(prompt, tokens, temperature)
    assert_accepted(llama[1], asked, recorder.generate(asked), f"full+torch-{attention}")


@pytest.mark.parametrize("form", ["llama", "mistral with a window", "gemma 3"])
def test_a_batch_gives_each_sequence_a_trace_of_its_own(tmp_path, form):
    network, statement = decoders.made(tmp_path, decoders.CONFIGS[form])
    batch = [inputs(9, 12), inputs(1, 4, 1.0, seed=1), inputs(15, 7, 0.7, seed=2)]
    for kind in ATTENTION:
        network.set_attn_implementation(kind)
        for asked, trace in zip(batch, Recorder(network, statement).generate_batch(batch), strict=True):
            assert_accepted(statement, asked, trace, "full")


def test_sequences_of_a_batch_end_where_they_end(llama, recorder):
    batch = [inputs(5, 60, EVEN, seed) for seed in range(6)]
    traces = recorder.generate_batch(batch)
    for asked, trace in zip(batch, traces, strict=True):
        assert_accepted(llama[1], asked, trace, "standard")
    counts = [len(trace["answer"]) for trace in traces]
    assert min(counts) < max(counts)
    for count, trace in zip(counts, traces, strict=True):
        assert trace["answer"][-1] == EOS or count == 60


def test_a_pass_over_a_given_answer_is_recorded_too(llama, recorder, attention):
    asked = inputs(temperature=0.7)
    given = asked | {"answer": recorder.generate(asked)["answer"]}
    assert_accepted(llama[1], asked, recorder.forward(given), f"full+torch-{attention}")


def test_greedy_tokens_are_those_of_plain_generation(llama, recorder, attention):
    asked = inputs(tokens=20)
    prompt = torch.from_numpy(asked["prompt"])[None]
    plain = llama[0].generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    assert recorder.generate(asked)["answer"].tolist() == plain[0, len(asked["prompt"]) :].tolist()


def test_a_seed_gives_the_same_trace_again_and_another_seed_another_answer(recorder):
    asked = inputs(temperature=1.0)
    trace = recorder.generate(asked)
    assert_same(recorder.generate(asked), trace)
    assert recorder.generate(asked | {"seed": asked["seed"] ^ 1})["answer"].tolist() != trace["answer"].tolist()


def test_what_the_folder_says_of_sampling_does_not_act(llama, recorder, monkeypatch):
    network, _ = llama
    asked = inputs(tokens=20)
    trace = recorder.generate(asked)
    for name, value in {"repetition_penalty": 9.0, "do_sample": True, "num_beams": 3, "max_length": 3}.items():
        monkeypatch.setattr(network.generation_config, name, value)
    own = network.generation_config
    assert_same(recorder.generate(asked), trace)
    assert network.generation_config is own


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(llama, recorder, attention, fails, monkeypatch):
    network, _ = llama
    home = __import__(type(network).__module__, fromlist=["eager_attention_forward"])
    functions = home.eager_attention_forward, ALL_ATTENTION_FUNCTIONS["sdpa"]
    before, frequencies = hooks(network), network.model.rotary_emb.inv_freq.clone()
    if fails:
        monkeypatch.setitem(network.lm_head._parameters, "weight", network.lm_head.weight * torch.nan)
        with pytest.raises(Malformed, match="NaN"):
            recorder.generate(inputs())
    else:
        recorder.generate(inputs())
    assert (home.eager_attention_forward, ALL_ATTENTION_FUNCTIONS["sdpa"]) == functions
    assert hooks(network) == before
    assert torch.equal(network.model.rotary_emb.inv_freq, frequencies)


def test_another_network_may_run_while_one_is_recorded(llama, recorder, attention, tmp_path):
    asked = inputs(tokens=4)
    alone = recorder.generate(asked)
    other = decoders.folder(tmp_path, decoders.CONFIGS["llama"])
    other.set_attn_implementation(attention)
    ids = torch.ones(1, 3, dtype=torch.int64)
    hook = llama[0].model.register_forward_hook(lambda *_: other(ids) and None)
    try:
        assert_same(recorder.generate(asked), alone)
    finally:
        hook.remove()


def test_the_statements_frequencies_are_the_ones_that_run(llama, recorder):
    network, statement = llama
    buffer, asked = network.model.rotary_emb.inv_freq, inputs()
    own, trace = buffer.clone(), recorder.generate(asked)
    try:
        buffer.mul_(1 + 2e-7)
        assert not torch.equal(buffer, own)
        assert_same(Recorder(network, statement).generate(asked), trace)
        buffer.mul_(1 + 1e-5)
        with pytest.raises(Malformed, match="rotary frequencies"):
            Recorder(network, statement)
    finally:
        buffer.copy_(own)


def test_other_weights_are_recorded_as_they_are(llama, tmp_path):
    """To tell them from the right ones is the verifier's business."""
    network, statement = decoders.llama(tmp_path)
    network.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    world = World(b"", statement, inputs(), policy="full")
    verdict = world.judge(world.prove(Recorder(network, statement).generate(world.inputs)))
    assert (verdict.verdict, verdict.node) == ("rejected", "layers.1.up")


def test_a_module_that_computes_otherwise_is_noticed(llama, recorder):
    hook = llama[0].model.rotary_emb.register_forward_hook(lambda module, args, out: (out[0] * 1.5, out[1]))
    try:
        with pytest.raises(Unavailable, match="'cos'"):
            recorder.generate(inputs())
    finally:
        hook.remove()


@pytest.mark.parametrize("prompt", [[], [3, -1], [3, decoders.WORDS], [[3, 4]]])
def test_a_prompt_that_cannot_be_embedded_is_malformed(recorder, prompt):
    with pytest.raises(Malformed, match="'prompt'"):
        recorder.generate(inputs() | {"prompt": np.array(prompt, np.int64)})


def test_a_network_that_does_not_fit_the_statement_is_refused(llama, tmp_path):
    network, statement = llama
    deep, wide, narrow = (tmp_path / name for name in ("deep", "wide", "narrow"))
    for path in (deep, wide, narrow):
        path.mkdir()
    with pytest.raises(Malformed, match="eval"):
        Recorder(network.train(), statement)
    network.eval()
    for other, message in (
        (decoders.llama(deep, layers=3)[0], "layers"),
        (decoders.llama(wide, dtype=torch.float32)[0], "bfloat16"),
        (
            decoders.folder(narrow, decoders.CONFIGS["llama, tied"] | {"hidden_size": 16}, torch.bfloat16),
            "in the graph",
        ),
    ):
        with pytest.raises(Malformed, match=message):
            Recorder(other, statement)
    own = network.config._attn_implementation
    try:
        network.config._attn_implementation = "flex_attention"
        with pytest.raises(Malformed, match="'flex_attention'"):
            Recorder(network, statement)
    finally:
        network.config._attn_implementation = own
