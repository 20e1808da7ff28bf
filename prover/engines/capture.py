"""A decoder of Transformers as it stands, watched while it runs: what its modules are given and return.

Hooks keep references, which are handed on after each step. Rotated queries and keys have no module: they are seen where
the model hands them to its attention function. What a module keeps to itself (the fp32 cosines and norms) is computed
again after the step, with the module's own operations, and must lead to the bits that it returned.
"""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import ml_dtypes
import numpy.typing as npt
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpu.device import Device
from proof.errors import Unavailable
from prover.engines.residents import Kept, Parts, Peak, Room, Tensor, window

Array = npt.NDArray[Any]
Network = Any  # a causal transformers model
Steps = dict[str, list[Any]]  # parts of a tensor (..., tokens, c), one a step

ATTENTION = ("eager", "sdpa")
BLOCK = {  # module of a layer: what it is given and returns, as the graph calls them
    "self_attn.q_proj": (None, "q"),
    "self_attn.k_proj": (None, "k"),
    "self_attn.v_proj": (None, "v"),
    "self_attn.o_proj": ("attention", "o"),
    "mlp.act_fn": ("gate", "activated"),
    "mlp.up_proj": (None, "up"),
    "mlp.down_proj": ("gated", "down"),
}
TWO_NORMS = {"post_attention_layernorm": ("residual", "post_norm")}
FOUR_NORMS = {
    "post_attention_layernorm": (None, "post_attention_norm"),
    "pre_feedforward_layernorm": ("residual", "post_norm"),
    "post_feedforward_layernorm": (None, "post_feedforward_norm"),
}
HEAD_NORMS = ("q_norm", "k_norm")
HEADS_FIRST = ("gemma3_text",)  # families that transpose to (heads, tokens) before they normalise heads

LONG = 1024  # tokens of a step that is handed on layer by layer
UNASKED = 1 << 13  # comparisons

_recording = Lock()  # the attention functions are one table for the whole process


@dataclass(frozen=True)
class Capture:
    """Tensors of a finished run of (B, tokens), padding included: (B, tokens, c) or (B, heads, tokens, c), in parts.

    `axis` says where a tensor has its tokens.
    """

    parts: Mapping[str, list[Tensor]]
    axis: Callable[[str], int]

    def sequence(self, row: int, start: int, count: int, answered: int, joined: bool) -> dict[str, Parts]:
        """One sequence of the batch, without an axis for it: `count` tokens from `start`; logits of the `answered`.

        Joined, each is a copy in one part.
        """
        return {
            name: self._own(name, row, *((0, answered) if name == "logits" else (start, start + count)), joined)
            for name in self.parts
        }

    def _own(self, name: str, row: int, start: int, stop: int, joined: bool) -> Parts:
        axis = self.axis(name)
        parts = [part[min(row, len(part) - 1)] for part in window(self.parts[name], axis, start, stop)]
        own = Parts.of([torch.cat(parts, axis)] if joined else parts, axis + parts[0].ndim)
        if name.endswith(".attention"):
            heads = self.parts[name.replace(".attention", ".q_rope")][0].shape[1]
            return own.reshape((len(own), heads, own.shape[1] // heads)).transpose((1, 0, 2))
        return own.transpose((1, 0, 2)) if _of_heads(name) and own.axis == 1 else own


def as_numpy(value: Any) -> Array:
    """The same bits, and the same memory where that is the CPU's."""
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        bits: Array = value.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = value.numpy()
    return array


class Watch:
    """What has been seen so far, in lists that hooks append to, and what was kept of the steps before."""

    def __init__(
        self, network: Network, names: Container[str], device: Device | None = None, room: Room = None
    ) -> None:
        """With a device, at most `room` bytes of what is seen stay in its memory (residents.py)."""
        self._network, self._names = network, names
        self._kept = Kept(device, room, self._axis)
        self._apart: list[tuple[str, Any]] = []  # whether what was computed again differs, known once torch got there
        self._steps: Steps = defaultdict(list)
        self._tables: list[tuple[Any, Any, Any, Any]] = []  # layer type, positions, cosines, sines
        self._norms: dict[str, tuple[Any, list[Any]]] = {}  # by name: the module and what it was given

    @contextmanager
    def seeing(self) -> Iterator["Watch"]:
        """Hooks and the attention function in place; all of them gone afterwards, however it ends."""
        with _recording, ExitStack() as stack:
            decoder = self._network.model
            self._watch(stack, decoder.embed_tokens, "embedding.given", "embedding")
            stack.callback(decoder.rotary_emb.register_forward_hook(self._table, with_kwargs=True).remove)
            stream = None  # what the next norm is given is the output of the layer before
            for i, layer in enumerate(decoder.layers):
                self._watch_norm(stack, layer.input_layernorm, stream, f"layers.{i}.input_norm")
                self._watch_layer(stack, layer, f"layers.{i}")
                stream = f"layers.{i}.output"
            self._watch_norm(stack, decoder.norm, stream, "norm")
            self._watch(stack, self._network.lm_head, None, "logits")
            self._watch_attention(stack)
            yield self

    def _watch_layer(self, stack: ExitStack, layer: Any, at: str) -> None:
        for path, (given, returned) in BLOCK.items():
            self._watch(stack, layer.get_submodule(path), given and f"{at}.{given}", f"{at}.{returned}")
        norms = FOUR_NORMS if hasattr(layer, "pre_feedforward_layernorm") else TWO_NORMS
        for path, (given, returned) in norms.items():
            self._watch_norm(stack, layer.get_submodule(path), given and f"{at}.{given}", f"{at}.{returned}")
        for name in HEAD_NORMS:
            if hasattr(layer.self_attn, name):
                self._watch_norm(stack, getattr(layer.self_attn, name), None, f"{at}.{name}")

    def _watch(self, stack: ExitStack, module: Any, given: str | None, returned: str) -> None:
        outputs = self._steps[returned]
        if given is None:
            hook = module.register_forward_hook(lambda module, args, result: outputs.append(result))
        else:
            inputs = self._steps[given]

            def both(module: Any, args: Any, result: Any) -> None:
                inputs.append(args[0])
                outputs.append(result)

            hook = module.register_forward_hook(both)
        stack.callback(hook.remove)

    def _watch_norm(self, stack: ExitStack, module: Any, given: str | None, returned: str) -> None:
        given = given or f"{returned}.given"
        self._watch(stack, module, given, returned)
        self._norms[returned] = module, self._steps[given]

    def _table(self, module: Any, args: Any, kwargs: Any, result: Any) -> None:
        asked = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self._tables.append((asked.get("layer_type"), asked["position_ids"], *result))

    def _watch_attention(self, stack: ExitStack) -> None:
        kind = self._network.config._attn_implementation
        modules = {layer.self_attn: i for i, layer in enumerate(self._network.model.layers)}
        if kind == "eager":
            home: Any = sys.modules[type(next(iter(modules))).__module__]
            original = home.eager_attention_forward
            stack.callback(setattr, home, "eager_attention_forward", original)
            home.eager_attention_forward = self._attending(original, modules)
        else:
            original = ALL_ATTENTION_FUNCTIONS[kind]
            stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, kind, original)
            ALL_ATTENTION_FUNCTIONS[kind] = self._attending(original, modules)

    def _attending(self, original: Callable[..., Any], modules: Mapping[Any, int]) -> Callable[..., Any]:
        queries, keys = ([self._steps[f"layers.{i}.{x}_rope"] for i in modules.values()] for x in "qk")

        def attend(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            if module in modules:
                queries[modules[module]].append(query)
                keys[modules[module]].append(_newest(key, query.shape[2]))
                if self._kept.bounded and query.shape[0] * query.shape[2] >= LONG:
                    self.turn()
            return original(module, query, key, *args, **kwargs)

        return attend

    @property
    def peak(self) -> Peak:
        return self._kept.peak

    def turn(self) -> None:
        """Hand on what was seen since the last turn: all of a step, or the layers of a long one so far.

        Raises Unavailable, then or later, where a module does not compute what we take it to.
        """
        self._recompute_tables()
        self._recompute_norms()
        self._recompute_embedding()
        step = {}
        for name, parts in self._steps.items():
            if parts and name in self._names:
                step[name] = parts[0] if len(parts) == 1 else torch.cat(parts, self._axis(name))
            parts.clear()
        self._kept.add(step)
        if len(self._apart) > UNASKED:
            self._ask()

    def done(self) -> Capture:
        """All steps. Raises Unavailable as `turn` does."""
        self.turn()
        self._ask()
        return Capture(self._kept.parts(), self._axis)

    def _axis(self, name: str) -> int:
        """Where a tensor has its tokens."""
        return -3 if _of_heads(name) and self._network.config.model_type not in HEADS_FIRST else -2

    def _recompute_tables(self) -> None:
        rotary = self._network.model.rotary_emb
        for kind, positions, *cast in self._tables:
            prefix, suffix = tables_of(kind)
            freqs = positions[..., None].float() * getattr(rotary, f"{prefix}inv_freq").float()
            angles, half = torch.cat((freqs, freqs), dim=-1), freqs.shape[-1]
            self._steps[f"angles{suffix}"].append(freqs)
            for name, exact, returned in zip(("cos", "sin"), (angles.cos(), angles.sin()), cast, strict=True):
                scaled = exact * getattr(rotary, f"{prefix}attention_scaling")
                self._agree(f"{name}{suffix}", scaled.to(returned.dtype), returned)
                for part, value in (("", exact), ("_scaled", scaled), ("_cast", returned)):
                    self._steps[f"{name}{part}{suffix}"].append(value[..., :half])
        self._tables.clear()

    def _recompute_norms(self) -> None:
        for name, (module, inputs) in self._norms.items():
            if f"{name}.exact" not in self._names:
                continue
            for given, returned in zip(inputs, self._steps[name], strict=True):
                wide = given.float()
                exact = module._norm(wide) * (1.0 + module.weight.float())
                self._agree(name, exact.type_as(given), returned)
                self._steps[f"{name}.wide"].append(wide)
                self._steps[f"{name}.exact"].append(exact)

    def _recompute_embedding(self) -> None:
        if "embedding_scaled" not in self._names:
            return
        module, seen = self._network.model.embed_tokens, self._steps["embedding"]
        for i, (ids, returned) in enumerate(zip(self._steps["embedding.given"], seen, strict=True)):
            rows = torch.nn.functional.embedding(ids, module.weight)
            self._agree("embedding_scaled", rows * module.embed_scale.to(rows.dtype), returned)
            self._steps["embedding_scaled"].append(returned)
            seen[i] = rows

    def _agree(self, name: str, computed: Any, returned: Any) -> None:
        """Compare on the device; what came of it is asked for later, as asking means waiting."""
        same_form = computed.shape == returned.shape and computed.dtype == returned.dtype
        self._apart.append((name, (computed != returned).any() if same_form else torch.ones_like(returned).any()))

    def _ask(self) -> None:
        """Raises Unavailable where a comparison failed."""
        compared, self._apart = self._apart, []
        if compared and (apart := torch.stack([flag for _, flag in compared]).cpu()).any():
            name = compared[int(apart.int().argmax())][0]
            raise Unavailable(f"{name!r}: the network's module returned other bits than its operations give")


def tables_of(kind: str | None) -> tuple[str, str]:
    """How a kind of layer prefixes its rotary frequencies in the network, and suffixes its tables in the graph."""
    return f"{kind}_" if kind else "", "_local" if kind == "sliding_attention" else ""


def _newest(key: Any, count: int) -> Any:
    """The rows that this step added. Copied out of a longer cache, which would be kept alive as a whole."""
    return key if key.shape[2] == count else key[:, :, -count:].clone()


def _of_heads(name: str) -> bool:
    return name.removesuffix(".exact").removesuffix(".wide").endswith(HEAD_NORMS)
