"""What `verify` checks, one function a step. Each returns nothing that could be forgotten: it raises Rejected."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import numpy as np

from gpu import hashing
from gpu.boundary import committed
from gpu.clearing.stand import Stand
from gpu.keys import Key
from gpu.ops.call import Call, Measure, Op, RowIds, Tensor
from gpu.plan import Model, Plan, registry_row
from gpu.reach import Selection, own_fault
from gpu.rounding import compare_closing, compare_interval
from proof.attestation import verify_commitment_signature
from proof.bundle import Proof
from proof.encoding import MAX_TEXT_BYTES
from proof.errors import Malformed, Reason, Rejected, Unavailable
from proof.graph import Node, dtype_name
from proof.messages import Challenge, Commitment, Task
from proof.policy import Policy
from proof.sampling import Draw

Recorded = tuple[Commitment, Challenge]
_NO_ROWS = np.zeros(0, np.int64)


class How(StrEnum):
    """By what a node was seen to be right, or that it was not."""

    CHECKED = "checked"  # by the check of its registry row
    CLEARED = "cleared"  # by a device
    KEYED = "keyed"  # by a secret key, without weights
    DERIVED = "derived"  # it follows from model and shapes: there is nothing to claim
    REPLAYED = "replayed"  # nobody committed to it: computed again for a later check
    REFUSED = "refused"


class Watch(Protocol):
    """Sees a verification go by; nothing that it does comes into the verdict."""

    def passed(self, step: str) -> None:
        """This was done since the last call, for all nodes at once."""

    def saw(self, node: Node, how: How, measure: Measure | None, rows: RowIds, of: int) -> None:
        """A node was done: what its check measured (None: nothing), in which of how many rows of its first output."""


@dataclass
class Coverage:
    """What has been covered so far, by op family; read into the verdict whichever way it goes."""

    nodes: int = 0
    entries: Counter[str] = field(default_factory=Counter)
    determined: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    ambiguous: int = 0

    def add(self, family: str, measure: Measure) -> None:
        self.entries[family] += measure.entries
        self.determined[family] += measure.determined
        self.largest[family] = max(self.largest.get(family, 0.0), measure.ratio)
        self.ambiguous += measure.ambiguous


def binding(proof: Proof, model: Model, task: Task | None, recorded: Recorded | None) -> None:
    """Task, commitment, signature, challenge and model belong together, and to what is on record."""
    commitment, challenge = proof.commitment, proof.challenge
    if recorded is not None and (commitment, challenge) != recorded:
        raise Rejected(Reason.BINDING, "the proof is for another commitment or challenge than the one on record")
    if proof.task != task:
        raise Rejected(Reason.BINDING, "the proof is for another task")
    _same("model", commitment.model, model.id)
    _same("challenged commitment", challenge.commitment, commitment.digest())
    _same("task", commitment.task, task.id() if task else None)
    if task is None:
        return
    _same("task's model", task.model, model.id)
    _same("policy", challenge.policy, task.policy)
    verify_commitment_signature(commitment, task.reward)


def shortened(detail: str) -> str:
    """A detail that fits a verdict."""
    return detail.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


def _same(what: str, found: bytes | str | None, wanted: bytes | str | None) -> None:
    if found != wanted:
        raise Rejected(Reason.BINDING, f"{what} {_show(found)} where {_show(wanted)} belongs")


def _show(value: bytes | str | None) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def shapes(commitment: Commitment, model: Model, rules: Policy) -> Plan:
    """The plan that the model gives for the committed input shapes; every claim of the policy must equal it."""
    claims = {claim.name: claim for claim in commitment.tensors}
    missing = [i.name for i in model.graph.inputs if i.name not in claims]
    if missing:
        raise Rejected(Reason.SHAPE, f"no input {missing[0]!r} is committed")
    try:
        plan = model.plan({i.name: claims[i.name].shape for i in model.graph.inputs})
        names = committed(plan, rules)
    except Malformed as error:
        raise Rejected(Reason.SHAPE, str(error)) from error
    found = [(claim.name, claim.dtype, claim.shape) for claim in commitment.tensors]
    wanted = [(name, dtype_name(plan.specs[name].dtype), plan.specs[name].shape) for name in names]
    if found != wanted:
        first = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), None)
        detail = f"{first[0]} where the graph gives {first[1]}" if first else f"{len(found)} tensors, not {len(wanted)}"
        raise Rejected(Reason.SHAPE, f"committed {detail}")
    return plan


def held(proof: Proof, plan: Plan) -> dict[str, int]:
    """How many rows of each tensor the proof holds: of every one that can be selected, in its dtype and width."""
    names = {claim.name for claim in proof.commitment.tensors} - plan.derived
    if proof.openings.keys() != names:
        odd = sorted(proof.openings.keys() ^ names)
        raise Rejected(Reason.SELECTION, f"opened other tensors than the challenge selects: {odd[:3]}")
    for name, opening in proof.openings.items():
        spec, found = plan.specs[name], opening.rows
        if found.dtype != spec.dtype or found.shape[1:] != (spec.width,):
            raise Rejected(
                Reason.SELECTION,
                f"{name!r}: opened {found.dtype}{found.shape} where {spec.dtype} rows of {spec.width} are selected",
            )
    return {name: len(opening.rows) for name, opening in proof.openings.items()}


def selected(proof: Proof, chosen: Selection) -> None:
    """As many rows are opened as were selected."""
    for name, rows in chosen.opened.items():
        found = len(proof.openings[name].rows)
        if found != len(rows):
            raise Rejected(Reason.SELECTION, f"{name!r}: {found} rows opened where {len(rows)} are selected")


def openings(proof: Proof, plan: Plan, chosen: Selection, stand: Stand | None = None) -> None:
    """Every opened row lies under the committed root of its tensor."""
    roots = {claim.name: claim.root for claim in proof.commitment.tensors}
    opened = [proof.openings[name].rows for name in chosen.opened]
    digests = map(hashing.row_digests, opened) if stand is None else stand.row_digests(opened)
    for (name, rows), found in zip(chosen.opened.items(), digests, strict=True):
        if not len(rows) and plan.specs[name].rows:
            raise Rejected(Reason.SELECTION, f"{name!r}: nothing of it is opened")
        siblings = proof.openings[name].siblings
        if hashing.multiproof_root(plan.specs[name].rows, rows, found, siblings) != roots[name]:
            raise Rejected(Reason.OPENING, f"{name!r}: the opened rows do not lead to its committed root")


def ends(proof: Proof, plan: Plan, task: Task | None) -> None:
    """Inputs are the task's, and values that follow from shapes are the ones we compute."""
    claims = {claim.name: claim for claim in proof.commitment.tensors}
    for wanted in task.inputs if task else ():
        if claims.get(wanted.name) != wanted:
            raise Rejected(Reason.INPUT, f"input {wanted.name!r} is not the task's")
    given = [name for name in plan.inputs if name not in plan.answers]
    if task and [wanted.name for wanted in task.inputs] != given:
        raise Rejected(Reason.INPUT, f"the task gives the inputs {[i.name for i in task.inputs]}, not {given}")
    for node in plan.nodes:
        for name in node.outputs:
            if (
                name in claims.keys() & plan.derived
                and hashing.root(hashing.tensor_levels(plan.known[name])) != claims[name].root
            ):
                raise Rejected(Reason.REEXECUTION, f"{name!r} is not what the shapes give", node.name)


@dataclass(frozen=True)
class Means:
    """What nodes are checked with: rules, the check seed, and a secret key or a device where there is one."""

    rules: Policy
    seed: bytes
    key: Key | None = None
    stand: Stand | None = None
    watch: Watch | None = None

    def report(self, node: Node, how: How, measure: Measure | None, plan: Plan, chosen: Selection) -> None:
        """Tell the watcher. Under a key no ratio is told: one honest residual is a linear equation in the secret."""
        if self.watch is not None:
            name = node.outputs[0]
            rows = chosen.checked.get(name, chosen.replayed.get(name, _NO_ROWS))
            told = replace(measure, ratio=np.nan) if measure and self.key else measure
            self.watch.saw(node, how, told, rows, plan.specs[name].rows if name else 0)


def nodes(proof: Proof, plan: Plan, chosen: Selection, means: Means, coverage: Coverage) -> None:
    """Every node, by the check of its registry row, from the committed bits it consumed to those it produced."""
    tensors = _tensors(proof, plan, chosen)
    if means.stand is not None:
        _offer(plan, chosen, tensors, means, means.stand)
        if means.watch is not None:
            means.watch.passed("offers")
    for node in plan.nodes:
        how, measure = How.DERIVED, None
        if not all(name in plan.derived for name in node.outputs if name):
            try:
                how, measure = _one(node, plan, chosen, tensors, means)
            except Rejected as rejection:
                means.report(node, How.REFUSED, None, plan, chosen)
                raise Rejected(rejection.reason, f"{node}: {rejection.detail}", node.name) from rejection
        if measure is not None:
            coverage.add(str(registry_row(node).family), measure)
        coverage.nodes += 1
        means.report(node, how, measure, plan, chosen)


def _one(
    node: Node, plan: Plan, chosen: Selection, tensors: dict[str, Tensor], means: Means
) -> tuple[How, Measure | None]:
    if chosen.replayed.keys() & set(node.outputs):
        _replay(node, plan, chosen, tensors, means.rules)
        return How.REPLAYED, None
    cleared = means.stand and means.stand.cleared(node.index)
    if cleared:
        return How.CLEARED, cleared
    how = How.KEYED if means.key and node.index in means.key.roles else How.CHECKED
    return how, _node(node, plan, chosen, tensors, means)


def _offer(plan: Plan, chosen: Selection, tensors: dict[str, Tensor], means: Means, stand: Stand) -> None:
    """Let the device work on all nodes at once; its kernels are of strength F and know no key.

    A node whose offer breaks may never be reached: whether that is a fault, its own turn says.
    """
    if means.key or means.rules.profile is not None:
        return
    for node in plan.nodes:
        if not all(name in plan.derived for name in node.outputs if name):
            with suppress(Rejected, Unavailable), own_fault(node):
                stand.offer(registry_row(node), _call(node, plan, chosen, tensors, means))


def _tensors(proof: Proof, plan: Plan, chosen: Selection) -> dict[str, Tensor]:
    tensors = {name: Tensor(plan.specs[name], proof.openings[name].rows, rows) for name, rows in chosen.opened.items()}
    for name, value in plan.known.items():
        spec = plan.specs[name]
        tensors[name] = Tensor(spec, value.reshape(spec.rows, spec.width))
    return tensors


def _call(node: Node, plan: Plan, chosen: Selection, tensors: dict[str, Tensor], means: Means) -> Call:
    rows = tuple(chosen.checked.get(name, _NO_ROWS) for name in node.outputs)
    claimed = tuple(
        tensors[name].take(chosen.checked[name]) if name in chosen.checked else np.zeros((0, 0), np.float32)
        for name in node.outputs
    )
    return Call(
        site=plan.sites[node.index],
        inputs=tuple(tensors[name] if name else None for name in node.inputs),
        rows=rows,
        claimed=claimed,
        policy=means.rules,
        draw=Draw(means.seed, f"node/{node.index}"),
        outputs=tuple(tensors[name] if name else None for name in node.outputs),
    )


def _node(node: Node, plan: Plan, chosen: Selection, tensors: dict[str, Tensor], means: Means) -> Measure:
    op, call = registry_row(node), _call(node, plan, chosen, tensors, means)
    with own_fault(node):
        closing = any(name in chosen.replayed for name in node.inputs)
        if means.key and node.index in means.key.roles:
            measure = means.key.check(call)
        else:
            measure = _close(op, call) if closing else _judge(op, call)
    expected = sum(values.size for values in call.claimed)
    if measure.entries != expected:
        raise RuntimeError(f"{node}: the check covered {measure.entries} of {expected} entries")
    return measure


def _judge(op: Op, call: Call) -> Measure:
    """By the interval of the policy's rounding profile where the op has one, else by what any honest kernel gives."""
    interval = op.interval(call) if op.interval is not None and call.policy.profile is not None else None
    if interval is None:
        return op.check(call)
    return Measure(call.claimed[0].size, determined=compare_interval(call.claimed[0], interval))


def _close(op: Op, call: Call) -> Measure:
    """The end of a segment that was recomputed, against what the worker committed to."""
    interval = op.interval(replace(call, claimed=())) if op.interval is not None else None
    if interval is None:
        raise Unavailable("it ends a segment and cannot be recomputed")
    return Measure(call.claimed[0].size, compare_closing(call.claimed[0], interval.nearest))


def _replay(node: Node, plan: Plan, chosen: Selection, tensors: dict[str, Tensor], rules: Policy) -> None:
    """Recompute the rows that a later check needs of a tensor nobody committed to."""
    (name,) = node.outputs
    spec, rows, op = plan.specs[name], chosen.replayed[name], registry_row(node)
    call = Call(
        site=plan.sites[node.index],
        inputs=tuple(tensors[source] if source else None for source in node.inputs),
        rows=(rows,),
        claimed=(),
        policy=rules,
        draw=Draw(bytes(32), ""),
    )
    with own_fault(node):
        interval = op.interval(call) if op.interval is not None else None
        if interval is None:
            raise Unavailable(f"{node} cannot be recomputed")
        tensors[name] = Tensor(spec, interval.nearest, rows)
