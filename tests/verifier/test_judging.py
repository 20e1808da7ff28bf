"""What a worker process does with a task: verdicts are signed either way, and our own faults are no verdict."""

from dataclasses import replace

import pytest
from record import NOW, work

from proof import attestation
from proof.attestation import FAIL, PASS, SignedAttestation
from proof.bundle import Opening
from proof.errors import Conflict, Malformed, Reason
from proof.messages import Verdict
from verifier.lifecycle import Stage
from verifier.release import Signer, evidence_hash, output_root


def judged(record, task):
    record.bench().judge(task)
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
    challenge = record.store.case(done.id).challenge
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
    kept = record.store.case(first.id).challenge
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
    record.store.lease(task, "dead", NOW, NOW + 10)
    assert bench._decide(task, "dead", 1)
    assert record.stage(task) == Stage.ACCEPTED
    record.store.protect(bench.signer.statement(record.store.judged(task), 7), NOW)
    record.clock.now += 11
    _, signed = judged(record, task)
    assert signed.attestation.expires_at == NOW + 7  # what was protected first is what is signed


def test_a_second_verdict_is_refused_before_it_is_signed(record):
    done = work()
    task = record.check(done)
    _, first = judged(record, task)
    other = replace(first.attestation, verdict=FAIL, amount=0)
    with pytest.raises(Conflict, match="another verdict"):
        record.store.protect(other, NOW)
    with pytest.raises(Conflict, match="another verdict"):
        record.store.protect(replace(first.attestation, evidence_hash=bytes(32)), NOW)
    assert record.store.protect(first.attestation, NOW + 1) == first.attestation


def test_a_fault_of_ours_is_tried_again_and_then_stalls(record):
    task = record.check(work())
    record.blobs.drop(record.store.proof(task).blob)
    bench = record.bench(attempts=3)
    for _ in range(3):
        bench.judge(task)
        assert record.stage(task) == Stage.CHECKING
        assert record.store.due(record.clock.now) == []
        assert "missing" in record.store.task(task).task.detail
        record.clock.now += 60
        assert [entry for entry, _ in record.store.due(record.clock.now)] == [task]
    bench.judge(task)
    assert record.stage(task) == Stage.STALLED
    assert record.store.verdict(task) is None
    assert record.store.attestation_of(task) is None


def test_a_fault_that_passes_costs_nobody_anything(record):
    task = record.check(work())
    blob = record.blobs.path(record.store.proof(task).blob)
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1])
    record.bench().judge(task)
    assert record.store.verdict(task) is None
    blob.write_bytes(whole)
    record.clock.now += 60
    verdict, _ = judged(record, task)
    assert verdict.verdict == "accepted"


def test_a_dead_workers_task_goes_to_the_next(record):
    task = record.check(work())
    record.store.lease(task, "killed", NOW, NOW + 20)
    record.bench().judge(task)
    assert record.store.verdict(task) is None
    record.clock.now += 20
    verdict, _ = judged(record, task)
    assert verdict.verdict == "accepted"


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path):
    path = tmp_path / "keys" / "attester.key"
    signer = Signer.create(path)
    assert Signer.create(path).address == signer.address
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() not in repr(signer)
    path.chmod(0o640)
    with pytest.raises(Malformed, match="0600"):
        Signer.open(path)


def test_a_key_that_is_named_must_be_there(tmp_path):
    with pytest.raises(Malformed, match="ASSAY_KEY_FILE"):
        Signer.open(tmp_path / "none")
