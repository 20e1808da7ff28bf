"""The transition table: what can follow what, and that every task can end."""

from verifier.lifecycle import DUE, FINAL, TRANSITIONS, Event, Stage

RETRIES = {event for event in Event if event.startswith("retry_")}


def reachable(stage, events=frozenset(Event)):
    found, todo = set(), [stage]
    while todo:
        at = todo.pop()
        steps = {TRANSITIONS[event].target for event in events if at in TRANSITIONS[event].sources}
        todo += steps - found
        found |= steps
    return found


def test_every_stage_is_reached_from_the_first():
    assert reachable(Stage.POSTED) == set(Stage) - {Stage.POSTED}


def test_exactly_the_final_stages_lead_nowhere_unless_somebody_asks():
    assert {stage for stage in Stage if not reachable(stage, set(Event) - RETRIES)} == set(FINAL)
    assert reachable(Stage.ATTESTED) == reachable(Stage.EXPIRED) == set()


def test_nothing_comes_back_unless_somebody_asks():
    assert not [stage for stage in Stage if stage in reachable(stage, set(Event) - RETRIES)]


def test_a_retry_leads_to_where_a_task_can_stall():
    assert {TRANSITIONS[event].target for event in RETRIES} == set(TRANSITIONS[Event.STALL].sources)
    assert all(TRANSITIONS[event].sources == (Stage.STALLED,) for event in RETRIES)


def test_no_stage_leads_from_rejected_to_accepted_without_somebody_asking():
    assert Stage.ACCEPTED not in reachable(Stage.REJECTED, set(Event) - RETRIES)


def test_what_is_due_can_still_move_and_is_all_that_waits_for_us():
    assert not set(FINAL) & set(DUE)
    assert set(DUE) == set(Stage) - set(FINAL) - {Stage.POSTED, Stage.CHALLENGED}
