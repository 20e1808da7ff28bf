import os

import pytest
import record as records
from fastapi.testclient import TestClient

from api.app import create_app
from api.door import Door
from verifier.queue import TaskQueue
from verifier.valkey import EmbeddedValkey


@pytest.fixture(scope="session")
def valkey():
    server = EmbeddedValkey(os.environ)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def record(tmp_path):
    place = records.Record(tmp_path)
    yield place
    place.store.close()


@pytest.fixture
def door(record, valkey):
    queue = TaskQueue(valkey.url)
    yield Door(record.store, record.blobs, record.library, queue, record.signer.address, record.clock)
    queue.close()


@pytest.fixture
def api(door):
    with TestClient(create_app(door), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client
