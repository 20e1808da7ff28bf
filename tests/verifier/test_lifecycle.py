"""The transition table: what can follow what, and that every task can end."""

from verifier.lifecycle import DUE, TRANSITIONS, Stage

FINAL = {Stage.ATTESTED, Stage.EXPIRED, Stage.STALLED}


def reachable(stage):
    found, todo = set(), [stage]
    while todo:
        at = todo.pop()
        steps = {transition.target for transition in TRANSITIONS.values() if at in transition.sources}
        todo += steps - found
        found |= steps
    return found


def test_every_stage_is_reached_from_the_first():
    assert reachable(Stage.POSTED) == set(Stage) - {Stage.POSTED}


def test_exactly_the_final_stages_lead_nowhere():
    assert {stage for stage in Stage if not reachable(stage)} == FINAL


def test_nothing_comes_back():
    assert not [stage for stage in Stage if stage in reachable(stage)]


def test_no_stage_leads_from_rejected_to_accepted():
    assert Stage.ACCEPTED not in reachable(Stage.REJECTED)


def test_what_is_due_can_still_move():
    assert not FINAL & set(DUE)
