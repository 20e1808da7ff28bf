"""THE FLOW of a worker, its steps numbered as in verifier/verify.py.

A trace maps ONNX value names to arrays: graph inputs and node outputs, as the engine produced them, and where it left
them: those on a device are hashed there, and only the rows that a challenge opens leave it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu import forest, hashing
from gpu.boundary import committed
from gpu.plan import Model, Plan
from gpu.reach import selection
from gpu.resident import Resident
from proof.bundle import Opening, Proof
from proof.errors import Malformed
from proof.graph import Spec, dtype_name, spec_of
from proof.messages import Challenge, Commitment, Task, TensorClaim
from proof.policy import Policy, policy

Array = npt.NDArray[Any]
Trace = Mapping[str, Array]
Recorded = Mapping[str, Array | Resident]  # a trace where the engine left it
Engine = Callable[[Mapping[str, Array]], Trace]  # from the inputs of a task
Levels = list[npt.NDArray[np.uint8]]
Progress = Callable[[str], None]  # called with the name of each tensor as it is done


@dataclass(frozen=True)
class Committed:
    """A commitment with what opening it needs: the trace and the tree above each tensor's rows."""

    plan: Plan
    trace: Recorded
    trees: Mapping[str, Levels]
    commitment: Commitment


def plan_of(model: Model, trace: Recorded) -> Plan:
    """The run that a trace records, from the shapes of its inputs. Raises Malformed for a missing input."""
    names = [i.name for i in model.graph.inputs]
    missing = [name for name in names if name not in trace]
    if missing:
        raise Malformed(f"the trace lacks the graph inputs {missing}")
    return model.plan({name: trace[name].shape for name in names})


def commit(
    model: Model,
    trace: Recorded,
    task: Task | None = None,
    progress: Progress = lambda _: None,
    *,
    rules: Policy | None = None,
) -> Committed:
    """Bind the tensors of a trace that the task's policy asks for, or `rules` where there is no task, or all of them.

    Honest or not is no matter here; only names, dtypes and shapes must fit.
    Raises Malformed naming the tensor that is missing or has another dtype or shape than the graph gives.
    """
    plan = plan_of(model, trace)
    rules = policy(task.policy) if task else rules
    names = committed(plan, rules) if rules else plan.tensors
    tensors = {name: _tensor(plan, trace, name) for name in names}
    trees = _planted(tensors)
    claims = []
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            trees[name] = hashing.tensor_levels(tensor)
        claims.append(TensorClaim(name, dtype_name(tensor.dtype), tensor.shape, hashing.root(trees[name])))
        progress(name)
    commitment = Commitment(
        model=model.id, task=task.id() if task else None, tensors=tuple(claims), worker=None, signature=None
    )
    return Committed(plan, trace, trees, commitment)


def _planted(tensors: Recorded) -> dict[str, Levels]:
    """The trees of all tensors that lie on a device, in one go."""
    residents = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Resident)}
    return dict(zip(residents, forest.plant(list(residents.values())), strict=True))


def _tensor(plan: Plan, trace: Recorded, name: str) -> Array | Resident:
    if name not in trace:
        raise Malformed(f"the trace lacks {name!r}: record every node output")
    given = _spec(trace[name])
    if given != plan.specs[name]:
        found, wanted = (f"{s.dtype}{list(s.shape)}" for s in (given, plan.specs[name]))
        raise Malformed(f"{name!r} is {found} in the trace; the graph gives {wanted}")
    return trace[name]


def answer(committed: Committed, commitment: Commitment, challenge: Challenge, task: Task | None = None) -> Proof:
    """Open what the challenge selects. `commitment` is the signed form of the committed one."""
    # 3 ---- selection: the challenge picks the rows, and the ops the rows that their checks need
    opened = selection(committed.plan, challenge).opened
    # 4 ---- openings: the rows, with what leads from them to the committed roots
    openings = {}
    for name, rows in opened.items():
        data = _rows(committed.trace[name], committed.plan.specs[name], rows)
        openings[name] = Opening(data, hashing.multiproof(committed.trees[name], rows))
    return Proof(task, commitment, challenge, openings)


def _spec(tensor: Array | Resident) -> Spec:
    return tensor.spec if isinstance(tensor, Resident) else spec_of(tensor)


def _rows(tensor: Array | Resident, spec: Spec, rows: npt.NDArray[np.int64]) -> Array:
    if isinstance(tensor, Resident):
        return tensor.take(rows)
    return np.ascontiguousarray(tensor).reshape(spec.rows, spec.width)[rows]
