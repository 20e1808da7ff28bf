"""What a worker process does with a task: verdicts are signed either way, and our own faults are no verdict."""

from dataclasses import replace

import pytest
import world
from record import NOW, work

from proof import attestation
from proof.attestation import EXPIRED, FAIL, PASS, SignedAttestation
from proof.bundle import Opening
from proof.errors import Conflict, Reason
from proof.messages import Verdict
from verifier import jobs
from verifier.jobs import MOMENT
from verifier.lifecycle import Stage
from verifier.release import evidence_hash, output_root, statement

MODEL = world.small().model.id.hex()


def judged(record, task):
    record.judge()
    found = record.store.attestation_of(task)
    return Verdict.from_json(record.store.verdict(task).document), SignedAttestation.from_json(found.document)


def test_an_honest_proof_is_paid(record):
    done = work()
    verdict, signed = judged(record, record.check(done))
    assert (verdict.verdict, verdict.nodes_checked) == ("accepted", verdict.nodes_total)
    attestation.verify(signed, record.signer.address)
    said, task = signed.attestation, done.asked.task
    assert (said.verdict, said.amount, said.payee) == (PASS, task.reward.amount, done.signed.worker)
    assert (said.issued_at, said.expires_at) == (NOW, NOW + record.settings.validity)
    assert said.output_root == output_root(done.signed, ("logits",))
    challenge = record.store.cases([done.id])[done.id].challenge
    assert said.evidence_hash == evidence_hash(task, done.signed, challenge, verdict)
    assert record.stage(done.id) == Stage.ATTESTED


def wrong_row(proof):
    name, opening = next((name, o) for name, o in proof.openings.items() if o.rows.dtype.kind == "f")
    return replace(proof, openings={**proof.openings, name: Opening(opening.rows + 1, opening.siblings)})


LIES = {
    "an opened row changed": (wrong_row, Reason.OPENING),
    "a challenge of its own": (
        lambda proof: replace(proof, challenge=replace(proof.challenge, seed=bytes(32))),
        Reason.BINDING,
    ),
    "another task in the file": (
        lambda proof: replace(proof, task=replace(proof.task, nonce=bytes(32))),
        Reason.BINDING,
    ),
    "nothing opened": (lambda proof: replace(proof, openings={}), Reason.SELECTION),
}


@pytest.mark.parametrize(("bend", "reason"), LIES.values(), ids=LIES.keys())
def test_a_lie_gets_a_signed_rejection_and_no_pay(record, bend, reason):
    verdict, signed = judged(record, record.check(work(), bend))
    assert (verdict.verdict, verdict.reason) == ("rejected", reason)
    attestation.verify(signed, record.signer.address)
    assert (signed.attestation.verdict, signed.attestation.amount, signed.attestation.score) == (FAIL, 0, 0)


def test_another_tasks_proof_is_rejected(record):
    first, second = work(), work()
    record.check(first)
    kept = record.store.cases([first.id])[first.id].challenge
    verdict, _ = judged(record, record.check(second, lambda _: first.proof(kept)))
    assert verdict.reason is Reason.BINDING
    assert verdict.commitment == second.signed.digest()


def test_judging_again_changes_nothing(record):
    task = record.check(work())
    _, first = judged(record, task)
    record.clock.now += 1000
    _, again = judged(record, task)
    assert again == first


def test_a_crash_between_verdict_and_signature_ends_in_the_same_attestation(record):
    task = record.check(work())
    bench = record.bench()
    rows = record.store.lease(MODEL, "dead", NOW, NOW + 10, 1)
    assert bench._decide(MODEL, rows, "dead") == [task]
    assert record.stage(task) == Stage.ACCEPTED
    record.store.protect([statement(record.store.outcomes([task])[task], record.signer, 7)], NOW)
    record.clock.now += 11
    _, signed = judged(record, task)
    assert signed.attestation.expires_at == NOW + 7  # what was protected first is what is signed


def test_a_second_verdict_is_refused_before_it_is_signed(record):
    done = work()
    task = record.check(done)
    _, first = judged(record, task)
    others = [
        replace(first.attestation, verdict=FAIL, amount=0),
        replace(first.attestation, verdict=EXPIRED, amount=0),
        replace(first.attestation, evidence_hash=bytes(32)),
    ]
    for outcome in record.store.protect(others, NOW):
        assert isinstance(outcome, Conflict)
        assert "another verdict" in str(outcome)
    assert record.store.protect([first.attestation], NOW + 1) == [first.attestation]


def test_who_signed_otherwise_elsewhere_stalls_and_the_rest_of_the_batch_is_signed(record):
    first, second = record.check(work()), record.check(work())
    rows = record.store.lease(MODEL, "here", NOW, NOW + 10, 2)
    bench = record.bench()
    ready = bench._decide(MODEL, rows, "here")
    said = statement(record.store.outcomes([first])[first], record.signer, 7)
    record.store.protect([replace(said, verdict=FAIL, amount=0)], NOW)
    bench._finish(ready, "here")
    assert (record.stage(first), record.stage(second)) == (Stage.STALLED, Stage.ATTESTED)
    assert "another verdict" in record.store.task(first).task.detail
    assert record.store.retry(first, NOW) == Stage.ACCEPTED
    record.judge()
    assert record.stage(first) == Stage.STALLED  # it is signed at most once, whoever asks


def test_a_fault_of_ours_is_tried_again_and_then_stalls(record):
    task = record.check(work())
    blob = record.blobs.path(record.store.proof(task).blob)
    whole = blob.read_bytes()
    blob.unlink()
    for _ in range(3):
        record.judge(attempts=3)
        assert record.stage(task) == Stage.CHECKING
        assert record.store.due(record.clock.now) == []
        assert "missing" in record.store.task(task).task.detail
        record.clock.now += 60
        assert record.store.due(record.clock.now) == [MODEL]
    record.judge(attempts=3)
    assert record.stage(task) == Stage.STALLED
    assert "missing" in record.store.task(task).task.detail
    assert record.store.verdict(task) is None
    assert record.store.attestation_of(task) is None

    blob.write_bytes(whole)
    assert record.store.retry(task, record.clock.now) == Stage.CHECKING
    with pytest.raises(Conflict, match="not stalled"):
        record.store.retry(task, record.clock.now)
    verdict, _ = judged(record, task)
    assert verdict.verdict == "accepted"


def test_small_tasks_of_a_model_share_their_transactions(record):
    tasks = [record.check(work()) for _ in range(5)]
    bench = record.bench()
    bench._seconds[MODEL] = MOMENT / 5
    bench.judge(MODEL)
    assert {record.stage(task) for task in tasks} == {Stage.ATTESTED}
    times = {record.store.verdict(task).created for task in tasks}
    assert len(times) == 1


def test_what_was_not_reached_in_its_moment_goes_to_others_untried(record, monkeypatch):
    tasks = [record.check(work()) for _ in range(3)]
    monkeypatch.setattr(jobs, "MOMENT", 0.0)
    bench = record.bench()
    rows = record.store.lease(MODEL, "here", NOW, NOW + 10, 3)
    assert len(bench._decide(MODEL, rows, "here")) == 1
    left = [record.store.task(task).task for task in tasks]
    assert sorted(row.attempts for row in left) == [0, 0, 1]
    assert len(record.store.lease(MODEL, "next", NOW, NOW + 10, 3)) == 2


def test_a_task_that_ended_a_process_comes_alone(record):
    tasks = [record.check(work()) for _ in range(3)]
    assert len(record.store.lease(MODEL, "killed", NOW, NOW + 20, 3)) == 3
    later = NOW + 20
    leased = [record.store.lease(MODEL, f"next{i}", later, later + 20, 3) for i in range(4)]
    assert [len(rows) for rows in leased] == [1, 1, 1, 0]
    assert {rows[0].id for rows in leased[:3]} == set(tasks)


def test_a_bug_stalls_its_task_with_its_name(record, monkeypatch):
    task = record.check(work())

    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(jobs, "verify", broken)
    for _ in range(2):
        with pytest.raises(TypeError):
            record.judge(attempts=2)
        record.clock.now += 60
    record.judge(attempts=2)
    assert record.stage(task) == Stage.STALLED
    assert "TypeError" in record.store.task(task).task.detail


def test_a_deadline_that_passes_is_signed_and_pays_nobody(record):
    committed, posted = work(), work()
    for done in (committed, posted):
        record.post(done)
    record.store.commit(committed.signed, NOW)
    record.clock.now = committed.asked.task.deadline + 1.0
    assert record.store.lapse(record.clock.now) == 2
    record.judge()
    for done, payee in ((committed, committed.signed.worker), (posted, "0x" + "00" * 20)):
        assert record.stage(done.id) == Stage.EXPIRED
        signed = SignedAttestation.from_json(record.store.attestation_of(done.id).document)
        attestation.verify(signed, record.signer.address)
        said = signed.attestation
        assert (said.verdict, said.amount, said.payee) == (EXPIRED, 0, payee)
        assert said.issued_at == done.asked.task.deadline


def test_a_fault_that_passes_costs_nobody_anything(record):
    task = record.check(work())
    blob = record.blobs.path(record.store.proof(task).blob)
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1])
    record.judge()
    assert record.store.verdict(task) is None
    blob.write_bytes(whole)
    record.clock.now += 60
    verdict, _ = judged(record, task)
    assert verdict.verdict == "accepted"


def test_a_dead_workers_task_goes_to_the_next(record):
    task = record.check(work())
    record.store.lease(MODEL, "killed", NOW, NOW + 20, 1)
    record.judge()
    assert record.store.verdict(task) is None
    record.clock.now += 20
    verdict, _ = judged(record, task)
    assert verdict.verdict == "accepted"
