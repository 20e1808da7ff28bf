"""Redis emptied again and again, and PostgreSQL thrown out in the middle: the record goes on where it was."""

import random
import time
from threading import Event, Thread

import pytest
from redis import Redis

from tests.faults.kit import Crowd, audit, errands

TASKS, CHEATS = 60, 6
FLUSH_SECONDS = 0.1
SEED = 20261124


@pytest.fixture
def crowd(production):
    with Crowd(production) as many:
        yield many


def test_a_redis_that_is_emptied_all_the_time_loses_nothing(production, crowd, tell):
    todo, done, flushed = errands(TASKS, CHEATS), Event(), []

    def flush():
        with Redis.from_url(production.redis.url) as redis:
            while not done.wait(FLUSH_SECONDS):
                redis.flushall()
                flushed.append(time.monotonic())

    flushing = Thread(target=flush)
    flushing.start()
    try:
        crowd.run(todo)
        audit(production, todo, crowd)
    finally:
        done.set()
        flushing.join()
    assert len(flushed) > 5
    tell(f"{TASKS} tasks while Redis was emptied {len(flushed)} times")


def test_a_postgresql_that_is_stopped_at_once_loses_nothing_that_was_committed(production, crowd, tell):
    """As `pg_ctl stop -m immediate`, so that it recovers from its log."""
    dice, todo = random.Random(SEED), errands(TASKS, CHEATS)

    def meanwhile():
        for calls in (30, 90, 150):
            crowd.reached(calls)
            time.sleep(dice.uniform(0.0, 0.05))
            production.postgres.kill()
            production.postgres.start()

    crowd.run(todo, meanwhile)
    audit(production, todo, crowd)
    tell(f"{TASKS} tasks while PostgreSQL was stopped 3 times")
