"""How far an adversary inside the tolerances can push a token: projected gradient over every op of a decoder.

The worker wants the runner-up of its last position instead of the token the rule gives. Every output of every node is
put at the edge of what its check accepts, on the side that the gradient of the margin asks for, from the tensors bent
so far; then the gradient is taken anew at the bent run. Every node passes by construction; every check is run to say
so. Published are the shifts of the margin under strength F and under the profiles (results/adversary.json).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import runs
from bench.provenance import provenance
from gpu import freivalds
from gpu.kernels import entries
from gpu.kernels.attention_radius import attend
from gpu.ops import attention
from gpu.ops.call import Call
from gpu.ops.normalisation import root_mean_square
from gpu.plan import Plan, registry_row
from gpu.rounding import FORMATS, U32, Interval, around, compare_interval, is_float
from proof.errors import Rejected
from proof.graph import Node
from proof.policy import Policy
from prover import smollm2

RESULTS = Path(__file__).parent / "results" / "adversary.json"
PACKAGES = ("numpy", "numba", "torch", "transformers", "ml-dtypes")
VOCABULARY = 49152

Array = npt.NDArray[Any]
Values = dict[str, torch.Tensor]


def rms_norm(node: Node, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + node.attributes["epsilon"]) * weight


def rotary(node: Node, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attended(
    node: Node, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    allowed = causal if mask is None else causal & mask.bool()
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=node.attributes.get("scale"), enable_gqa=True
    )


def gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate=node.attributes.get("approximate", "none"))


DERIVATIVES: dict[str, Callable[..., torch.Tensor]] = {
    "Gemm": lambda node, x, w, *bias: functional.linear(x, w, *bias),
    "RMSNormalization": rms_norm,
    "RotaryEmbedding": rotary,
    "Attention": attended,
    "Swish": lambda node, x: functional.silu(x),
    "Gelu": gelu,
    "Mul": lambda node, a, b: a * b,
    "Add": lambda node, a, b: a + b,
    "Cast": lambda node, x: x,
    "Reshape": lambda node, x, shape: x.reshape(shape.to(torch.int64).tolist()),
    "Transpose": lambda node, x: x.permute(node.attributes["perm"]),
}


@dataclass(frozen=True)
class Run:
    """A decoder's run: the plan, every tensor as the engine gave it, and the margin at stake."""

    plan: Plan
    trace: Mapping[str, Array]

    def margin(self, logits: Array) -> tuple[float, int, int]:
        """Of the last position: how far the token is ahead of the runner-up, and both."""
        row = logits[-1].astype(np.float64)
        second, first = np.argsort(row, kind="stable")[-2:]
        return float(row[first] - row[second]), int(first), int(second)


def gradients(run: Run, at: Mapping[str, Array], first: int, second: int) -> dict[str, Array]:
    """d(runner-up - token) / d(tensor) for every float tensor, at the values of `at`, in float32.

    The graph is interpreted once more; each value is what `at` holds, each derivative its op's.
    """
    values: Values = {}
    known = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in run.plan.known.items()}

    def take(name: str) -> torch.Tensor:
        return values[name] if name in values else known.get(name, torch.tensor(0.0))

    for node in run.plan.nodes:
        name = node.outputs[0]
        if name in run.plan.derived or not is_float(run.plan.specs[name].dtype):
            continue
        fixed = torch.from_numpy(at[name].astype(np.float32))
        sources = [source for source in node.inputs if source]
        if node.op == "Slice":
            begin = run.plan.specs[sources[0]].shape[0] - fixed.shape[0]
            value = take(sources[0])[begin:]
        elif node.op in DERIVATIVES and any(source in values for source in sources):
            value = DERIVATIVES[node.op](node, *map(take, sources))
        else:
            value = fixed.clone().requires_grad_()
        values[name] = value + (fixed - value).detach()
        values[name].retain_grad()
    logits = values[_logits(run.plan)]
    (logits[-1, second] - logits[-1, first]).backward()
    return {name: value.grad.numpy() for name, value in values.items() if value.grad is not None}


def _logits(plan: Plan) -> str:
    return next(node.inputs[0] for node in plan.nodes if node.op == "Decode")


def bent(run: Run, rules: Policy, iterations: int = 2, *, last_row_only: bool = False) -> dict[str, Array]:
    """The run with every tensor at the edge of its acceptance, on the adversary's side."""
    _, first, second = run.margin(run.trace[_logits(run.plan)])
    current = dict(run.trace)
    for _ in range(iterations):
        slope = gradients(run, current, first, second)
        moved: dict[str, Array] = dict(run.trace)
        for node in run.plan.nodes:
            name = node.outputs[0]
            if name in run.plan.derived:
                continue
            allowed = acceptance(run.plan, node, moved, rules)
            if allowed is None:
                continue
            push = slope.get(name, np.zeros(run.plan.specs[name].shape)).reshape(allowed.low.shape)
            if last_row_only:
                push = _last_position(run.plan.specs[name].shape, push)
            edge = np.where(push > 0, allowed.high, np.where(push < 0, allowed.low, allowed.nearest))
            moved[name] = edge.astype(allowed.low.dtype).reshape(run.plan.specs[name].shape)
        current = moved
    return current


def _last_position(shape: tuple[int, ...], push: Array) -> Array:
    """Only where the last token position is: the axis before the last, or the one before heads and width."""
    kept = np.zeros(shape)
    kept[(..., -1, slice(None))] = 1.0
    return push * kept.reshape(push.shape)


def acceptance(plan: Plan, node: Node, trace: runs.Trace, rules: Policy) -> Interval | None:
    """What the check of a node accepts for its output, given these inputs; None where it leaves no choice to bend."""
    op = registry_row(node)
    if op.interval is None:
        return None
    call = runs.call(plan, node, trace, rules)
    if rules.profile is None and node.op in FREE:
        z, slack = FREE[node.op](call)
        return around(z, slack, plan.specs[node.outputs[0]].dtype)
    # Where the strengths do not differ: one IEEE operation, or data that only moves.
    return op.interval(replace(call, policy=rules if rules.profile else runs.exhaustive("torch-sdpa")))


def free_product(call: Call) -> tuple[Array, Array]:
    x, w = (tensor.whole() for tensor in call.inputs[:2] if tensor is not None)
    bias = call.inputs[2].whole() if len(call.inputs) > 2 and call.inputs[2] is not None else np.zeros(len(w))
    z, squares, size, prefix = entries.statistics(x.astype(np.float64), w.T, bias.astype(np.float64).reshape(1, -1))
    form, k = freivalds.PROFILES[x.dtype], x.shape[1]
    coherence = np.divide(2 * prefix, size, out=np.zeros_like(size), where=size > 0)
    return z, form.accumulation(k, coherence) * np.maximum(np.sqrt(squares), prefix)


def free_norm(call: Call) -> tuple[Array, Array]:
    x, weight = (tensor.whole().astype(np.float64) for tensor in call.inputs[:2] if tensor is not None)
    lanes = x.reshape(-1, x.shape[-1])
    n, error = root_mean_square(U32, lanes, epsilon=call.site.node.attributes["epsilon"])
    u = FORMATS[call.claimed[0].dtype].u
    return n * weight, np.abs(weight) * (error + u * np.abs(n))


def free_rotary(call: Call) -> tuple[Array, Array]:
    x, cos, sin = (tensor.whole().astype(np.float64) for tensor in call.inputs if tensor is not None)
    first, second = np.split(x, 2, axis=-1)
    unit = FORMATS[call.claimed[0].dtype].u + U32
    z = np.concatenate([cos * first - sin * second, sin * first + cos * second], -1)
    size = [np.abs(cos * a) + np.abs(sin * b) for a, b in ((first, second), (second, first))]
    return z.reshape(-1, x.shape[-1]), unit * np.concatenate(size, -1).reshape(-1, x.shape[-1])


def free_swish(call: Call) -> tuple[Array, Array]:
    x = next(tensor.data.astype(np.float64) for tensor in call.inputs if tensor is not None)
    return x / (1 + np.exp(-x)), 16 * U32 * np.abs(x)


def free_attention(call: Call) -> tuple[Array, Array]:
    q, k, v = (tensor.whole()[0] for tensor in call.inputs[:3] if tensor is not None)
    heads, tokens, width = q.shape
    unseen = np.where(np.tril(np.ones((tokens, tokens), np.bool_)), 0.0, -np.inf)
    dtype = call.claimed[0].dtype
    bounds = attention.bounds(call, width, tokens, dtype)
    parts = [
        attend(q[h].astype(np.float64), k[group], v[group], unseen, bounds, dtype)
        for h, group in enumerate(np.repeat(np.arange(len(k)), heads // len(k)))
    ]
    z, slack = (np.stack(part).reshape(-1, width) for part in zip(*parts, strict=True))
    return z, slack


FREE = {
    "Gemm": free_product,
    "RMSNormalization": free_norm,
    "RotaryEmbedding": free_rotary,
    "Swish": free_swish,
    "Attention": free_attention,
}


def accepted(run: Run, trace: Mapping[str, Array], rules: Policy) -> list[str]:
    """Nodes whose check refuses the bent run: none, if the adversary stayed inside."""
    refused = []
    for node in runs.computed(run.plan):
        if node.op == "Decode":
            continue
        op, call = registry_row(node), runs.call(run.plan, node, trace, rules)
        interval = op.interval(call) if op.interval is not None and rules.profile else None
        try:
            if interval is None:
                op.check(call)
            else:
                compare_interval(call.claimed[0], interval)
        except Rejected as rejection:
            refused.append(f"{node}: {rejection.detail}")
    return refused


def shift(run: Run, trace: Mapping[str, Array]) -> float:
    """How much closer the runner-up has come."""
    name = _logits(run.plan)
    margin, first, second = run.margin(run.trace[name])
    row = trace[name][-1].astype(np.float64)
    return margin - float(row[first] - row[second])


def measured(recorder: runs.Recorder, kind: str, ids: Array) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both strengths on one prompt."""
    trace = recorder.generate(runs.asked(ids, 1, temperature=0.0))
    run = Run(runs.plan_of(recorder.statement, trace), trace)
    margin, _, _ = run.margin(trace[_logits(run.plan)])
    for strength, profile in (("F", None), ("P", f"torch-{kind}")):
        rules = runs.exhaustive(profile)
        pushed = bent(run, rules)
        found = {"margin": margin, "shift": shift(run, pushed), "refused": accepted(run, pushed, rules)}
        yield f"{strength} {kind}", found


def shown(found: Mapping[str, list[dict[str, Any]]]) -> Table:
    table = Table("strength", "attention", "margins", "largest shift", "mean shift", "tokens turned")
    for name, results in found.items():
        shifts = [entry["shift"] for entry in results]
        margins = ", ".join(f"{entry['margin']:.2f}" for entry in results)
        turned = sum(entry["shift"] > entry["margin"] for entry in results)
        cells = f"{max(shifts):.2f}", f"{np.mean(shifts):.2f}", f"{turned} of {len(shifts)}"
        table.add_row(*name.split(), margins, *cells)
    return table


def main(
    folder: Annotated[Path, typer.Option(help="Where the converted model lies.")] = Path("demo"),
    prompts: int = 5,
    tokens: int = 48,
    write: bool = True,
) -> None:
    console, started, rng = Console(), time.perf_counter(), np.random.default_rng(11)
    model = smollm2.folder(folder / "smollm2-bfloat16", "bfloat16")
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ("sdpa", "eager"):
        recorder = runs.recorder(model, kind)
        for number in range(prompts):
            with console.status(f"{kind}, prompt {number + 1} of {prompts}"):
                for name, entry in measured(recorder, kind, rng.integers(10, VOCABULARY, tokens)):
                    found.setdefault(name, []).append(entry)
    console.print(shown(found))
    if write:
        seconds = round(time.perf_counter() - started)
        told = provenance("python bench/adversary.py", PACKAGES) | {"seconds": seconds, "tokens": tokens, "runs": found}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    raise typer.Exit(int(any(entry["refused"] for results in found.values() for entry in results)))


if __name__ == "__main__":
    typer.run(main)
