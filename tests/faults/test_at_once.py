"""The same request twenty times at once, from twenty connections: it happens once, and all get the same answer."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from sqlalchemy import func, select

from tests.faults.kit import audit, errand, perceptron
from verifier.queue import JUDGE, TASKS
from verifier.tables import CommitmentRow, EventRow, ProofRow

AT_ONCE = 20
ROUNDS = 5


def at_once(call):
    """What twenty threads, let go together, get."""
    line = Barrier(AT_ONCE)

    def one():
        line.wait()
        return call()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [run.result() for run in [pool.submit(one) for _ in range(AT_ONCE)]]


def test_a_proof_that_comes_twenty_times_at_once_is_nobodys_conflict(deployment, crowd):
    todo = [errand() for _ in range(ROUNDS)]
    for one in todo:
        crowd.protocol.post(one.body)
        path, worker = crowd.answer(one), crowd.workers[one.key]
        at_once(lambda worker=worker, one=one, path=path: worker.upload(one.task.id(), path, one.task.reward))
    audit(deployment, todo, crowd)


def test_twenty_times_at_once_is_once(deployment, crowd, tell):
    wanted = errand()
    task, worker = wanted.task.id(), crowd.workers[wanted.key]
    answers = at_once(lambda: crowd.protocol.call("POST", "/v1/tasks", json=wanted.body))
    assert sorted(answer.status_code for answer in answers) == [200] * (AT_ONCE - 1) + [201]

    challenges = at_once(lambda: worker.commit(task, wanted.signed, wanted.task.reward))
    assert len({challenge.seed for challenge in challenges}) == 1

    path = crowd.answer(wanted)
    answers = at_once(lambda: worker.upload(task, path, wanted.task.reward))
    assert len(answers) == AT_ONCE
    if deployment.redis:  # as many jobs for its model as there are workers to run them, and more
        with Redis.from_url(deployment.redis.url) as redis:
            queue = Queue(TASKS, connection=redis, serializer=JSONSerializer)
            at_once(lambda: queue.enqueue(JUDGE, perceptron().model.id.hex()))
    audit(deployment, [wanted], crowd)
    with deployment.opened() as store, store.database.read() as session:
        for row in (CommitmentRow, ProofRow):
            assert session.scalar(select(func.count()).where(row.task == wanted.id)) == 1
        told = session.scalars(select(EventRow.stage).where(EventRow.task == wanted.id).order_by(EventRow.id)).all()
    assert told == ["posted", "challenged", "checking", "accepted", "attested"]
    signed = at_once(lambda: crowd.protocol.attestation(task))
    assert len({one.signature for one in signed}) == 1
    tell(f"post, commitment, proof and attestation {AT_ONCE} times at once")
