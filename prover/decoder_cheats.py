"""What dishonest workers of a decoder do. The demo hires them, bench/detection.py measures how often they are met.

Some bend a copy of the network. The others run an honest one on another request or along a text from elsewhere, and put
what they like into the trace.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpu.plan import Model
from prover.prove import Engine

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]
Trace = dict[str, Array]
Network = Any  # a causal transformers model
Bend = Callable[[Network], None]

ADAPTED = ("q_proj", "v_proj")
WINDOW = 32
PADDING = 16  # tokens billed and never generated
WINNING = 20.0  # in units of the temperature: wins over any Gumbel noise, and is all that top-p leaves


class Recording(Protocol):
    """The recorder of a network (engines/torch.py)."""

    def generate(self, inputs: Inputs) -> Mapping[str, Array]: ...

    def forward(self, inputs: Inputs) -> Mapping[str, Array]: ...


@dataclass
class Scene:
    """An honest network, which cheats run too: once for each request, however many of them ask."""

    network: Network
    statement: Model
    record: Callable[[Network, Model], Recording]
    _runs: dict[tuple[bytes, ...], Trace] = field(default_factory=dict, repr=False)

    @cached_property
    def recorder(self) -> Recording:
        return self.record(self.network, self.statement)

    @property
    def eos(self) -> int:
        decode = next(node for node in self.statement.nodes if node.op == "Decode")
        return int(decode.attributes["eos"][0])

    def honest(self, inputs: Inputs) -> Trace:
        key = tuple(inputs[name].tobytes() for name in sorted(inputs))
        if key not in self._runs:
            self._runs[key] = dict(self.recorder.generate(inputs))
        return self._runs[key]

    def bent(self, bend: Bend) -> Recording:
        """The recorder of a copy of the network that `bend` has changed in place."""
        network = deepcopy(self.network)
        bend(network)
        return self.record(network, self.statement)


Cheat = Callable[[Scene], Engine]
Write = Callable[[Scene, Inputs], Array]  # a text to answer with


def running(bend: Bend) -> Cheat:
    """Another network of the same shapes writes the answer."""
    return lambda scene: scene.bent(bend).generate


def quantised(bend: Callable[[Array], Array]) -> Bend:
    """Every matrix of the layers through a coarser format and back; `bend` takes float32 (out, in)."""

    def change(network: Network) -> None:
        for linear in _linears(network):
            linear.weight.data.copy_(linear.weight.new_tensor(bend(linear.weight.data.float().numpy())))

    return change


def int8(weight: Array) -> Array:
    """One scale an output channel."""
    return _rounded(weight, 127)


def int4(weight: Array, group: int = 64) -> Array:
    """One scale every `group` weights of a channel."""
    return _rounded(weight.reshape(-1, min(group, weight.shape[1])), 7).reshape(weight.shape)


def fp8(weight: Array) -> Array:
    """e4m3, one scale an output channel."""
    scale = _scale(weight, float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max))
    return (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def _rounded(weight: Array, levels: int) -> Array:
    scale = _scale(weight, levels)
    rounded: Array = np.rint(weight / scale) * scale
    return rounded


def _scale(weight: Array, largest: float) -> Array:
    highest = np.abs(weight).max(axis=1, keepdims=True)
    return np.where(highest > 0, highest / largest, 1).astype(np.float32)


def adapted(network: Network, size: float = 1e-3, rank: int = 8) -> None:
    """A LoRA adapter beside q and v; its product has the norm `size` relative to the matrix it adapts."""
    rng = np.random.default_rng(3)

    def hook(down: Any, up: Any) -> Callable[[Any, Any, Any], Any]:
        return lambda module, args, output: output + (args[0] @ down.T) @ up.T

    for linear in _linears(network, ADAPTED):
        weight = linear.weight.data.float().numpy()
        down, up = (rng.standard_normal(shape) for shape in ((rank, weight.shape[1]), (weight.shape[0], rank)))
        up *= size * np.linalg.norm(weight) / np.linalg.norm(up @ down)
        linear.register_forward_hook(hook(linear.weight.new_tensor(down), linear.weight.new_tensor(up)))


def shortened(network: Network) -> None:
    """The last quarter of the layers left out: zeros in the trace, and each hands on what it was given."""
    layers = network.model.layers
    for layer in layers[len(layers) - max(len(layers) // 4, 1) :]:
        for parameter in (p for module in layer.modules() if _is_linear(module) for p in module.parameters()):
            parameter.data.zero_()


def windowed(network: Network, window: int = WINDOW) -> None:
    """Attention to the last `window` positions alone."""

    def narrow(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, past = given["hidden_states"] if "hidden_states" in given else args[0], given.get("past_key_values")
        queries = hidden.shape[1]
        keys = queries + (past.get_seq_length(module.layer_idx) if past is not None else 0)
        seen = hidden.new_ones((1, 1, queries, keys)).tril(keys - queries).triu(keys - queries - window + 1)
        return args, given | {"attention_mask": hidden.new_zeros(seen.shape).masked_fill(seen == 0, -np.inf)}

    for layer in network.model.layers:
        layer.self_attn.register_forward_pre_hook(narrow, with_kwargs=True)


def rebased(scene: Scene, factor: float = 0.99) -> Engine:
    """Rotary positions from a base smaller by `factor`, under the angles of the right one."""
    honest = scene.statement.constants["inv_freq"]
    bent = (honest * factor ** -(np.arange(len(honest)) / len(honest))).astype(honest.dtype)
    statement = replace(
        scene.statement, constants={**scene.statement.constants, "inv_freq": bent}, _plans=OrderedDict()
    )
    network = deepcopy(scene.network)
    network.model.rotary_emb.inv_freq.copy_(network.model.rotary_emb.inv_freq.new_tensor(bent))
    recorder = scene.record(network, statement)

    def run(inputs: Inputs) -> Trace:
        trace = dict(recorder.generate(inputs))
        plan = scene.statement.plan({i.name: trace[i.name].shape for i in scene.statement.graph.inputs})
        return trace | {name: plan.known[name] for name in plan.derived}

    return run


def asking(**changes: Any) -> Cheat:
    """Answers another request, of the same shapes, and puts the task's in front of it."""

    def cheat(scene: Scene) -> Engine:
        def run(inputs: Inputs) -> Trace:
            other = {name: np.asarray(change(inputs[name]), inputs[name].dtype) for name, change in changes.items()}
            trace = dict(scene.recorder.generate(dict(inputs) | other)) | dict(inputs)
            return trace | {"ids": np.concatenate([trace["prompt"], trace["fed"]])}

        return run

    return cheat


def openly_asking(**changes: Any) -> Cheat:
    """Answers another request, and commits to that."""
    return lambda scene: (
        lambda inputs: scene.recorder.generate(
            dict(inputs) | {name: change(inputs[name]) for name, change in changes.items()}
        )
    )


def retelling(write: Write) -> Cheat:
    """Runs the honest network once over a text that it did not write."""
    return lambda scene: lambda inputs: scene.recorder.forward(dict(inputs) | {"answer": write(scene, inputs)})


def insisting(write: Write) -> Cheat:
    """The same, with logits invented from where the text leaves the honest one: there, each token of it wins."""
    retold = retelling(write)

    def cheat(scene: Scene) -> Engine:
        def run(inputs: Inputs) -> Trace:
            trace, answer = dict(retold(scene)(inputs)), scene.honest(inputs)["answer"]
            told, logits = trace["answer"], trace["logits"].copy()
            shared = min(len(told), len(answer))
            rows = np.arange(int(np.argmax(told[:shared] != answer[:shared])), len(told))
            highest = logits[rows].astype(np.float32).max(axis=1)
            boost = WINNING * max(float(inputs["temperature"]), 1e-3)
            logits[rows, told[rows]] = (highest + boost).astype(logits.dtype)
            return trace | {"logits": logits}

        return run

    return cheat


def by_network(bend: Bend) -> Write:
    """What a bent network writes."""
    return lambda scene, inputs: scene.bent(bend).generate(inputs)["answer"]


def by_hand(rewrite: Callable[[Array, int], Array]) -> Write:
    """The honest answer, rewritten; `rewrite` takes it and the id that ends an answer."""
    return lambda scene, inputs: rewrite(scene.honest(inputs)["answer"], scene.eos)


def another_tail(answer: Array, eos: int) -> Array:
    """The first half, and then it again from the back; the last token stays."""
    half = len(answer) // 2
    return np.concatenate([answer[:half], np.resize(answer[:half][::-1], len(answer) - half - 1), answer[-1:]])


def padded(answer: Array, eos: int) -> Array:
    return np.concatenate([answer, np.resize(answer, PADDING)])


def cut(answer: Array, eos: int) -> Array:
    return answer[: max(len(answer) // 2, 1)]


def ended(answer: Array, eos: int) -> Array:
    return np.concatenate([cut(answer, eos), [eos]])


def _other_words(prompt: Array) -> Array:
    """The same words in another order."""
    return np.roll(prompt, 1)


def _without_system(prompt: Array) -> Array:
    return prompt[len(prompt) // 2 :]


CHEATS: dict[str, Cheat] = {
    "int8 weights": running(quantised(int8)),
    "fp8 weights": running(quantised(fp8)),
    "int4 weights": running(quantised(int4)),
    "a LoRA adapter": running(adapted),
    "a quarter of the layers skipped": running(shortened),
    "a window on attention": running(windowed),
    "another rotary base": rebased,
    "another prompt": openly_asking(prompt=_without_system),
    "another prompt under the task's": asking(prompt=_other_words),
    "another temperature": asking(temperature=lambda t: 3 * t),
    "another seed": asking(seed=lambda seed: seed ^ 255),
    "a text by int4 weights": retelling(by_network(quantised(int4))),
    "another tail": insisting(by_hand(another_tail)),
    "tokens never generated": retelling(by_hand(padded)),
    "an answer cut short": retelling(by_hand(cut)),
    "an end put in": insisting(by_hand(ended)),
}


def _linears(network: Network, names: tuple[str, ...] = ("",)) -> list[Any]:
    found = network.model.layers.named_modules()
    return [module for name, module in found if _is_linear(module) and name.endswith(names)]


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2
