"""Which rows a challenge opens: the sampled rows of every tensor, and the rows their checks need.

Prover and verifier run this same function over plan and challenge; nothing the prover sends takes part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gpu.ops.call import RowIds, distinct, every_row
from gpu.plan import Plan, registry_row
from proof.messages import Challenge
from proof.policy import policy
from proof.sampling import select

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Selection:
    """Per committed tensor, derived ones left out: rows that are checked, and rows that are opened for it."""

    checked: Mapping[str, RowIds]
    opened: Mapping[str, RowIds]


def selection(plan: Plan, challenge: Challenge) -> Selection:
    """Rows to check and to open. A graph output is opened whole: it is what the protocol pays for."""
    rows = policy(challenge.policy).rows
    names = [name for name in plan.tensors if name not in plan.derived]
    checked = {name: select(challenge.seed, rows, plan.specs[name].rows) for name in names}
    needed: dict[str, list[RowIds]] = {name: [checked[name]] for name in names}
    for name in plan.outputs:
        if name in needed:
            needed[name].append(every_row(plan.specs[name]))
    for node in plan.nodes:
        site, op = plan.sites[node.index], registry_row(node)
        for position, output in enumerate(node.outputs):
            if output not in checked:
                continue
            for source, wanted in op.reach(site, position, checked[output]).items():
                if node.inputs[source] not in plan.known:
                    needed[node.inputs[source]].append(wanted)
    return Selection(checked, {name: _union(parts) for name, parts in needed.items()})


def _union(parts: list[RowIds]) -> RowIds:
    return parts[0] if len(parts) == 1 else distinct(np.concatenate(parts))
