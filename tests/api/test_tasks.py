"""The door, one call at a time: every call may be repeated, and each thing that is refused has its code."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import world
from record import NOW, work

from api import limits, schemas
from proof import bundle
from proof.attestation import SignedAttestation, sign_commitment
from proof.messages import Challenge, Task
from proof.requests import Action
from prover.client import _tensor
from tests.api.calls import body, commit, refused, signing, upload

JSON = {"Content-Type": "application/json"}
OTHER = bytes.fromhex("22" * 32)


@pytest.fixture
def done(api):
    """A task that is posted."""
    made = work()
    api.post("/v1/models", content=made.asked.source)
    assert api.post("/v1/tasks", json=body(made)).status_code == 201
    return made


@pytest.fixture
def proven(api, done, tmp_path):
    """The proof file of a task that is challenged."""
    challenge = Challenge.from_json(commit(api, done).json())
    path = tmp_path / "proof"
    bundle.write_proof(path, done.proof(challenge))
    return path


def files(record):
    return {path for path in record.blobs.root.rglob("*") if path.is_file()}


def test_a_model_is_registered_once(api, record):
    first = api.post("/v1/models", content=world.small().source)
    again = api.post("/v1/models", content=world.small().source)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.json()["model"] == world.small().model.id.hex()
    assert api.get(first.headers["location"]).json() == first.json()
    assert len(files(record)) == 1
    schemas.ModelState.model_validate_json(first.content)


def test_a_model_with_an_op_that_cannot_be_checked_is_refused_by_name(api, record):
    source = world.small().source.replace(b"\x22\x03Erf", b"\x22\x03Det")
    problem = refused(api.post("/v1/models", content=source), 422, "model.unverifiable")
    assert "Det" in problem.detail
    refused(api.post("/v1/models", content=b"no model"), 422, "model.unverifiable")
    assert files(record) == set()


def test_a_task_is_posted_once_under_its_digest(api, done):
    again = api.post("/v1/tasks", json=body(done))
    assert (again.status_code, again.json()["id"]) == (200, done.id)
    state = api.get(f"/v1/tasks/{done.id}")
    assert Task.from_json(state.json()["task"]) == done.asked.task
    schemas.TaskState.model_validate_json(state.content)


def test_the_inputs_come_back_bit_for_bit(api, done, tmp_path):
    path = tmp_path / "inputs"
    path.write_bytes(api.get(f"/v1/tasks/{done.id}/inputs").content)
    assert np.array_equal(bundle.read(path).tensors["ids"], done.asked.inputs["ids"])


WRONG_TASKS = {
    "a model nobody registered": ({"model": "ab" * 32}, "model.unregistered"),
    "an input missing": ({"inputs": {}}, "task.inputs"),
    "an input of another name": ({"inputs": {"x": _tensor(np.zeros((1, 4)))}}, "task.inputs"),
    "an input of another dtype": ({"inputs": {"ids": _tensor(np.zeros((2, 12), np.int32))}}, "task.inputs"),
    "an input of another rank": ({"inputs": {"ids": _tensor(np.zeros(12, np.int64))}}, "task.inputs"),
    "a deadline that has passed": ({"deadline": int(NOW) - 1}, "task.deadline"),
    "too few bytes": ({"inputs": {"ids": {"dtype": "I64", "shape": [2, 12], "data": "AAAA"}}}, "malformed"),
    "a shape beyond all bytes": ({"inputs": {"ids": {"dtype": "I64", "shape": [2**60], "data": ""}}}, "malformed"),
    "no base64": ({"inputs": {"ids": {"dtype": "I64", "shape": [0, 12], "data": "A"}}}, "malformed"),
    "a policy nobody knows": ({"policy": "lenient"}, "malformed"),
    "a field too many": ({"tip": 1}, "malformed"),
    "an address in capitals": ({"payer": "0x" + "AB" * 20}, "malformed"),
}


@pytest.mark.parametrize(("changes", "code"), WRONG_TASKS.values(), ids=WRONG_TASKS.keys())
def test_a_task_that_nobody_could_do_is_refused(api, done, record, changes, code):
    kept = files(record)
    refused(api.post("/v1/tasks", json=body(done) | changes), 422, code)
    assert files(record) == kept


def test_tasks_are_listed_by_stage(api, done):
    def listed(**query):
        answer = api.get("/v1/tasks", params=query)
        return [state.id for state in schemas.TaskList.model_validate_json(answer.content).tasks]

    assert listed(stage="posted", limit=5) == [done.id]
    commit(api, done)
    assert listed(stage="posted") == []
    assert listed() == [done.id]
    refused(api.get("/v1/tasks?stage=done"), 422, "malformed")
    refused(api.get(f"/v1/tasks?limit={limits.MAX_LISTED + 1}"), 422, "malformed")


def test_a_second_commitment_is_a_conflict_and_the_first_may_be_repeated(api, done):
    first = commit(api, done)
    assert first.status_code == 200
    assert commit(api, done).json() == first.json()
    bent = replace(done.committed.commitment, tensors=done.signed.tensors[:-1])
    other = sign_commitment(bent, done.asked.task.reward, world.WORKER)
    refused(commit(api, done, other), 409, "conflict")


def test_twenty_commitments_at_once_draw_one_challenge(api, done):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: commit(api, done), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["seed"] for answer in answers}) == 1


def test_a_commitment_must_be_signed_by_its_worker_for_this_task(api, done):
    forged = replace(done.signed, worker="0x" + "ab" * 20)
    refused(commit(api, done, forged), 403, "signature")
    refused(commit(api, done, work().signed), 422, "commitment.binding")
    refused(api.post(f"/v1/tasks/{done.id}/commitment", json={}), 422, "malformed")
    deep = api.post(f"/v1/tasks/{done.id}/commitment", content=b"[" * 100_000, headers=JSON)
    refused(deep, 400, "bad_request")
    untyped = api.post(f"/v1/tasks/{done.id}/commitment", content=b"{}")
    assert "application/json" in refused(untyped, 422, "malformed").detail


def test_an_upload_may_be_repeated(api, done, proven, record):
    first, again = upload(api, done, proven), upload(api, done, proven)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert first.json()["stage"] == "checking"
    assert first.json()["proof"] == bundle.file_digest(proven).hex()


def test_nobody_but_the_worker_can_have_its_task_judged(api, done, proven, record):
    kept = files(record)
    refused(upload(api, done, proven, OTHER), 403, "proof.signature")
    refused(api.put(f"/v1/tasks/{done.id}/proof", content=b"x"), 401, "caller.unknown")
    signature = signing(api, done.asked.task, Action.PROVE, bundle.file_digest(proven))
    refused(api.put(f"/v1/tasks/{done.id}/proof", content=b"x", headers=signature), 403, "proof.signature")
    assert files(record) == kept
    assert record.stage(done.id) == "challenged"


def test_bytes_that_are_no_proof_are_not_kept(api, done, proven, record):
    kept = files(record)
    proven.write_bytes(proven.read_bytes()[:-1])
    refused(upload(api, done, proven), 422, "malformed")
    assert files(record) == kept
    assert record.stage(done.id) == "challenged"


def test_a_second_proof_is_a_conflict(api, done, proven, record):
    upload(api, done, proven)
    kept = files(record)
    held = bundle.read_proof(proven)
    name, opening = next((name, o) for name, o in held.openings.items() if o.rows.dtype.kind == "f")
    bent = replace(held, openings={**held.openings, name: replace(opening, rows=opening.rows + 1)})
    bundle.write_proof(proven, bent)
    refused(upload(api, done, proven), 409, "conflict")
    assert files(record) == kept


def test_a_proof_before_the_commitment_is_a_conflict(api, done, tmp_path):
    (tmp_path / "proof").write_bytes(b"x")
    refused(upload(api, done, tmp_path / "proof"), 409, "conflict")


def test_past_the_deadline_everything_is_gone(api, done, proven, record):
    record.clock.now = done.asked.task.deadline + 1.0
    assert api.get(f"/v1/tasks/{done.id}").json()["stage"] == "lapsed"
    refused(upload(api, done, proven), 410, "task.expired")
    record.judge()
    assert api.post("/v1/tasks", json=body(done)).json()["stage"] == "expired"
    refused(api.get(f"/v1/tasks/{done.id}/verdict"), 410, "task.expired")
    assert api.get(f"/v1/tasks/{done.id}/attestation").json()["message"]["verdict"] == 3


def test_what_is_not_there_yet_may_be_asked_for_again(api, done):
    for path, code in {"verdict": "verdict.pending", "outputs": "verdict.pending", "bundle": "verdict.pending"}.items():
        problem = refused(api.get(f"/v1/tasks/{done.id}/{path}"), 404, code)
        assert problem.retryable
    refused(api.get(f"/v1/tasks/{done.id}/attestation"), 404, "attestation.pending")


def test_the_check_seed_is_not_shown_before_the_verdict(api, done, proven, record):
    upload(api, done, proven)
    seed = record.store.proof(done.id).check_seed
    assert seed not in api.get(f"/v1/tasks/{done.id}").text
    record.judge()
    assert api.get(f"/v1/tasks/{done.id}/verdict").json()["check_seed"] == seed


def test_after_the_verdict_everything_can_be_fetched(api, done, proven, record, tmp_path):
    upload(api, done, proven)
    record.judge()
    at = f"/v1/tasks/{done.id}"
    schemas.Verdict.model_validate_json(api.get(f"{at}/verdict").content)
    attested = api.get(f"{at}/attestation")
    schemas.Attestation.model_validate_json(attested.content)
    signed = SignedAttestation.from_json(attested.json())
    uid = signed.attestation.digest().hex()
    assert api.get(f"/v1/attestations/{uid}").json() == attested.json()
    assert api.get(at).json()["attestation"] == uid
    for name in ("outputs", "bundle"):
        (tmp_path / name).write_bytes(api.get(f"{at}/{name}").content)
    assert np.array_equal(bundle.read(tmp_path / "outputs").tensors["logits"], done.committed.trace["logits"])
    held = bundle.read_bundle(tmp_path / "bundle")
    assert held.proof.commitment == done.signed
    assert held.attestation == attested.json()
    assert not list((record.blobs.root / "partial").iterdir())


def test_outputs_of_a_rejected_proof_are_not_handed_out(api, record):
    rejected = work(bend=lambda trace: trace | {"logits": trace["logits"] + 1})
    record.check(rejected)
    record.judge()
    refused(api.get(f"/v1/tasks/{rejected.id}/outputs"), 409, "outputs.refused")
    assert api.get(f"/v1/tasks/{rejected.id}/attestation").json()["message"]["amount"] == "0"
    assert api.get(f"/v1/tasks/{rejected.id}/bundle").status_code == 200


def test_a_body_over_its_limit_is_refused_before_it_is_read(api, monkeypatch):
    monkeypatch.setattr(limits, "MAX_JSON_BYTES", 1000)
    declared = api.post("/v1/tasks", content=b" " * 1001)
    streamed = api.post("/v1/tasks", content=(b" " * 100 for _ in range(11)))
    for answer in (declared, streamed):
        refused(answer, 413, "too_large")


def test_a_queue_that_is_away_delays_and_loses_nothing(api, done, proven, door, record, token):
    door.queue = type(door.queue)("unix:///nowhere/valkey.sock")
    assert upload(api, done, proven).status_code == 202
    assert record.store.due(NOW) == [world.small().model.id.hex()]
    ready = api.get("/readyz")
    assert ready.status_code == 503
    assert {check["name"] for check in ready.json()["checks"] if not check["ok"]} == {"queue", "workers"}
    metrics = api.get("/metrics", headers={"Authorization": f"Bearer {token('acme', 'metrics')}"}).text
    assert 'assay_tasks{stage="checking"} 1.0' in metrics
    assert "assay_queue_jobs{" not in metrics


def test_unknown_things_have_their_own_codes(api):
    refused(api.get("/v1/tasks/" + "ab" * 32), 404, "task.unknown")
    refused(api.get("/v1/models/" + "ab" * 32), 404, "model.unknown")
    refused(api.get("/v1/attestations/" + "ab" * 32), 404, "attestation.unknown")
    refused(api.get("/v1/nothing"), 404, "route.unknown")
    refused(api.get("/v1/tasks/not-an-id"), 422, "malformed")
    answer = api.delete("/v1/tasks/" + "ab" * 32)
    refused(answer, 405, "method.refused")
    assert answer.headers["allow"] == "GET"


def test_a_problem_repeats_nothing_of_what_was_sent(api, done):
    secret = "a-secret-that-was-pasted-into-the-wrong-field"
    answer = api.post("/v1/tasks", json=body(done) | {"payer": secret})
    assert secret not in answer.text
    assert "payer" in refused(answer, 422, "malformed").detail
