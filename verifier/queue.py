"""RQ distributes work; Redis carries ids and nothing else, and may be emptied at any moment.

A job names a routine of an allow-list, which is looked up and never imported, and one task id. Callbacks and
webhooks, which RQ would import and call just the same, do not exist here.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from proof.errors import Failure, Unavailable
from verifier.store import Store

NAME = "assay"
JUDGE = "judge"
JOB_SECONDS = 6 * 3600  # against a check that never ends; leases notice a dead process long before
FAILED_SECONDS = 3600  # that Redis remembers a failed job; the record is elsewhere
RETRIES = 3  # of one command to Redis
WORKER_SECONDS = 30  # between signs of life of an idle worker process

Routines = Mapping[str, Callable[[str], None]]

log = logging.getLogger(__name__)
_TASK = re.compile(r"[0-9a-f]{64}")


class Refused(Failure):
    """A job that is not one of ours."""


def job_class(routines: Routines) -> type[Job]:
    """A job class that runs these routines, and refuses any other name."""

    class TaskJob(Job):  # type: ignore[misc]  # RQ is read without types
        @property
        def func(self) -> Callable[[str], None]:
            known = self.func_name in routines and self.instance is None and not self.kwargs
            if not known or len(self.args) != 1 or not _TASK.fullmatch(str(self.args[0])):
                raise Refused(f"job {self.id} is not on the allow-list")
            return routines[self.func_name]

        @property
        def success_callback(self) -> None:
            return None

        failure_callback = stopped_callback = success_callback

        def restore(self, raw_data: Any) -> Any:
            super().restore(raw_data)
            self.webhooks: list[Any] = []

    return TaskJob


class TaskQueue:
    def __init__(self, url: str) -> None:
        self._redis = _redis(url)
        self._queue = Queue(NAME, connection=self._redis, serializer=JSONSerializer, job_class=job_class({}))

    def put(self, task: str, attempt: int) -> None:
        """Ask for one attempt at a task, once however often it is called. Raises Unavailable."""
        job = f"{task}-{attempt}"
        try:
            if self._queue.get_job_position(job) is None:
                self._queue.enqueue(
                    JUDGE, task, job_id=job, job_timeout=JOB_SECONDS, result_ttl=0, failure_ttl=FAILED_SECONDS
                )
        except RedisError as error:
            raise Unavailable(f"the queue does not answer: {type(error).__name__}") from error

    def length(self) -> int:
        try:
            return int(self._queue.count)
        except RedisError as error:
            raise Unavailable(f"the queue does not answer: {type(error).__name__}") from error

    def workers(self) -> int:
        try:
            return len(SimpleWorker.all(queue=self._queue))
        except RedisError as error:
            raise Unavailable(f"the queue does not answer: {type(error).__name__}") from error

    def close(self) -> None:
        self._redis.close()


class TaskWorker(SimpleWorker):  # type: ignore[misc]
    """Runs jobs in its own process, so that opened models stay opened."""

    max_connection_wait_time = 2.0

    def subscribe(self) -> None:
        """Take no commands over Redis: signals stop this process, the record says what it does."""

    def unsubscribe(self) -> None:
        """Nothing was subscribed to."""


def _redis(url: str) -> Redis:
    """A connection that gives up soon: who waits for it has a record to go by."""
    return Redis.from_url(url, retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), RETRIES))


def work(url: str, routines: Routines, *, burst: bool = False) -> None:
    """Run jobs until a signal asks to stop; the job at hand is finished first."""
    worker = TaskWorker(
        [NAME],
        connection=_redis(url),
        serializer=JSONSerializer,
        job_class=job_class(routines),
        worker_ttl=WORKER_SECONDS,
    )
    worker.work(burst=burst, logging_level="WARNING")


def sweep(store: Store, queue: TaskQueue, now: float) -> None:
    """Expire what is late, and ask again for what nobody works on: a lost Redis or worker process loses nothing."""
    expired = store.expire(now)
    if expired:
        log.info("expired %d tasks", expired)
    for task, attempts in store.due(now):
        queue.put(task, attempts)
