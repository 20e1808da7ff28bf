"""The record's suite runs on both databases: the embedded one, and PostgreSQL."""

import pytest
import record as records
import servers


@pytest.fixture(params=servers.DATABASES)
def record_url(request, tmp_path):
    """An empty database."""
    return servers.fresh(request.param, tmp_path)


@pytest.fixture
def record(tmp_path, record_url):
    place = records.Record(tmp_path, record_url)
    yield place
    place.close()
