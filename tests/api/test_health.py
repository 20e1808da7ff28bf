"""Seen from outside: ready or why not, and figures that are the record's."""

from dataclasses import replace
from pathlib import Path

import pytest
import world
from prometheus_client.parser import text_string_to_metric_families
from record import TENANT, work

from api import health, metrics, schemas

README = Path(__file__).parents[2] / "api" / "README.md"


def checks(client):
    answer = client.get("/readyz")
    told = schemas.Readiness.model_validate_json(answer.content)
    assert answer.status_code == (200 if told.ready else 503)
    return {check.name: check.reason for check in told.checks if not check.ok}


@pytest.fixture
def manned(door, monkeypatch):
    """A worker process has shown life."""
    monkeypatch.setattr(type(door.queue), "workers", lambda queue, name="assay": 1)


def test_without_worker_processes_it_is_not_ready(anonymous):
    assert "assay work" in checks(anonymous)["workers"]


@pytest.mark.usefixtures("manned")
def test_each_check_says_what_to_do(anonymous, door, record, monkeypatch):
    assert checks(anonymous) == {}
    monkeypatch.setattr(health, "MIN_FREE_BYTES", 2**60)
    assert "make room" in checks(anonymous)["blobs"]
    monkeypatch.undo()


@pytest.mark.usefixtures("manned")
def test_a_task_that_waits_too_long_is_told(anonymous, record):
    record.check(work())
    assert checks(anonymous) == {}
    record.clock.now += health.MAX_WAIT_SECONDS + 1
    assert "assay status" in checks(anonymous)["backlog"]


@pytest.mark.usefixtures("manned")
def test_a_clock_that_is_off_and_a_record_of_another_version_are_told(anonymous, door, monkeypatch):
    monkeypatch.setattr(type(door.store.database), "clock", lambda _: 0.0)
    assert "NTP" in checks(anonymous)["clock"]
    monkeypatch.setattr(type(door.store.database), "head", "9999")
    assert "assay init" in checks(anonymous)["migrations"]


def scraped(client, token):
    headers = {"Authorization": f"Bearer {token(TENANT, 'metrics')}"}
    text = client.get("/metrics", headers=headers).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    return families, samples


def test_figures_are_those_of_the_record(anonymous, record, token):
    honest = [work() for _ in range(2)]
    cheat = work(bend=lambda trace: trace | {"logits": trace["logits"] + 1})
    tasks = [record.check(done) for done in (*honest, cheat)]
    record.judge()
    waiting = record.check(work())
    record.clock.now += 7
    _, found = scraped(anonymous, token)
    assert found[("assay_tasks", ("stage", "attested"))] == 3
    assert found[("assay_tasks", ("stage", "checking"))] == 1
    assert found[("assay_verdicts_total", ("reason", ""), ("verdict", "accepted"))] == 2
    assert found[("assay_verdicts_total", ("reason", "reexecution"), ("verdict", "rejected"))] == 1
    assert found[("assay_queue_age_seconds",)] == 7
    assert found[("assay_proofs_total",)] == 4
    sizes = [record.store.proof(task).size for task in (*tasks, waiting)]
    assert found[("assay_proof_bytes_total",)] == sum(sizes)
    paid = ("chain_id", str(world.REWARD.chain_id)), ("token", world.REWARD.token)
    assert found[("assay_attested_amount", *paid)] == 2 * world.REWARD.amount
    families = {dict(key[1:])["family"]: value for key, value in found.items() if key[0] == "assay_check_seconds_total"}
    assert {"contraction", "pointwise"} <= families.keys()
    checked = sum(record.store.verdict(task).seconds for task in tasks)
    assert 0 < sum(families.values()) <= checked


def test_a_lease_that_is_lost_is_counted(anonymous, record, token):
    record.check(work())
    record.store.lease(world.small().model.id.hex(), "dead", record.clock(), record.clock() + 5, 1)
    record.clock.now += 6
    record.judge()
    _, found = scraped(anonymous, token)
    assert found[("assay_lease_losses_total",)] == 1


def test_requests_are_counted_by_their_route(api, token):
    for task in ("ab" * 32, "cd" * 32):
        api.get(f"/v1/tasks/{task}")
    _, found = scraped(api, token)
    route = ("method", "GET"), ("route", "/v1/tasks/{task}"), ("status", "404")
    assert found[("assay_request_seconds_count", *route)] == 2


def test_every_metric_is_what_the_table_says(api, token, record):
    api.get("/v1/tasks")
    families, _ = scraped(api, token)
    told = {entry.name.removesuffix("_total"): entry for entry in metrics.TOLD}
    series = {name: family for name, family in families.items() if not name.endswith("_created")}  # of the library
    assert series.keys() == told.keys()
    for name, family in series.items():
        assert (family.type, family.documentation) == (told[name].kind, told[name].text)


def test_the_readme_has_the_table():
    text = README.read_text()
    assert text[text.index("<!-- metrics -->") : text.index("<!-- end -->")].strip().endswith(metrics.table())


def test_a_service_without_its_queue_is_alive_and_not_ready(anonymous, door):
    door.queue = type(door.queue)("unix:///nowhere/valkey.sock")
    door.settings = replace(door.settings, redis="unix:///nowhere/valkey.sock")
    assert anonymous.get("/livez").json() == {"live": True}
    assert {"queue", "workers"} <= checks(anonymous).keys()
