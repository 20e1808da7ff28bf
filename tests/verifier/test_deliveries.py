"""Deliveries to a real receiver: signed, at least once, never elsewhere, and never for longer than they may take."""

import json
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import servers
from receiver import CERTIFICATE, receiving
from record import NOW, TENANT, work
from sqlalchemy import select, update

from proof import webhook
from verifier import deliveries as couriers
from verifier import webhooks
from verifier.deliveries import Courier
from verifier.lifecycle import Stage
from verifier.tables import DeliveryRow

LOOPBACK = ("127.0.0.1/32",)


def courier(record, networks=LOOPBACK, **options):
    return Courier(record.database, replace(record.settings, webhook_networks=networks), record.clock, **options)


def post(record, url, *stages):
    """A posted task that is to be told to the URL; the webhook."""
    row = webhooks.add(record.database, TENANT, url, stages, record.clock())
    record.post(work())
    return row


def sent(record, row):
    (entry,) = webhooks.deliveries(record.database, row.id, 2)
    return entry.delivery


def newest(record, row):
    """The id of a webhook's newest delivery."""
    return webhooks.deliveries(record.database, row.id, 1)[0].delivery.id


@pytest.fixture
def record_url(request, tmp_path):
    """SQLite's, unless a test asks for both: what is tested here is mostly said over HTTP."""
    return servers.fresh(getattr(request, "param", "sqlite"), tmp_path)


both = pytest.mark.parametrize("record_url", servers.DATABASES, indirect=True)


@pytest.fixture
def receiver():
    with receiving() as server:
        yield server


@both
def test_a_delivery_is_signed_and_says_what_happened(record, receiver):
    row = webhooks.add(record.database, TENANT, receiver.url(), [Stage.ATTESTED], NOW)
    done = work()
    record.check(done)
    record.judge()
    record.clock.now += 60
    courier(record).attempt(sent(record, row).id)
    (came,) = receiver.came
    webhook.verify(row.secret, came.headers, came.body, record.clock())
    event = sent(record, row).event
    assert json.loads(came.body) == {
        "type": "task.attested",
        "timestamp": "2027-01-15T08:00:00.000Z",
        "data": {
            "event": event,
            "task": done.id,
            "stage": "attested",
            "verdict": "accepted",
            "reason": None,
            "attestation": record.store.attestation_of(done.id).uid,
        },
    }
    assert came.path == "/hook?of=acme"
    assert came.headers["webhook-id"] == f"event_{event}"
    assert came.headers["content-type"] == "application/json"
    assert came.headers["host"] == f"127.0.0.1:{receiver.port}"
    entry = sent(record, row)
    assert (entry.stage, entry.attempts, entry.status, entry.detail) == ("delivered", 1, 204, None)


def test_what_is_delivered_is_not_delivered_again(record, receiver):
    row, carrier = post(record, receiver.url()), courier(record)
    for _ in range(3):
        carrier.attempt(sent(record, row).id)
    carrier.attempt("ab" * 32)
    assert len(receiver.came) == 1


def test_it_is_tried_again_and_again_and_then_fails(record, receiver):
    receiver.status = 500
    row, carrier = post(record, receiver.url()), courier(record)
    for attempt, pause in enumerate(couriers.PAUSES, 1):
        carrier.attempt(sent(record, row).id)
        entry = sent(record, row)
        assert (entry.stage, entry.attempts, entry.status, entry.detail) == ("waiting", attempt, 500, "answered 500")
        assert pause <= entry.due - record.clock() <= pause * (1 + couriers.JITTER)
        record.clock.now = entry.due - 0.001
        assert webhooks.due(record.database, record.clock()) == []
        carrier.attempt(entry.id)
        assert len(receiver.came) == attempt
        record.clock.now = entry.due
        assert webhooks.due(record.database, record.clock()) == [entry.id]
    carrier.attempt(sent(record, row).id)
    entry = sent(record, row)
    assert (entry.stage, entry.attempts) == ("failed", len(couriers.PAUSES) + 1)
    record.clock.now += 10**6
    assert webhooks.due(record.database, record.clock()) == []
    assert len({(came.headers["webhook-id"], came.body) for came in receiver.came}) == 1
    assert len({came.headers["webhook-timestamp"] for came in receiver.came}) == len(receiver.came)
    again = webhooks.replay(record.database, row.id, entry.id, record.clock()).delivery
    receiver.status = 200
    carrier.attempt(again.id)
    assert receiver.came[-1].headers["webhook-id"] == receiver.came[0].headers["webhook-id"]


@pytest.mark.parametrize("status", [201, 299])
def test_any_success_is_one(record, receiver, status):
    receiver.status = status
    row = post(record, receiver.url())
    courier(record).attempt(sent(record, row).id)
    assert (sent(record, row).stage, sent(record, row).status) == ("delivered", status)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(record, receiver, status):
    def elsewhere(answering):
        answering.send_response(status)
        answering.send_header("Location", "/elsewhere")
        answering.send_header("Content-Length", "0")
        answering.end_headers()

    receiver.answer = elsewhere
    row = post(record, receiver.url())
    courier(record).attempt(sent(record, row).id)
    assert [came.path for came in receiver.came] == ["/hook?of=acme"]
    assert (sent(record, row).stage, sent(record, row).detail) == ("waiting", f"answered {status}")


@both
def test_gone_removes_the_webhook(record, receiver):
    receiver.status = 410
    row = post(record, receiver.url())
    record.post(work())
    first, second = (entry.delivery.id for entry in webhooks.deliveries(record.database, row.id, 3))
    courier(record).attempt(first)
    courier(record).attempt(second)
    assert webhooks.listed(record.database, TENANT) == []
    assert {entry.delivery.stage for entry in webhooks.deliveries(record.database, row.id, 3)} == {"failed"}
    assert len(receiver.came) == 1


def test_one_who_was_removed_meanwhile_is_told_nothing(record, receiver):
    row = post(record, receiver.url())
    webhooks.remove(record.database, TENANT, row.id, NOW)
    with record.database.write() as session:  # announced in a transaction that began before
        session.execute(update(DeliveryRow).values(stage="waiting"))
    courier(record).attempt(sent(record, row).id)
    assert (sent(record, row).stage, receiver.came) == ("failed", [])


@both
def test_two_processes_deliver_once(record, receiver):
    def slowly(answering):
        first.set()
        assert go_on.wait(10)
        answering.send_response(204)
        answering.end_headers()

    first, go_on = threading.Event(), threading.Event()
    receiver.answer = slowly
    row = post(record, receiver.url())
    id_ = sent(record, row).id
    one = threading.Thread(target=courier(record).attempt, args=[id_])
    one.start()
    assert first.wait(10)
    courier(record).attempt(id_)
    assert webhooks.due(record.database, record.clock()) == []
    go_on.set()
    one.join()
    assert (len(receiver.came), sent(record, row).stage) == (1, "delivered")


@both
def test_a_process_that_dies_leaves_its_delivery_to_another(record, receiver):
    row = post(record, receiver.url())
    dying = courier(record)
    assert dying._take(sent(record, row).id)
    courier(record).attempt(sent(record, row).id)
    assert receiver.came == []
    record.clock.now += couriers.LEASE_SECONDS
    assert webhooks.due(record.database, record.clock()) == [sent(record, row).id]
    courier(record).attempt(sent(record, row).id)
    assert (len(receiver.came), sent(record, row).attempts, sent(record, row).stage) == (1, 2, "delivered")


def test_a_delivery_that_kills_processes_is_given_up(record, receiver):
    row = post(record, receiver.url())
    dying = courier(record)
    for _ in range(couriers.MOST_ATTEMPTS):
        assert dying._take(sent(record, row).id)
        record.clock.now += couriers.LEASE_SECONDS
    courier(record).attempt(sent(record, row).id)
    assert (sent(record, row).stage, receiver.came) == ("failed", [])
    assert webhooks.due(record.database, record.clock() + couriers.LEASE_SECONDS) == []


@both
def test_one_who_comes_back_too_late_changes_nothing(record, receiver):
    row = post(record, receiver.url())
    late = courier(record)
    parcel = late._take(sent(record, row).id)
    record.clock.now += couriers.LEASE_SECONDS
    courier(record).attempt(sent(record, row).id)
    late._record(parcel, couriers.Outcome(500, "answered 500"))
    assert (sent(record, row).stage, sent(record, row).status) == ("delivered", 204)


# ---- never elsewhere


def test_private_addresses_are_not_called_unless_allowed(record, receiver):
    row = webhooks.add(record.database, TENANT, receiver.url("localhost", "https"), [], NOW)
    record.post(work())
    courier(record, networks=()).attempt(sent(record, row).id)
    entry = sent(record, row)
    assert (entry.stage, entry.status) == ("waiting", None)
    assert "not public" in entry.detail
    assert receiver.came == []


def test_a_name_that_leads_elsewhere_later_is_followed_nowhere(record):
    """Two servers on one port: 127.0.0.2 stands for the allowed outside, 127.0.0.1 for the inside."""
    answers = [["127.0.0.2"], ["127.0.0.1"], ["127.0.0.2", "127.0.0.1"], ["127.0.0.2"]]
    asked = []

    def resolve(host, port):
        asked.append((host, port))
        return answers[len(asked) - 1]

    with receiving("127.0.0.2") as outside, receiving("127.0.0.1", outside.port) as inside:
        row = post(record, outside.url("rebinding.test"))
        carrier = courier(record, networks=("127.0.0.2/32",), resolve=resolve)
        seen = []
        for i in range(len(answers)):
            again = webhooks.replay(record.database, row.id, seen[0], NOW).delivery.id if i else sent(record, row).id
            seen.append(again)
            carrier.attempt(again)
        by_id = {entry.delivery.id: entry.delivery.stage for entry in webhooks.deliveries(record.database, row.id, 9)}
    assert [by_id[id_] for id_ in seen] == ["delivered", "waiting", "waiting", "delivered"]
    assert asked == [("rebinding.test", outside.port)] * 4
    assert len(outside.came) == 2
    assert inside.came == []
    assert outside.came[0].headers["host"] == f"rebinding.test:{outside.port}"


def test_an_address_that_does_not_answer_gives_way_to_the_next(record, receiver):
    row = post(record, receiver.url("two.test"))
    resolve = lambda host, port: ["127.0.0.3", "127.0.0.1"]  # noqa: E731
    courier(record, networks=("127.0.0.0/8",), resolve=resolve).attempt(sent(record, row).id)
    assert sent(record, row).stage == "delivered"


def test_a_proxy_of_the_environment_is_not_asked(record, receiver, monkeypatch):
    with receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        row = post(record, receiver.url())
        courier(record).attempt(sent(record, row).id)
    assert (len(receiver.came), proxy.came) == (1, [])


def test_tls_is_checked_against_the_name(record):
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    with receiving(tls=True) as receiver:
        for host, options, stage in (
            ("receiver.test", {"tls": trusting}, "delivered"),
            ("other.test", {"tls": trusting}, "waiting"),
            ("receiver.test", {}, "waiting"),
        ):
            row = post(record, receiver.url(host, "https"))
            carrier = courier(record, resolve=lambda *_: ["127.0.0.1"], **options)
            carrier.attempt(newest(record, row))
            entry = webhooks.deliveries(record.database, row.id, 1)[0].delivery
            assert entry.stage == stage
            assert stage == "delivered" or "certificate is refused" in entry.detail
            webhooks.remove(record.database, TENANT, row.id, NOW)
        assert len(receiver.came) == 1


# ---- never for longer than they may take


def dripping_head(answering):
    answering.wfile.write(b"HTTP/1.1 200 OK\r\n")
    with suppress(OSError):
        while True:
            answering.wfile.write(b"X: y\r\n")
            answering.wfile.flush()
            time.sleep(0.05)


def nothing(answering):
    time.sleep(2)


@pytest.mark.parametrize("answer", [dripping_head, nothing])
def test_a_receiver_that_takes_its_time_is_left(record, receiver, answer):
    receiver.answer = answer
    row = post(record, receiver.url())
    started = time.monotonic()
    courier(record, seconds=0.5).attempt(sent(record, row).id)
    assert time.monotonic() - started < 1.8
    assert (sent(record, row).stage, sent(record, row).detail) == ("waiting", "no answer in time")


def test_an_endless_answer_is_not_read(record, receiver):
    def endless(answering):
        answering.send_response(200)
        answering.end_headers()
        with suppress(OSError):
            while True:
                answering.wfile.write(bytes(1 << 16))

    receiver.answer = endless
    row = post(record, receiver.url())
    started = time.monotonic()
    courier(record, seconds=10).attempt(sent(record, row).id)
    assert time.monotonic() - started < 5
    assert sent(record, row).stage == "delivered"


@pytest.mark.parametrize("raw", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000])
def test_an_answer_that_is_not_http_is_none(record, receiver, raw):
    receiver.answer = lambda answering: answering.wfile.write(raw)
    row = post(record, receiver.url())
    courier(record, seconds=5).attempt(sent(record, row).id)
    assert sent(record, row).stage == "waiting"
    assert sent(record, row).detail.startswith("no answer")


def test_nobody_listens(record, receiver):
    row = post(record, f"http://127.0.0.1:{free_port()}/")
    courier(record).attempt(sent(record, row).id)
    assert sent(record, row).detail == "no answer: ConnectError"


def free_port():
    with receiving() as server:
        return server.port


def test_a_slow_receiver_does_not_keep_others_waiting(record, receiver):
    def slowly(answering):
        came.release()
        assert go_on.wait(20)
        answering.send_response(204)
        answering.end_headers()

    came, go_on = threading.Semaphore(0), threading.Event()
    with receiving() as slow:
        slow.answer = slowly
        rows = [webhooks.add(record.database, TENANT, server.url(), [], NOW) for server in (slow, receiver)]
        record.post(work())
        for row in rows:
            for _ in range(couriers.THREADS + 3):
                webhooks.replay(record.database, row.id, newest(record, row), NOW)
        carrier = courier(record)
        for row in rows:
            for entry in webhooks.deliveries(record.database, row.id, 100):
                carrier.deliver(entry.delivery.id)
        for _ in range(couriers.THREADS_EACH):
            assert came.acquire(timeout=10)
        give_up = time.monotonic() + 20
        while len(receiver.came) < couriers.THREADS and time.monotonic() < give_up:
            for id_ in webhooks.due(record.database, record.clock()):
                carrier.deliver(id_)
            time.sleep(0.02)
        assert len(receiver.came) >= couriers.THREADS
        assert len(slow.came) == couriers.THREADS_EACH
        go_on.set()
        carrier.close()
    with record.database.read() as session:
        stages = session.scalars(select(DeliveryRow.stage).where(DeliveryRow.webhook == rows[0].id)).all()
    assert stages.count("delivered") == couriers.THREADS_EACH
