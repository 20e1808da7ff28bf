"""What a policy has committed: every tensor, or the ends of segments that the verifier recomputes.

The ends are graph inputs and outputs, what attention takes and gives, the inputs of what cannot be recomputed, and
the residual stream: sums of two computed tensors. What lies between is replayed from them with the profile's roundings,
and meets the next end within a calibrated distance (rounding.compare_closing), so that small deviations pass that a
full commitment shows (numerics-local section 5). Queries are among the ends: one bit of a query moves a whole row of
attention, which is checked closely only between committed tensors.
"""

from gpu.ops.call import Family
from gpu.plan import Plan, registry_row
from proof.errors import Malformed
from proof.graph import Node
from proof.policy import Policy


def committed(plan: Plan, rules: Policy) -> tuple[str, ...]:
    """The tensors that a commitment covers, in the order of the plan.

    Raises Malformed when the policy leaves out one that cannot be recomputed.
    """
    if not rules.boundary:
        return plan.tensors
    ends = {*plan.inputs, *plan.outputs}
    read = {name for node in plan.nodes for name in node.inputs}
    for node in plan.nodes:
        ends.update(_ends(plan, node), (name for name in node.outputs if name not in read))
    for node in plan.nodes:
        if not ends.issuperset(filter(None, node.outputs)) and not _replayable(node):
            raise Malformed(f"{node} cannot be recomputed, so policy {rules.name!r} does not fit the model")
    return tuple(name for name in plan.tensors if name in ends - plan.derived)


def _replayable(node: Node) -> bool:
    return registry_row(node).interval is not None and len(node.outputs) == 1


def _ends(plan: Plan, node: Node) -> tuple[str, ...]:
    op = registry_row(node)
    if op.family is Family.ATTENTION and node.op == "Attention":
        return (*node.inputs[:3], *filter(None, node.outputs))
    if node.op == "Add" and not any(name in plan.known for name in node.inputs):
        return node.outputs
    return node.inputs if not _replayable(node) else ()
