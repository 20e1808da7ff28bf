"""Weights beside a model: uploaded by content, found by digest, bound by the model's id."""

import numpy as np
import onnx
import pytest
import world
from blake3 import blake3

from api import schemas
from proof.errors import Unavailable
from prover.client import Client
from verifier.library import Library


@pytest.fixture
def service(api):
    client = Client("http://service")
    client._http = api
    return client


@pytest.fixture
def outside(tmp_path):
    """The small model with its weights in a file beside it."""
    path = tmp_path / "model.onnx"
    proto = onnx.load_model_from_string(world.small().source)
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def refused(answer, status, code):
    problem = schemas.Problem.model_validate_json(answer.content)
    assert (answer.status_code, problem.code) == (status, code), problem.detail
    return problem


def test_a_model_with_weights_outside_is_the_same_model(service, outside, door):
    model = world.small().model
    assert service.register(outside) == model.id
    assert service.register(outside) == model.id
    opened = Library(door.store, door.blobs).model(model.id)  # as another process does
    assert isinstance(opened.constants["head"], np.memmap)
    assert np.array_equal(opened.constants["head"], model.constants["head"])


def test_a_file_of_weights_is_uploaded_once_under_its_digest(api):
    at = f"/v1/weights/{blake3(b'weights').hexdigest()}"
    refused(api.get(at), 404, "weights.unknown")
    answers = [api.put(at, content=b"weights") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert api.get(at).json() == answers[0].json() == answers[1].json()
    refused(api.put(at, content=b"others"), 422, "malformed")


@pytest.mark.parametrize("location", ["weights.bin", "../../key", "ab" * 32, ""])
def test_a_model_that_points_elsewhere_is_refused(api, outside, location):
    proto = onnx.load(outside, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    refused(api.post("/v1/models", content=proto.SerializeToString()), 422, "model.unverifiable")


def test_damaged_weights_are_our_fault(service, outside, door):
    model = service.register(outside)
    address = blake3((outside.parent / "weights.bin").read_bytes()).hexdigest()
    data = bytearray(door.blobs.path(address).read_bytes())
    data[-1] ^= 1
    door.blobs.path(address).write_bytes(data)
    with pytest.raises(Unavailable, match="opens as"):
        Library(door.store, door.blobs).model(model)
