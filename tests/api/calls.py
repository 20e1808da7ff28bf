"""Calls to the API that several tests make."""

import world
from record import Work

from api import schemas
from proof import bundle
from proof.requests import NOTHING, Action
from prover.calls import Purpose, Service
from prover.client import _tensor, terms


def body(done: Work, **changes):
    task = done.asked.task
    asked = terms(task.model, task.policy, task.reward, task.payer, task.deadline, task.nonce)
    return asked | {"inputs": {name: _tensor(array) for name, array in done.asked.inputs.items()}} | changes


def signing(api, task, action, content=NOTHING, key=world.WORKER):
    """The headers of a worker's request, as prover/calls.py makes them, at the time of the test."""
    reward = task.reward if action in (Action.COMMIT, Action.PROVE) else None
    with Service(str(api.base_url), worker=key) as caller:
        return caller.signed(Purpose(action, task.id(), content, reward), api.app.state.door.clock())


def commit(api, done, signed=None, key=world.WORKER):
    sent = signed or done.signed
    headers = signing(api, done.asked.task, Action.COMMIT, sent.digest(), key)
    return api.post(f"/v1/tasks/{done.id}/commitment", json=sent.to_json(), headers=headers)


def upload(api, done, path, key=world.WORKER):
    headers = signing(api, done.asked.task, Action.PROVE, bundle.file_digest(path), key)
    return api.put(f"/v1/tasks/{done.id}/proof", content=path.read_bytes(), headers=headers)


def refused(answer, status, code):
    problem = schemas.Problem.model_validate_json(answer.content)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem.status, problem.code) == (status, status, code), problem.detail
    return problem
