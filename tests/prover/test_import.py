"""A decoder's folder becomes the graph of the network that Transformers runs, or is refused by what it has wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import decoders
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from gpu.plan import Model
from proof.errors import Malformed
from prover import cli
from prover.decoders import check, families, graph, rope

LLAMA = decoders.CONFIGS["llama"]
EXACT = 1e-5  # of float32, relative
LENGTHS = {"prompt": (20,), "answer": (4,), "seed": (32,)} | dict.fromkeys(
    ("temperature", "top_k", "top_p", "max_tokens"), ()
)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    decoders.folder(tmp_path, LLAMA)
    return tmp_path


@pytest.mark.parametrize("name", decoders.CONFIGS)
def test_the_logits_are_those_of_transformers(tmp_path, name):
    decoders.folder(tmp_path, decoders.CONFIGS[name])
    _, apart = check.checked(tmp_path)
    assert apart.keys() == {"random weights", "its own weights"}
    assert max(apart.values()) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", decoders.CONFIGS)
def test_every_node_of_a_graph_can_be_verified(tmp_path, name, dtype):
    _, model = decoders.made(tmp_path, decoders.CONFIGS[name], dtype)
    plan = model.plan(LENGTHS)
    assert model.answers == {"answer"}
    assert plan.specs["logits"].shape == (4, decoders.WORDS)
    assert all(node.outputs == (node.name,) for node in model.nodes)
    assert {"positions", "angles", "window_mask"} & set(plan.specs) <= plan.derived


def test_a_layer_has_the_names_of_the_statement(tmp_path):
    _, model = decoders.llama(tmp_path, layers=1)
    parts = {node.name.removeprefix("layers.0.") for node in model.nodes if node.name.startswith("layers.0.")}
    assert parts == {
        *("input_norm", "q", "k", "v", "q_heads", "k_heads", "v_heads", "q_split", "k_split", "v_split"),
        *("q_rope", "k_rope", "attention", "attention_joined", "attention_rows", "o", "residual", "post_norm"),
        *("gate", "up", "activated", "gated", "down", "output"),
    }
    outside = {node.name for node in model.nodes if not node.name.startswith(("layers.", "positions.", "answered."))}
    tables = {"positions", "angles", "cos", "sin", "cos_cast", "sin_cast"}
    assert outside == tables | {"fed", "ids", "embedding", "norm", "answered", "logits", "tokens"}


def test_norms_of_gemma_are_rounded_once(tmp_path):
    _, model = decoders.made(tmp_path, decoders.GEMMA)
    ops = {node.name: node.op for node in model.nodes}
    found = [ops[name] for name in ("layers.1.q_norm.wide", "layers.1.q_norm.exact", "layers.1.q_norm")]
    assert found == ["Cast", "RMSNormalization", "Cast"]
    weight = load_file(tmp_path / "model.safetensors")["model.norm.weight"].astype(np.float32)
    assert np.array_equal(model.constants["norm.scale"], 1 + weight)


def test_weights_are_the_files_own_bytes(llama):
    model = graph.build(llama)
    outside = {tensor.name for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL}
    assert outside == set(load_file(llama / "model.safetensors"))
    opened = graph.save(model, llama / "model.onnx")
    for name, array in load_file(llama / "model.safetensors").items():
        assert np.array_equal(opened.graph.weights[name], array)


def test_shards_make_the_same_network(llama):
    whole = graph.save(graph.build(llama), llama / "whole.onnx")
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, llama / file, {"format": "pt"})
    places = {name: file for file, part in shards.items() for name in part}
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model, apart = check.checked(llama)
    assert max(apart.values()) <= EXACT
    assert graph.save(model, llama / "model.onnx").id == whole.id


def test_one_file_goes_before_shards_as_in_transformers(llama):
    whole = graph.save(graph.build(llama), llama / "model.onnx")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"other": "other.safetensors"}}))
    assert graph.save(graph.build(llama), llama / "model.onnx").id == whole.id


@pytest.mark.parametrize("place", ["sub/x.safetensors", "../x.safetensors", "{parent}/x.safetensors"])
def test_shards_of_another_folder_are_refused(llama, place):
    path = llama / (place := place.format(parent=llama.parent))
    path.parent.mkdir(exist_ok=True)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").rename(path)
    save_file({name: -array for name, array in tensors.items()}, llama / "x.safetensors", {"format": "pt"})
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, place)}))
    with pytest.raises(Malformed, match="same folder"):
        graph.build(llama)


@pytest.mark.parametrize("change", [np.copy, np.negative])
def test_a_tied_head_that_is_stored_all_the_same_is_taken_as_transformers_takes_it(tmp_path, change):
    decoders.folder(tmp_path, decoders.CONFIGS["llama, tied"])
    bend(tmp_path, lambda t: t | {"lm_head.weight": change(t["model.embed_tokens.weight"])})
    _, apart = check.checked(tmp_path)
    assert max(apart.values()) <= EXACT


@pytest.mark.parametrize(
    ("generation", "config", "ends"), [(None, 2, (2,)), ([5, 6], 2, (5, 6)), (7, None, (7,)), (None, None, ())]
)
def test_answers_end_as_generation_ends(llama, generation, config, ends):
    check.write_config(llama, decoders.SIZES | LLAMA | {"eos_token_id": config})
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    model = graph.save(graph.build(llama), llama / "model.onnx")
    assert model.nodes[-1].attributes["eos"] == ends


@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
def test_frequencies_are_those_of_torch_to_a_rounding(theta, width):
    own = rope.frequencies({"rope_theta": theta}, width)
    other = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
    np.testing.assert_array_max_ulp(own, other.numpy(), 1)


REFUSED = {
    "architectures": ["GPT2LMHeadModel"],
    "quantization_config": {"quant_method": "gptq"},
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"full_attention": {"rope_theta": 1e4}},
    "partial_rotary_factor": 0.5,
    "hidden_act": "gelu",
    "hidden_size": None,
    "rms_norm_eps": 0,
    "num_key_value_heads": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "auto_map": {"AutoModelForCausalLM": "code.Model"},
}
NAMED = {"rope_scaling": "yarn", "hidden_act": "activation", "num_key_value_heads": "kv-heads"}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_built_is_named(llama, field):
    check.write_config(llama, decoders.SIZES | LLAMA | {field: REFUSED[field]})
    with pytest.raises(Malformed, match=NAMED.get(field, field)):
        check.checked(llama)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma 3", "final_logit_softcapping", 30.0),
        ("gemma 3", "attn_logit_softcapping", 50.0),
        ("gemma 3", "use_bidirectional_attention", True),
        ("gemma 3", "layer_types", ["full_attention", "chunked_attention"]),
        ("qwen 2", "attention_bias", True),
        ("qwen 3", "layer_types", ["full_attention"]),
        ("qwen 3", "layer_types", ["full_attention", "sliding_attention"]),
        ("mistral", "mlp_bias", True),
    ],
)
def test_a_field_that_is_not_built_for_a_family_is_named(name, field, value):
    with pytest.raises(Malformed, match=field):
        families.decoder(decoders.SIZES | decoders.CONFIGS[name] | {field: value})


def bend(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    save_file(change(tensors), path, {"format": "pt"})


BENT = {
    "a bias that the config denies": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)},
        "q_proj.bias which config.json gives no place",
    ),
    "a tensor too few": (
        lambda t: {name: array for name, array in t.items() if name != "model.norm.weight"},
        "no tensor model.norm.weight",
    ),
    "another shape": (lambda t: t | {"model.norm.weight": np.zeros(31, np.float32)}, "model.norm.weight has the shape"),
    "two types": (lambda t: t | {"model.norm.weight": np.zeros(32, np.float16)}, "float16 and float32"),
    "integers": (lambda t: {name: array.astype(np.int8) for name, array in t.items()}, "int8"),
}


@pytest.mark.parametrize("lie", BENT)
def test_weights_that_do_not_fit_are_named(llama, lie):
    change, words = BENT[lie]
    bend(llama, change)
    with pytest.raises(Malformed, match=words):
        graph.build(llama)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"not this", b"\xff" * 64])
def test_a_folder_of_other_files_is_malformed(llama, name, content):
    (llama / name).unlink()
    if content is not None:
        (llama / name).write_bytes(content)
    with pytest.raises(Malformed):
        graph.build(llama)


def test_links_out_of_the_folder_are_refused(llama, tmp_path_factory):
    blob = tmp_path_factory.mktemp("blobs") / "abc"
    (llama / "model.safetensors").rename(blob)
    (llama / "model.safetensors").symlink_to(blob)
    with pytest.raises(Malformed, match="link"):
        graph.build(llama)


WRONG = {
    "another scale of attention": lambda form: replace(form, scale=form.scale * 1.1),
    "no window": lambda form: replace(form, windowed=(False,) * len(form.windowed), window=None),
    "a window of one more": lambda form: replace(form, window=form.window + 1),
    "another epsilon": lambda form: replace(form, epsilon=0.1),
    "another activation": lambda form: replace(form, activation="gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("lie", WRONG)
def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch, lie):
    decoders.folder(tmp_path, decoders.CONFIGS["mistral with a window"])
    monkeypatch.setattr(graph, "decoder", lambda config: WRONG[lie](families.decoder(config)))
    with pytest.raises(Malformed, match="those of Transformers"):
        cli.import_(tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_writes_a_model_beside_its_weights(llama):
    done = run("-m", "assay", "model", "import", llama, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["relative_error"] <= EXACT
    assert told["model"] == Model.open(llama / "model.onnx").id.hex()
    assert Path(told["file"]) == llama / "model.onnx"
    assert run("-m", "assay", "model", "show", llama / "model.onnx").returncode == 0


def test_a_model_goes_nowhere_but_beside_its_weights(llama, tmp_path_factory):
    with pytest.raises(Malformed, match="beside its weights"):
        cli.import_(llama, tmp_path_factory.mktemp("elsewhere") / "model.onnx")


def test_without_torch_nothing_is_imported(llama):
    block = "import sys; sys.modules['torch'] = None; import assay; assay.main()"
    done = run("-c", block, "model", "import", llama)
    assert (done.returncode, "pip install 'assay[torch]'" in done.stderr) == (2, True), done.stderr[-2000:]
    assert not (llama / "model.onnx").exists()


BIG = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64}
READ = """
import re, sys
from pathlib import Path
from proof import graph as reading
from prover.decoders import graph
folder = Path(sys.argv[1])
(folder / "model.onnx").write_bytes(graph.build(folder).SerializeToString())
reading._model_id = lambda *parts: bytes(32)
weights = reading.read_graph(folder / "model.onnx").weights.values()
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]  # a fork's ru_maxrss is its parent's
print(sum(array.nbytes for array in weights), 1024 * int(peak))
"""


def test_a_network_of_140_gigabytes_is_read_in_a_quarter_of_one(tmp_path):
    config = decoders.SIZES | LLAMA | BIG | {"vocab_size": 128_256, "num_key_value_heads": 8}
    check.write_config(tmp_path, config)
    decoders.sparse(tmp_path / "model.safetensors", config)
    done = run("-c", READ, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, held = map(int, done.stdout.split())
    assert weights > 140e9
    assert held < 2.5e8
