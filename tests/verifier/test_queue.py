"""The queue on a real embedded Valkey: an allow-list, a worker process, and a Redis that may be emptied."""

import os
import time

import pytest
import world
from record import work
from redis import Redis
from rq import Queue
from rq.job import Callback
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from verifier.children import Child
from verifier.lifecycle import Stage
from verifier.queue import DELIVER, DELIVERIES, JUDGE, TASKS, TaskQueue
from verifier.queue import work as run_jobs
from verifier.sweeping import sweep
from verifier.valkey import EmbeddedValkey

PATIENCE = 20.0


@pytest.fixture(scope="module")
def valkey():
    server = EmbeddedValkey(os.environ)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis(valkey):
    client = Redis.from_url(valkey.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def queue(valkey, redis):
    opened = TaskQueue(valkey.url)
    yield opened
    opened.close()


@pytest.fixture
def seen():
    return []


@pytest.fixture
def drain(valkey, seen):
    return lambda: run_jobs(valkey.url, JUDGE, seen.append, burst=True)


def until(condition):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_what_is_asked_for_twice_waits_once(queue, drain, seen):
    for _ in range(2):
        queue.put(JUDGE, "ab" * 32)
    assert queue.length() == 1
    drain()
    assert seen == ["ab" * 32]
    assert queue.length() == 0


def test_what_is_asked_for_while_it_is_worked_on_comes_again(queue, valkey):
    seen = []

    def run(model):
        seen.append(model)
        if len(seen) < 3:
            queue.put(JUDGE, model)

    queue.put(JUDGE, "ab" * 32)
    run_jobs(valkey.url, JUDGE, run, burst=True)
    assert seen == ["ab" * 32] * 3


def test_deliveries_do_not_wait_behind_tasks(queue, valkey):
    queue.put(JUDGE, "ab" * 32)
    queue.put(DELIVER, "cd" * 32)
    assert (queue.length(TASKS), queue.length(DELIVERIES)) == (1, 1)
    sent = []
    run_jobs(valkey.url, DELIVER, sent.append, burst=True)
    assert sent == ["cd" * 32]
    assert (queue.length(TASKS), queue.length(DELIVERIES)) == (1, 0)


def test_ids_are_all_that_redis_carries(queue, redis):
    queue.put(JUDGE, "ab" * 32)
    stored = Queue(TASKS, connection=redis, serializer=JSONSerializer).jobs[0]
    job = redis.hgetall(f"rq:job:{stored.id}")
    assert (stored.func_name, stored.args, stored.kwargs) == ("judge", ["ab" * 32], {})
    assert set(job) <= {
        b"status", b"data", b"created_at", b"enqueued_at", b"origin", b"description", b"timeout", b"result_ttl",
        b"failure_ttl", b"started_at", b"ended_at", b"last_heartbeat", b"worker_name", b"success_callback_name",
        b"failure_callback_name", b"stopped_callback_name", b"group_id", b"success_callback_timeout",
        b"failure_callback_timeout", b"stopped_callback_timeout", b"meta", b"ttl", b"retries_left",
        b"number_of_retries", b"enqueue_at_front_on_retry",
    }  # fmt: skip


STRANGERS = {
    "any importable function": ("os.system", ["touch {}"], {}),
    "a routine by its import path": ("verifier.jobs.decide", ["ab" * 32], {}),
    "our routine with something else than an id": (JUDGE, ["touch {}"], {}),
    "our routine with two ids": (JUDGE, ["ab" * 32, "cd" * 32], {}),
    "our routine with a keyword": (JUDGE, ["ab" * 32], {"task": "ab" * 32}),
}


@pytest.mark.parametrize(("name", "arguments", "keywords"), STRANGERS.values(), ids=STRANGERS.keys())
def test_a_job_that_is_not_ours_is_refused(redis, drain, seen, tmp_path, name, arguments, keywords):
    witness = tmp_path / "witness"
    arguments = [argument.format(witness) for argument in arguments]
    foreign = Queue(TASKS, connection=redis, serializer=JSONSerializer)
    job = foreign.enqueue(name, args=arguments, kwargs=keywords)
    drain()
    assert seen == []
    assert not witness.exists()
    assert job.id in FailedJobRegistry(queue=foreign).get_job_ids()


def test_callbacks_are_not_called(redis, drain, seen, tmp_path):
    foreign = Queue(TASKS, connection=redis, serializer=JSONSerializer)
    foreign.enqueue(JUDGE, "ab" * 32, on_success=Callback("os.abort"), on_failure=Callback("os.abort"))
    foreign.enqueue("os.getpid", on_failure=Callback("os.abort"))
    drain()
    assert seen == ["ab" * 32]


def test_a_worker_process_judges_what_a_lost_redis_forgot(record, record_url, valkey, redis, queue):
    record.clock.now = time.time()
    task = record.check(work())
    queue.put(JUDGE, world.small().model.id.hex())
    redis.flushall()
    environ = {
        **os.environ,
        "ASSAY_REDIS_URL": valkey.url,
        "ASSAY_DATA": str(record.root),
        "ASSAY_DATABASE_URL": record_url,
        "ASSAY_KEY_FILE": str(record.settings.key),
    }
    child = Child("assay", ["work", "--with-parent"], environ)
    child.ensure()
    try:
        sweep(record.store, queue, time.time())
        until(lambda: record.stage(task) == Stage.ATTESTED)
        assert queue.workers() == 1
    finally:
        child.stop()
    assert record.store.verdict(task).verdict == "accepted"
    assert record.store.verdict(task).seconds > 0


def test_a_valkey_ends_with_its_parent_and_can_be_started_again():
    server = EmbeddedValkey(os.environ)
    server.start()
    client = Redis.from_url(server.url)
    own = client.info("server")["process_id"]
    server.child._process.stdin.close()  # what the end of this process would do
    until(lambda: server.child._process.poll() is not None)
    with pytest.raises(ProcessLookupError):
        os.kill(own, 0)
    server.start()
    assert client.info("server")["process_id"] != own
    client.close()
    server.stop()
