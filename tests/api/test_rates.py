"""How often somebody may call, and what happens to those who take their time."""

import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import uvicorn
from fastapi import Request
from fastapi.testclient import TestClient

from api import limits
from api.app import create_app
from api.problems import Problem
from api.rates import Rates, _network
from api.slow import PatientProtocol, SteadyBody
from proof.errors import Malformed
from tests.api.calls import refused


@pytest.fixture
def limited(door):
    def made(**rates):
        door.settings = replace(door.settings, **rates)
        door.rates = Rates(door.settings)
        return TestClient(create_app(door), raise_server_exceptions=False)

    return made


def test_a_key_is_counted_by_itself(limited, token):
    first, second = ({"Authorization": f"Bearer {token()}"} for _ in range(2))
    with limited(rate_key="3/minute") as client:
        for _ in range(3):
            assert client.get("/v1/tasks", headers=first).is_success
        answer = client.get("/v1/tasks", headers=first)
        assert refused(answer, 429, "rate.limited").retryable
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert client.get("/v1/tasks", headers=second).is_success


def test_an_address_is_counted_before_anything_is_read(limited):
    with limited(rate_address="2/minute") as client:
        for _ in range(2):
            assert client.get("/.well-known/assay.json").is_success
        refused(client.post("/v1/tasks", content=b"x" * 1000), 429, "rate.limited")
        assert client.get("/livez").is_success


def test_a_lost_redis_neither_opens_the_gates_nor_shuts_them(door):
    rates = Rates(replace(door.settings, redis="redis://127.0.0.1:1", rate_key="3/minute"))
    for _ in range(3):
        rates.spend("key", "a")
    with pytest.raises(Problem):
        rates.spend("key", "a")
    rates.spend("key", "b")


def test_processes_count_together(door):
    settings = replace(door.settings, rate_key="2/minute")
    one, other = Rates(settings), Rates(settings)
    one.spend("key", "a")
    other.spend("key", "a")
    for rates in (one, other):
        with pytest.raises(Problem):
            rates.spend("key", "a")


def test_a_rate_that_is_none_is_refused_by_name(door):
    with pytest.raises(Malformed, match="ASSAY_RATE_KEY"):
        Rates(replace(door.settings, rate_key="often"))


@pytest.mark.parametrize(
    ("client", "network"),
    [("192.0.2.7", "192.0.2.7"), ("2001:db8::1", "2001:db8::"), ("2001:db8::ffff:2", "2001:db8::"),
     ("::ffff:192.0.2.7", "192.0.2.7"), ("unix", "unix")],
)  # fmt: skip
def test_an_ipv6_network_is_one_client(client, network):
    assert _network(client) == network


HEADS = {
    "compressed": ({"Content-Encoding": "gzip"}, 415, "encoding.refused"),
    "too many headers": ({f"X-{i}": "a" for i in range(limits.MAX_HEADERS)}, 413, "too_large"),
    "too long headers": ({f"X-{i}": "a" * 8000 for i in range(9)}, 413, "too_large"),
}


@pytest.mark.parametrize(("headers", "status", "code"), HEADS.values(), ids=HEADS.keys())
def test_a_head_that_asks_for_too_much_is_refused(api, headers, status, code):
    refused(api.post("/v1/tasks", content=b"{}", headers=headers), status, code)


# ---- slow ones, over real sockets


async def application(scope, receive, send):
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def served(app, head=0.3):
    config = uvicorn.Config(app, port=0, http=partial(PatientProtocol, head_seconds=head), log_config=None)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


def read(connection):
    connection.settimeout(10)
    found = b""
    while part := connection.recv(4096):
        found += part
    return found


POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"


def test_a_head_that_does_not_come_is_cut_off():
    with served(application) as address, socket.create_connection(address) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        with socket.create_connection(address) as quick:
            quick.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert read(quick).endswith(b"ok")
        started = time.monotonic()
        assert read(slow) == b""
        assert time.monotonic() - started < 5


def test_a_second_head_must_come_in_time_too():
    with served(application) as address, socket.create_connection(address) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.1)
        slow.sendall(b"GET / HTTP/1.1\r\nX-")
        answer = read(slow)
        assert answer.count(b"HTTP/1.1 200") == 1


def test_a_head_may_be_followed_by_a_long_body():
    with served(application) as address, socket.create_connection(address) as steady:
        steady.sendall(POST)
        for _ in range(10):
            time.sleep(0.06)
            steady.sendall(b"x" * 10_000)
        assert b"200" in steady.recv(100)


@pytest.mark.parametrize(
    "steady", [{"stall": 0.2}, {"stall": 10.0, "grace": 0.2, "rate": 1e6}], ids=["pauses", "crawls"]
)
def test_a_body_that_takes_its_time_is_cut_off(door, steady):
    app = create_app(door)
    app.user_middleware = [entry for entry in app.user_middleware if entry.cls is not SteadyBody]
    app.add_middleware(SteadyBody, **steady)
    app.add_api_route("/slow", _slow, methods=["POST"])
    with served(app) as address, socket.create_connection(address) as slow:
        slow.sendall(POST.replace(b"POST /", b"POST /slow"))
        answer, give_up = b"", time.monotonic() + 10
        slow.settimeout(0.05)
        while b"408" not in answer and time.monotonic() < give_up:
            if "grace" in steady:
                slow.sendall(b"x")
            try:
                answer += slow.recv(4096)
            except TimeoutError:
                continue
        assert b"too_slow" in answer + read(slow)


async def _slow(request: Request):
    async for _ in request.stream():
        pass
