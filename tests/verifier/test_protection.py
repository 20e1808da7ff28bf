"""What was signed moves with the key: exported, imported, and never contradicted."""

import io
import json
from dataclasses import replace

import pytest
import record as records
import servers
from record import NOW, work

from proof.attestation import FAIL, PaymentAttestation
from proof.errors import Conflict, Malformed
from verifier import protection


@pytest.fixture
def signed(record):
    """Three tasks that were attested, and their export."""
    for _ in range(3):
        record.check(work())
    record.judge()
    return exported(record)


@pytest.fixture
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    place = records.Record(folder, servers.fresh("sqlite", folder))
    yield place
    place.close()


def exported(place):
    file = io.StringIO()
    protection.export(place.database, file)
    return file.getvalue().encode()


def test_what_was_signed_moves_and_again_is_nothing_new(signed, elsewhere, monkeypatch):
    monkeypatch.setattr(protection, "PAGE", 2)
    assert protection.import_(elsewhere.database, signed) == 3
    assert protection.import_(elsewhere.database, signed) == 0
    assert exported(elsewhere) == signed


def test_the_other_record_signs_nothing_else(record, signed, elsewhere):
    said = PaymentAttestation.from_json(json.loads(signed)["rows"][0]["attestation"])
    protection.import_(elsewhere.database, signed)
    (outcome,) = elsewhere.store.protect([replace(said, verdict=FAIL, amount=0)], NOW)
    assert isinstance(outcome, Conflict)
    assert elsewhere.store.protect([said], NOW) == [said]


def test_a_contradiction_refuses_the_whole_file(signed, elsewhere):
    rows = json.loads(signed)["rows"]
    said = PaymentAttestation.from_json(rows[-1]["attestation"])
    elsewhere.store.protect([replace(said, verdict=FAIL, amount=0)], NOW)
    before = exported(elsewhere)
    with pytest.raises(Conflict, match=said.task_id.hex()):
        protection.import_(elsewhere.database, signed)
    assert exported(elsewhere) == before


LIES = {
    "another format": lambda file: file.update(format="slashing/5"),
    "a field too many": lambda file: file.update(extra=1),
    "no rows": lambda file: file.pop("rows"),
    "another uid": lambda file: file["rows"][0].update(uid="ab" * 32),
    "another verdict under the uid": lambda file: file["rows"][0]["attestation"]["message"].update(verdict=2),
    "a time that is none": lambda file: file["rows"][0].update(created=True),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_what_is_no_protection_table_is_malformed(signed, elsewhere, lie):
    file = json.loads(signed)
    lie(file)
    with pytest.raises(Malformed):
        protection.import_(elsewhere.database, json.dumps(file).encode())
    assert json.loads(exported(elsewhere))["rows"] == []
