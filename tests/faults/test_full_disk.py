"""A disk that takes no more while something is uploaded: 503, nothing left behind, and later the same request is taken.

The limit on the size of files stands for a full disk: writing past it fails (EFBIG where a disk says ENOSPC), of SQLite
as well.
"""

import resource
import secrets
from contextlib import contextmanager

import pytest
import world
from blake3 import blake3

from proof import bundle
from proof.requests import Action
from prover.calls import Purpose
from prover.client import Client
from tests.faults.kit import HONEST, audit, errand

ROOM = 256  # bytes that a file may have
BINARY = {"Content-Type": "application/octet-stream"}
SIZES = {"buffered": 2_000, "streamed": 2_000_000}  # bytes: a small file is written at its end, a large one as it comes


@contextmanager
def full(deployment, room=ROOM):
    """No file that the API writes may be longer."""
    before = resource.prlimit(deployment.api.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(deployment.api.pid, resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.prlimit(deployment.api.pid, resource.RLIMIT_FSIZE, before)


def files(deployment):
    return {path for path in (deployment.data / "blobs").rglob("*") if path.is_file()}


@pytest.fixture
def hasty(deployment):
    """Clients that show the first answer, whatever it is: a protocol's, and a worker's."""
    with (
        Client(deployment.url, key=deployment.key, patience=0.0) as protocol,
        Client(deployment.url, worker=HONEST[0], patience=0.0) as worker,
    ):
        yield protocol, worker


def refused(answer):
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.json()["code"], answer.json()["retryable"]) == ("unavailable", True)


def test_a_proof_that_the_disk_does_not_take(deployment, crowd, hasty, tell):
    (protocol, worker), one = hasty, errand(HONEST[0])
    protocol.post(one.body)
    path, before = crowd.answer(one), files(deployment)
    purpose = Purpose(Action.PROVE, one.task.id(), bundle.file_digest(path), one.task.reward)
    with full(deployment):
        refused(worker.send("PUT", f"/v1/tasks/{one.id}/proof", content=path, headers=BINARY, purpose=purpose))
        assert files(deployment) == before
        assert protocol.state(one.task.id()).stage == "challenged"
    worker.upload(one.task.id(), path, one.task.reward)
    audit(deployment, [one], crowd)
    tell("a proof, refused and then taken")


@pytest.mark.parametrize("room", [ROOM, 1_000], ids=["inputs", "database"])
def test_a_task_that_the_disk_does_not_take(deployment, crowd, hasty, room):
    """Its inputs do not fit, or they do and then SQLite's log does not: then they are collected."""
    (protocol, _), one = hasty, errand()
    if deployment.postgres and room > ROOM:
        pytest.skip("the database is on another disk")
    before = files(deployment)
    with full(deployment, room):
        refused(protocol.send("POST", "/v1/tasks", json=one.body))
        assert not [path for path in files(deployment) - before if path.parent.name == "partial"]
        assert room > ROOM or files(deployment) == before
    crowd.serve(one)
    audit(deployment, [one], crowd)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_weights_that_the_disk_does_not_take(deployment, hasty, size):
    (protocol, _), before, weights = hasty, files(deployment), secrets.token_bytes(size)
    url = f"/v1/weights/{blake3(weights).hexdigest()}"
    with full(deployment):
        refused(protocol.send("PUT", url, content=weights, headers=BINARY))
        assert files(deployment) == before
    assert protocol.send("PUT", url, content=weights, headers=BINARY).status_code == 201


def test_a_model_that_the_disk_does_not_take(deployment, hasty):
    (protocol, _), before, other = hasty, files(deployment), world.small(seed=1).source
    with full(deployment):
        refused(protocol.send("POST", "/v1/models", content=other, headers=BINARY))
        assert files(deployment) == before
