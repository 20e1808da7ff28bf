"""The order in which things become durable (verifier/README.md), seen at the calls that make them so."""

import os
from pathlib import Path

import pytest
import servers
from record import NOW, Record, work
from sqlalchemy import event, text

from proof import bundle


@pytest.fixture(params=servers.DATABASES)
def record(request, tmp_path):
    place = Record(tmp_path, servers.fresh(request.param, tmp_path))
    yield place
    place.close()


class Journal(list):
    """One entry a call: a file or folder was synced, a file renamed, a transaction committed that wrote to tables."""

    def __init__(self, blobs):
        super().__init__()
        self._blobs, self._sync, self._written = blobs, os.fsync, set()

    def fsync(self, descriptor):
        self._sync(descriptor)
        self.append(f"fsync {self._named(os.readlink(f'/proc/self/fd/{descriptor}'))}")

    def moving(self, move):
        def moved(source, target):
            move(source, target)
            self.append(f"rename {self._named(source)} to {self._named(target)}")

        return moved

    def executed(self, connection, cursor, statement, *_):
        words = statement.split()
        if words[0] == "INSERT":
            self._written.add(words[2])

    def committed(self, connection):
        if self._written:
            self.append(f"commit {' '.join(sorted(self._written - {'counters', 'revenue'}))}")
        self._written.clear()

    def _named(self, path):
        if not Path(path).is_relative_to(self._blobs):
            return "another file"
        inside = Path(path).relative_to(self._blobs).parts
        return "partial file" if inside[:1] == ("partial",) else ("blobs", "folder", "blob")[len(inside)]


@pytest.fixture
def order(record, monkeypatch):
    """The journal of this test."""
    seen, engine = Journal(record.blobs.root), record.database._engine
    monkeypatch.setattr(os, "fsync", seen.fsync)
    monkeypatch.setattr(os, "rename", seen.moving(os.rename))
    monkeypatch.setattr(os, "replace", seen.moving(os.replace))
    listeners = {"before_cursor_execute": seen.executed, "commit": seen.committed}
    for name, listener in listeners.items():
        event.listen(engine, name, listener)
    yield seen
    for name, listener in listeners.items():
        event.remove(engine, name, listener)


KEPT = ["fsync partial file", "rename partial file to blob", "fsync folder", "fsync blobs"]


def test_an_uploaded_proof_is_on_the_disk_before_it_is_recorded(record, order, tmp_path):
    done = work()
    task = record.post(done)
    challenge = record.store.commit(done.signed, NOW)
    path = tmp_path / "proof"
    bundle.write_proof(path, done.proof(challenge))
    order.clear()
    with record.blobs.upload(2**20) as upload:
        upload.write(path.read_bytes())
        address = upload.close()
        assert order == ["fsync partial file"]
        record.blobs.place(upload, address)
        record.store.prove(task, bundle.file_digest(path), address, upload.size, NOW)
    assert order == [*KEPT, "commit events proofs"]


def test_the_inputs_of_a_task_are_on_the_disk_before_it_is_recorded(record, order):
    done = work()
    record.register()
    order.clear()
    record.store.add_task(done.asked.task, record.keep(b"inputs"), NOW, "acme")
    assert order == [*KEPT, "commit events tasks"]


def test_a_challenge_is_stored_with_its_commitment(record, order):
    done = work()
    record.post(done)
    order.clear()
    record.store.commit(done.signed, NOW)
    assert order == ["commit commitments events"]


def test_verdict_then_protection_then_signature_then_attestation(record, order):
    record.check(work())

    class Pen:
        address = record.signer.address

        def sign(self, preimage):
            order.append("sign")
            return record.signer.sign(preimage)

    bench = record.bench()
    bench.signer = Pen()
    order.clear()
    bench.judge(record.store.due(NOW)[0])
    assert order == ["commit events verdicts", "commit protection", "sign", "commit attestations events"]


def test_a_commit_is_on_the_disk_when_it_returns(record):
    """As the database says; PostgreSQL's values are the server's defaults, which Assay does not lower."""
    wanted = {
        "sqlite": {"PRAGMA synchronous": 2, "PRAGMA journal_mode": "wal", "PRAGMA foreign_keys": 1},
        "postgresql": {"SHOW synchronous_commit": "on", "SHOW fsync": "on", "SHOW full_page_writes": "on"},
    }
    with record.database.write() as session:
        for asked, value in wanted[session.get_bind().dialect.name].items():
            assert session.execute(text(asked)).scalar() == value
