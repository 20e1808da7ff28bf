"""Whether a graph is the network that Transformers builds from the same folder: both run on the same random tokens.

Always a small network of random weights whose config.json keeps every flag of the folder's; besides it the folder's
own weights where they are few. Both run in float32, the graph in ONNX Runtime.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from proof import bundle
from proof.errors import Malformed
from prover.decoders import graph
from prover.decoders.families import Decoder, decoder
from prover.decoders.weights import WHOLE, stored
from prover.engines.capture import as_numpy

AGREEMENT = 1e-3  # relative, of root mean squares
FEW_BYTES = 10**9  # of weights in float32
SAME_FREQUENCY = 1e-6  # relative: as far as two libraries' fp32 powers are apart
WINDOW, PROMPT, ANSWER = 8, 20, 4  # tokens; more than a window

Network = Any
Array = npt.NDArray[Any]


def checked(folder: Path) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The folder's graph, with Transformers' own frequencies, and how far the logits of both were apart.

    Raises Malformed where the graph is not what Transformers runs.
    """
    config = graph.read_config(folder)
    form, sizes = decoder(config), [tensor.spec.size for tensor in stored(folder).values()]
    with TemporaryDirectory() as place:
        small = shrunk(config, form)
        write_config(Path(place), small)
        network = random(Path(place))
    apart = {"random weights": _apart(network, small)}
    model = graph.build(folder, _frequencies(type(network.model.rotary_emb)(_read(folder)), form))
    if 4 * sum(sizes) < FEW_BYTES:
        apart["its own weights"] = _apart(_loaded(folder), config)
    for weights, distance in apart.items():
        if not distance <= AGREEMENT:
            raise Malformed(f"with {weights} the graph's logits are {distance:.1e} from those of Transformers")
    return model, apart


def shrunk(config: Mapping[str, Any], form: Decoder) -> dict[str, Any]:
    """A config.json of few and small layers, one of each kind, that keeps whatever else it says."""
    groups = 1 if form.groups == 1 else 4 if form.groups == form.heads else 2
    kinds = [form.windowed.index(kind) for kind in (True, False) if kind in form.windowed]
    kinds = kinds if len(kinds) > 1 else kinds * 2
    sizes: dict[str, Any] = {
        "hidden_size": 48 if "head_dim" in config else 64,
        "num_attention_heads": 4,
        "num_key_value_heads": groups,
        "intermediate_size": 80,
        "vocab_size": 97,
        "num_hidden_layers": len(kinds),
    }
    small = {**config, **sizes, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if config.get("head_dim") is not None:
        small["head_dim"] = 16
    if form.window is not None:
        small["sliding_window"] = WINDOW
    if len(set(form.windowed)) > 1 or "layer_types" in config:
        small["layer_types"] = ["sliding_attention" if form.windowed[i] else "full_attention" for i in kinds]
    return small


def _apart(network: Network, config: Mapping[str, Any]) -> float:
    """How far the graph of a network saved in float32 is from the network."""
    form = decoder(config)
    rng = np.random.default_rng(0)
    prompt, answer = (rng.integers(0, form.words, count) for count in (PROMPT, ANSWER))
    with TemporaryDirectory() as place:
        save(network, config, Path(place))
        model = graph.build(Path(place), _frequencies(network.model.rotary_emb, form))
        found = _logits(model, Path(place), {"prompt": prompt, "answer": answer})
    ids = torch.from_numpy(np.concatenate([prompt, answer[:-1]]))[None]
    with torch.no_grad():
        expected = network(ids, use_cache=False).logits[0, PROMPT - 1 :].numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def save(network: Network, config: Mapping[str, Any], folder: Path) -> None:
    """The network's weights, and the config.json as given."""
    tied = "lm_head.weight" if network.lm_head.weight is network.model.embed_tokens.weight else None
    tensors = {name: as_numpy(value) for name, value in network.state_dict().items() if name != tied}
    bundle.write(folder / WHOLE, tensors.items(), {"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def random(folder: Path, dtype: torch.dtype = torch.float32) -> Network:
    """The network of a config.json with random weights, none of them such that leaving it out would change nothing."""
    network = AutoModelForCausalLM.from_config(_read(folder), dtype=dtype, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw).to(dtype) * 0.1)
    return network


def _loaded(folder: Path) -> Network:
    load = AutoModelForCausalLM.from_pretrained
    return load(folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager").eval()


def _read(folder: Path) -> Any:
    """What Transformers makes of a config.json. Raises Malformed with what it says against it."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise Malformed(f"Transformers cannot read config.json: {error}") from error


def _frequencies(rotary: Any, form: Decoder) -> dict[str, npt.NDArray[np.float32]]:
    """Those of Transformers. Raises Malformed where ours are others, by more than a rounding."""
    found = {}
    for suffix, ours in form.frequencies().items():
        kind = ("sliding_attention_" if suffix else "full_attention_") if form.gemma else ""
        found[suffix] = getattr(rotary, f"{kind}inv_freq").numpy()
        same = found[suffix].shape == ours.shape and np.allclose(found[suffix], ours, rtol=SAME_FREQUENCY, atol=0)
        if not same or getattr(rotary, f"{kind}attention_scaling") != 1:
            raise Malformed("config.json: Transformers gives the rotary embedding other frequencies")
    return found


def _logits(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, Array]) -> Array:
    """The graph without its last node, run by ONNX Runtime."""
    nodes = model.graph.node
    del nodes[-1]
    kept = [value for value in model.graph.input if value.name in inputs]
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(kept)
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["answer", None]))
    path = folder / "logits.onnx"
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], dict(inputs))[0])
