"""Aggregates behind the pages, on both databases: the record of a worker, and the board of a tenant."""

import numpy as np
import record as records
import world
from record import TENANT, work

from proof.attestation import sign_commitment
from verifier import nodes
from verifier.board import Outcome, board, timeline
from verifier.lifecycle import Stage
from verifier.nodes import Earned, NodeRecord

STRANGER = bytes.fromhex("22" * 32)


def bent(trace):
    trace["layer1.softmax"] = np.roll(trace["layer1.softmax"], 1, -1)
    return trace


def by(key):
    """A task and its commitment, signed with another key."""
    done = work()
    done.signed = sign_commitment(done.committed.commitment, done.asked.task.reward, key)
    return done


def test_the_record_of_a_worker_is_what_was_signed_and_answered(record):
    done = work()
    for one in (done, work(), work(bent)):
        record.check(one)
    record.judge()
    late = work()
    record.post(late)
    record.store.commit(late.signed, record.clock())
    record.clock.now = late.asked.task.deadline + 1.0
    record.store.lapse(record.clock())
    record.judge()
    reward = world.REWARD
    earned = (Earned(reward.chain_id, reward.token, 2 * reward.amount),)
    wanted = NodeRecord(done.signed.worker, 2, 1, 1, 4, 3, records.NOW, earned)
    assert nodes.record(record.database, done.signed.worker) == wanted
    assert wanted.share == 0.75


def test_workers_are_listed_by_address_a_page_at_a_time(record):
    for done in (by(STRANGER), by(world.WORKER)):
        record.post(done)
        record.store.commit(done.signed, record.clock())
    found = nodes.records(record.database, 10)
    assert [one.worker for one in found] == sorted({by(STRANGER).signed.worker, by(world.WORKER).signed.worker})
    assert {(one.challenged, one.answered, one.share) for one in found} == {(1, 0, 0.0)}
    assert nodes.records(record.database, 1) == found[:1]
    assert nodes.records(record.database, 1, found[0].worker) == found[1:]
    assert nodes.records(record.database, 1, found[1].worker) == []


def test_a_task_that_nobody_took_is_on_nobodys_record(record):
    done = work()
    record.post(done)
    record.clock.now = done.asked.task.deadline + 1.0
    record.store.lapse(record.clock())
    record.judge()
    assert record.store.attestation_of(done.id).verdict == 3
    assert nodes.records(record.database, 10) == []
    assert nodes.record(record.database, done.signed.worker) is None


def test_recent_tasks_are_the_workers_own_and_of_the_tenant(record):
    made = []
    for _ in range(3):
        made.append(record.check(work()))
        record.clock.now += 1
    other = by(STRANGER)
    record.post(other)
    record.store.commit(other.signed, record.clock())
    worker = by(world.WORKER).signed.worker

    def recent(tenant, limit):
        return [one.task.id for one in nodes.recent(record.database, worker, tenant, limit)]

    assert recent(None, 2) == made[:0:-1]
    assert recent(TENANT, 10) == made[::-1]
    assert recent("umbrella", 10) == []


def test_a_board_counts_a_tenants_stages_and_verdicts(record):
    for bend in (None, bent, bent):
        record.check(work(bend))
    record.judge()
    record.post(work())
    for tenant in (TENANT, None):
        found = board(record.database, tenant)
        stages = {stage: count for stage, count in found.stages.items() if count}
        assert stages == {Stage.POSTED: 1, Stage.ATTESTED: 3}
        assert (found.tasks, found.count("accepted"), found.count("rejected")) == (4, 1, 2)
        assert [(one.reason, one.count) for one in found.outcomes] == [(None, 1), ("reexecution", 2)]
        assert all(isinstance(one, Outcome) and one.seconds > 0 for one in found.outcomes)
    nothing = board(record.database, "umbrella")
    assert (nothing.tasks, list(nothing.outcomes)) == (0, [])


def test_a_timeline_has_every_stage_and_its_moment(record):
    task = record.check(work())
    record.clock.now += 5
    record.judge()
    start, end = records.NOW, records.NOW + 5
    stages = [Stage.POSTED, Stage.CHALLENGED, Stage.CHECKING, Stage.ACCEPTED, Stage.ATTESTED]
    assert timeline(record.database, task) == list(zip(stages, [start] * 3 + [end] * 2, strict=True))
