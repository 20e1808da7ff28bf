"""Small decoders of Transformers with random weights, one of each family, as folders that can be imported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu.plan import Model
from prover.decoders import check, graph

WORDS, WINDOW = 97, 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def _family(name: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **fields}


CONFIGS: dict[str, dict[str, Any]] = {  # beside SIZES
    "llama": _family("Llama", rope_theta=10_000.0),
    "llama, tied": _family("Llama", rope_theta=100_000.0, tie_word_embeddings=True),
    "llama 3": _family("Llama", rope_theta=500_000.0, rope_scaling=LLAMA3),
    "llama 3, in newer words": _family("Llama", rope_parameters={"rope_theta": 500_000.0, **LLAMA3}),
    "llama, stretched": _family("Llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama with biases": _family("Llama", attention_bias=True, mlp_bias=True),
    "llama, one kv-head": _family("Llama", num_key_value_heads=1, head_dim=24),
    "llama, as many kv-heads": _family("Llama", num_key_value_heads=None),
    "mistral": _family("Mistral", sliding_window=None),
    "mistral with a window": _family("Mistral", sliding_window=WINDOW),
    "qwen 2": _family("Qwen2", rope_theta=1_000_000.0, use_sliding_window=False, tie_word_embeddings=True),
    "qwen 2 with a window in half": _family(
        "Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen 3": _family("Qwen3", head_dim=16, rope_theta=1_000_000.0),
    "qwen 3 with biases": _family("Qwen3", head_dim=16, attention_bias=True),
    "gemma 3": GEMMA,
    "gemma 3, in newer words": {
        **{name: value for name, value in GEMMA.items() if not name.startswith(("rope", "sliding_window_"))},
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
}


def folder(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Write config.json and random weights; returns the network."""
    check.write_config(path, SIZES | config)
    network = check.random(path, dtype)
    check.save(network, SIZES | config, path)
    return network


def made(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Model]:
    """A network of this form, and the graph of it that lies beside its weights as model.onnx."""
    network = folder(path, config, dtype)
    return network, graph.save(graph.build(path), path / "model.onnx")


def llama(path: Path, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Model]:
    return made(path, CONFIGS["llama, tied"] | {"num_hidden_layers": layers}, dtype)


def sparse(path: Path, config: dict[str, int]) -> None:
    """A file of bfloat16 weights that takes no room on the disk."""
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"embed_tokens": (words, width), "norm": (width,)}
    for i in range(config["num_hidden_layers"]):
        parts = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width)}
        parts |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width)}
        parts |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        parts |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in parts.items()}
    named = {f"model.{name}.weight": shape for name, shape in shapes.items()} | {"lm_head.weight": (words, width)}
    header, at = {}, 0
    for name, shape in named.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
