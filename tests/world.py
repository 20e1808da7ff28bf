"""An honest worker on a small model; a test bends one thing.

The model is two causal transformer blocks of primitive ops in float32 (`small`), or the real MiniLM (`minilm`).
`World.run` gives an honest trace; `prove` goes through commit, challenge and open; `judge` verifies.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpu import hashing
from gpu.plan import Model
from proof.attestation import sign_commitment
from proof.bundle import Proof
from proof.graph import dtype_name
from proof.messages import Challenge, Reward, Task, TensorClaim, Verdict
from prover import prove, sentences
from prover.engines.onnxruntime import Recorder
from verifier.verify import verify

Array = npt.NDArray[Any]
Trace = dict[str, Array]

WORKER = bytes.fromhex("11" * 32)
SEED, CHECK_SEED = bytes(range(32)), bytes(range(32, 64))
REWARD = Reward(chain_id=31337, contract="0x" + "c0" * 20, token="0x" + "70" * 20, amount=10**18)


@dataclass(frozen=True)
class World:
    """One task on one model. Fields are replaced to lie."""

    source: bytes = field(repr=False)
    model: Model
    inputs: Mapping[str, Array]
    policy: str = "standard"
    nonce: bytes = bytes(32)
    key: bytes = field(default=WORKER, repr=False)

    @property
    def task(self) -> Task:
        return Task(
            model=self.model.id,
            inputs=tuple(
                claim(i.name, self.inputs[i.name]) for i in self.model.graph.inputs if i.name not in self.model.answers
            ),
            policy=self.policy,
            reward=REWARD,
            payer="0x" + "9a" * 20,
            deadline=2_000_000_000,
            nonce=self.nonce,
        )

    def run(self, source: bytes | None = None, inputs: Mapping[str, Array] | None = None) -> Trace:
        """A trace recorded by running `source`, the task's own model if left out."""
        fed = self.inputs if inputs is None else inputs
        plan = self.model.plan({name: array.shape for name, array in fed.items()})
        return Recorder(source or self.source, self.model, plan, threads=1).run(fed)

    def prove(self, trace: Trace, seed: bytes = SEED) -> Proof:
        """Commit, sign, be challenged with `seed`, open."""
        task = self.task
        committed = prove.commit(self.model, trace, task)
        signed = sign_commitment(committed.commitment, task.reward, self.key)
        challenge = Challenge(signed.digest(), task.policy, seed)
        return prove.answer(committed, signed, challenge, task)

    def judge(self, proof: Proof, check_seed: bytes = CHECK_SEED) -> Verdict:
        return verify(proof, self.model, check_seed, task=self.task)

    def with_inputs(self, inputs: Mapping[str, Array]) -> "World":
        return replace(self, inputs=inputs, nonce=bytes([self.nonce[0] + 1]) + self.nonce[1:])


def claim(name: str, array: Array) -> TensorClaim:
    root = hashing.root(hashing.tensor_levels(array))
    return TensorClaim(name, dtype_name(array.dtype), array.shape, root)


class Writer:
    """Writes ONNX graphs node by node."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, to: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [to], name=to, **attributes))
        return to

    def cast(self, value: str, to: str, kind: int) -> str:
        self.nodes.append(helper.make_node("Cast", [value], [to], name=to, to=kind))
        return to

    def weight(self, name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> str:
        values = (self.rng.standard_normal(shape) * scale + offset).astype(np.float32)
        return self.constant(name, values)

    def constant(self, name: str, value: Array) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], opset: int = 18) -> bytes:
        graph = helper.make_graph(self.nodes, "world", inputs, outputs, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        proto.ir_version = 10
        onnx.checker.check_model(proto, full_check=True)
        return bytes(proto.SerializeToString())


WIDTH, HEADS, WORDS, LENGTH = 32, 4, 50, 12


def block(write: Writer, x: str, at: str, weights: str) -> str:
    """A pre-norm GPT-2 block from primitive ops; `at` prefixes names, `weights` those of its weights."""

    def w(name: str, *shape: int) -> str:
        return write.weight(f"{weights}.{name}", *shape, scale=shape[0] ** -0.5)

    norm = [write.weight(f"{weights}.{name}", WIDTH, offset=at, scale=0.1) for name, at in (("norm", 1), ("shift", 0))]
    normed = write.op("LayerNormalization", x, *norm, to=f"{at}.normed", axis=-1)
    split = {}
    for part in "qkv":
        flat = write.op("MatMul", normed, w(part, WIDTH, WIDTH), to=f"{at}.{part}")
        parted = write.op("Reshape", flat, "parted", to=f"{at}.{part}.parted")
        perm = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        split[part] = write.op("Transpose", parted, to=f"{at}.{part}.heads", perm=perm)
    scores = write.op("MatMul", split["q"], split["k"], to=f"{at}.scores")
    scaled = write.op("Div", scores, "root", to=f"{at}.scaled")
    masked = write.op("Where", "mask", scaled, "never", to=f"{at}.masked")
    chances = write.op("Softmax", masked, to=f"{at}.softmax", axis=-1)
    mixed = write.op("MatMul", chances, split["v"], to=f"{at}.mixed")
    turned = write.op("Transpose", mixed, to=f"{at}.turned", perm=[0, 2, 1, 3])
    joined = write.op("Reshape", turned, "joined", to=f"{at}.joined")
    attended = write.op("MatMul", joined, w("o", WIDTH, WIDTH), to=f"{at}.attended")
    middle = write.op("Add", x, attended, to=f"{at}.middle")
    wide = write.op("MatMul", middle, w("up", WIDTH, 4 * WIDTH), to=f"{at}.wide")
    halved = write.op("Div", wide, "sqrt2", to=f"{at}.halved")
    erf = write.op("Erf", halved, to=f"{at}.erf")
    grown = write.op("Add", erf, "one", to=f"{at}.grown")
    gated = write.op("Mul", wide, grown, to=f"{at}.gated")
    active = write.op("Mul", gated, "half", to=f"{at}.active")
    narrow = write.op("MatMul", active, w("down", 4 * WIDTH, WIDTH), to=f"{at}.narrow")
    return write.op("Add", middle, narrow, to=f"{at}.out")


@cache
def gpt_bytes(seed: int = 0) -> bytes:
    """Two blocks over 50 words, causal, with the mask cut from a constant by the input's shape."""
    write = Writer(seed)
    scalars = {"root": (WIDTH / HEADS) ** 0.5, "sqrt2": 2**0.5, "one": 1, "half": 0.5, "never": -np.inf}
    for name, value in scalars.items():
        write.constant(name, np.float32(value))
    write.constant("parted", np.array([0, 0, HEADS, WIDTH // HEADS]))
    write.constant("joined", np.array([0, 0, WIDTH]))
    for name, value in {"zero": [0], "first": [1], "axes": [0, 1], "origin": [0, 0]}.items():
        write.constant(name, np.array(value))
    write.constant("tril", np.tril(np.ones((64, 64), np.bool_)))
    shape = write.op("Shape", "ids", to="shape")
    length = write.op("Gather", shape, "first", to="length", axis=0)
    square = write.op("Concat", length, length, to="square", axis=0)
    write.op("Slice", "tril", "origin", square, "axes", to="mask")
    write.weight("words", WORDS, WIDTH)
    write.weight("places", 64, WIDTH)
    embedded = write.op("Gather", "words", "ids", to="embedded")
    placed = write.op("Slice", "places", "zero", length, "zero", to="placed")
    x = write.op("Add", embedded, placed, to="start")
    for layer in range(2):
        x = block(write, x, f"layer{layer}", f"w{layer}")
    write.weight("head", WIDTH, WORDS, scale=WIDTH**-0.5)
    write.op("MatMul", x, "head", to="logits")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    return write.model([ids], [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", WORDS])])


def of(source: bytes, inputs: Mapping[str, Array]) -> World:
    return World(source, Model.open(source), inputs)


@cache
def small(seed: int = 0) -> World:
    return of(gpt_bytes(seed), {"ids": np.random.default_rng(seed).integers(0, WORDS, (2, LENGTH))})


SENTENCES = (
    "The bridge was closed after the flood.",
    "Heavy rain washed the road away last night.",
    "She plays the violin in a small orchestra.",
    "Interest rates were raised by a quarter point.",
)


@cache
def minilm() -> World:
    """all-MiniLM-L6-v2 with int8 weights dequantised in the graph, on four English sentences."""
    path = sentences.model_path()
    return World(path.read_bytes(), Model.open(path), sentences.tokenised(SENTENCES))
