"""What answers have in common: pages, entity tags, waiting, repeated requests, many tasks at once, tenants apart."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Timer

import pytest
import world
from record import TENANT, work

from api import schemas
from proof.errors import Conflict
from tests.api.calls import body, commit, refused
from verifier import idempotency


@pytest.fixture
def registered(api):
    assert api.post("/v1/models", content=world.small().source).is_success
    return api


def post(api, done, **headers):
    return api.post("/v1/tasks", json=body(done), headers=headers)


def test_pages_meet_without_a_gap(registered, record):
    ids = []
    for i in range(5):
        record.clock.now += i // 2
        ids.append(post(registered, work()).json()["id"])
    seen, query = [], {"limit": 2}
    while True:
        page = schemas.TaskList.model_validate_json(registered.get("/v1/tasks", params=query).content)
        assert len(page.tasks) <= 2
        seen += [state.id for state in page.tasks]
        if page.next is None:
            break
        query["cursor"] = page.next
    assert sorted(seen) == sorted(ids)
    for lie in ("x", "AAAA", "WzEsICJ4Il0", "W05hTiwgImEiXQ"):
        refused(registered.get("/v1/tasks", params={"cursor": lie}), 422, "malformed")


def test_what_is_known_already_is_not_sent_again(registered):
    done = work()
    post(registered, done)
    at = f"/v1/tasks/{done.id}"
    first = registered.get(at)
    again = registered.get(at, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert registered.get(at, headers={"If-None-Match": '"other", W/' + first.headers["etag"]}).status_code == 304
    commit(registered, done)
    changed = registered.get(at, headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.headers["etag"] != first.headers["etag"]


def test_a_request_may_wait_for_the_end(registered, record):
    done = work()
    task = record.check(done)
    assert registered.get(f"/v1/tasks/{task}").json()["stage"] == "checking"
    Timer(0.3, record.judge).start()
    started = time.monotonic()
    answer = registered.get(f"/v1/tasks/{task}", headers={"Prefer": "respond-async, wait=30"})
    assert answer.json()["stage"] == "attested"
    assert 0.2 < time.monotonic() - started < 10
    for what in ("verdict", "attestation"):
        assert registered.get(f"/v1/tasks/{task}/{what}", headers={"Prefer": "wait=30"}).status_code == 200


def test_a_wait_that_is_over_answers_with_what_there_is(registered, record):
    task = record.check(work())
    started = time.monotonic()
    answer = registered.get(f"/v1/tasks/{task}", headers={"Prefer": "wait=1"})
    assert answer.json()["stage"] == "checking"
    assert 0.9 < time.monotonic() - started < 10
    refused(registered.get(f"/v1/tasks/{task}/verdict", headers={"Prefer": "wait=x"}), 404, "verdict.pending")


def test_a_key_gets_the_same_answer_again(registered, record):
    done = work()
    key = {"Idempotency-Key": "one"}
    first = post(registered, done, **key)
    commit(registered, done)
    again = post(registered, done, **key)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true"
    assert post(registered, done).json()["stage"] == "challenged"
    refused(post(registered, work(), **key), 422, "malformed")
    record.clock.now += idempotency.KEPT_SECONDS + 1
    idempotency.forget(record.database, record.clock.now)
    assert post(registered, done, **key).status_code == 200


def test_a_key_of_a_request_that_failed_is_free(registered, record):
    key, unknown = {"Idempotency-Key": "two"}, body(work()) | {"model": "ab" * 32}
    refused(registered.post("/v1/tasks", json=unknown, headers=key), 422, "model.unregistered")
    assert post(registered, work(), **key).status_code == 201


def test_a_key_while_its_request_is_at_work_is_a_conflict(registered, record):
    idempotency.begin(record.database, TENANT, "three", "ab" * 32, record.clock())
    with pytest.raises(Conflict, match="at work"):
        idempotency.begin(record.database, TENANT, "three", "ab" * 32, record.clock())
    record.clock.now += idempotency.WORK_SECONDS + 1
    assert idempotency.begin(record.database, TENANT, "three", "ab" * 32, record.clock()) is None


def test_twenty_with_one_key_post_one_task(registered, record):
    done = work()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: post(registered, done, **{"Idempotency-Key": "four"}), range(20)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.content for answer in answers if answer.status_code == 201}) == 1
    assert len(record.store.tasks(9)) == 1


def test_many_tasks_are_answered_each_by_itself(registered):
    good, other = work(), work()
    late = body(work()) | {"deadline": 1}
    answer = registered.post("/v1/tasks:batch", json={"tasks": [body(good), late, body(good), body(other)]})
    results = schemas.PostedList.model_validate_json(answer.content).results
    assert [one.status for one in results] == [201, 422, 200, 201]
    assert [one.task.id if one.task else one.problem.code for one in results] == [
        good.id, "task.deadline", good.id, other.id,
    ]  # fmt: skip
    too_many = {"tasks": [body(good)] * (schemas.MAX_BATCH + 1)}
    refused(registered.post("/v1/tasks:batch", json=too_many), 422, "malformed")
    refused(registered.post("/v1/tasks:batch", json={"tasks": []}), 422, "malformed")


def test_a_long_queue_takes_no_more(registered, record, door):
    door.settings = type(door.settings)(**{**vars(door.settings), "backlog": 1})
    waiting = record.check(work())
    problem = refused(answer := post(registered, work()), 429, "queue.full")
    assert problem.retryable
    assert int(answer.headers["retry-after"]) > 0
    record.judge()
    record.clock.now += 1
    assert record.stage(waiting) == "attested"
    assert post(registered, work()).status_code == 201


def test_tenants_see_only_their_own(registered, record, token):
    done = work()
    task = post(registered, done).json()["id"]
    others = {"Authorization": f"Bearer {token('others')}"}
    admin = {"Authorization": f"Bearer {token('root', 'admin')}"}
    for path in ("", "/inputs", "/verdict", "/attestation", "/outputs", "/bundle"):
        refused(registered.get(f"/v1/tasks/{task}{path}", headers=others), 404, "task.unknown")
    assert registered.get("/v1/tasks", headers=others).json()["tasks"] == []
    assert registered.get(f"/v1/tasks/{task}", headers=admin).json()["tenant"] == TENANT
    assert [state["id"] for state in registered.get("/v1/tasks", headers=admin).json()["tasks"]] == [task]
    refused(registered.post("/v1/tasks", json=body(done), headers=others), 409, "conflict")
    narrow = {"Authorization": f"Bearer {token(TENANT, 'models')}"}
    refused(registered.get(f"/v1/tasks/{task}", headers=narrow), 403, "scope.missing")


def test_a_task_may_be_for_one_worker_alone(registered):
    done = work()
    elsewhere = body(done) | {"worker": "0x" + "ab" * 20}
    assert registered.post("/v1/tasks", json=elsewhere).json()["assigned"] == elsewhere["worker"]
    refused(commit(registered, done), 404, "task.unknown")
    refused(post(registered, done), 409, "conflict")
