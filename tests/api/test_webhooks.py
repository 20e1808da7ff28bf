"""Webhooks over HTTP: made, shown once with their secret, listed, removed, and what was sent sent again."""

from dataclasses import replace

import pytest
from receiver import receiving
from record import TENANT, work

from api import webhooks as routes
from proof import webhook
from tests.api.calls import refused
from verifier import webhooks
from verifier.deliveries import Courier
from verifier.tables import DeliveryRow

URL = "https://example.com/assay"


def add(api, url=URL, **changes):
    return api.post("/v1/webhooks", json={"url": url} | changes)


@pytest.fixture
def others(token):
    return {"Authorization": f"Bearer {token('others')}"}


def test_the_secret_is_shown_once(api):
    answer = add(api, stages=["expired", "attested"])
    assert answer.status_code == 201
    made = routes.WebhookSecret.model_validate_json(answer.content)
    webhook.verify(made.secret, webhook.sign(made.secret, "a", 1, b""), b"", 1)
    shown = api.get("/v1/webhooks")
    assert made.secret not in shown.text
    (only,) = routes.WebhookList.model_validate_json(shown.content).webhooks
    assert (only.id, only.url, only.stages) == (made.id, URL, ["attested", "expired"])


def test_a_repeated_request_makes_one(api):
    first, again = (api.post("/v1/webhooks", json={"url": URL}, headers={"Idempotency-Key": "once"}) for _ in range(2))
    assert first.json() == again.json()
    assert len(api.get("/v1/webhooks").json()["webhooks"]) == 1
    for _ in range(2):
        lie = api.post("/v1/webhooks", json={"url": "http://a/"}, headers={"Idempotency-Key": "refused"})
        refused(lie, 422, "webhook.refused")


def test_it_is_removed_and_told_nothing_more(api, record):
    id_ = add(api).json()["id"]
    assert api.delete(f"/v1/webhooks/{id_}").status_code == 204
    assert api.get("/v1/webhooks").json() == {"webhooks": []}
    record.post(work())
    with record.database.read() as session:
        assert session.query(DeliveryRow).all() == []
    refused(api.delete(f"/v1/webhooks/{id_}"), 404, "webhook.unknown")
    refused(api.get(f"/v1/webhooks/{id_}/deliveries"), 404, "webhook.unknown")


def test_a_tenant_sees_its_own_only(api, others, record):
    id_ = add(api).json()["id"]
    record.post(work())
    delivery = api.get(f"/v1/webhooks/{id_}/deliveries").json()["deliveries"][0]["id"]
    assert api.get("/v1/webhooks", headers=others).json() == {"webhooks": []}
    at = f"/v1/webhooks/{id_}"
    for method, path in (
        ("DELETE", at),
        ("GET", f"{at}/deliveries"),
        ("POST", f"{at}/deliveries/{delivery}/replay"),
    ):
        refused(api.request(method, path, headers=others), 404, "webhook.unknown")
    foreign = api.post("/v1/webhooks", json={"url": URL}, headers=others).json()["id"]
    refused(api.post(f"/v1/webhooks/{foreign}/deliveries/{delivery}/replay", headers=others), 404, "webhook.unknown")


def test_callers_need_the_scope(anonymous, token):
    for method, path in (
        ("GET", "/v1/webhooks"),
        ("POST", "/v1/webhooks"),
        ("DELETE", f"/v1/webhooks/{'ab' * 16}"),
        ("GET", f"/v1/webhooks/{'ab' * 16}/deliveries"),
        ("POST", f"/v1/webhooks/{'ab' * 16}/deliveries/{'ab' * 32}/replay"),
        ("GET", "/v1/events"),
    ):
        body = {"json": {"url": URL}} if path == "/v1/webhooks" and method == "POST" else {}
        refused(anonymous.request(method, path, **body), 401, "caller.unknown")
        only_models = {"Authorization": f"Bearer {token(TENANT, 'models')}"}
        refused(anonymous.request(method, path, headers=only_models, **body), 403, "scope.missing")


@pytest.mark.parametrize(
    "url",
    ["http://example.com/", "https://127.0.0.1/", "https://[::1]/", "https://a:b@example.com/", "ftp://a/", "nonsense"],
)
def test_a_url_that_may_not_be_called(api, url):
    refused(add(api, url), 422, "webhook.refused")
    assert api.get("/v1/webhooks").json() == {"webhooks": []}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": 7},
        {"url": "https://example.com/" + "a" * 2048},
        {"url": URL, "stages": ["paid"]},
        {"url": URL, "stages": "attested"},
        {"url": URL, "secret": "whsec_mine"},
        {"url": URL, "stages": ["posted"] * 10},
    ],
)
def test_what_is_no_webhook(api, body):
    refused(api.post("/v1/webhooks", json=body), 422, "malformed")


def test_so_many_and_no_more(api):
    for _ in range(webhooks.MAX_WEBHOOKS):
        assert add(api).status_code == 201
    refused(add(api), 409, "webhook.many")


def test_deliveries_are_shown_page_by_page_and_sent_again(api, door, record):
    door.settings = replace(door.settings, webhook_networks=("127.0.0.1/32",))
    with receiving() as receiver:
        made = add(api, receiver.url()).json()
        for _ in range(3):
            record.post(work())
        at = f"/v1/webhooks/{made['id']}/deliveries"
        first = routes.DeliveryList.model_validate_json(api.get(at, params={"limit": 2}).content)
        second = routes.DeliveryList.model_validate_json(api.get(at, params={"limit": 2, "cursor": first.next}).content)
        found = first.deliveries + second.deliveries
        assert [entry.event for entry in found] == sorted((entry.event for entry in found), reverse=True)
        assert (len(found), second.next) == (3, None)
        courier = Courier(record.database, door.settings, record.clock)
        courier.attempt(found[0].id)
        shown = routes.DeliveryList.model_validate_json(api.get(at).content).deliveries
        assert [(entry.stage, entry.status, entry.due is None) for entry in shown] == [
            ("delivered", 204, True),
            ("waiting", None, False),
            ("waiting", None, False),
        ]
        answer = api.post(f"{at}/{found[0].id}/replay")
        assert answer.status_code == 202
        again = routes.Delivery.model_validate_json(answer.content)
        assert (again.event, again.stage, again.attempts) == (found[0].event, "waiting", 0)
        courier.attempt(again.id)
        webhook.verify(made["secret"], receiver.came[-1].headers, receiver.came[-1].body, record.clock())
        assert [came.body for came in receiver.came] == [receiver.came[0].body] * 2
    refused(api.post(f"{at}/{'ab' * 32}/replay"), 404, "webhook.unknown")


@pytest.mark.parametrize("cursor", ["x", "1", "1.ab", ".", "-1." + "ab" * 32, "1" * 19 + "." + "ab" * 32])
def test_a_cursor_that_was_never_given(api, cursor):
    id_ = add(api).json()["id"]
    refused(api.get(f"/v1/webhooks/{id_}/deliveries", params={"cursor": cursor}), 422, "malformed")
