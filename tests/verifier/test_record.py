"""The record: one challenge and one check seed a task, leases that exclude, deadlines that end."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from record import NOW, work

from proof.attestation import sign_commitment
from proof.errors import Conflict, Unavailable
from proof.messages import Verdict
from verifier.lifecycle import Expired, LostLease, Stage
from verifier.store import Store

OTHER = bytes.fromhex("22" * 32)


def rejection(done):
    return Verdict(
        verdict="rejected",
        reason="opening",
        nodes_total=2,
        nodes_checked=0,
        rows=16,
        policy="standard",
        misses={},
        task=done.asked.task.id(),
        commitment=done.signed.digest(),
        check_seed=bytes(32),
    )


def test_the_same_commitment_again_gets_the_same_challenge(record):
    done = work()
    record.post(done)
    first = record.store.commit(done.signed, NOW)
    assert record.store.commit(done.signed, NOW + 1) == first
    assert first.commitment == done.signed.digest()
    assert first.policy == "standard"


def test_a_second_commitment_is_a_conflict(record):
    done = work()
    record.post(done)
    record.store.commit(done.signed, NOW)
    bent = replace(done.committed.commitment, tensors=done.signed.tensors[:-1])
    with pytest.raises(Conflict, match="another commitment"):
        record.store.commit(sign_commitment(bent, done.asked.task.reward, done.asked.key), NOW)


def test_the_same_trace_committed_by_somebody_else_is_a_conflict(record):
    done = work()
    record.post(done)
    record.store.commit(done.signed, NOW)
    copied = sign_commitment(done.committed.commitment, done.asked.task.reward, OTHER)
    assert copied.digest() == done.signed.digest()
    with pytest.raises(Conflict):
        record.store.commit(copied, NOW)


def test_twenty_at_once_get_one_challenge(record):
    done = work()
    record.post(done)
    bent = replace(done.committed.commitment, tensors=done.signed.tensors[:-1])
    other = sign_commitment(bent, done.asked.task.reward, OTHER)

    def commit(i):
        try:
            return record.store.commit(other if i % 2 else done.signed, NOW)
        except Conflict:
            return None

    with ThreadPoolExecutor(20) as pool:
        challenges = list(pool.map(commit, range(20)))
    won = [challenge for challenge in challenges if challenge]
    assert len(set(won)) == 1
    assert len(won) == 10


def test_the_check_seed_is_drawn_once_and_with_the_proof(record):
    done = work()
    record.post(done)
    record.store.commit(done.signed, NOW)
    assert record.store.proof(done.id) is None
    assert record.store.prove(done.id, b"p" * 32, "a" * 64, 1, NOW)
    seed = record.store.proof(done.id).check_seed
    assert not record.store.prove(done.id, b"p" * 32, "a" * 64, 1, NOW + 1)
    with pytest.raises(Conflict, match="another proof"):
        record.store.prove(done.id, b"q" * 32, "b" * 64, 1, NOW)
    assert record.store.proof(done.id).check_seed == seed
    assert len(bytes.fromhex(seed)) == 32


def test_a_proof_before_the_commitment_is_a_conflict(record):
    done = work()
    record.post(done)
    with pytest.raises(Conflict, match="no commitment"):
        record.store.prove(done.id, b"p" * 32, "a" * 64, 1, NOW)


def test_past_the_deadline_nothing_is_taken(record):
    committed, posted = work(), work()
    for done in (committed, posted):
        record.post(done)
    record.store.commit(committed.signed, NOW)
    late = committed.asked.task.deadline + 1.0
    with pytest.raises(Expired):
        record.store.commit(posted.signed, late)
    with pytest.raises(Expired):
        record.store.prove(committed.id, b"p" * 32, "a" * 64, 1, late)
    assert record.store.expire(late) == 2
    assert {record.stage(done.id) for done in (committed, posted)} == {Stage.EXPIRED}


def test_a_task_with_a_proof_never_expires(record):
    task = record.check(work())
    assert record.store.expire(1e12) == 0
    assert record.stage(task) == Stage.CHECKING


def test_a_lease_excludes_until_it_runs_out(record):
    task = record.check(work())
    assert record.store.lease(task, "one", NOW, NOW + 10).attempts == 1
    assert record.store.due(NOW + 5) == []
    assert record.store.lease(task, "two", NOW + 5, NOW + 15) is None
    record.store.renew(task, "one", NOW + 12)
    assert record.store.lease(task, "two", NOW + 11, NOW + 21) is None
    assert record.store.due(NOW + 12) == [(task, 1)]
    assert record.store.lease(task, "two", NOW + 12, NOW + 22).attempts == 2
    with pytest.raises(LostLease):
        record.store.renew(task, "one", NOW + 30)


def test_twenty_at_once_get_one_lease(record):
    task = record.check(work())
    with ThreadPoolExecutor(20) as pool:
        rows = list(pool.map(lambda i: record.store.lease(task, str(i), NOW, NOW + 10), range(20)))
    assert sum(row is not None for row in rows) == 1


def test_who_lost_the_lease_stores_no_verdict(record):
    done = work()
    task = record.check(done)
    record.store.lease(task, "slow", NOW, NOW + 10)
    record.store.lease(task, "next", NOW + 11, NOW + 21)
    with pytest.raises(LostLease):
        record.store.judge(task, "slow", rejection(done), 0.1, NOW + 12)
    assert record.store.verdict(task) is None
    record.store.judge(task, "next", rejection(done), 0.1, NOW + 12)
    assert record.stage(task) == Stage.REJECTED
    with pytest.raises(LostLease):
        record.store.judge(task, "next", rejection(done), 0.1, NOW + 13)


def test_the_same_task_again_is_the_same_row(record):
    done = work()
    record.post(done)
    assert not record.store.add_task(done.asked.task, "c" * 64, NOW + 5)
    assert record.store.task(done.id).task.created == NOW


def test_a_database_that_is_away_is_unavailable(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    with pytest.raises(Unavailable):
        store.ping()
