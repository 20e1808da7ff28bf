import pytest
import record as records


@pytest.fixture
def record(tmp_path):
    place = records.Record(tmp_path)
    yield place
    place.store.close()
