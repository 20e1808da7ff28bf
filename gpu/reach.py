"""Which rows a challenge opens: the sampled rows of every tensor, and the rows their checks need.

Prover and verifier run this same function over plan and challenge; nothing the prover sends takes part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gpu.ops.call import RowIds, distinct, every_row
from gpu.plan import Plan, registry_row
from proof.errors import Malformed, Reason, Rejected, Unavailable
from proof.graph import Node
from proof.messages import Challenge
from proof.policy import policy
from proof.sampling import select

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Selection:
    """Per committed tensor, derived ones left out: rows that are checked, and rows that are opened for it."""

    checked: Mapping[str, RowIds]
    opened: Mapping[str, RowIds]


def selection(plan: Plan, challenge: Challenge, held: Mapping[str, int] | None = None) -> Selection:
    """Rows to check and to open. A graph output is opened whole: it is what the protocol pays for.

    `held` says how many rows of each tensor there are to choose from, where that is known: Rejected(SELECTION) as soon
    as more are needed, so that a proof cannot have more memory taken than it holds itself.
    """
    rows = policy(challenge.policy).rows
    names = [name for name in plan.tensors if name not in plan.derived]
    whole = set(names) if rows is None else set(plan.outputs)
    for name in names:
        _enough(held, name, plan.specs[name].rows if name in whole else 0)
    checked = {name: select(challenge.seed, rows, plan.specs[name].rows) for name in names}
    needed: dict[str, list[RowIds]] = {name: [checked[name]] for name in names}
    for name in names:
        _enough(held, name, len(checked[name]))
        if name in plan.outputs:
            needed[name].append(every_row(plan.specs[name]))
    for node in plan.nodes:
        site, op = plan.sites[node.index], registry_row(node)
        for position, output in enumerate(node.outputs):
            if output not in checked:
                continue
            with own_fault(node):
                reached = op.reach(site, position, checked[output])
            for source, wanted in reached.items():
                if node.inputs[source] not in plan.known:
                    _enough(held, node.inputs[source], len(wanted))
                    needed[node.inputs[source]].append(wanted)
    return Selection(checked, {name: _union(parts) for name, parts in needed.items()})


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
    return parts[0] if len(parts) == 1 else distinct(np.concatenate(parts))
