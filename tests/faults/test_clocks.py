"""Clocks that jump by an hour, forwards and backwards: of real processes by libfaketime, and of the lease logic."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import servers
import world
from record import NOW, Record, work

from proof import attestation
from proof.attestation import PASS, SignedAttestation
from tests.faults.kit import HOUR, Crowd, Deployment, audit, errands
from verifier.jobs import LONGEST_PAUSE
from verifier.lifecycle import Stage

MODEL = world.small().model.id.hex()
TASKS, CHEATS = 16, 4
JUMPS = ("+0", "+3600", "-3600", "+0")  # seconds, of API and worker processes alike


@pytest.fixture
def jumping(tmp_path):
    """A deployment, and what sets the clock of all its processes."""
    wheel = find_spec("libfaketime")
    if wheel is None or wheel.origin is None:
        pytest.skip("no libfaketime: pip install libfaketime")
    library = Path(wheel.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    offset = tmp_path / "offset"

    def jump(seconds):
        written = tmp_path / "offset.new"
        written.write_text(f"{seconds}\n")
        written.replace(offset)

    jump("+0")
    environ = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }
    deployment = Deployment(tmp_path, **environ)
    try:
        deployment.start()
        yield deployment, jump
    finally:
        deployment.stop()


def test_processes_whose_clock_jumps_by_an_hour_either_way(jumping, tell):
    """Tasks of before a jump are still at work when it comes; callers' clocks go with it."""
    deployment, jump = jumping
    with Crowd(deployment) as crowd:
        crowd.register()
        todo = errands(TASKS, CHEATS, seconds=4 * HOUR)
        share = TASKS // len(JUMPS)
        for at, seconds in enumerate(JUMPS):
            jump(seconds)
            crowd.ahead = float(seconds)
            crowd.run(todo[at * share : (at + 1) * share])
        audit(deployment, todo[: share * len(JUMPS)], crowd)
    tell(f"{share * len(JUMPS)} tasks while the clock jumped to {', '.join(JUMPS)} s")


@pytest.fixture(params=servers.DATABASES)
def record(request, tmp_path):
    place = Record(tmp_path, servers.fresh(request.param, tmp_path))
    yield place
    place.close()


def signed_once(record, task):
    assert record.stage(task) == Stage.ATTESTED
    signed = SignedAttestation.from_json(record.store.attestation_of(task).document)
    attestation.verify(signed, record.signer.address)
    assert (signed.attestation.verdict, signed.attestation.task_id.hex()) == (PASS, task)


def test_a_task_of_an_hour_ahead_is_judged_when_the_clock_is_set_right(record):
    record.clock.now = NOW + HOUR
    task = record.check(work())
    record.clock.now = NOW
    record.judge()
    signed_once(record, task)


def test_a_lease_of_an_hour_ahead_does_not_outlive_its_owner(record):
    record.clock.now = NOW + HOUR
    task = record.check(work())
    assert record.store.lease(MODEL, "dead", NOW + HOUR, NOW + HOUR + record.settings.lease, 1)
    record.clock.now = NOW + LONGEST_PAUSE
    record.judge()
    signed_once(record, task)


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_while_two_have_the_same_task_gives_one_attestation(record, jump):
    task = record.check(work())
    slow = record.bench()
    rows = record.store.lease(MODEL, "slow", NOW, NOW + record.settings.lease, 1)
    record.clock.now += jump
    record.judge()
    record.clock.now = NOW + 2 * record.settings.lease  # backwards, its lease is due now at the latest
    ready = slow._decide(MODEL, rows, "slow")
    record.judge()
    slow._finish(ready, "slow")
    signed_once(record, task)
