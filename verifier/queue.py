"""RQ distributes work; Redis carries ids and nothing else, and may be emptied at any moment.

A job names a routine of an allow-list, which is looked up and never imported, and one id: of a model with tasks to
judge, or of a delivery. Callbacks and webhooks, which RQ would import and call just the same, do not exist here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from proof.errors import Failure, Unavailable

TASKS, DELIVERIES = "assay", "assay-deliveries"  # the queues
JUDGE, DELIVER = "judge", "deliver"  # the routines
QUEUES = {JUDGE: TASKS, DELIVER: DELIVERIES}
JOB_SECONDS = 6 * 3600  # against a check that never ends; leases notice a dead process long before
FAILED_SECONDS = 3600  # that Redis remembers a failed job; the record is elsewhere
ASKED_SECONDS = 5  # within which an id is not asked for twice, unless a worker process has taken it up
RETRIES = 3  # of one command to Redis
CONNECT_SECONDS = 2.0
WORKER_SECONDS = 30  # between signs of life of an idle worker process

Routines = Mapping[str, Callable[[str], None]]

_ID = re.compile(r"[0-9a-f]{64}")


class Refused(Failure):
    """A job that is not one of ours."""


def job_class(routines: Routines) -> type[Job]:
    """A job class that runs these routines, and refuses any other name."""

    class ListedJob(Job):  # type: ignore[misc]  # RQ is read without types
        @property
        def func(self) -> Callable[[str], None]:
            known = self.func_name in routines and self.instance is None and not self.kwargs
            if not known or len(self.args) != 1 or not _ID.fullmatch(str(self.args[0])):
                raise Refused(f"job {self.id} is not on the allow-list")
            return routines[self.func_name]

        @property
        def success_callback(self) -> None:
            return None

        failure_callback = stopped_callback = success_callback

        def restore(self, raw_data: Any) -> Any:
            super().restore(raw_data)
            self.webhooks: list[Any] = []

    return ListedJob


class TaskQueue:
    """What is to be done, by id. Everything raises Unavailable while Redis does not answer."""

    def __init__(self, url: str) -> None:
        self.redis = _redis(url)
        queue = {"connection": self.redis, "serializer": JSONSerializer, "job_class": job_class({})}
        self._queues = {name: Queue(name, **queue) for name in QUEUES.values()}

    def put(self, routine: str, id_: str) -> None:
        """Ask for a routine, once however often it is called, until a worker process takes it up."""
        with _answering():
            if self.redis.set(_asked(routine, id_), "1", nx=True, ex=ASKED_SECONDS):
                self._queues[QUEUES[routine]].enqueue(
                    routine, id_, job_timeout=JOB_SECONDS, result_ttl=0, failure_ttl=FAILED_SECONDS
                )

    def taken_up(self, routine: str, id_: str) -> None:
        """From now on it may be asked for again: what comes later is not seen by who is at work already."""
        with _answering():
            self.redis.delete(_asked(routine, id_))

    def length(self, queue: str = TASKS) -> int:
        with _answering():
            return int(self._queues[queue].count)

    def workers(self, queue: str = TASKS) -> int:
        """Worker processes that have shown life."""
        with _answering():
            return len(SimpleWorker.all(queue=self._queues[queue]))

    def close(self) -> None:
        self.redis.close()


class ListedWorker(SimpleWorker):  # type: ignore[misc]
    """Runs jobs in its own process, so that opened models stay opened."""

    max_connection_wait_time = 2.0

    def subscribe(self) -> None:
        """Take no commands over Redis: signals stop this process, the record says what it does."""

    def unsubscribe(self) -> None:
        """Nothing was subscribed to."""


def work(url: str, routine: str, run: Callable[[str], None], *, burst: bool = False) -> None:
    """Run a routine's jobs until a signal asks to stop; the job at hand is finished first."""
    queue = TaskQueue(url)

    def taken(id_: str) -> None:
        queue.taken_up(routine, id_)
        run(id_)

    worker = ListedWorker(
        [QUEUES[routine]],
        connection=_redis(url),
        serializer=JSONSerializer,
        job_class=job_class({routine: taken}),
        worker_ttl=WORKER_SECONDS,
    )
    try:
        worker.work(burst=burst, logging_level="WARNING")
    finally:
        queue.close()


def _redis(url: str) -> Redis:
    """A connection that gives up soon: who waits for it has a record to go by."""
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.02), RETRIES)
    return Redis.from_url(url, retry=retry, socket_connect_timeout=CONNECT_SECONDS)


def _asked(routine: str, id_: str) -> str:
    return f"assay:asked:{routine}:{id_}"


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise Unavailable(f"the queue does not answer: {type(error).__name__}") from error
