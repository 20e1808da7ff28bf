"""Clients that send a byte now and then: they are cut off, and everybody else is answered meanwhile."""

import socket
import time
from contextlib import ExitStack

import httpx
import pytest

from prover.client import Client
from tests.faults.kit import audit, errand, errands

SLOW = 60  # connections of each kind
STRANGERS = 100
HEAD = b"POST /v1/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\n"
STRANGE = HEAD + b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
BODY = HEAD + b"Content-Type: application/json\r\nContent-Length: 100000\r\nAuthorization: Bearer %s\r\n\r\n"
CUT_SECONDS = 12.0  # within which the service's 3 s must have ended, on a busy machine
ANSWER_SECONDS = 3.0
TASKS, CHEATS = 10, 1


@pytest.fixture
def deployment(embedded):
    """Which database is behind the service is no matter here."""
    return embedded


def slow(deployment, begin, running):
    one = running.enter_context(socket.create_connection(("127.0.0.1", deployment.port)))
    one.sendall(begin)
    return one


def ended(one):
    """Whether the service has closed it; what it said before does not matter."""
    one.setblocking(False)
    try:
        while one.recv(4096):
            continue
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def crawl(slow_ones):
    """Another byte on each that is still open; those that are."""
    left = []
    for one in slow_ones:
        if not ended(one):
            try:
                one.send(b"x")
            except ConnectionError:
                continue
            left.append(one)
    return left


def test_slow_heads_and_bodies_are_cut_off_and_hold_up_nobody(deployment, crowd, tell):
    todo, longest = errands(TASKS, CHEATS), 0.0
    with ExitStack() as running, httpx.Client(base_url=deployment.url) as other:
        heads = [slow(deployment, HEAD, running) for _ in range(SLOW)]
        bodies = [slow(deployment, BODY % deployment.key.encode(), running) for _ in range(SLOW)]
        started, crawling, waiting = time.monotonic(), heads, bodies
        crowd.run(todo)  # work goes on beside them
        while crawling or waiting:
            assert time.monotonic() - started < CUT_SECONDS, f"{len(crawling)} heads, {len(waiting)} bodies are open"
            crawling, waiting = crawl(crawling), [one for one in waiting if not ended(one)]
            asked = time.monotonic()
            assert other.get("/livez").is_success
            longest = max(longest, time.monotonic() - asked)
            time.sleep(0.1)
    assert longest < ANSWER_SECONDS
    audit(deployment, todo, crowd)
    tell(f"{SLOW} slow heads and {SLOW} stalled bodies, others answered within {longest:.2f} s")


def test_strangers_who_stall_keep_nobody_out(deployment, crowd, tell):
    """Callers without a key or a signature do not use up what there is for those who have one."""
    one = errand()
    with ExitStack() as running, Client(deployment.url, key=deployment.key, patience=0.0) as hasty:
        for _ in range(STRANGERS):
            slow(deployment, STRANGE, running)
        assert hasty.send("POST", "/v1/tasks", json=one.body).status_code == 201
    crowd.serve(one)
    audit(deployment, [one], crowd)
    tell(f"a task posted while {STRANGERS} strangers stalled")
