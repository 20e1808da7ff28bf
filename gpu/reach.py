"""Which rows a challenge opens: the sampled rows of every tensor, and the rows their checks need.

Prover and verifier run this same function over plan and challenge; nothing the prover sends takes part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gpu.boundary import committed
from gpu.ops.call import RowIds, distinct, every_row
from gpu.plan import Plan, registry_row
from proof.errors import Malformed, Reason, Rejected, Unavailable
from proof.graph import Node
from proof.messages import Challenge
from proof.policy import policy
from proof.sampling import drawn

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Selection:
    """Rows of committed tensors that are checked, and that are opened for it, derived tensors left out; and rows of
    tensors that are not committed, which are recomputed for it."""

    checked: Mapping[str, RowIds]
    opened: Mapping[str, RowIds]
    replayed: Mapping[str, RowIds]


def selection(plan: Plan, challenge: Challenge, held: Mapping[str, int] | None = None) -> Selection:
    """Rows to check and to open. A graph output is opened whole: it is what the protocol pays for.

    `held` says how many rows of each tensor there are to choose from, where that is known: Rejected(SELECTION) as soon
    as more are needed, so that a proof cannot have more memory taken than it holds itself.
    """
    rules = policy(challenge.policy)
    names = [name for name in committed(plan, rules) if name not in plan.derived]
    whole = set(names) if rules.rows is None else set(plan.outputs)
    for name in names:
        _enough(held, name, plan.specs[name].rows if name in whole else 0)
    checked = {name: drawn(challenge.seed, rules.rows, plan.specs[name].rows) for name in names}
    checked |= {name: rows for name, rows in _sampled(plan, challenge).items() if name in checked}
    needed: dict[str, list[RowIds]] = {name: [] for name in plan.tensors if name not in plan.derived}
    for name in names:
        _enough(held, name, len(checked[name]))
        needed[name] += [checked[name]] + [every_row(plan.specs[name])] * (name in plan.outputs)
    for node in reversed(plan.nodes):
        for position, output in enumerate(node.outputs):
            rows = checked.get(output) if output in checked else _union(needed.get(output, []))
            if rows is None or not len(rows):
                continue
            with own_fault(node):
                reached = registry_row(node).reach(plan.sites[node.index], position, rows)
            for source, wanted in reached.items():
                name = node.inputs[source]
                if name not in plan.known:
                    if name in checked:
                        _enough(held, name, len(wanted))
                    needed[name].append(wanted)
    rows_of = {name: _union(parts) for name, parts in needed.items()}
    return Selection(
        checked,
        {name: rows for name, rows in rows_of.items() if name in checked},
        {name: rows for name, rows in rows_of.items() if name not in checked},
    )


def _sampled(plan: Plan, challenge: Challenge) -> dict[str, RowIds]:
    """The rows of nodes whose op draws its own."""
    rules, found = policy(challenge.policy), {}
    for node in plan.nodes:
        sample = registry_row(node).sample
        if sample is not None and rules.rows is not None and node.outputs[0] not in plan.derived:
            with own_fault(node):
                found[node.outputs[0]] = sample(plan.sites[node.index], rules, challenge.seed)
    return found


@contextmanager
def own_fault(node: Node) -> Iterator[None]:
    """Whatever breaks inside an op's functions is a fault of ours, and no verdict: Unavailable."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, Malformed, MemoryError, TypeError, ValueError) as error:
        raise Unavailable(f"{node}: its check broke: {type(error).__name__}: {error}") from error


def _enough(held: Mapping[str, int] | None, name: str, rows: int) -> None:
    if held is not None and held[name] < rows:
        raise Rejected(Reason.SELECTION, f"{name!r}: {held[name]} rows opened where {rows} or more are selected")


def _union(parts: list[RowIds]) -> RowIds:
    return parts[0] if len(parts) == 1 else distinct(np.concatenate([NONE, *parts]))
