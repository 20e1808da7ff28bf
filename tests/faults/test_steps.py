"""A worker process that dies between any two durable steps: the next one ends the task, with one signature at most.

A death is a SystemExit at the chosen step, after which this process gets nothing more done.
"""

from dataclasses import dataclass, field, replace

import pytest
import servers
import world
from record import Record, work

from proof import attestation
from proof.attestation import SignedAttestation
from verifier.lifecycle import Stage

MODEL = world.small().model.id.hex()
STEPS = ("lease", "judge", "protect", "sign", "attest")


class Death(SystemExit):
    pass


@dataclass
class Fate:
    """Where a process dies: right before a step is done, or right after. The dead do nothing more."""

    step: str = ""
    after: bool = False
    dead: bool = False

    def befalls(self, name, do):
        if self.dead:
            raise Death
        if name == self.step and not self.after:
            self.dead = True
            raise Death
        done = do()
        if name == self.step:
            self.dead = True
            raise Death
        return done


class Mortal:
    """The record as a process with a fate reaches it."""

    def __init__(self, store, fate):
        self._store, self._fate = store, fate

    def __getattr__(self, name):
        method = getattr(self._store, name)
        return lambda *arguments: self._fate.befalls(name, lambda: method(*arguments))


@dataclass
class Pen:
    """The signer, which remembers what it signed."""

    inner: object
    fate: Fate = field(default_factory=Fate)
    signed: list = field(default_factory=list)

    @property
    def address(self):
        return self.inner.address

    def sign(self, preimage):
        def signing():
            self.signed.append((preimage, self.inner.sign(preimage)))
            return self.signed[-1][1]

        return self.fate.befalls("sign", signing)


@pytest.fixture(params=servers.DATABASES)
def record(request, tmp_path):
    place = Record(tmp_path, servers.fresh(request.param, tmp_path))
    yield place
    place.close()


def honest(proof):
    return proof


def lie(proof):
    return replace(proof, openings={})


ENDS = [(step, after, honest) for step in STEPS for after in (False, True)]
ENDS += [("protect", True, lie), ("sign", True, lie)]


@pytest.mark.parametrize(("step", "after", "bend"), ENDS)
def test_a_death_at_any_step_ends_in_one_signature(record, step, after, bend):
    task = record.check(work(), bend)
    seed = record.store.proof(task).check_seed
    fate = Fate(step, after)
    pen, bench = Pen(record.signer, fate), record.bench()
    bench.store, bench.signer = Mortal(record.store, fate), pen
    with pytest.raises(Death):
        bench.judge(MODEL)
    assert fate.dead
    said_before = pen.signed

    record.clock.now += record.settings.lease
    heir = record.bench()
    heir.signer = pen = Pen(record.signer)
    heir.judge(MODEL)
    assert record.stage(task) == Stage.ATTESTED
    signed = SignedAttestation.from_json(record.store.attestation_of(task).document)
    attestation.verify(signed, record.signer.address)
    assert {*said_before, *pen.signed} == {(signed.attestation.preimage(), signed.signature)}
    assert record.store.proof(task).check_seed == seed
    heir.judge(MODEL)
    assert SignedAttestation.from_json(record.store.attestation_of(task).document) == signed


def test_a_process_that_was_only_asleep_signs_nothing_else(record):
    """It wakes up at the signature, after another has ended the task."""
    task = record.check(work())
    bench = record.bench()
    rows = record.store.lease(MODEL, "asleep", record.clock(), record.clock() + record.settings.lease, 1)
    ready = bench._decide(MODEL, rows, "asleep")
    record.clock.now += record.settings.lease + 1
    heir = record.bench()
    heir.judge(MODEL)
    first = record.store.attestation_of(task).document
    bench.signer = pen = Pen(record.signer)
    record.clock.now += 1000
    bench._finish(ready, "asleep")
    assert record.store.attestation_of(task).document == first
    assert [preimage for preimage, _ in pen.signed] == [SignedAttestation.from_json(first).attestation.preimage()]
