import os
from dataclasses import replace

import pytest
import record as records
from fastapi.testclient import TestClient

from api.app import create_app
from api.door import Door
from verifier import tenants
from verifier.inspector import Inspector
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
    place.close()


@pytest.fixture(scope="session")
def inspector(tmp_path_factory):
    """One for all records: what it opens is named by its path."""
    opened = Inspector(tmp_path_factory.mktemp("inspected"))
    yield opened
    opened.close()


@pytest.fixture
def door(record, valkey, inspector):
    queue = TaskQueue(valkey.url)
    queue.redis.flushall()
    inspector.blobs = record.blobs.root
    settings = replace(record.settings, redis=valkey.url)
    yield Door(
        settings,
        record.store,
        record.blobs,
        record.library,
        queue,
        inspector,
        record.signer.address,
        record.clock,
    )
    queue.close()


@pytest.fixture
def token(record):
    """Makes API keys: `token(tenant, *scopes)`."""

    def made(tenant=records.TENANT, *scopes):
        return tenants.create(record.database, tenant, "test", scopes or ("tasks", "models"), record.clock(), None)[1]

    return made


@pytest.fixture
def anonymous(door):
    with TestClient(create_app(door), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def api(anonymous, token):
    """A protocol's calls."""
    anonymous.headers["Authorization"] = f"Bearer {token()}"
    return anonymous
