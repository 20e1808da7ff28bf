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
    file = io.BytesIO()
    protection.export(place.database, file)
    return file.getvalue()


def taken(place, content):
    return protection.import_(place.database, io.BytesIO(content))


def test_what_was_signed_moves_and_again_is_nothing_new(signed, elsewhere, monkeypatch):
    monkeypatch.setattr(protection, "PAGE", 2)
    assert taken(elsewhere, signed) == 3
    assert taken(elsewhere, signed) == 0
    assert exported(elsewhere) == signed


def test_the_other_record_signs_nothing_else(record, signed, elsewhere):
    said = PaymentAttestation.from_json(json.loads(signed)["rows"][0]["attestation"])
    taken(elsewhere, signed)
    (outcome,) = elsewhere.store.protect([replace(said, verdict=FAIL, amount=0)], NOW)
    assert isinstance(outcome, Conflict)
    assert elsewhere.store.protect([said], NOW) == [said]


def test_a_contradiction_refuses_the_whole_file(signed, elsewhere):
    rows = json.loads(signed)["rows"]
    said = PaymentAttestation.from_json(rows[-1]["attestation"])
    elsewhere.store.protect([replace(said, verdict=FAIL, amount=0)], NOW)
    before = exported(elsewhere)
    with pytest.raises(Conflict, match=said.task_id.hex()):
        taken(elsewhere, signed)
    assert exported(elsewhere) == before


def row(change):
    """The file with its first row changed."""

    def bent(file):
        lines = file.splitlines(keepends=True)
        first = json.loads(lines[1])
        change(first)
        lines[1] = json.dumps(first, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        return b"".join(lines)

    return bent


LIES = {
    "another format": lambda file: file.replace(b"assay-verdict-interchange/1", b"slashing-interchange/5"),
    "a row missing its end": lambda file: file[:-20],
    "no rows": lambda file: b"{}",
    "more after the end": lambda file: file + b" ",
    "a row without end": lambda file: file.replace(b'"uid"', b" " * protection.MAX_ROW_BYTES + b'"uid"'),
    "another uid": row(lambda first: first.update(uid="ab" * 32)),
    "another verdict under the uid": row(lambda first: first["attestation"]["message"].update(verdict=2)),
    "a time that is none": row(lambda first: first.update(created=True)),
    "a field too many": row(lambda first: first.update(extra=1)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_what_is_no_protection_table_is_malformed(signed, elsewhere, lie):
    assert lie(signed) != signed
    with pytest.raises(Malformed):
        taken(elsewhere, lie(signed))
    assert json.loads(exported(elsewhere))["rows"] == []


def test_a_row_that_is_written_again_unchanged_is_taken(signed, elsewhere):
    assert row(lambda first: None)(signed) == signed
    assert taken(elsewhere, signed) == 3
