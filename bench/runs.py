"""Recorded generations of SmolLM2 for the measurements here, and the checks of a recorded run, node by node."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoModelForCausalLM

from gpu.ops.call import Call, RowIds, Tensor, every_row
from gpu.plan import Model, Plan
from proof.graph import Node
from proof.policy import Policy
from proof.sampling import Draw
from prover.engines.torch import Recorder

Array = npt.NDArray[Any]
Trace = Mapping[str, Array]

NEVER_FOLDED = 2**40  # random vectors a product would have to be worth: every entry is recomputed


def exhaustive(profile: str | None) -> Policy:
    """Every row, and every entry of a product again."""
    return Policy("exhaustive", None, challenges=NEVER_FOLDED, profile=profile)


def recorder(folder: Path, attention: str) -> Recorder:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    return Recorder(network, Model.open(folder / "model.onnx"))


def asked(prompt: Array, tokens: int, *, temperature: float = 0.7, seed: int = 0) -> dict[str, Array]:
    """A task's inputs; no top-k or top-p."""
    return {
        "prompt": np.asarray(prompt, np.int64),
        "temperature": np.array(temperature, np.float32),
        "top_k": np.array(0, np.int64),
        "top_p": np.array(1.0, np.float32),
        "seed": np.random.default_rng(seed).integers(0, 256, 32).astype(np.uint8),
        "max_tokens": np.array(tokens, np.int64),
    }


def plan_of(model: Model, trace: Trace) -> Plan:
    return model.plan({i.name: trace[i.name].shape for i in model.graph.inputs})


def tensor(plan: Plan, name: str, trace: Trace) -> Tensor:
    spec = plan.specs[name]
    data = plan.known[name] if name in plan.known else trace[name]
    return Tensor(spec, np.ascontiguousarray(data).reshape(spec.rows, spec.width))


def call(plan: Plan, node: Node, trace: Trace, rules: Policy, rows: RowIds | None = None) -> Call:
    """The check of a node with everything opened; of all its rows, or of some."""
    output = tensor(plan, node.outputs[0], trace)
    rows = every_row(output.spec) if rows is None else rows
    return Call(
        site=plan.sites[node.index],
        inputs=tuple(tensor(plan, name, trace) if name else None for name in node.inputs),
        rows=(rows,),
        claimed=(output.data[rows],),
        policy=rules,
        draw=Draw(bytes(32), ""),
        outputs=(output,),
    )


def computed(plan: Plan) -> Iterator[Node]:
    """The nodes whose outputs a worker commits to."""
    return (node for node in plan.nodes if node.outputs[0] not in plan.derived)
