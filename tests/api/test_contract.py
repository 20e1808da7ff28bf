"""The published document against the running service: whatever fits it, or nearly, is answered as it says."""

import threading
import time
from collections.abc import Iterator

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app

EXAMPLES = 12  # of each operation
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
ELSEWHERE = ["/v1/events", "/readyz"]  # the one never ends, the other answers 503 on purpose: test_events, test_health


@pytest.fixture
def live(door) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(door), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    give_up = time.monotonic() + 30
    while not server.started and time.monotonic() < give_up:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def schema() -> schemathesis.BaseSchema:
    """Without a service: operations are collected before any runs."""
    return schemathesis.openapi.from_dict(create_app(None).openapi()).exclude(path=ELSEWHERE)


@schema().parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_every_answer_is_one_that_the_document_describes(case, live, token):
    headers = {"Authorization": f"Bearer {token('acme', 'admin')}"}
    case.call_and_validate(base_url=live, headers=headers, checks=CHECKS, timeout=30)
