"""Events over HTTP from a real server, and the listening behind them: in order, none twice, none missed."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from record import TENANT, work
from sqlalchemy import event as hooks

from api import events as routes
from api import listening
from api.app import create_app
from api.listening import Listening
from proof.errors import Unavailable
from tests.api.calls import refused
from verifier.database import Database
from verifier.lifecycle import Stage
from verifier.outbox import Moved, announce

TIMEOUT = 20.0


@dataclass
class Live:
    """A server in a thread, with what it is asked to stop by."""

    server: uvicorn.Server
    thread: threading.Thread

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


class Server(uvicorn.Server):
    """Lets listeners go before it waits for connections, as `assay serve` does."""

    def __init__(self, config, door):
        super().__init__(config)
        self.door = door

    async def shutdown(self, sockets=None):
        self.door.listening.end()
        await super().shutdown(sockets)


@pytest.fixture
def live(door):
    server = Server(uvicorn.Config(create_app(door), port=0, log_config=None), door)
    running = Live(server, threading.Thread(target=server.run))
    running.thread.start()
    wait(lambda: server.started)
    yield running
    running.stop()


def wait(condition):
    give_up = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.fixture
def client(live, token):
    with httpx.Client(
        base_url=live.url, headers={"Authorization": f"Bearer {token()}"}, timeout=TIMEOUT, trust_env=False
    ) as caller:
        yield caller


@contextmanager
def stream(client, **options):
    """The events of a stream as they come, once it is open."""
    with client.stream("GET", "/v1/events", **options) as answer:
        if answer.is_error:
            answer.read()
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        lines = answer.iter_lines()
        assert next(lines) == "retry: 1000"
        yield parsed(lines)


def parsed(lines):
    """As a browser reads them: fields until an empty line."""
    fields = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, value = line.split(": ", 1)
            fields[name] = value
        elif fields:
            assert fields["event"] == f"task.{json.loads(fields['data'])['stage']}"
            assert int(fields["id"]) == json.loads(fields["data"])["event"]
            yield json.loads(fields["data"])
            fields = {}


def stages(events, count):
    return [next(events)["stage"] for _ in range(count)]


def move(record, task, count, tenant=TENANT):
    """Announce `count` events of a task, each in a transaction of its own."""
    for _ in range(count):
        with record.database.write() as session:
            announce(session, [Moved(task, tenant, Stage.CHECKING)], record.clock())


def test_each_stage_is_told_as_it_comes(client, record):
    done = work()
    with stream(client) as events:
        record.check(done)
        assert stages(events, 3) == ["posted", "challenged", "checking"]
        record.judge()
        accepted, attested = next(events), next(events)
    uid = record.store.attestation_of(done.id).uid
    assert accepted == {
        "event": accepted["event"],
        "task": done.id,
        "stage": "accepted",
        "verdict": "accepted",
        "reason": None,
        "attestation": None,
    }
    assert (attested["stage"], attested["attestation"]) == ("attested", uid)
    assert attested["event"] > accepted["event"]


def test_who_comes_back_misses_nothing(client, record):
    record.check(work())
    with stream(client, params={"after": "0"}) as events:
        posted = next(events)
    record.judge()
    with stream(client, headers={"Last-Event-ID": str(posted["event"])}, params={"after": "99"}) as events:
        assert stages(events, 4) == ["challenged", "checking", "accepted", "attested"]


def test_without_a_number_it_begins_with_the_next(client, record):
    record.check(work())
    with stream(client) as events:
        record.judge()
        assert stages(events, 2) == ["accepted", "attested"]


def test_tenants_hear_of_their_own_tasks_only(client, live, token, record):
    first, second = work(), work()
    for done, tenant in ((first, "others"), (second, TENANT)):
        record.register()
        record.store.add_task(done.asked.task, record.keep(b"inputs"), record.clock(), tenant)
    start = {"after": "0"}
    with stream(client, params=start) as events:
        assert next(events)["task"] == second.id
    admin = {"Authorization": f"Bearer {token('root', 'admin')}"}
    with stream(client, params=start, headers=admin) as events:
        assert [next(events)["task"] for _ in range(2)] == [first.id, second.id]
    refused(client.get("/v1/events", params={"task": first.id}), 404, "task.unknown")


def test_one_task_alone(client, record):
    first, second = record.check(work()), record.check(work())
    with stream(client, params={"after": "0", "task": second}) as events:
        assert {next(events)["task"] for _ in range(3)} == {second}
        move(record, first, 2)
        move(record, second, 1)
        assert next(events)["task"] == second


@pytest.mark.parametrize(
    "asked",
    [
        {"params": {"after": "x"}},
        {"params": {"after": "-1"}},
        {"params": {"after": "9" * 19}},
        {"params": {"task": "x"}},
        {"headers": {"Last-Event-ID": "1; 2"}},
        {"headers": {"Last-Event-ID": ""}},
    ],
)
def test_what_is_no_number(api, asked):
    refused(api.get("/v1/events", **asked), 422, "malformed")


def test_many_listeners_hear_the_same(client, record):
    task = record.post(work())

    def hear(_):
        with stream(client, params={"after": "0"}) as events:
            heard.release()
            return [next(events)["event"] for _ in range(41)]

    heard = threading.Semaphore(0)
    with ThreadPoolExecutor(12) as pool:
        listeners = [pool.submit(hear, i) for i in range(12)]
        for _ in listeners:
            assert heard.acquire(timeout=TIMEOUT)
        move(record, task, 40)
        told = [listener.result(TIMEOUT) for listener in listeners]
    assert told == [sorted(set(told[0]))] * 12


def test_a_reader_that_leaves_is_forgotten(client, door):
    with stream(client), stream(client):
        wait(lambda: len(door.listening._listeners) == 2)
    wait(lambda: not door.listening._listeners and not door.listening._seats.total())


def test_there_are_places_for_so_many(client, door, live, token):
    seats = [door.listening.seat(TENANT) for _ in range(listening.MAX_STREAMS_EACH)]
    for seat in seats:
        seat.__enter__()
    refused(client.get("/v1/events"), 503, "unavailable")
    others = {"Authorization": f"Bearer {token('others')}"}
    with stream(client, headers=others):
        pass
    seats.pop().__exit__(None, None, None)
    with stream(client):
        refused(client.get("/v1/events"), 503, "unavailable")
    more = [door.listening.seat(f"t{i}") for i in range(listening.MAX_STREAMS - len(seats))]
    wait(lambda: door.listening._seats.total() == len(seats))
    for seat in more:
        seat.__enter__()
    refused(client.get("/v1/events", headers=others), 503, "unavailable")


def test_a_stream_does_not_last_for_ever(client, record, monkeypatch):
    monkeypatch.setattr(routes, "STREAM_SECONDS", 0.0)
    record.check(work())
    with stream(client, params={"after": "0"}) as events:
        assert [event["stage"] for event in events] == ["posted"]


def test_a_reader_that_stands_still_is_let_go(live, token, record, door, monkeypatch):
    monkeypatch.setattr(routes, "STREAM_SECONDS", 1.5)
    monkeypatch.setattr(routes, "STALLED_SECONDS", 0.1)
    listener = live.server.servers[0].sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    task = record.post(work())
    with record.database.write() as session:
        announce(session, [Moved(task, TENANT, Stage.CHECKING)] * 3000, record.clock())
    with socket.socket() as still:
        still.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        still.connect(listener.getsockname())
        head = f"GET /v1/events?after=0 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token()}\r\n\r\n"
        still.sendall(head.encode())
        assert still.recv(16).startswith(b"HTTP/1.1 200")
        assert door.listening._seats.total() == 1
        wait(lambda: not door.listening._seats.total())


def test_a_server_that_stops_lets_listeners_go(client, live):
    ended = threading.Event()

    def hear():
        with stream(client) as events:
            opened.set()
            assert list(events) == []
        ended.set()

    opened = threading.Event()
    thread = threading.Thread(target=hear)
    thread.start()
    assert opened.wait(TIMEOUT)
    started = time.monotonic()
    live.stop()
    assert time.monotonic() - started < 5
    assert ended.wait(TIMEOUT)
    thread.join()


# ---- the listening itself


def heard(told, count):
    async def gather():
        async with aclosing(told):
            return [event.number async for event in first(told, count)]

    return gather()


async def first(told, count):
    async for event in told:
        if event is None:
            continue
        yield event
        count -= 1
        if not count:
            return


def test_quiet_is_told(record):
    async def quiet():
        async with Listening(record.database) as door, aclosing(door.events(TENANT, None, quiet=0.05)) as told:
            lines = routes.EventStream(told).body_iterator
            return [await anext(lines) for _ in range(3)]

    assert asyncio.run(quiet()) == [b"retry: 1000\n\n", b":\n\n", b":\n\n"]


def test_a_long_history_is_read_in_pages_and_goes_over_into_what_is_new(record):
    task = record.post(work())
    with record.database.write() as session:
        announce(session, [Moved(task, TENANT, Stage.CHECKING)] * (2 * listening.PAGE), record.clock())

    async def listen():
        async with Listening(record.database) as door:
            waiting = asyncio.create_task(heard(door.events(TENANT, 0), 2 * listening.PAGE + 31))
            await asyncio.to_thread(move, record, task, 30)
            return await asyncio.wait_for(waiting, TIMEOUT)

    assert asyncio.run(listen()) == list(range(1, 2 * listening.PAGE + 32))


def test_a_listener_that_is_too_slow_is_let_go_and_goes_on_where_it_was(record):
    task = record.post(work())
    more = listening.MAX_BEHIND + 5

    async def listen():
        async with Listening(record.database) as door:
            seen = []
            async with aclosing(door.events(TENANT, 0)) as told:
                seen.append((await anext(told)).number)
                waiting = asyncio.create_task(anext(told))
                while not door._placed.is_set():
                    await asyncio.sleep(0.01)
                move(record, task, 1)
                seen.append((await waiting).number)
                with record.database.write() as session:
                    announce(session, [Moved(task, TENANT, Stage.CHECKING)] * more, record.clock())
                while door._last < more + 2:
                    await asyncio.sleep(0.01)
                seen += [event.number async for event in told]
            assert seen == list(range(1, listening.MAX_BEHIND + 3))
            return seen + await heard(door.events(TENANT, seen[-1]), more + 2 - len(seen))

    assert asyncio.run(listen()) == list(range(1, more + 3))


def test_a_change_wakes_who_waits_for_that_task(record):
    one, other = record.post(work()), record.post(work())

    async def changed():
        loop = asyncio.get_running_loop()
        async with Listening(record.database) as door:
            await asyncio.wait_for(door.changed(one, TIMEOUT), TIMEOUT)  # it was posted just now
            waiting = asyncio.create_task(door.changed(one, TIMEOUT))
            await asyncio.to_thread(move, record, other, 1)
            await asyncio.sleep(3 * listening.POLL)
            assert not waiting.done()
            await asyncio.to_thread(move, record, one, 1)
            await asyncio.wait_for(waiting, 5)
            started = loop.time()
            await door.changed(one, 0.2)
            assert 0.19 < loop.time() - started < 5
            assert not door._listeners
            door.end()
            await asyncio.wait_for(door.changed(one, TIMEOUT), 1)
            assert [event async for event in door.events(None, 0)] == []

    asyncio.run(changed())


def test_nobody_listens_nothing_is_read(record):
    async def idle():
        async with Listening(record.database) as door:
            await door.changed("ab" * 32, 0.05)
            await asyncio.sleep(2 * listening.POLL)
            before = len(read)
            await asyncio.sleep(4 * listening.POLL)
            return before, len(read)

    read = []
    engine = record.database._engine
    hooks.listen(engine, "before_cursor_execute", lambda *arguments: read.append(arguments[2]))
    before, after = asyncio.run(idle())
    assert 0 < before == after


def test_a_database_that_was_away_is_listened_to_again(record):
    """A database of the same file that is refused at first, as one that restarts is."""
    task = record.post(work())

    class Restarting(Database):
        refusals = 1

        def read(self):
            if self.refusals:
                self.refusals -= 1
                raise Unavailable("restarting")
            return super().read()

    async def listen():
        async with Listening(database) as door:
            return await asyncio.wait_for(heard(door.events(TENANT, 0), 1), TIMEOUT)

    database = Restarting(record.settings.database)
    assert asyncio.run(listen()) == [1]
    database.close()
    assert record.stage(task) == "posted"
