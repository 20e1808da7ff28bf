"""Workers that take a task and say no more: past its deadline that is signed, with nothing to pay."""

import time

import pytest

from proof import attestation
from proof.attestation import EXPIRED
from proof.errors import Conflict
from tests.faults.kit import audit_record, errand

DEADLINE_SECONDS = 4


def test_a_worker_that_never_opens_gets_its_task_expired(deployment, crowd, tell):
    never_opened, never_taken = errand(seconds=DEADLINE_SECONDS), errand(seconds=DEADLINE_SECONDS)
    for one in (never_opened, never_taken):
        crowd.protocol.post(one.body)
    path = crowd.answer(never_opened)
    states = crowd.settled([never_opened, never_taken])
    assert {state.stage for state in states.values()} == {"expired"}
    assert time.time() > never_opened.task.deadline
    for one, payee in ((never_opened, crowd.workers[never_opened.key].worker.address), (never_taken, "0x" + "00" * 20)):
        signed = crowd.protocol.attestation(one.task.id())
        attestation.verify(signed, deployment.signer)
        said = signed.attestation
        assert (said.verdict, said.amount, said.score, said.payee) == (EXPIRED, 0, 0, payee)
        assert said.issued_at == one.task.deadline
    worker = crowd.workers[never_opened.key]
    with pytest.raises(Conflict):
        worker.upload(never_opened.task.id(), path, never_opened.task.reward)
    with pytest.raises(Conflict):
        worker.commit(never_taken.task.id(), never_taken.signed, never_taken.task.reward)
    audit_record(deployment, [never_opened, never_taken])
    tell("a task that was committed to, and one that nobody took, past their deadline")
