"""The record: one challenge and one check seed a task, leases that exclude, deadlines that end."""

import os
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import world
from record import NOW, TENANT, work
from sqlalchemy import select

from proof.attestation import sign_commitment
from proof.errors import Conflict, Unavailable
from proof.messages import Verdict
from verifier.database import Database
from verifier.lifecycle import Expired, Stage
from verifier.store import Judgement
from verifier.summaries import Filter
from verifier.sweeping import collect
from verifier.tables import DeliveryRow, EventRow, RevenueRow, WebhookRow

MODEL = world.small().model.id.hex()
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
    assert record.store.lapse(late) == 2
    assert {record.stage(done.id) for done in (committed, posted)} == {Stage.LAPSED}


def test_a_task_with_a_proof_never_expires(record):
    task = record.check(work())
    assert record.store.lapse(1e12) == 0
    assert record.stage(task) == Stage.CHECKING


def test_a_lease_excludes_until_it_runs_out(record):
    task, store = record.check(work()), record.store
    assert [row.attempts for row in store.lease(MODEL, "one", NOW, NOW + 10, 9)] == [1]
    assert store.due(NOW + 5) == []
    assert store.lease(MODEL, "two", NOW + 5, NOW + 15, 9) == []
    store.renew([task], "one", NOW + 12)
    assert store.lease(MODEL, "two", NOW + 11, NOW + 21, 9) == []
    assert store.due(NOW + 12) == [MODEL]
    assert [row.attempts for row in store.lease(MODEL, "two", NOW + 12, NOW + 22, 9)] == [2]
    store.renew([task], "one", NOW + 90)
    assert store.due(NOW + 22) == [MODEL]


def test_twenty_at_once_get_one_lease(record):
    record.check(work())
    with ThreadPoolExecutor(20) as pool:
        rows = list(pool.map(lambda i: record.store.lease(MODEL, str(i), NOW, NOW + 10, 1), range(20)))
    assert sum(map(len, rows)) == 1


def test_who_lost_the_lease_stores_no_verdict(record):
    done = work()
    task, store = record.check(done), record.store
    store.lease(MODEL, "slow", NOW, NOW + 10, 1)
    store.lease(MODEL, "next", NOW + 11, NOW + 21, 1)
    judgement = Judgement(task, rejection(done), 0.1)
    assert store.judge([judgement], "slow", NOW + 12) == []
    assert store.verdict(task) is None
    assert store.judge([judgement], "next", NOW + 12) == [task]
    assert record.stage(task) == Stage.REJECTED
    assert store.judge([judgement], "next", NOW + 13) == []


def test_what_was_given_back_untried_counts_as_untried(record):
    task, store = record.check(work()), record.store
    store.lease(MODEL, "one", NOW, NOW + 10, 1)
    store.give_back([task], "one", NOW, None)
    assert [row.attempts for row in store.lease(MODEL, "two", NOW, NOW + 10, 1)] == [1]


def test_the_same_task_again_is_the_same_row(record):
    done = work()
    record.post(done)
    assert not record.store.add_task(done.asked.task, "c" * 64, NOW + 5, TENANT)
    assert record.store.task(done.id).task.created == NOW
    with pytest.raises(Conflict, match="another tenant"):
        record.store.add_task(done.asked.task, "c" * 64, NOW + 5, "others")
    with pytest.raises(Conflict, match="another worker"):
        record.store.add_task(done.asked.task, "c" * 64, NOW + 5, TENANT, "0x" + "ab" * 20)


def test_every_stage_is_told_once_and_in_order(record):
    done = work()
    with record.database.write() as session:
        for stages in ([], ["attested"]):
            session.add(webhook(stages))
        session.add(webhook([], tenant="others"))
    task = record.check(done)
    record.judge()
    with record.database.read() as session:
        events = session.scalars(select(EventRow).order_by(EventRow.id)).all()
        deliveries = session.scalars(select(DeliveryRow)).all()
    assert [event.stage for event in events] == ["posted", "challenged", "checking", "accepted", "attested"]
    assert {(event.task, event.tenant) for event in events} == {(task, TENANT)}
    wanted = Counter(event.id for event in events) + Counter([events[-1].id])
    assert Counter(delivery.event for delivery in deliveries) == wanted


def webhook(stages, tenant=TENANT):
    return WebhookRow(
        id=secrets.token_hex(16), tenant=tenant, url="https://a", secret="whsec_", stages=stages, created=NOW
    )


def test_revenue_is_the_sum_of_what_was_attested(record):
    honest, cheat = [work() for _ in range(3)], work(bend=lambda trace: trace | {"logits": trace["logits"] + 1})
    for done in (*honest, cheat):
        record.check(done)
        record.judge()
    with record.database.read() as session:
        (row,) = session.scalars(select(RevenueRow)).all()
    assert int(row.amount) == 3 * world.REWARD.amount
    assert (row.payee, row.chain_id, row.token) == (
        cheat.signed.worker, world.REWARD.chain_id, world.REWARD.token,
    )  # fmt: skip


def test_pages_of_tasks_meet_without_a_gap(record):
    ids = []
    for i in range(5):
        record.clock.now = NOW + i // 2  # some at the same moment
        ids.append(record.post(work()))
    for newest in (False, True):
        seen, after = [], None
        while True:
            page = record.store.tasks(2, Filter(tenant=TENANT, after=after, newest=newest))
            if not page:
                break
            seen += page
            after = page[-1].place
        assert sorted(entry.task.id for entry in seen) == sorted(ids)
        assert [entry.place for entry in seen] == sorted((entry.place for entry in seen), reverse=newest)
    assert record.store.tasks(9, Filter(tenant="others")) == []


def test_a_worker_finds_what_it_may_do_and_what_it_did(record):
    free, mine, others, taken = work(), work(), work(), work()
    worker = mine.signed.worker
    record.register()
    for done, assigned in ((free, None), (mine, worker), (others, "0x" + "ab" * 20), (taken, None)):
        record.store.add_task(done.asked.task, "0" * 64, NOW, TENANT, assigned)
    record.store.commit(taken.signed, NOW)

    def seen(address):
        return {entry.task.id for entry in record.store.tasks(9, Filter(worker=address))}

    assert seen(worker) == {free.id, mine.id, taken.id}
    assert seen("0x" + "cd" * 20) == {free.id}


def test_only_what_nothing_points_to_is_collected(record):
    task = record.check(work())
    lost, fresh = record.keep(b"lost"), record.keep(b"fresh")
    old = time.time() - 1000
    for path in record.blobs.root.rglob("*"):
        if path.is_file() and path.name != fresh:
            os.utime(path, (old, old))
    assert collect(record.store, record.blobs, old - 1) == 0
    assert collect(record.store, record.blobs, old + 1) == 1
    assert record.blobs.find(lost) is None
    assert record.blobs.find(fresh)
    record.judge()
    assert record.stage(task) == Stage.ATTESTED


def test_a_file_that_was_set_aside_by_the_dead_comes_back(record):
    kept = record.keep(b"kept")
    path, old = record.blobs.path(kept), time.time() - 1000
    path.rename(path.with_suffix(".aside"))
    os.utime(path.with_suffix(".aside"), (old, old))
    assert list(record.blobs.older(old + 1, 10)) == []
    assert record.blobs.check(kept).read_bytes() == b"kept"
    assert record.blobs.touch(kept)
    with record.blobs.aside(kept, old + 1) as gone:
        assert gone is None  # written since
    assert record.blobs.find(kept)


def test_a_database_that_is_away_is_unavailable(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    with pytest.raises(Unavailable):
        database.ping()
