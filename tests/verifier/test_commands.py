"""What a person who keeps the service running types: init, status, task, key, protection; exit codes and JSON."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import record as records
from record import work
from sqlalchemy import select

from proof.attestation import FAIL, SignedAttestation, sign
from verifier.tables import AttestationRow

ROOT = Path(__file__).parents[2]
WELL, ATTENTION, MALFORMED = 0, 1, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def assay(data):
    def run(*arguments, expect=WELL):
        environ = {**os.environ, "ASSAY_DATA": str(data)}
        command = [sys.executable, "-m", "assay", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
        assert done.returncode == expect, done.stderr + done.stdout
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def prepared(assay):
    return json.loads(assay("init", "--json"))


@pytest.fixture
def place(data, prepared):
    opened = records.Record(data)
    yield opened
    opened.close()


def test_a_record_must_be_prepared_first(assay, tmp_path):
    (tmp_path / "none").mkdir()
    assert "assay init" in assay("status", "--data", tmp_path / "none", expect=MALFORMED)


def test_init_again_keeps_the_key_and_makes_another_api_key(assay, prepared):
    again = json.loads(assay("init", "--json"))
    assert again["signer"] == prepared["signer"]
    assert again["api_key"] != prepared["api_key"]
    shown = json.loads(assay("key", "attester", "show", "--json"))
    assert shown["address"] == prepared["signer"]
    assert prepared["api_key"][-43:] not in assay("key", "api", "list", "--json")


def test_api_keys_are_made_listed_and_revoked(assay, prepared):
    arguments = ("--tenant", "acme", "--name", "ci", "--scope", "tasks", "--scope", "models", "--expires-days", "1")
    made = json.loads(assay("key", "api", "create", *arguments, "--json"))
    assert assay("key", "api", "create", *arguments).startswith("assay_")
    listed = {row["id"]: row for row in json.loads(assay("key", "api", "list", "--json"))}
    assert (listed[made["id"]]["tenant"], listed[made["id"]]["revoked"]) == ("acme", None)
    assay("key", "api", "revoke", made["id"])
    listed = {row["id"]: row for row in json.loads(assay("key", "api", "list", "--json"))}
    assert listed[made["id"]]["revoked"]
    assay("key", "api", "create", "--tenant", "A B", "--name", "ci", "--scope", "tasks", expect=MALFORMED)
    assay("key", "api", "revoke", "ab" * 8, expect=MALFORMED)


def test_status_says_what_needs_a_person_and_retry_mends_it(assay, place):
    assert json.loads(assay("status", "--json"))["attention"] == []
    task = place.check(work())
    model = place.store.task(task).task.model
    place.store.lease(model, "worker", place.clock(), place.clock() + 1, 1)
    place.store.stall(task, "worker", "no verdict after 5 attempts: blob is missing", place.clock())
    told = json.loads(assay("status", "--json", expect=ATTENTION))
    assert told["stalled"] == [{"task": task, "detail": "no verdict after 5 attempts: blob is missing"}]
    assert "assay task retry" in told["attention"][0]
    assert "blob is missing" in assay("status", expect=ATTENTION)
    assert json.loads(assay("task", "show", task, "--json"))["stage"] == "stalled"
    assert json.loads(assay("task", "retry", "--all", "--json")) == {task: "checking"}
    assay("task", "retry", task, expect=MALFORMED)
    assay("task", "retry", expect=MALFORMED)
    assay("task", "show", "ab" * 32, expect=MALFORMED)


def test_what_was_signed_can_be_taken_along_and_compared(assay, place, tmp_path):
    place.check(work())
    place.judge()
    assay("protection", "export", tmp_path / "signed.json")
    assert json.loads(assay("protection", "import", tmp_path / "signed.json", "--json")) == {"new": 0}
    (tmp_path / "bad.json").write_text("{}")
    assay("protection", "import", tmp_path / "bad.json", expect=MALFORMED)
    with place.database.read() as session:
        document = session.scalars(select(AttestationRow.document)).first()
    first = tmp_path / "first.json"
    first.write_text(json.dumps(document))
    assert json.loads(assay("equivocation", first, first, "--json")) == {"equivocation": False}
    said = SignedAttestation.from_json(document).attestation
    other = replace(said, verdict=FAIL, amount=0)
    second = tmp_path / "second.json"
    second.write_text(json.dumps(sign(other, bytes.fromhex(records.KEY)).to_json()))
    found = json.loads(assay("equivocation", first, second, "--json", expect=ATTENTION))
    assert found["task"] == said.task_id.hex()
    assert len(found["uids"]) == 2
