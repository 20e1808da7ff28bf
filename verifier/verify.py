"""THE FLOW: statement, proof, model and seed give a verdict. No clock, network, store or environment.

Steps are numbered as in prover/prove.py.
"""

from gpu.clearing.stand import Shelf, Stand
from gpu.keys import Key
from gpu.plan import Model
from gpu.reach import selection
from proof.bundle import Proof
from proof.errors import Malformed, Rejected
from proof.messages import Task, Verdict
from proof.policy import policy
from verifier import checks


def verify(  # noqa: PLR0913  # everything that a verification depends on
    proof: Proof,
    model: Model,
    seed: bytes,
    *,
    task: Task | None,
    recorded: checks.Recorded | None = None,
    key: Key | None = None,
    shelf: Shelf | None = None,
    watch: checks.Watch | None = None,
) -> Verdict:
    """Decide whether `proof` shows a run of `model`. Reads and writes nothing else.

    `task` and `recorded` are the verifier's own word on what was asked and committed to; where there is no record, as
    in a file checked offline, the proof is held to what it says of itself. `seed` (32 bytes) must have been drawn after
    the proof was fixed. With a `key`, whose model is `model`, products are checked by it and without weights. With a
    `shelf`, its device clears what it can; the verdict is the same. `watch` is shown every node as it is done.

    Returns a verdict either way. Raises Malformed for a policy that is not known, or that a key is no help with; lets
    Unavailable through: a fault of ours is no verdict.
    """
    # 1 ---- policy: the challenge names a policy that we know
    commitment, challenge = recorded or (proof.commitment, proof.challenge)
    rules = policy(challenge.policy)
    if key and rules.boundary:
        raise Malformed(f"policy {rules.name!r} recomputes products, which takes the weights: verify with the model")
    coverage = checks.Coverage()
    rejection: Rejected | None = None
    try:
        # 2 ---- binding: task, commitment, signature and challenge belong together
        checks.binding(proof, model, task, recorded)
        # 3 ---- selection: the graph gives the tensors; the challenge, and nothing the prover chose, the rows
        plan = checks.shapes(proof.commitment, model, rules)
        chosen = selection(plan, proof.challenge, checks.held(proof, plan))
        checks.selected(proof, chosen)
        # 4 ---- openings: every opened row lies under the committed root
        stand = Stand(shelf, len(model.graph.nodes)) if shelf else None
        checks.openings(proof, plan, chosen, stand)
        # 5 ---- ends: inputs are the task's; what follows from shapes alone is what we compute
        checks.ends(proof, plan, task)
        if watch is not None:
            watch.passed("openings")
        # 6 ---- nodes: every node of the graph, by the check of its registry row
        checks.nodes(proof, plan, chosen, checks.Means(rules, seed, key, stand, watch), coverage)
    except Rejected as failure:
        rejection = failure
    return Verdict(
        verdict="rejected" if rejection else "accepted",
        reason=rejection.reason if rejection else None,
        detail=checks.shortened(rejection.detail) if rejection else "",
        node=rejection.node if rejection else None,
        nodes_total=len(model.nodes),
        nodes_checked=coverage.nodes,
        rows=rules.rows,
        policy=rules.name,
        misses=rules.report(),
        heads=rules.heads,
        entries=dict(coverage.entries),
        determined={family: count for family, count in coverage.determined.items() if count},
        largest={} if key else coverage.largest,
        ambiguous=coverage.ambiguous,
        keyed=key.id if key else None,
        task=task.id() if task else None,
        commitment=commitment.digest(),
        check_seed=seed,
    )
