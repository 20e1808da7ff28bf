"""What is published: codes in the README, and an OpenAPI document that shows every request and answer."""

import re
from pathlib import Path

import pytest

from api.problems import KINDS, Code

README = Path(__file__).parents[2] / "api" / "README.md"
ROUTES = {
    ("put", "/v1/weights/{digest}"),
    ("get", "/v1/weights/{digest}"),
    ("post", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/tasks"),
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
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/metrics"),
    ("get", "/"),
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


def test_the_index_names_the_signer(api, record):
    assert api.get("/").json()["signer"] == record.signer.address
