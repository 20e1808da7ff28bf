"""What is published: codes in the README, and an OpenAPI document that shows every request and answer."""

import json
import re
from pathlib import Path

import pytest

from api import schemas
from api.problems import KINDS, Code

OPENAPI = Path(__file__).parents[2] / "api" / "openapi.json"
README = Path(__file__).parents[2] / "api" / "README.md"
ROUTES = {
    ("put", "/v1/weights/{digest}"),
    ("get", "/v1/weights/{digest}"),
    ("post", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/tasks"),
    ("post", "/v1/tasks:batch"),
    ("get", "/v1/tasks"),
    ("get", "/v1/tasks/{task}"),
    ("get", "/v1/tasks/{task}/inputs"),
    ("post", "/v1/tasks/{task}/commitment"),
    ("put", "/v1/tasks/{task}/proof"),
    ("get", "/v1/tasks/{task}/verdict"),
    ("get", "/v1/tasks/{task}/attestation"),
    ("get", "/v1/tasks/{task}/outputs"),
    ("get", "/v1/tasks/{task}/bundle"),
    ("get", "/v1/attestations/{uid}"),
    ("get", "/v1/events"),
    ("post", "/v1/webhooks"),
    ("get", "/v1/webhooks"),
    ("delete", "/v1/webhooks/{webhook}"),
    ("get", "/v1/webhooks/{webhook}/deliveries"),
    ("post", "/v1/webhooks/{webhook}/deliveries/{delivery}/replay"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/metrics"),
    ("get", "/.well-known/assay.json"),
}


def test_every_code_stands_in_the_readme_with_its_status():
    rows = re.findall(r"^\| `([a-z_.]+)` \| (\d+) \| (yes|no) \|", README.read_text(), re.MULTILINE)
    assert rows == [(str(code), str(kind.status), "yes" if kind.retryable else "no") for code, kind in KINDS.items()]
    assert set(KINDS) == set(Code)


def test_every_route_stands_in_the_readme():
    text = README.read_text()
    assert [route for method, route in ROUTES if f"`{method.upper()} {route}`" not in text] == []


@pytest.fixture
def openapi(api):
    return api.get("/openapi.json").json()


def test_the_routes_are_those_of_the_protocol(openapi):
    assert {(method, path) for path, item in openapi["paths"].items() for method in item} == ROUTES


def test_every_operation_says_how_it_fails(openapi):
    for item in openapi["paths"].values():
        for operation in item.values():
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            assert "422" not in operation["responses"]


def test_every_scalar_that_has_a_form_shows_an_example(openapi):
    for schema in openapi["components"]["schemas"].values():
        for field in schema.get("properties", {}).values():
            for form in field.get("anyOf", [field]):
                assert "pattern" not in form or "examples" in form


def test_alive_and_ready_are_different_questions(api):
    assert api.get("/livez").json() == {"live": True}
    answer = api.get("/readyz")
    assert answer.status_code == 503  # no worker process runs here
    assert [check["name"] for check in answer.json()["checks"] if not check["ok"]] == ["workers"]


def test_a_stranger_learns_who_signs_and_what_the_limits_are(anonymous, record):
    about = schemas.About.model_validate_json(anonymous.get("/.well-known/assay.json").content)
    assert about.signer == record.signer.address
    assert about.origins == list(record.settings.origins)


def test_the_document_that_is_checked_in_is_the_one_that_is_served(openapi):
    kept = json.loads(OPENAPI.read_text())
    assert kept == openapi, "make openapi"
