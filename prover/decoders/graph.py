"""The ONNX graph of a decoder: prompt and answer in, the tokens that the logits give out, one row a token position.

T = prompt + answer - 1 positions are run: the last token of an answer is never fed. The graph's weights are the
safetensors files themselves; what is computed from a config.json lies inside the ONNX file.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from gpu.plan import Model
from proof import encoding
from proof.errors import Malformed
from prover.decoders.families import ACTIVATIONS, Decoder, decoder
from prover.decoders.weights import stored
from prover.decoders.writer import Writer

OPSET, IR = 24, 11
MAX_CONFIG_BYTES = 2**24
END = 2**62  # of a slice: beyond any tensor
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INPUTS: tuple[tuple[str, int, list[str | int]], ...] = (
    ("prompt", TensorProto.INT64, ["prompt"]),
    ("answer", TensorProto.INT64, ["answer"]),
    ("temperature", TensorProto.FLOAT, []),
    ("top_k", TensorProto.INT64, []),
    ("top_p", TensorProto.FLOAT, []),
    ("seed", TensorProto.UINT8, [32]),
    ("max_tokens", TensorProto.INT64, []),
)

Frequencies = Mapping[str, npt.NDArray[np.float32]]  # by the suffix of their tables


def build(folder: Path, frequencies: Frequencies | None = None) -> onnx.ModelProto:
    """The graph of the decoder in `folder`, to be saved there; rotary frequencies by our own formulas if left out.

    Raises Malformed naming the file, field or tensor that stands against it.
    """
    config = read_config(folder)
    form, write = decoder(config), Writer(stored(folder))
    x = _embedded(write, form)
    _tables(write, form.frequencies() if frequencies is None else frequencies)
    if form.window:
        _mask(write, form.window)
    for layer in range(len(form.windowed)):
        x = _layer(write, form, x, layer)
    _norm(write, form, x, "model.norm.weight", to="norm")
    _answered(write, form, _eos(folder, config))
    write.refuse_unread()
    inputs = [helper.make_tensor_value_info(*entry) for entry in INPUTS]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["answer", 1])
    graph = helper.make_graph(write.nodes, "decoder", inputs, [tokens], write.initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("assay", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR)


def save(model: onnx.ModelProto, path: Path) -> Model:
    """Write the graph beside its weights, under a name that appears once it can be verified at every node."""
    partial = path.with_name(f".{secrets.token_hex(8)}")
    try:
        partial.write_bytes(model.SerializeToString())
        opened = Model.open(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return opened


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise Malformed(f"{folder} has no {name}: it is not the folder of a Transformers model")
    found = encoding.parse(path.read_bytes(), name, MAX_CONFIG_BYTES)
    if not isinstance(found, dict):
        raise Malformed(f"{name}: not an object")
    return found


def _eos(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, as `generate` takes them."""
    name = "generation_config.json"
    generation = read_config(folder, name) if (folder / name).is_file() else {}
    given = [fields["eos_token_id"] for fields in (generation, config) if fields.get("eos_token_id") is not None]
    first = given[0] if given else []
    return [encoding.integer(token, "eos_token_id") for token in (first if isinstance(first, list) else [first])]


def _embedded(write: Writer, form: Decoder) -> str:
    fed = write.node(
        "Slice",
        "answer",
        write.constant("zero", [0]),
        write.constant("minus_one", [-1]),
        write.constant("axis", [0]),
        to="fed",
    )
    ids = write.node("Concat", "prompt", fed, to="ids", axis=0)
    x = write.node("Gather", write.weight(EMBEDDING, form.words, form.width), ids, to="embedding")
    if not form.gemma:
        return x
    scale = write.constant("embedding_scale", np.float32(form.width**0.5).astype(write.dtype))
    return write.node("Mul", x, scale, to="embedding_scaled")


def _tables(write: Writer, frequencies: Frequencies) -> None:
    """Cosines and sines (1, T, width of a head / 2), as Transformers computes them: in float32, then rounded."""
    shape = write.node("Shape", "ids", to="positions.shape")
    count = write.node("Squeeze", shape, to="positions.count")
    start, step = write.constant("first", 0), write.constant("step", 1)
    numbers = write.node("Range", start, count, step, to="positions.range")
    wide = write.cast(numbers, TensorProto.FLOAT, to="positions.float")
    positions = write.node("Unsqueeze", wide, write.constant("positions.axes", [0, 2]), to="positions")
    for suffix, values in frequencies.items():
        turns = write.constant(f"inv_freq{suffix}", values)
        angles = write.node("Mul", positions, turns, to=f"angles{suffix}")
        for op, name in (("Cos", "cos"), ("Sin", "sin")):
            table = write.node(op, angles, to=f"{name}{suffix}")
            if write.narrow:
                write.cast(table, write.kind, to=f"{name}_cast{suffix}")


def _mask(write: Writer, window: int) -> None:
    """True where key k is fewer than `window` positions before query q, as q - window < k."""
    least = write.node("Sub", "positions.range", write.constant("window", window), to="window_mask.least")
    queries = write.node("Unsqueeze", least, write.constant("window_mask.column", [1]), to="window_mask.queries")
    keys = write.node("Unsqueeze", "positions.range", write.constant("window_mask.row", [0]), to="window_mask.keys")
    write.node("Less", queries, keys, to="window_mask")


def _layer(write: Writer, form: Decoder, x: str, layer: int) -> str:
    at, source = f"layers.{layer}", f"model.layers.{layer}"
    _norm(write, form, x, f"{source}.input_layernorm.weight", to=f"{at}.input_norm")
    attended = _attention(write, form, layer)
    if form.gemma:
        weight = f"{source}.post_attention_layernorm.weight"
        attended = _norm(write, form, attended, weight, to=f"{at}.post_attention_norm")
    middle = write.node("Add", x, attended, to=f"{at}.residual")
    before = "pre_feedforward_layernorm" if form.gemma else "post_attention_layernorm"
    _norm(write, form, middle, f"{source}.{before}.weight", to=f"{at}.post_norm")
    fed = _mlp(write, form, layer)
    if form.gemma:
        weight = f"{source}.post_feedforward_layernorm.weight"
        fed = _norm(write, form, fed, weight, to=f"{at}.post_feedforward_norm")
    return write.node("Add", middle, fed, to=f"{at}.output")


def _attention(write: Writer, form: Decoder, layer: int) -> str:
    at, suffix = f"layers.{layer}", form.table(layer)
    cast = "_cast" if write.narrow else ""
    tables = [f"{name}{cast}{suffix}" for name in ("cos", "sin")]
    operands = []
    for part, count in (("q", form.heads), ("k", form.groups), ("v", form.groups)):
        shape = (count * form.head_width, form.width)
        x = _product(write, form, f"{at}.input_norm", layer, f"self_attn.{part}_proj", shape, to=f"{at}.{part}")
        split = write.constant(f"split.{count}", [1, -1, count, form.head_width])
        x = write.node("Reshape", x, split, to=f"{at}.{part}_heads")
        if form.head_norms and part != "v":
            weight = f"model.layers.{layer}.self_attn.{part}_norm.weight"
            x = _norm(write, form, x, weight, to=f"{at}.{part}_norm")
        x = write.node("Transpose", x, to=f"{at}.{part}_split", perm=[0, 2, 1, 3])
        operands.append(x if part == "v" else write.node("RotaryEmbedding", x, *tables, to=f"{at}.{part}_rope"))
    if form.windowed[layer]:
        operands.append("window_mask")
    x = write.node("Attention", *operands, to=f"{at}.attention", is_causal=1, scale=form.scale)
    x = write.node("Transpose", x, to=f"{at}.attention_joined", perm=[0, 2, 1, 3])
    width = form.heads * form.head_width
    x = write.node("Reshape", x, write.constant("joined", [-1, width]), to=f"{at}.attention_rows")
    return _product(write, form, x, layer, "self_attn.o_proj", (form.width, width), to=f"{at}.o")


def _mlp(write: Writer, form: Decoder, layer: int) -> str:
    at, (op, attributes) = f"layers.{layer}", ACTIVATIONS[form.activation]
    for part in ("gate", "up"):
        shape = (form.inner, form.width)
        _product(write, form, f"{at}.post_norm", layer, f"mlp.{part}_proj", shape, to=f"{at}.{part}")
    active = write.node(op, f"{at}.gate", to=f"{at}.activated", **attributes)
    gated = write.node("Mul", active, f"{at}.up", to=f"{at}.gated")
    return _product(write, form, gated, layer, "mlp.down_proj", (form.width, form.inner), to=f"{at}.down")


def _product(write: Writer, form: Decoder, x: str, layer: int, module: str, shape: tuple[int, int], *, to: str) -> str:
    """x W^T + b. The bias is fused: one rounding, as in Transformers."""
    name = f"model.layers.{layer}.{module}"
    bias = [write.weight(f"{name}.bias", shape[0])] if module.split(".")[-1] in form.biased else []
    return write.node("Gemm", x, write.weight(f"{name}.weight", *shape), *bias, to=to, transB=1)


def _norm(write: Writer, form: Decoder, x: str, weight: str, *, to: str) -> str:
    width = form.head_width if weight.endswith(("q_norm.weight", "k_norm.weight")) else form.width
    rms = {"axis": -1, "epsilon": form.epsilon, "stash_type": 1}
    if not form.gemma:
        return write.node("RMSNormalization", x, write.weight(weight, width), to=to, **rms)
    scale = write.constant(f"{to}.scale", np.float32(1) + write.values(weight, width).astype(np.float32))
    if not write.narrow:
        return write.node("RMSNormalization", x, scale, to=to, **rms)
    wide = write.cast(x, TensorProto.FLOAT, to=f"{to}.wide")
    exact = write.node("RMSNormalization", wide, scale, to=f"{to}.exact", **rms)
    return write.cast(exact, write.kind, to=to)


def _answered(write: Writer, form: Decoder, eos: list[int]) -> None:
    """The rows after which a token was chosen, their logits, and the rule that the answer must keep."""
    count = write.node("Shape", "prompt", to="answered.prompt")
    start = write.node("Sub", count, write.constant("one", [1]), to="answered.start")
    rows = write.node("Slice", "norm", start, write.constant("end", [END]), "axis", to="answered")
    tied = form.tied and not write.has(HEAD)  # a head that is stored all the same is taken, as by Transformers
    head = EMBEDDING if tied else HEAD
    logits = write.node("Gemm", rows, write.weight(head, form.words, form.width), to="logits", transB=1)
    settings = [name for name, _, _ in INPUTS[1:]]
    write.node("Decode", logits, *settings, to="tokens", domain="assay")
    write.nodes[-1].attribute.append(helper.make_attribute("eos", eos, attr_type=onnx.AttributeProto.INTS))
