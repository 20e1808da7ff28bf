"""A decoder of Transformers, unmodified, that generates and hands over every tensor of its graph.

The network runs through its own `generate` with its own cache; only the choice of a token is the task's rule
(gpu/decoding.py). What was recorded is put into the shapes of the graph once the run is over. With a device the
network's memory is its memory: a trace is then where torch left the rows, nothing copied. torch is waited for before
traces are handed out, so that kernels may read them from any stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from gpu.decoding import Settings, choose
from gpu.device import Device
from gpu.plan import Model, Plan
from gpu.resident import Resident
from proof.errors import Malformed
from proof.graph import Node
from prover.engines.capture import ATTENTION, Capture, Network, Watch, as_numpy, tables_of
from prover.engines.residents import DTYPES, Parts, Peak, Room, settled

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]
Trace = dict[str, Any]  # arrays; with a device, what was recorded as Residents

EMBEDDING = "model.embed_tokens.weight"
SAME_FREQUENCY = 1e-6  # relative: as far as two libraries' fp32 powers are apart


class Rule(LogitsProcessor):  # type: ignore[misc]
    """The task's rule in a form that greedy search follows: 0 at the token that it gives, -inf elsewhere."""

    def __init__(self, settings: Sequence[Settings], start: int, end: int, stepped: Callable[[], None]) -> None:
        """`stepped` is called once a step, when the network has done it."""
        self._settings, self._start, self._end, self._stepped = settings, start, end, stepped

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._stepped()
        position = input_ids.shape[1] - self._start
        chosen = torch.full_like(scores, -torch.inf)
        for row, settings in enumerate(self._settings):
            past = position >= settings.max_tokens
            chosen[row, self._end if past else choose(scores[row].cpu().numpy(), settings, position)] = 0.0
        return chosen


def loaded(
    folder: Path,
    statement: Model,
    threads: int,
    attention: str,
    device: Device | None = None,
    room: Room = "a quarter",
) -> "Recorder":
    """The network in a Transformers folder, as it stands, in the memory of `device` if there is one.

    Raises Malformed where it is none, or not the statement's.
    """
    if threads:
        torch.set_num_threads(threads)
    place = device.place if device else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise Malformed("this PyTorch has no CUDA: install one that has, or run on the CPU with ASSAY_DEVICE=cpu")
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation=attention, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise Malformed(f"Transformers does not load {folder}: {error}") from error
    return Recorder(network.eval().to(place), statement, device, room)


class Recorder:
    """Keep it between runs; one run at a time in a process."""

    def __init__(
        self, network: Network, statement: Model, device: Device | None = None, room: Room = "a quarter"
    ) -> None:
        """With a device, at most `room` bytes of rows stay in its memory, and one step or one layer of a long step.

        Raises Malformed where the network is not of the statement's sizes, dtype or frequencies, or not on the device.
        Weights are not compared: that is the verifier's business.
        """
        _fit(network, statement)
        if device and network.device.type != device.place:
            raise Malformed(f"the network is on {network.device.type!r}, the device is {device.name}")
        if network.device.type == "cuda":
            # sums in 16 bit are no rounding of float32 sums, which is what the verifier allows for
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._network, self.statement = network, statement
        self._device, self._room = device, room
        self._names = frozenset(name for node in statement.nodes for name in node.outputs)
        decode = next(node for node in statement.nodes if node.op == "Decode")
        self._eos = list(decode.attributes["eos"])
        self.peak = Peak(0, 0)  # of the last run

    def generate(self, inputs: Inputs) -> Trace:
        """Answer a prompt; the trace, `answer` included. Takes the task's inputs."""
        return self.generate_batch([inputs])[0]

    def generate_batch(self, batch: Sequence[Inputs]) -> list[Trace]:
        """Answer several prompts in one call, the shorter ones padded on the left. A trace for each."""
        settings = [Settings.of(inputs) for inputs in batch]
        prompts = [self._ids(inputs, "prompt") for inputs in batch]
        longest, end = max(map(len, prompts)), self._eos[0] if self._eos else 0
        ids = torch.full((len(batch), longest), end, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=max(asked.max_tokens for asked in settings),
            do_sample=False,
            eos_token_id=self._eos or None,
            pad_token_id=end,
        )
        with self._own_settings(config), self._recording() as watch:
            device = self._network.device
            written = self._network.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([Rule(settings, longest, end, watch.turn)]),
            )
            capture = watch.done()
        answers = written[:, longest:].cpu().numpy()
        traces = [
            self._trace(capture, row, longest - len(prompt), {**inputs, "answer": self._ended(answer, asked)})
            for row, (inputs, prompt, asked, answer) in enumerate(zip(batch, prompts, settings, answers, strict=True))
        ]
        settled(self._network)
        return traces

    def forward(self, inputs: Inputs) -> Trace:
        """One causal pass over `prompt` and `answer`, nothing sampled."""
        fed = np.concatenate([self._ids(inputs, "prompt"), self._ids(inputs, "answer")[:-1]])
        with torch.no_grad(), self._recording() as watch:
            self._network(
                input_ids=torch.from_numpy(fed)[None].to(self._network.device),
                use_cache=False,
                logits_to_keep=len(inputs["answer"]),
            )
            capture = watch.done()
        trace = self._trace(capture, 0, 0, inputs)
        settled(self._network)
        return trace

    def _ids(self, inputs: Inputs, name: str) -> Array:
        ids = inputs[name]
        words = len(self.statement.graph.weights[EMBEDDING])
        if ids.ndim != 1 or not len(ids) or not ((ids >= 0) & (ids < words)).all():
            raise Malformed(f"{name!r} must be a list of token ids from 0 to {words - 1}, at least one")
        return ids

    def _ended(self, answer: Array, asked: Settings) -> Array:
        answer = answer[: asked.max_tokens]
        ends = np.flatnonzero(np.isin(answer, self._eos))
        return answer[: ends[0] + 1] if len(ends) else answer

    @contextmanager
    def _recording(self) -> Iterator[Watch]:
        """Recording, on the frequencies that the statement gives bit for bit."""
        kept = [(buffer, buffer.clone()) for buffer, _ in _frequencies(self._network, self.statement)]
        try:
            for buffer, stated in _frequencies(self._network, self.statement):
                buffer.copy_(torch.tensor(stated))
            with Watch(self._network, self._names, self._device, self._room).seeing() as watch:
                yield watch
                self.peak = watch.peak
        finally:
            for buffer, own in kept:
                buffer.copy_(own)

    @contextmanager
    def _own_settings(self, config: GenerationConfig) -> Iterator[None]:
        """What a folder's generation_config.json says of sampling fills in whatever a call leaves open."""
        own = self._network.generation_config
        self._network.generation_config = config
        try:
            yield
        finally:
            self._network.generation_config = own

    def _trace(self, capture: Capture, row: int, start: int, inputs: Inputs) -> Trace:
        plan = self.statement.plan({i.name: inputs[i.name].shape for i in self.statement.graph.inputs})
        count, answered, device = plan.specs["ids"].size, plan.specs["answer"].size, self._device
        seen = capture.sequence(row, start, count, answered, joined=device is None)
        found: Trace = {name: inputs[name] for name in plan.inputs} | dict(plan.known)
        for node in plan.nodes:
            (name,) = node.outputs
            if name in plan.derived:
                continue
            if name in seen:
                found[name] = _fitted(seen[name] if device else as_numpy(seen[name].parts[0]), plan, name)
            else:
                found[name] = _moved(node, found, plan)
        return {name: _left(found[name], device, plan.specs[name].shape) for name in plan.tensors}


def _left(found: Array | Parts, device: Device | None, shape: tuple[int, ...]) -> Array | Resident:
    if device and isinstance(found, Parts):
        return found.resident(device)
    return np.ascontiguousarray(found).reshape(shape)


def _fitted(recorded: Any, plan: Plan, name: str) -> Any:
    """A recorded tensor with the batch of one that the graph may give it."""
    shape = plan.specs[name].shape
    if shape not in (recorded.shape, (1, *recorded.shape)):
        raise Malformed(f"{name!r} is {recorded.shape} in the network and {shape} in the graph")
    return recorded.reshape(shape)


def _moved(node: Node, found: Trace, plan: Plan) -> Any:
    """What a node that only moves values makes of those recorded before it."""
    if node.op not in MOVES:
        raise Malformed(f"{node}: the recorder sees nothing of it in this network")
    return MOVES[node.op](node, [found[name] for name in node.inputs], plan.specs[node.outputs[0]].shape)


def _slice(node: Node, given: list[Any], shape: tuple[int, ...]) -> Any:
    data, starts = given[:2]
    (start,) = starts.reshape(-1)
    return data[start : start + shape[0]]


MOVES: dict[str, Callable[[Node, list[Any], tuple[int, ...]], Any]] = {  # of arrays and of Parts alike
    "Reshape": lambda node, given, shape: given[0].reshape(shape),
    "Transpose": lambda node, given, shape: given[0].transpose(node.attributes["perm"]),
    "Concat": lambda node, given, shape: np.concatenate(given, axis=node.attributes["axis"]),
    "Slice": _slice,
    "Decode": lambda node, given, shape: given[1].reshape(shape),
}


def _fit(network: Network, statement: Model) -> None:
    if network.training:
        raise Malformed("the network is in training mode: call its eval()")
    kind = network.config._attn_implementation
    if kind not in ATTENTION:
        raise Malformed(f"attention {kind!r} cannot be recorded: load the network with {' or '.join(ATTENTION)}")
    weights, own = statement.graph.weights, network.state_dict()
    if EMBEDDING not in weights:
        raise Malformed(f"the graph has no {EMBEDDING!r}: it is not a decoder's")
    dtypes = {DTYPES.get(value.dtype) for value in network.parameters()}
    if dtypes != {weights[EMBEDDING].dtype}:
        raise Malformed(f"the network must be loaded in the graph's {weights[EMBEDDING].dtype} throughout")
    for name in weights.keys() & own.keys():
        if tuple(own[name].shape) != weights[name].shape:
            raise Malformed(
                f"{name!r} is {weights[name].shape} in the graph and {tuple(own[name].shape)} in the network"
            )
    layers = {name.split(".")[1] for node in statement.nodes for name in node.outputs if name.startswith("layers.")}
    if len(layers) != len(network.model.layers):
        raise Malformed(f"the graph has {len(layers)} layers, the network {len(network.model.layers)}")
    for buffer, frequencies in _frequencies(network, statement):
        turns = buffer.detach().cpu().double().numpy()
        if turns.shape != frequencies.shape or not np.allclose(turns, frequencies, rtol=SAME_FREQUENCY, atol=0):
            raise Malformed("the rotary frequencies of the network are not the graph's")


def _frequencies(network: Network, statement: Model) -> Iterator[tuple[Any, Array]]:
    """The network's rotary frequencies beside those that the statement gives for them."""
    rotary = network.model.rotary_emb
    for kind in (None, "full_attention", "sliding_attention"):
        prefix, suffix = tables_of(kind)
        if hasattr(rotary, f"{prefix}inv_freq"):
            stated = statement.constants.get(f"inv_freq{suffix}")
            if stated is None:
                raise Malformed(f"the graph has no 'inv_freq{suffix}'")
            yield getattr(rotary, f"{prefix}inv_freq"), stated.reshape(-1)
