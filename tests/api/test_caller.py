"""Who may call: keys with scopes, workers by their signature, everybody else only what is public."""

import pytest
import world
from record import TENANT, work

from api import caller
from proof.requests import LEEWAY_SECONDS, MAX_REQUEST_SECONDS, Action
from prover.calls import Purpose, Service
from tests.api.calls import body, commit, refused, signing, upload
from verifier import tenants

PUBLIC = ("/livez", "/.well-known/assay.json", "/openapi.json", "/docs")
OTHER = bytes.fromhex("22" * 32)


@pytest.fixture
def done(api):
    made = work()
    assert api.post("/v1/models", content=made.asked.source).is_success
    assert api.post("/v1/tasks", json=body(made)).status_code == 201
    return made


@pytest.fixture
def stranger(api, anonymous, done):
    """The same service without an API key."""
    del anonymous.headers["Authorization"]
    return anonymous


def test_strangers_see_what_is_public_and_nothing_else(anonymous):
    for path in PUBLIC:
        assert anonymous.get(path).is_success, path
    paths = anonymous.get("/openapi.json").json()["paths"]
    for path, item in paths.items():
        for method in item:
            if path.startswith("/v1/") or path == "/metrics":
                url = path.replace("{digest}", "ab" * 32).replace("{uid}", "ab" * 32).replace("{model}", "ab" * 32)
                url = url.replace("{task}", "ab" * 32).replace("{webhook}", "ab" * 16).replace("{delivery}", "ab" * 32)
                answer = anonymous.request(method, url, json={})
                assert answer.status_code in (401, 404, 422), (method, path)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.status_code != 404 or path.startswith("/v1/tasks/{task}/"), (method, path)


@pytest.mark.parametrize("header", ["", "Basic YTpi", "Bearer ", "Bearer assay_0", "Bearer \u00e9".encode("latin-1")])
def test_what_is_no_key_is_refused(anonymous, header):
    refused(anonymous.get("/v1/tasks", headers={"Authorization": header}), 401, "caller.unknown")


def test_a_key_may_what_its_scopes_say(anonymous, token):
    wanted = {"tasks": "/v1/tasks", "models": f"/v1/weights/{'ab' * 32}", "metrics": "/metrics"}
    for scope in (*wanted, "admin"):
        headers = {"Authorization": f"Bearer {token(TENANT, scope)}"}
        for other, path in wanted.items():
            answer = anonymous.get(path, headers=headers)
            if scope in (other, "admin"):
                assert answer.status_code in (200, 404)
            else:
                refused(answer, 403, "scope.missing")


def test_a_revoked_key_ends_within_a_minute(api, record):
    assert api.get("/v1/tasks").is_success
    (row,) = tenants.listed(record.database)
    tenants.revoke(record.database, row.id, record.clock())
    record.clock.now += caller.BELIEVED_SECONDS + 1
    refused(api.get("/v1/tasks"), 401, "caller.unknown")


def test_a_key_that_expires_is_not_believed_for_longer(anonymous, record):
    _, token = tenants.create(record.database, TENANT, "short", ["tasks"], record.clock(), record.clock() + 10)
    headers = {"Authorization": f"Bearer {token}"}
    assert anonymous.get("/v1/tasks", headers=headers).is_success
    record.clock.now += 11
    refused(anonymous.get("/v1/tasks", headers=headers), 401, "caller.unknown")


def listing(client, key):
    with Service(str(client.base_url), worker=key) as service:
        return service.signed(Purpose(Action.LIST), client.app.state.door.clock())


def test_a_worker_finds_reads_and_does_a_task_without_a_key(stranger, done, record, tmp_path):
    task = done.asked.task
    listed = stranger.get("/v1/tasks?stage=posted", headers=listing(stranger, world.WORKER)).json()["tasks"]
    assert [state["id"] for state in listed] == [done.id]
    reading = signing(stranger, task, Action.READ)
    assert stranger.get(f"/v1/tasks/{done.id}/inputs", headers=reading).is_success
    assert commit(stranger, done).is_success
    assert stranger.get(f"/v1/tasks/{done.id}", headers=reading).json()["stage"] == "challenged"
    other = signing(stranger, task, Action.READ, key=OTHER)
    refused(stranger.get(f"/v1/tasks/{done.id}", headers=other), 404, "task.unknown")
    assert stranger.get("/v1/tasks", headers=listing(stranger, OTHER)).json()["tasks"] == []
    refused(stranger.post("/v1/tasks", json=body(work()), headers=reading), 401, "caller.unknown")


def test_a_signature_is_for_one_action_on_one_task(stranger, done):
    task, at = done.asked.task, f"/v1/tasks/{done.id}"
    for lie in (
        signing(stranger, work().asked.task, Action.READ),
        signing(stranger, task, Action.COMMIT, done.signed.digest()),
        listing(stranger, world.WORKER),
        signing(stranger, task, Action.READ) | {"Assay-Worker": "0x" + "ab" * 20},
        signing(stranger, task, Action.READ) | {"Assay-Signature": "0x" + "1b" * 65},
        signing(stranger, task, Action.READ) | {"Assay-Signature": "0x12"},
    ):
        refused(stranger.get(at, headers=lie), 403, "signature")
    sent = {"headers": signing(stranger, task, Action.READ), "json": done.signed.to_json()}
    refused(stranger.post(f"{at}/commitment", **sent), 403, "signature")


def test_a_signature_for_another_service_is_worthless_here(stranger, done, record):
    with Service("https://other.example", worker=world.WORKER) as elsewhere:
        headers = elsewhere.signed(Purpose(Action.READ, done.asked.task.id()), record.clock())
    refused(stranger.get(f"/v1/tasks/{done.id}", headers=headers | {"Host": "other.example"}), 403, "signature")


def test_a_signature_ends(stranger, done, record):
    headers, at = signing(stranger, done.asked.task, Action.READ), f"/v1/tasks/{done.id}"
    expires = int(headers["Assay-Expires"])
    for now, good in (
        (expires + LEEWAY_SECONDS, True),
        (expires + LEEWAY_SECONDS + 1, False),
        (expires - MAX_REQUEST_SECONDS - LEEWAY_SECONDS - 1, False),
    ):
        record.clock.now = float(now)
        answer = stranger.get(at, headers=headers)
        if good:
            assert answer.is_success
        else:
            refused(answer, 403, "request.expired")


def test_nobody_uploads_for_another(stranger, done, tmp_path):
    assert commit(stranger, done).is_success
    (tmp_path / "proof").write_bytes(b"x")
    refused(upload(stranger, done, tmp_path / "proof", OTHER), 403, "proof.signature")
