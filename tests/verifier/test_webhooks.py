"""Webhooks on record, and where one may lead: to public addresses over TLS, and nowhere else unless it is allowed."""

from datetime import UTC, datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record import NOW, TENANT, work
from sqlalchemy import select, update

from proof import webhook
from proof.errors import Malformed, Unavailable
from verifier import events, webhooks
from verifier.destinations import MAX_URL_BYTES, Destinations, Refused, resolved
from verifier.lifecycle import Stage
from verifier.tables import DeliveryRow

PUBLIC = ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8")
PRIVATE = (
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.0.0.9",
    "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "224.0.1.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::10.0.0.1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "64:ff9b::808:808",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:a00:1::1", "2002:808:808::1", "3fff::1", "5f00::1",
    "fc00::1", "fd12::1", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "ff0e::1",
)  # fmt: skip


def add(record, *stages, tenant=TENANT, url="https://example.com/hook"):
    return webhooks.add(record.database, tenant, url, stages, record.clock())


def deliveries(record):
    with record.database.read() as session:
        return session.scalars(select(DeliveryRow).order_by(DeliveryRow.event, DeliveryRow.id)).all()


def test_a_webhook_has_a_secret_of_its_own(record):
    first, second = add(record), add(record, Stage.ATTESTED, Stage.EXPIRED)
    assert first.secret != second.secret
    webhook.verify(first.secret, webhook.sign(first.secret, "a", 1, b""), b"", 1)
    assert [(row.id, row.stages) for row in webhooks.listed(record.database, TENANT)] == sorted(
        [(first.id, []), (second.id, ["attested", "expired"])]
    )


def test_tenants_do_not_meet(record):
    mine, other = add(record), add(record, tenant="others")
    assert [row.id for row in webhooks.listed(record.database, TENANT)] == [mine.id]
    assert webhooks.find(record.database, TENANT, other.id) is None
    assert webhooks.remove(record.database, TENANT, other.id, NOW) is None
    assert webhooks.find(record.database, "others", other.id)


def test_a_tenant_has_so_many_and_no_more(record):
    rows = [add(record) for _ in range(webhooks.MAX_WEBHOOKS)]
    with pytest.raises(webhooks.TooMany):
        add(record)
    add(record, tenant="others")
    webhooks.remove(record.database, TENANT, rows[0].id, NOW)
    add(record)


def test_what_waits_for_a_removed_webhook_fails(record):
    gone, stays = add(record), add(record)
    record.post(work())
    assert webhooks.remove(record.database, TENANT, gone.id, NOW)
    assert webhooks.remove(record.database, TENANT, gone.id, NOW) is None
    told = {row.webhook: (row.stage, row.detail) for row in deliveries(record)}
    assert told == {gone.id: ("failed", "the webhook was removed"), stays.id: ("waiting", None)}
    record.post(work())
    assert [row.webhook for row in deliveries(record)].count(gone.id) == 1


def test_pages_of_deliveries_meet_the_newest_first(record):
    row = add(record)
    for _ in range(5):
        record.post(work())
    first = webhooks.deliveries(record.database, row.id, 1)[0].delivery
    webhooks.replay(record.database, row.id, first.id, NOW)
    seen, before = [], None
    while page := webhooks.deliveries(record.database, row.id, 2, before):
        seen += [sent.delivery for sent in page]
        before = seen[-1].event, seen[-1].id
    assert [entry.id for entry in seen] == [entry.id for entry in reversed(deliveries(record))]
    assert [entry.event for entry in seen] == sorted((entry.event for entry in seen), reverse=True)
    assert len({entry.id for entry in seen}) == 6


def test_a_replay_is_a_delivery_of_its_own(record):
    row, other = add(record), add(record)
    record.post(work())
    sent = webhooks.deliveries(record.database, row.id, 1)[0].delivery
    with record.database.write() as session:
        session.execute(update(DeliveryRow).values(stage=webhooks.DELIVERED, attempts=3))
    again = webhooks.replay(record.database, row.id, sent.id, NOW + 5)
    assert again.delivery.id != sent.id
    assert (again.event.id, again.event.stage) == (sent.event, "posted")
    assert webhooks.due(record.database, NOW + 5) == [again.delivery.id]
    assert webhooks.replay(record.database, other.id, sent.id, NOW) is None
    assert webhooks.replay(record.database, row.id, "ab" * 32, NOW) is None


def test_what_is_due_is_shared_among_webhooks(record):
    busy, quiet = add(record), add(record)
    record.post(work())
    event = deliveries(record)[0].event
    with record.database.write() as session:
        for i in range(webhooks.MOST_DUE_EACH + 5):
            due = NOW - 1000 + i
            session.add(
                DeliveryRow(id=f"{i:064x}", webhook=busy.id, event=event, stage="waiting", due=due, created=due)
            )
    asked = webhooks.due(record.database, NOW)
    assert asked[: webhooks.MOST_DUE_EACH] == [f"{i:064x}" for i in range(webhooks.MOST_DUE_EACH)]
    (last,) = asked[webhooks.MOST_DUE_EACH :]
    assert {row.id: row.webhook for row in deliveries(record)}[last] == quiet.id


def test_nothing_is_due_before_its_time(record):
    add(record)
    record.post(work())
    assert webhooks.due(record.database, NOW - 1) == []
    assert len(webhooks.due(record.database, NOW)) == 1


def test_an_event_says_what_was_known_then(record):
    done = work()
    record.check(done)
    record.judge()
    with record.database.read() as session:
        told = events.read(session, 0, 100)
        assert [events.one(session, one.number) for one in told] == told
        assert [one.stage for one in events.read(session, told[2].number, 100, TENANT, done.id)] == [
            "accepted",
            "attested",
        ]
        assert events.read(session, 0, 100, "others") == []
        assert events.read(session, 0, 100, None, "ab" * 32) == []
        assert events.newest(session) == told[-1].number
    uid = record.store.attestation_of(done.id).uid
    assert [(one.stage, one.verdict, one.attestation) for one in told] == [
        ("posted", None, None),
        ("challenged", None, None),
        ("checking", None, None),
        ("accepted", "accepted", None),
        ("attested", "accepted", uid),
    ]
    assert {datetime.fromtimestamp(one.created, UTC).year for one in told} == {2027}


# ---- where one may lead


def host(address):
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_over_tls(address):
    found = Destinations([], lambda name, port: [address])
    assert found.addresses(found.url("https://example.com/hook")) == [address]
    found.url(f"https://{host(address)}/hook")
    with pytest.raises(Refused):
        found.url(f"http://{host(address)}/hook")


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_by_name_and_by_number(address):
    found = Destinations([], lambda name, port: ["8.8.8.8", address])
    with pytest.raises(Refused, match="not public") as refusal:
        found.addresses(found.url("https://example.com/hook"))
    assert address not in str(refusal.value)
    if "%" not in address:
        with pytest.raises(Refused, match="not public"):
            found.url(f"https://{host(address)}/hook")


@pytest.mark.parametrize("name", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "localhost", "localhost."])
def test_odd_names_of_loopback_are_refused(name):
    found = Destinations([])
    with pytest.raises((Refused, Unavailable)):
        found.addresses(found.url(f"https://{name}/hook"))


def test_networks_that_the_settings_name_are_allowed():
    found = Destinations(["10.1.0.0/16", "fd00::/8"], lambda name, port: ["10.1.2.3", "fd00::1", "::ffff:10.1.0.9"])
    for scheme in ("http", "https"):
        assert len(found.addresses(found.url(f"{scheme}://inside.example/hook"))) == 3
        found.url(f"{scheme}://10.1.2.3/")
        with pytest.raises(Refused):
            found.url(f"{scheme}://10.2.2.3/")
    with pytest.raises(Refused, match="without TLS"):
        Destinations(["10.1.0.0/16"], lambda *_: ["8.8.8.8"]).addresses(httpx.URL("http://example.com"))
    with pytest.raises(Malformed, match="ASSAY_WEBHOOK_NETWORKS"):
        Destinations(["10.1.0.1/16"])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/hook",
        "//example.com/hook",
        "http://example.com/hook",
        "ftp://example.com/hook",
        "file:///etc/passwd",
        "https://",
        "https:///hook",
        "https://user@example.com/",
        "https://user:word@example.com/",
        "https://example.com/#part",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://.example.com/",
        "https://example..com/",
        "https://exa mple.com/",
        "https://example.com/\r\nHost: other",
        "https://example.com\\@127.0.0.1/",
        "https://[::1/",
        "https://" + "a" * 64 + ".com/",
        "https://example.com/" + "a" * MAX_URL_BYTES,
        "https://example.com/" + "é" * (MAX_URL_BYTES // 4),
    ],
)
def test_what_is_no_public_https_url_is_refused(url):
    with pytest.raises(Refused):
        Destinations([]).url(url)


@given(st.text(max_size=40), st.sampled_from(["", "https://", "https://[", "https://a:"]))
def test_any_text_is_a_url_or_refused(text, start):
    try:
        url = Destinations([]).url(start + text)
    except Refused:
        return
    assert Destinations([]).url(str(url)) == url
    assert (url.scheme, url.userinfo, bool(url.host)) == ("https", b"", True)


def test_a_name_without_an_address():
    with pytest.raises(Unavailable):
        resolved("nobody.invalid", 443)
    with pytest.raises(Unavailable):
        Destinations([], lambda *_: []).addresses(httpx.URL("https://example.com"))
    with pytest.raises(Refused):
        Destinations([], lambda *_: ["nonsense"]).addresses(httpx.URL("https://example.com"))
