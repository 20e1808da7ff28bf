"""Families of decoders, a row each: what of a config.json each of them reads, and how it differs from Llama.

`decoder` gives one network's form. What would change the function and is not built is refused by the field's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from proof import encoding
from proof.errors import Malformed
from prover.decoders import rope

Fields = Mapping[str, Any]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("Swish", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
}
WINDOWED = {"full_attention": False, "sliding_attention": True}
UNBUILT = (
    "quantization_config",
    "auto_map",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "is_encoder_decoder",
    "add_cross_attention",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}


@dataclass(frozen=True)
class Family:
    defaults: Fields  # of what a config.json may leave out, as Transformers fills it in
    biased: tuple[str, ...] = ()  # projections with a bias whatever the config says
    windowed: Callable[[Fields, int], bool] = lambda fields, layer: False  # where the config names no kinds of layers
    head_norms: bool = False  # of queries and keys
    gemma: bool = False  # norms of 1 + w, four a layer, a scaled embedding, rotary tables by kind of layer


def _by_depth(fields: Fields, layer: int) -> bool:
    windows = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return bool(windows) and layer >= encoding.integer(fields["max_window_layers"], "config.json: max_window_layers")


FAMILIES = {
    "LlamaForCausalLM": Family(LLAMA_DEFAULTS | {"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Family(
        LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        windowed=lambda fields, layer: fields["sliding_window"] is not None,
    ),
    "Qwen2ForCausalLM": Family(QWEN_DEFAULTS, biased=ATTENTION[:3], windowed=_by_depth),
    "Qwen3ForCausalLM": Family(
        QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False}, windowed=_by_depth, head_norms=True
    ),
    "Gemma3ForCausalLM": Family(
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
        },
        windowed=lambda fields, layer: bool((layer + 1) % _size(fields, "sliding_window_pattern")),
        head_norms=True,
        gemma=True,
    ),
}


@dataclass(frozen=True)
class Decoder:
    """One network's form. `ropes` and the frequencies from them go by the suffix of their tables: "" or "_local"."""

    width: int
    heads: int
    groups: int
    head_width: int
    inner: int
    words: int
    epsilon: float
    scale: float  # of attention
    tied: bool
    activation: str
    biased: frozenset[str]
    windowed: tuple[bool, ...]  # by layer
    window: int | None
    head_norms: bool
    gemma: bool
    ropes: Mapping[str, rope.Parameters] = field(repr=False)

    def frequencies(self) -> dict[str, npt.NDArray[np.float32]]:
        return {suffix: rope.frequencies(parameters, self.head_width) for suffix, parameters in self.ropes.items()}

    def table(self, layer: int) -> str:
        """The suffix of the rotary tables that a layer takes."""
        return "_local" if self.gemma and self.windowed[layer] else ""


def decoder(config: Fields) -> Decoder:
    """Raises Malformed naming the field that is missing, wrong, or stands for what is not built."""
    family = family_of(config)
    fields = {**family.defaults, **config}
    _refuse_unbuilt(family, config)
    heads, width = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
    groups = heads if fields.get("num_key_value_heads") is None else _size(fields, "num_key_value_heads")
    head_width = width // heads if fields.get("head_dim") is None else _size(fields, "head_dim")
    if heads % groups or head_width % 2:
        raise Malformed(f"config.json: {groups} kv-heads of {head_width} for {heads} heads")
    activation = fields["hidden_activation" if family.gemma else "hidden_act"]
    if activation not in ACTIVATIONS:
        raise Malformed(f"config.json: the activation {activation!r} is not supported: {', '.join(ACTIVATIONS)} are")
    windowed = _windows(family, fields, _size(fields, "num_hidden_layers"))
    return Decoder(
        width=width,
        heads=heads,
        groups=groups,
        head_width=head_width,
        inner=_size(fields, "intermediate_size"),
        words=_size(fields, "vocab_size"),
        epsilon=_positive(fields, "rms_norm_eps"),
        scale=(_positive(fields, "query_pre_attn_scalar") if family.gemma else head_width) ** -0.5,
        tied=bool(fields["tie_word_embeddings"]),
        activation=activation,
        biased=frozenset(family.biased).union(*(part for name, part in BIASES.items() if fields.get(name))),
        windowed=windowed,
        window=_size(fields, "sliding_window") if any(windowed) else None,
        head_norms=family.head_norms,
        gemma=family.gemma,
        ropes=_ropes(family, fields, windowed),
    )


def family_of(config: Fields) -> Family:
    """Raises Malformed naming the families that there are."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if not isinstance(name, str) or name not in FAMILIES:
        raise Malformed(f"config.json: architectures {named!r} is not supported: {', '.join(FAMILIES)} are")
    return FAMILIES[name]


def _refuse_unbuilt(family: Family, config: Fields) -> None:
    for name in (*UNBUILT, *(name for name in BIASES if name not in family.defaults)):
        if config.get(name):
            raise Malformed(f"config.json: {name} is not supported for {config['architectures'][0]}")
    if config.get("partial_rotary_factor", 1) not in (None, 1):
        raise Malformed("config.json: partial_rotary_factor is not supported: every element of a head is turned")


def _windows(family: Family, fields: Fields, layers: int) -> tuple[bool, ...]:
    kinds = fields.get("layer_types")
    if kinds and "layer_types" not in family.defaults:
        raise Malformed("config.json: layer_types is not supported for this architecture")
    if kinds is None:
        return tuple(family.windowed(fields, layer) for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in WINDOWED for kind in kinds):
        raise Malformed(f"config.json: layer_types must name one of {', '.join(WINDOWED)} for each of {layers} layers")
    if "sliding_attention" in kinds and not fields.get("use_sliding_window", True):
        raise Malformed("config.json: layer_types has sliding_attention where use_sliding_window is false")
    return tuple(WINDOWED[kind] for kind in kinds)


def _ropes(family: Family, fields: Fields, windowed: tuple[bool, ...]) -> dict[str, rope.Parameters]:
    given, scaling = (_object(fields, name) for name in ("rope_parameters", "rope_scaling"))
    nested = {name: part for name, part in given.items() if isinstance(part, dict)}
    if not family.gemma:
        if nested:
            raise Malformed(f"config.json: rope_parameters by kind of layer, {min(nested)}, is not supported here")
        return {"": {"rope_theta": fields["rope_theta"], **(scaling or given)}}
    wide = {"rope_theta": fields["rope_theta"], **nested.get("full_attention", {}), **scaling}
    near = {"rope_theta": fields["rope_local_base_freq"], **nested.get("sliding_attention", {})}
    parts: dict[str, rope.Parameters] = {"": wide, "_local": near}
    return {suffix: parts[suffix] for suffix in sorted({"_local" if local else "" for local in windowed})}


def _object(fields: Fields, name: str) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise Malformed(f"config.json: {name} is not an object")
    return value


def _size(fields: Fields, name: str) -> int:
    value = encoding.integer(fields.get(name), f"config.json: {name}")
    if not value:
        raise Malformed(f"config.json: {name} is 0")
    return value


def _positive(fields: Fields, name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise Malformed(f"config.json: {name} is {value!r}, not a positive number")
    return float(value)
